//! The simulation and the sanitizers catch a program that races.
//!
//! The program uses only the raw bindings and forgets to wait. It writes host memory whose upload
//! is queued, and reads host memory before its download has finished.

#![cfg(target_os = "linux")]

#[path = "common/runtime.rs"]
mod runtime;

use std::ffi::{CStr, c_void};

use cudart_sys as sys;
use runtime::{in_subprocess, is_subprocess, test_name};

const SUCCESS: sys::cudaError_t = sys::cudaError::cudaSuccess;
const UP: sys::cudaMemcpyKind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
const DOWN: sys::cudaMemcpyKind = sys::cudaMemcpyKind::cudaMemcpyDeviceToHost;
const BYTES: usize = 4096;
const ROUNDS: u8 = 100;

/// Pinned host memory, device memory of the same size, and a stream.
struct Racer {
    host: *mut u8,
    gpu: *mut u8,
    stream: sys::cudaStream_t,
}

impl Racer {
    fn new() -> Racer {
        let (mut host, mut gpu, mut stream) =
            (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a valid place.
        assert_eq!(unsafe { sys::cudaHostAlloc(&mut host, BYTES, 0) }, SUCCESS);
        // SAFETY: as above.
        assert_eq!(unsafe { sys::cudaMalloc(&mut gpu, BYTES) }, SUCCESS);
        // SAFETY: as above.
        assert_eq!(unsafe { sys::cudaStreamCreateWithFlags(&mut stream, 1) }, SUCCESS);
        Racer { host: host.cast(), gpu: gpu.cast(), stream }
    }

    fn write(&self, value: u8) {
        // SAFETY: as many bytes as were allocated. Of the race there is nothing to say; it is what this program
        // is for.
        unsafe { self.host.write_bytes(value, BYTES) };
    }

    /// Whether the host memory holds this value, and no other.
    fn reads(&self, value: u8) -> bool {
        // SAFETY: as above; volatile, so that it is looked at now.
        let seen = unsafe { self.host.cast::<[u8; BYTES]>().read_volatile() };
        seen == [value; BYTES]
    }

    fn copy(&self, kind: sys::cudaMemcpyKind) {
        let (to, from) = if kind == UP { (self.gpu, self.host) } else { (self.host, self.gpu) };
        // SAFETY: as many bytes on both sides.
        let status =
            unsafe { sys::cudaMemcpyAsync(to.cast(), from.cast(), BYTES, kind, self.stream) };
        assert_eq!(status, SUCCESS);
    }

    /// As [`copy`](Self::copy) up, by the kernel that moves several ranges: all but the first byte in one.
    fn gather(&self) {
        let function = gather();
        let (mut to, mut from) = (self.gpu, self.host);
        let mut pieces = [[0u64; 2]; 32];
        pieces[0] = [0, 1];
        pieces[1] = [1, BYTES as u64 - 1];
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut pieces).cast()];
        let launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel");
        let (launch, parameters) = (launch.unwrap(), parameters.as_mut_ptr());
        let none = std::ptr::null_mut();
        // SAFETY: the parameters are those of `cgb_gather_32`, as many bytes on both sides.
        let status =
            unsafe { launch(function, 1, 2, 1, 256, 1, 1, 0, self.stream, parameters, none) };
        assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    }

    fn wait(&self) {
        // SAFETY: the stream is live.
        assert_eq!(unsafe { sys::cudaStreamSynchronize(self.stream) }, SUCCESS);
    }

    /// Writes while the upload is queued; whether something else arrived than was there when it was sent.
    fn upload_arrives_wrong(&self, round: u8) -> bool {
        self.write(round);
        self.copy(UP);
        self.write(0xff);
        self.wait();
        self.copy(DOWN);
        self.wait();
        !self.reads(round)
    }

    /// The same with the kernel.
    fn gathered_upload_arrives_wrong(&self, round: u8) -> bool {
        self.write(round);
        self.gather();
        self.write(0xff);
        self.wait();
        self.copy(DOWN);
        self.wait();
        !self.reads(round)
    }

    /// Reads before the download has finished; whether it saw something else than was sent.
    fn download_is_read_wrong(&self, round: u8) -> bool {
        self.write(round);
        self.copy(UP);
        self.wait();
        self.write(0xff);
        self.copy(DOWN);
        let wrong = !self.reads(round);
        self.wait();
        // The bytes do come in the end.
        assert!(self.reads(round));
        wrong
    }
}

fn entry<F>(name: &CStr) -> F {
    let mut address = std::ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    // SAFETY: the places are valid.
    let status = unsafe {
        sys::cudaGetDriverEntryPointByVersion(name.as_ptr(), &mut address, 12000, 0, &mut found)
    };
    assert_eq!(status, SUCCESS);
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: the callers name the type that belongs to the name.
    unsafe { std::mem::transmute_copy(&address) }
}

/// The kernel, of the committed image.
fn gather() -> sys::CUfunction {
    let load: sys::PFN_cuModuleLoadData_v2000 = entry(c"cuModuleLoadData");
    let get: sys::PFN_cuModuleGetFunction_v2000 = entry(c"cuModuleGetFunction");
    let image = concat!(include_str!("../kernels/kernels.ptx"), "\0");
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: PTX that ends with a NUL.
    let status = unsafe { load.unwrap()(&mut module, image.as_ptr().cast()) };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    // SAFETY: the module was just loaded.
    let status = unsafe { get.unwrap()(&mut function, module, c"cgb_gather_32".as_ptr()) };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    function
}

#[test]
fn a_racy_program_gets_wrong_bytes_with_every_seed() {
    let test = test_name!();
    if !runtime::is_simulated() {
        return runtime::left_out(
            test,
            "elsewhere than on the simulated runtime a race may be won",
        );
    }
    if is_subprocess() {
        let racer = Racer::new();
        let count =
            |race: fn(&Racer, u8) -> bool| (0..ROUNDS).filter(|round| race(&racer, *round)).count();
        let (up, down) = (count(Racer::upload_arrives_wrong), count(Racer::download_is_read_wrong));
        let gathered = count(Racer::gathered_upload_arrives_wrong);
        println!(
            "wrong bytes in {up} uploads, {gathered} by a kernel and {down} downloads of {ROUNDS}"
        );
        return assert!(up > 0 && gathered > 0 && down > 0, "a race was won every time");
    }
    for seed in 1..=24 {
        let output = in_subprocess(test, &[("CUDART_SIM_SEED", &seed.to_string())]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "seed {seed}: {text}");
        println!("seed {seed}: {}", text.lines().find(|line| line.contains("wrong")).unwrap_or(""));
    }
}
