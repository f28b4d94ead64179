//! Fills of device memory with elements of several sizes.
//!
//! The subject measures the bandwidth on the device and the cost of enqueueing. All contenders fill
//! the same memory on the same stream.

use std::ffi::c_void;
use std::mem;

use bytemuck::Pod;
use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Pinning, Stream, sys};

use super::job::{BATCH, Job, compare};
use crate::figures::Run;
use crate::lane::OURS;
use crate::measure::{Named, each, seconds};
use crate::raw::{self, Timer};
use crate::setup::Setup;

pub const MEMSET: &str = "cudaMemsetAsync";
const MEMSET32: &str = "cuMemsetD32Async";
const SIZES: [usize; 7] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30, 8 << 30];
/// The largest size whose enqueueing is timed. A batch of larger fills keeps the device busy too
/// long.
const ENQUEUED: usize = 1 << 20;

pub fn plan(setup: &Setup) -> Vec<Job> {
    let jobs = |bytes| {
        [
            of("1 byte", [0xa1_u8], bytes),
            of("2 bytes", [0xa1a2_u16], bytes),
            of("4 bytes", [1.1_f32], bytes),
            of("4 bytes, all alike", [0xa1a1_a1a1_u32], bytes),
            of("8 bytes", [1.1_f64], bytes),
            of("12 bytes", [1.1_f32, 2.2, 3.3], bytes),
            of("16 bytes", [1.1_f32, 2.2, 3.3, 4.4], bytes),
            of("zero", [0.0_f32], bytes),
        ]
    };
    setup.sizes(&SIZES).flat_map(jobs).collect()
}

fn of<E: Pod>(element: &'static str, value: E, bytes: usize) -> Job {
    Box::new(move |setup, run| job(setup, run, element, value, bytes))
}

fn job<E: Pod>(setup: &Setup, run: &mut Run, element: &str, value: E, bytes: usize) {
    if let Err(why) = setup.room(bytes, 0) {
        return run.leave_out(format!("fill of {bytes} bytes, {element}: {why}"));
    }
    let stream = Stream::new(setup.device).unwrap();
    // Nothing touches the host side, and untouched pages cost nothing.
    let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
    let count = bytes / size_of::<E>();
    let mut buffer = CpuGpuBuffer::<E>::with_options(count, setup.device, options).unwrap();
    let filled = buffer.nbytes();
    let raw = Raw { to: buffer.device_ptr().cast(), bytes: filled, stream: stream.as_raw() };
    stream.synchronize().unwrap();

    if bytes <= ENQUEUED {
        let timed = |fill: &mut dyn FnMut()| {
            let cost = each(BATCH, fill);
            stream.synchronize().unwrap();
            cost
        };
        let case = format!("enqueue, {element}");
        let contenders = contenders(setup, &mut buffer, value, &stream, raw, timed);
        compare(run, setup.rounds(200), ("fill", &case, bytes), "ns", contenders);
    }

    let fills = (256_usize << 20).div_ceil(bytes).min(BATCH);
    let timer = setup.is_cuda().then(Timer::new);
    let timed = |fill: &mut dyn FnMut()| {
        let send = || (0..fills).for_each(|_| fill());
        let time = match &timer {
            Some(timer) => timer.seconds(stream.as_raw(), send),
            None => seconds(send),
        };
        (filled * fills) as f64 / time * 1e-9
    };
    let case = format!("device, {element}");
    let contenders = contenders(setup, &mut buffer, value, &stream, raw, timed);
    compare(run, setup.rounds(30), ("fill", &case, bytes), "GB/s", contenders);

    verify(&mut buffer, value, &stream, setup.is_cuda().then_some(raw));
}

/// Those who fill, each timed by `timed`.
fn contenders<'a, E: Pod>(
    setup: &Setup,
    buffer: &'a mut CpuGpuBuffer<E>,
    value: E,
    stream: &'a Stream,
    raw: Raw,
    timed: impl Fn(&mut dyn FnMut()) -> f64 + Copy + 'a,
) -> Vec<Named<'a>> {
    let mut ours = move || buffer.fill_gpu(value, stream).unwrap();
    let mut contenders = vec![Named::new(OURS, move || timed(&mut ours))];
    if !setup.is_cuda() {
        return contenders;
    }
    contenders.push(Named::new(MEMSET, move || timed(&mut || raw.memset(0xa1))));
    if let Ok(word) = bytemuck::try_cast::<E, u32>(value)
        && let Some(memset) = memset32()
    {
        contenders.push(Named::new(MEMSET32, move || timed(&mut || raw.memset32(memset, word))));
    }
    contenders
}

/// The memory that all of them fill.
#[derive(Clone, Copy)]
struct Raw {
    to: *mut c_void,
    bytes: usize,
    stream: sys::cudaStream_t,
}

type Memset32 = unsafe extern "C" fn(u64, u32, usize, sys::CUstream) -> sys::CUresult;

fn memset32() -> Option<Memset32> {
    const _: fn(Memset32) -> sys::PFN_cuMemsetD32Async_v3020 = Some;
    let address = raw::driver_function(c"cuMemsetD32Async")?;
    // SAFETY: the driver returned the address for this name, which its headers declare with this
    // type.
    Some(unsafe { mem::transmute::<*mut c_void, Memset32>(address) })
}

impl Raw {
    fn memset(self, byte: u8) {
        // SAFETY: the device side outlives the fill. All its work is on this stream.
        unsafe { raw::memset(self.to, byte, self.bytes, self.stream) };
    }

    fn memset32(self, memset: Memset32, word: u32) {
        // SAFETY: as above. The length is a multiple of 4, since the element is a word.
        let status = unsafe { memset(self.to.addr() as u64, word, self.bytes / 4, self.stream) };
        assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    }
}

/// Fills over other contents, and checks both ends and random ranges in between.
fn verify<E: Pod>(buffer: &mut CpuGpuBuffer<E>, value: E, stream: &Stream, raw: Option<Raw>) {
    if let Some(raw) = raw {
        raw.memset(0x5e);
    }
    buffer.fill_gpu(value, stream).unwrap();
    let count = buffer.numel();
    let length = count.min(1000);
    let starts =
        [0, count - length].into_iter().chain((0..6).map(|_| fastrand::usize(..=count - length)));
    for start in starts {
        buffer.copy_to_cpu(start..start + length, stream).unwrap();
        let seen = &buffer.cpu().unwrap()[start..start + length];
        let expected = bytemuck::bytes_of(&value);
        let mut seen = bytemuck::cast_slice::<E, u8>(seen).chunks_exact(size_of::<E>());
        assert!(seen.all(|element| element == expected), "not filled, of {count} from {start}");
    }
}
