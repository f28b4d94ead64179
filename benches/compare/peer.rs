//! cudarc, with event tracking and without. Tracking is its default.

use std::sync::Arc;

use cpu_gpu_buffer::sys;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, PinnedHostSlice};

use crate::lane::Lane;

pub struct Peer {
    tracked: Arc<CudaContext>,
    untracked: Arc<CudaContext>,
}

/// `CU_MEMHOSTALLOC_PORTABLE`. The flag is given alone, since write-combined memory is slow to
/// read.
const PORTABLE: u32 = 1;

impl Peer {
    /// Both contexts are the device's primary one, that of the runtime.
    pub fn new(ordinal: u32) -> Result<Peer, String> {
        // SAFETY: loading the driver's library again runs no code that was not run.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err("it needs a driver, and there is none".into());
        }
        let context = || CudaContext::new(ordinal as usize).map_err(|error| error.to_string());
        let peer = Peer { tracked: context()?, untracked: context()? };
        // SAFETY: each slice of this context is used on one stream alone.
        unsafe { peer.untracked.disable_event_tracking() };
        Ok(peer)
    }

    /// The card's name.
    pub fn gpu(&self) -> Option<String> {
        self.tracked.name().ok()
    }

    pub fn lane(&self, tracked: bool, bytes: usize) -> CudarcLane {
        let context = if tracked { &self.tracked } else { &self.untracked };
        let stream = context.new_stream().unwrap();
        // SAFETY: the memory is written before it is read.
        let device = unsafe { stream.alloc(bytes) }.unwrap();
        let mut host = self.pinned(bytes);
        host.as_mut_slice().unwrap().fill(0);
        stream.synchronize().unwrap();
        CudarcLane {
            name: if tracked { "cudarc" } else { "cudarc, untracked" },
            tracked,
            host,
            device,
            stream,
        }
    }

    /// Pinned memory of the kind that the other contenders have.
    pub fn pinned(&self, bytes: usize) -> PinnedHostSlice<u8> {
        // SAFETY: the kernel zeroes new pages, so all bytes are initialised.
        unsafe { self.tracked.alloc_pinned_with_flags(bytes, PORTABLE) }.unwrap()
    }

    /// Pinned memory as cudarc allocates it unless told otherwise: write-combined.
    pub fn pinned_as_usual(&self, bytes: usize) -> PinnedHostSlice<u8> {
        // SAFETY: as above.
        unsafe { self.tracked.alloc_pinned(bytes) }.unwrap()
    }
}

pub struct CudarcLane {
    name: &'static str,
    tracked: bool,
    host: PinnedHostSlice<u8>,
    device: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

impl CudarcLane {
    /// Waits for copies that cudarc does not track.
    fn wait(&self) {
        if !self.tracked {
            self.stream.synchronize().unwrap();
        }
    }
}

impl Lane for CudarcLane {
    fn name(&self) -> &'static str {
        self.name
    }

    fn upload(&mut self) {
        self.stream.memcpy_htod(&self.host, &mut self.device).unwrap();
    }

    fn download(&mut self) {
        self.stream.memcpy_dtoh(&self.device, &mut self.host).unwrap();
    }

    fn read(&mut self) -> &[u8] {
        self.wait();
        self.host.as_slice().unwrap()
    }

    fn write(&mut self) -> &mut [u8] {
        self.wait();
        self.host.as_mut_slice().unwrap()
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }

    fn enter(&mut self) {
        self.stream.context().bind_to_thread().unwrap();
    }
}
