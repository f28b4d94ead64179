//! The control of all the others: a program that does race, over the raw bindings, is caught. It writes host
//! memory whose upload is queued, as programs do that forget to wait, and looks at what arrived.

#![cfg(target_os = "linux")]

mod common;

use common::{in_own_process, is_own_process};
use cpu_gpu_buffer::{Device, sys};

const SUCCESS: sys::cudaError_t = sys::cudaError::cudaSuccess;
const BYTES: usize = 4096;

/// How many of 200 racy uploads delivered something else than was there when they were sent.
fn wrong_bytes() -> usize {
    let (mut host, mut gpu, mut stream) =
        (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: valid places.
    assert_eq!(unsafe { sys::cudaHostAlloc(&mut host, BYTES, 0) }, SUCCESS);
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cudaMalloc(&mut gpu, BYTES) }, SUCCESS);
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cudaStreamCreateWithFlags(&mut stream, 1) }, SUCCESS);
    let mut wrong = 0;
    for round in 0..200 {
        // SAFETY: as many bytes as were allocated.
        unsafe { host.cast::<u8>().write_bytes(round as u8, BYTES) };
        let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
        // SAFETY: as many bytes on both sides.
        assert_eq!(unsafe { sys::cudaMemcpyAsync(gpu, host, BYTES, kind, stream) }, SUCCESS);
        // The race.
        // SAFETY: of the write there is nothing to say; it is what this program is for.
        unsafe { host.cast::<u8>().write_bytes(0xff, BYTES) };
        // SAFETY: the stream is live.
        assert_eq!(unsafe { sys::cudaStreamSynchronize(stream) }, SUCCESS);
        let seen = common::device_bytes(Device::Cuda(0), gpu.cast(), BYTES);
        wrong += usize::from(seen.iter().any(|byte| *byte != round as u8));
    }
    wrong
}

#[test]
fn a_racy_program_gets_wrong_bytes_with_every_seed() {
    let test = "a_racy_program_gets_wrong_bytes_with_every_seed";
    if !common::is_simulated() {
        return common::left_out(test, "a race on hardware may be won");
    }
    if is_own_process() {
        return assert!(wrong_bytes() > 0, "the race was won 200 times");
    }
    for seed in 1..=8 {
        let output = in_own_process(test, &[("CUDART_SIM_SEED", &seed.to_string())]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "seed {seed}: {text}");
    }
}
