//! Whatever call of the driver fails in the middle of whatever operation: a typed error, no panic, nothing
//! lost, and the same value usable again.
//!
//! For each operation, its calls are made to fail one after the other, until it runs without meeting the
//! fault: with each of several codes, once and for ever, without and with the call's effect (as an error of
//! earlier work lets it have).

#![cfg(target_os = "linux")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::sim;
use cpu_gpu_buffer::{
    BufferOptions, CpuGpuBuffer, Device, Error, Event, Pinning, Result, Stream, StreamOptions,
    WaitPolicy, is_pinned_memory_available,
};

const DEVICE: Device = Device::Cuda(0);
const WORDS: usize = 3000;

/// What an operation works on: a buffer with an upload on one stream and a device use on another.
struct Bench {
    stream: Stream,
    other: Stream,
    event: Event,
    buffer: CpuGpuBuffer<u32>,
    foreign: CpuGpuBuffer<u32>,
}

impl Bench {
    fn new(state: State, wait: WaitPolicy) -> Bench {
        let options = StreamOptions { wait, ..Default::default() };
        let stream = Stream::with_options(DEVICE, options).unwrap();
        let other = Stream::with_options(DEVICE, options).unwrap();
        let mut buffer = CpuGpuBuffer::new(WORDS, DEVICE).unwrap();
        let mut foreign = CpuGpuBuffer::new(WORDS, DEVICE).unwrap();
        foreign.gpu_on(&stream).unwrap();
        foreign.synchronize().unwrap();
        if let State::Busy = state {
            buffer.copy_to_gpu(.., &other).unwrap();
            buffer.copy_to_cpu(..5, &stream).unwrap();
            buffer.gpu_on(&other).unwrap();
        }
        let event = stream.record().unwrap();
        Bench { stream, other, event, buffer, foreign }
    }

    /// Everything still works, once calls succeed again.
    fn verify(&mut self) {
        let buffer = &mut self.buffer;
        for (value, stream) in [(7, &self.stream), (8, &self.other)] {
            buffer.fill(value, stream).unwrap();
            buffer.fill_cpu(0).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            common::all(buffer.cpu().unwrap(), value);
            buffer.fill_cpu(value + 2).unwrap();
            buffer.copy_to_gpu(.., stream).unwrap();
            buffer.fill_cpu(0).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            common::all(buffer.cpu().unwrap(), value + 2);
        }
        buffer.synchronize().unwrap();
        assert!(buffer.is_idle().unwrap());
        self.event.synchronize().unwrap();
    }
}

#[derive(Clone, Copy, Debug)]
enum State {
    Fresh,
    Busy,
}

type Operation = fn(&mut Bench) -> Result<()>;

/// Every public operation that may reach CUDA, by the name of its function; `name/kind` for several kinds.
const OPERATIONS: &[(&str, Operation)] = &[
    ("CpuGpuBuffer::new", |_| CpuGpuBuffer::<u8>::new(100, DEVICE).map(drop)),
    ("CpuGpuBuffer::new/aligned", |_| CpuGpuBuffer::<u64>::new([3 << 20], DEVICE).map(drop)),
    ("CpuGpuBuffer::with_options", |_| {
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        CpuGpuBuffer::<u8>::with_options(100, DEVICE, options).map(drop)
    }),
    ("CpuGpuBuffer::cpu", |bench| bench.buffer.cpu().map(drop)),
    ("CpuGpuBuffer::cpu_mut", |bench| bench.buffer.cpu_mut().map(drop)),
    ("CpuGpuBuffer::try_cpu", |bench| bench.buffer.try_cpu().map(drop)),
    ("CpuGpuBuffer::try_cpu_mut", |bench| bench.buffer.try_cpu_mut().map(drop)),
    ("CpuGpuBuffer::copy_to_gpu", |bench| bench.buffer.copy_to_gpu(.., &bench.stream)),
    ("CpuGpuBuffer::copy_to_gpu/rows", |bench| bench.buffer.copy_to_gpu(1..3, &bench.stream)),
    ("CpuGpuBuffer::copy_to_cpu", |bench| bench.buffer.copy_to_cpu(.., &bench.stream)),
    ("CpuGpuBuffer::copy_to_device_ptr", |bench| {
        let to = bench.foreign.device_ptr();
        // SAFETY: memory of the same shape, which nothing else uses.
        unsafe { bench.buffer.copy_to_device_ptr(.., to, &bench.stream) }
    }),
    ("CpuGpuBuffer::copy_from_device_ptr", |bench| {
        let from = bench.foreign.device_ptr();
        // SAFETY: as above.
        unsafe { bench.buffer.copy_from_device_ptr(.., from, &bench.stream) }
    }),
    ("CpuGpuBuffer::is_idle", |bench| bench.buffer.is_idle().map(drop)),
    ("CpuGpuBuffer::synchronize", |bench| bench.buffer.synchronize()),
    ("CpuGpuBuffer::fill", |bench| bench.buffer.fill(3, &bench.stream)),
    ("CpuGpuBuffer::fill_cpu", |bench| bench.buffer.fill_cpu(3)),
    ("CpuGpuBuffer::fill_gpu", |bench| bench.buffer.fill_gpu(0x01020304, &bench.stream)),
    ("CpuGpuBuffer::fill_gpu/kernel", |bench| {
        let mut buffer = CpuGpuBuffer::<[u8; 5]>::new(9, DEVICE)?;
        buffer.fill_gpu([1, 2, 3, 4, 5], &bench.stream)
    }),
    ("CpuGpuBuffer::fill_gpu/long", |bench| {
        let mut buffer = CpuGpuBuffer::<[u16; 4000]>::new(2, DEVICE)?;
        buffer.fill_gpu(std::array::from_fn(|at| at as u16), &bench.stream)
    }),
    ("CpuGpuBuffer::zero", |bench| bench.buffer.zero(&bench.stream)),
    ("CpuGpuBuffer::resize/in place", |bench| bench.buffer.resize([30, 2])),
    ("CpuGpuBuffer::resize", |bench| bench.buffer.resize(5 * WORDS)),
    ("CpuGpuBuffer::gpu_on", |bench| bench.buffer.gpu_on(&bench.stream).map(drop)),
    ("CpuGpuBuffer::drop", |bench| {
        let mut foreign = std::mem::replace(&mut bench.foreign, CpuGpuBuffer::new(0, DEVICE)?);
        foreign.copy_to_gpu(.., &bench.other)?;
        foreign.copy_to_cpu(.., &bench.stream)?;
        foreign.gpu_on(&bench.other)?;
        Ok(())
    }),
    ("Stream::new", |_| Stream::new(DEVICE).map(drop)),
    ("Stream::with_options", |_| Stream::with_options(DEVICE, Default::default()).map(drop)),
    ("Stream::from_raw", |_| {
        // SAFETY: the legacy stream lives as long as its context.
        let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), DEVICE, None) }?;
        let mut buffer = CpuGpuBuffer::<u8>::new(9, DEVICE)?;
        buffer.fill(1, &legacy)?;
        legacy.synchronize()
    }),
    ("Stream::synchronize", |bench| bench.stream.synchronize()),
    ("Stream::is_idle", |bench| bench.stream.is_idle().map(drop)),
    ("Stream::record", |bench| bench.stream.record().map(drop)),
    ("Stream::wait", |bench| bench.other.wait(&bench.event)),
    ("Event::is_complete", |bench| bench.event.is_complete().map(drop)),
    ("Event::synchronize", |bench| bench.event.synchronize()),
    ("Event::elapsed_since", |bench| bench.event.elapsed_since(&bench.event).map(drop)),
    ("Device::cuda", |_| Device::cuda(0).map(drop)),
    ("Device::memory", |_| DEVICE.memory().map(drop)),
    ("Device::auto", |_| {
        Device::auto();
        Ok(())
    }),
    ("Device::cuda_count", |_| {
        Device::cuda_count();
        Ok(())
    }),
    ("is_pinned_memory_available", |_| {
        is_pinned_memory_available();
        Ok(())
    }),
];

/// Public functions that read what is known and never reach CUDA.
const SILENT: &[&str] = &[
    "CpuGpuBuffer::device_ptr",
    "CpuGpuBuffer::shape",
    "CpuGpuBuffer::numel",
    "CpuGpuBuffer::nbytes",
    "CpuGpuBuffer::device",
    "CpuGpuBuffer::is_pinned",
    "CpuGpuBuffer::dtype",
    "Stream::as_raw",
    "Stream::device",
    "Event::device",
];

#[test]
fn every_public_function_is_an_operation_here_or_known_to_be_silent() {
    let sources = [
        (include_str!("../src/buffer.rs"), "CpuGpuBuffer::"),
        (include_str!("../src/stream.rs"), "Stream::"),
        (include_str!("../src/event.rs"), "Event::"),
        (include_str!("../src/device.rs"), "Device::"),
        (include_str!("../src/host.rs"), ""),
    ];
    for (source, owner) in sources {
        for line in source.lines() {
            let line = line.trim_start();
            let Some(rest) =
                line.strip_prefix("pub fn ").or_else(|| line.strip_prefix("pub unsafe fn "))
            else {
                continue;
            };
            let name = rest.split(['(', '<']).next().unwrap();
            let name = format!("{owner}{name}");
            let covered =
                OPERATIONS.iter().any(|(known, _)| known.split('/').next() == Some(&name));
            assert!(covered || SILENT.contains(&name.as_str()), "{name} is in neither list");
        }
    }
}

/// cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorIllegalAddress.
const CODES: [u32; 3] = [1, 2, 700];

#[test]
fn any_call_may_fail_in_any_operation() {
    let test = "any_call_may_fail_in_any_operation";
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    assert_eq!(Device::auto(), DEVICE);
    let mut faults = 0;
    for (name, operation) in OPERATIONS {
        for state in [State::Fresh, State::Busy] {
            for wait in [WaitPolicy::Spin, WaitPolicy::Block] {
                for code in CODES {
                    for (once, effect) in [(true, false), (false, false), (true, true)] {
                        let what =
                            format!("{name}, {state:?}, {code}, once {once}, effect {effect}");
                        faults += sweep(&what, *operation, (state, wait), (code, once, effect));
                    }
                }
            }
        }
    }
    println!("{faults} faults");
}

/// Makes the operation's calls fail, one after the other; the answer is how many there were.
fn sweep(
    what: &str,
    operation: Operation,
    (state, wait): (State, WaitPolicy),
    (code, once, effect): (u32, bool, bool),
) -> u64 {
    for number in 1.. {
        let before = sim::live();
        let mut bench = Bench::new(state, wait);
        sim::reset();
        sim::fail(number, code, once, effect);
        let result = catch_unwind(AssertUnwindSafe(|| operation(&mut bench)));
        sim::heal();
        let (injected, released) = (sim::injected(), sim::injected_releases());
        let what = format!("{what}, call {number}");
        let result = result.unwrap_or_else(|_| panic!("{what}: panicked"));
        match &result {
            Ok(()) => {}
            Err(Error::Cuda { code: seen, call }) => {
                assert!(seen.0 == code && !call.is_empty(), "{what}: {result:?}");
            }
            Err(
                Error::OutOfMemory { .. }
                | Error::PinningUnavailable { .. }
                | Error::Unavailable { .. },
            ) => {}
            Err(error) => panic!("{what}: {error}"),
        }
        if injected == 0 {
            assert!(result.is_ok(), "{what}: {result:?}");
            return number - 1;
        }
        bench.verify();
        drop(bench);
        let left: i64 = sim::live().iter().zip(before).map(|(now, before)| now - before).sum();
        // What a failing call was to give back stays behind, and what one made that then said it had not.
        let excused = released as i64 + i64::from(effect);
        // These drop a buffer that is in flight. Where the wait fails, nobody knows whether it still is, and
        // both halves are leaked.
        let drops =
            ["/kernel", "/long", "from_raw", "::drop"].iter().any(|kind| what.contains(kind));
        let unknown = if drops && injected > released { 2 } else { 0 };
        assert!((0..=excused + unknown).contains(&left), "{what}: {left} things are left behind");
    }
    unreachable!()
}
