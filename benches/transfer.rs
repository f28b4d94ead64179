//! What a transfer costs the caller beside the raw calls, and what looking at the host half costs when
//! the stream is known to be done. Both are taken in one program, batch by batch in turn, so that
//! whatever slows the machine slows both.

use std::hint::black_box;
use std::ptr;
use std::time::Instant;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, sys};

const BYTES: usize = 4096;
const BATCH: usize = 64;
const ROUNDS: usize = 400;

/// The median and the 10th and 90th percentile, in nanoseconds.
fn spread(mut samples: Vec<f64>) -> [f64; 3] {
    samples.sort_by(f64::total_cmp);
    [50, 10, 90].map(|percent| samples[samples.len() * percent / 100])
}

/// Nanoseconds of each of a batch of calls.
fn batch(samples: &mut Vec<f64>, mut call: impl FnMut()) {
    for _ in 0..BATCH {
        let start = Instant::now();
        call();
        samples.push(start.elapsed().as_secs_f64() * 1e9);
    }
}

/// Nanoseconds of one call, of many that are too short to be timed singly.
fn short(mut call: impl FnMut()) -> [f64; 3] {
    const CALLS: usize = 10_000;
    let samples = (0..200).map(|_| {
        let start = Instant::now();
        (0..CALLS).for_each(|_| call());
        start.elapsed().as_secs_f64() * 1e9 / CALLS as f64
    });
    spread(samples.collect())
}

fn line(what: &str, [median, low, high]: [f64; 3]) {
    println!("{what:<52} {median:>8.1} ns  ({low:.1} to {high:.1})");
}

/// The raw halves and the event of a program without this crate.
struct Raw {
    host: *mut std::ffi::c_void,
    device: *mut std::ffi::c_void,
    stream: sys::cudaStream_t,
    event: sys::cudaEvent_t,
}

impl Raw {
    fn new() -> Raw {
        let mut raw = Raw {
            host: ptr::null_mut(),
            device: ptr::null_mut(),
            stream: ptr::null_mut(),
            event: ptr::null_mut(),
        };
        // SAFETY: valid places.
        checked(unsafe { sys::cudaHostAlloc(&mut raw.host, BYTES, sys::cudaHostAllocPortable) });
        // SAFETY: as above.
        checked(unsafe { sys::cudaMalloc(&mut raw.device, BYTES) });
        // SAFETY: as above.
        checked(unsafe {
            sys::cudaStreamCreateWithFlags(&mut raw.stream, sys::cudaStreamNonBlocking)
        });
        // SAFETY: as above.
        checked(unsafe {
            sys::cudaEventCreateWithFlags(&mut raw.event, sys::cudaEventDisableTiming)
        });
        raw
    }

    fn upload(&self) {
        let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
        // SAFETY: both have as many bytes, and live as long as the program.
        checked(unsafe { sys::cudaMemcpyAsync(self.device, self.host, BYTES, kind, self.stream) });
        // SAFETY: both live as long as the program.
        checked(unsafe { sys::cudaEventRecord(self.event, self.stream) });
    }

    fn synchronize(&self) {
        // SAFETY: as above.
        checked(unsafe { sys::cudaStreamSynchronize(self.stream) });
    }
}

fn checked(status: sys::cudaError_t) {
    assert_eq!(status, sys::cudaError::cudaSuccess, "{status}");
}

fn main() {
    let device = Device::auto();
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(BYTES, device).unwrap();
    println!("device {device}, {BYTES} bytes, pinned: {}", buffer.is_pinned());

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let raw = (device != Device::Cpu).then(Raw::new);
    for round in 0..ROUNDS {
        if round == ROUNDS / 10 {
            // What came before was the warm-up.
            ours.clear();
            theirs.clear();
        }
        if let Some(raw) = &raw {
            batch(&mut theirs, || raw.upload());
            raw.synchronize();
        }
        batch(&mut ours, || buffer.copy_to_gpu(.., &stream).unwrap());
        stream.synchronize().unwrap();
    }
    let ours = spread(ours);
    line("copy_to_gpu, enqueue", ours);
    if raw.is_some() {
        let theirs = spread(theirs);
        line("cudaMemcpyAsync + cudaEventRecord, enqueue", theirs);
        println!("{:<52} {:>8.3}   (goal: at most 1.25)", "ratio", ours[0] / theirs[0]);
    }

    buffer.copy_to_gpu(.., &stream).unwrap();
    stream.synchronize().unwrap();
    line(
        "cpu_mut, stream synchronized since (goal: under 20)",
        short(|| {
            black_box(black_box(&mut buffer).cpu_mut().unwrap());
        }),
    );
    if let Some(raw) = &raw {
        raw.upload();
        raw.synchronize();
        line(
            "cudaEventQuery of a finished event",
            // SAFETY: the event lives as long as the program.
            short(|| checked(unsafe { sys::cudaEventQuery(black_box(raw.event)) })),
        );
    }
}
