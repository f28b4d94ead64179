//! Allocating and releasing zeroed pinned memory.
//!
//! A buffer of this crate also has a device side. It is therefore compared with `cudaHostAlloc` and
//! `cudaMalloc` together. The memory of the other libraries has no device side, and is not promised
//! to be zeroed.

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

use super::job::{Job, Lifecycle, compare_lifecycles, lifecycle};
use crate::figures::Run;
use crate::lane::OURS;
use crate::raw::{DeviceMemory, Pinned, Registered};
use crate::setup::Setup;

pub const RAW_BOTH: &str = "cudaHostAlloc + cudaMalloc";
const SIZES: [usize; 6] = [4 << 10, 64 << 10, 1 << 20, 64 << 20, 1 << 30, 4 << 30];
pub const ALONE: [&str; 2] = ["allocate", "release"];
const BESIDE: [&str; 2] = ["allocate, others live", "release, others live"];

pub fn plan(setup: &Setup) -> Vec<Job> {
    let job = |bytes, cases| -> Job { Box::new(move |setup, run| job(setup, run, bytes, cases)) };
    let small = move |bytes: &usize| *bytes <= 1 << 20;
    let beside = setup.sizes(&SIZES).filter(small).map(move |bytes| job(bytes, BESIDE));
    setup.sizes(&SIZES).map(move |bytes| job(bytes, ALONE)).chain(beside).collect()
}

fn lifecycles(setup: &Setup, bytes: usize) -> Vec<Lifecycle<'_>> {
    let buffer = move || CpuGpuBuffer::<u8>::new(bytes, setup.device).unwrap();
    let mut lifecycles = vec![lifecycle(OURS, buffer)];
    if setup.is_cuda() {
        lifecycles
            .push(lifecycle(RAW_BOTH, move || (Pinned::new(bytes), DeviceMemory::new(bytes))));
        lifecycles.push(lifecycle("cudaMalloc", move || DeviceMemory::new(bytes)));
        lifecycles.push(lifecycle("mmap + cudaHostRegister", move || Registered::new(bytes)));
    }
    if let Some(peer) = &setup.cudarc {
        lifecycles.push(lifecycle("cudarc alloc_pinned", move || peer.pinned_as_usual(bytes)));
    }
    lifecycles
}

fn job(setup: &Setup, run: &mut Run, bytes: usize, cases: [&str; 2]) {
    if let Err(why) = setup.room(bytes, bytes) {
        return run.leave_out(format!("pinned memory of {bytes} bytes: {why}"));
    }
    let _living = (cases == BESIDE).then(|| {
        let raw = setup.is_cuda().then(|| (Pinned::new(4096), DeviceMemory::new(4096)));
        (CpuGpuBuffer::<u8>::new(4096, setup.device).unwrap(), raw)
    });
    // A gigabyte takes long.
    let rounds = [(1 << 20, 100), (64 << 20, 20), (1 << 30, 5)];
    let rounds =
        rounds.into_iter().find(|(most, _)| bytes <= *most).map_or(2, |(_, rounds)| rounds);
    let rounds = if setup.short { 3 } else { rounds };
    compare_lifecycles(run, rounds, ("pinned", cases, bytes), &mut lifecycles(setup, bytes));
    verify(setup.device, bytes);
}

/// Checks that both sides of a new buffer are zeroes, also in reused memory.
fn verify(device: Device, bytes: usize) {
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(bytes, device).unwrap();
    let zeroes = |bytes: &[u8]| {
        let (front, words, end) = bytemuck::pod_align_to::<u8, u64>(bytes);
        front.iter().chain(end).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
    };
    assert!(zeroes(buffer.cpu().unwrap()), "the host side is not zeroed");
    buffer.cpu_mut().unwrap().fill(1);
    buffer.copy_to_cpu(.., &stream).unwrap();
    assert!(zeroes(buffer.cpu().unwrap()), "the device side is not zeroed");
}
