//! Programs for `.ci/sanitizers control`, whose results are right with the planted faults, too: only a sanitizer
//! sees that something is wrong.

mod common;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

/// A race in which nothing changes: what is written while the upload is queued is what was there. No gate holds it
/// open, since that would order the two; one of many uploads is late enough.
#[test]
fn host_sides_are_written_again_after_their_uploads() {
    let test = "host_sides_are_written_again_after_their_uploads";
    let (device, _turn) = common::cuda(test).unwrap();
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u32>::new(1000, device).unwrap();
    buffer.fill_cpu(7).unwrap();
    for _ in 0..3000 {
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.fill_cpu(7).unwrap();
    }
    buffer.copy_to_cpu(.., &stream).unwrap();
    common::all(buffer.cpu().unwrap(), 7);
}

#[test]
fn a_buffer_is_made_and_dropped() {
    let buffer = CpuGpuBuffer::<u32>::new(1000, Device::Cpu).unwrap();
    assert_eq!(buffer.numel(), 1000);
}

#[test]
fn a_buffer_is_written() {
    let mut buffer = CpuGpuBuffer::<u32>::new(1000, Device::Cpu).unwrap();
    buffer.fill_cpu(7).unwrap();
}
