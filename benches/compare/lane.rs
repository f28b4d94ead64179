//! The interface of all lanes, and their names.

use cpu_gpu_buffer::sys;

pub trait Lane: Send {
    fn name(&self) -> &'static str;

    /// Enqueues a copy of all bytes to the device side.
    fn upload(&mut self);

    /// Enqueues a copy of all bytes to the host side.
    fn download(&mut self);

    /// The host side, as soon as the library allows to read it.
    fn read(&mut self) -> &[u8];

    /// The host side, as soon as the library allows to write it.
    fn write(&mut self) -> &mut [u8];

    /// Waits for the stream.
    fn finish(&mut self);

    fn stream(&self) -> sys::cudaStream_t;

    /// Prepares the calling thread for its first call, if the library requires that.
    fn enter(&mut self) {}
}

pub const OURS: &str = "cpu-gpu-buffer";
pub const OURS_PREFIX: &str = "cpu-gpu-buffer `..n`";
pub const OURS_BETWEEN: &str = "cpu-gpu-buffer, two buffers";
pub const OURS_IN_CONTEXT: &str = "cpu-gpu-buffer, device chosen";
pub const RAW: &str = "cudaMemcpyAsync";
pub const RAW_EVENT: &str = "cudaMemcpyAsync + cudaEventRecord";

/// Sends random bytes there and back, and compares.
pub fn verify(lane: &mut dyn Lane) {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    random.fill(lane.write());
    lane.upload();
    lane.write().fill(0);
    lane.download();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut expected = vec![0; lane.read().len()];
    random.fill(&mut expected);
    assert!(lane.read() == expected, "{}: bytes were lost", lane.name());
}
