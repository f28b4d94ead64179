//! Whatever sequence of operations, on whatever streams and from several threads at once: each side holds what it
//! would hold had every operation been done when it was called.

mod common;

use std::mem;
use std::ops::Range;

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, Device, PoolOptions, Stream};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const STREAMS: usize = 3;
const MOST: usize = 3000;

#[derive(Clone, Debug)]
enum Operation {
    Write(Range<usize>, u32),
    Upload(Range<usize>, usize),
    Download(Range<usize>, usize),
    Fill(u32, usize),
    FillCpu(u32),
    FillGpu(u32, usize),
    Kernel(u32, usize),
    Resize(usize),
    Synchronize(usize),
    WaitForBuffer,
    Replace {
        forget: bool,
        words: usize,
    },
    /// From one of two pools, instead of the buffer.
    Acquire {
        zeroed: bool,
    },
    Swap,
    Look,
}

fn operation() -> impl Strategy<Value = Operation> {
    // Ranges are cut to the buffer's size when they are used.
    let range = || (0..MOST, 0..MOST).prop_map(|(a, b)| a.min(b)..a.max(b));
    let value = || prop_oneof![Just(0), Just(0x0707_0707), Just(0x0001_0001), any::<u32>()];
    prop_oneof![
        4 => (range(), value()).prop_map(|(range, value)| Operation::Write(range, value)),
        4 => (range(), 0..STREAMS).prop_map(|(range, on)| Operation::Upload(range, on)),
        4 => (range(), 0..STREAMS).prop_map(|(range, on)| Operation::Download(range, on)),
        1 => (value(), 0..STREAMS).prop_map(|(value, on)| Operation::Fill(value, on)),
        1 => value().prop_map(Operation::FillCpu),
        2 => (value(), 0..STREAMS).prop_map(|(value, on)| Operation::FillGpu(value, on)),
        2 => (value(), 0..STREAMS).prop_map(|(value, on)| Operation::Kernel(value, on)),
        1 => (0..MOST).prop_map(Operation::Resize),
        1 => (0..STREAMS).prop_map(Operation::Synchronize),
        1 => Just(Operation::WaitForBuffer),
        1 => (any::<bool>(), 0..MOST)
            .prop_map(|(forget, words)| Operation::Replace { forget, words }),
        3 => any::<bool>().prop_map(|zeroed| Operation::Acquire { zeroed }),
        1 => Just(Operation::Swap),
        2 => Just(Operation::Look),
    ]
}

/// A buffer, and what each of its sides must hold.
struct Modelled {
    buffer: CpuGpuBuffer<u32>,
    host: Vec<u32>,
    gpu: Vec<u32>,
}

impl Modelled {
    fn new(words: usize, device: Device) -> Modelled {
        let buffer = CpuGpuBuffer::new(words, device).unwrap();
        Modelled { buffer, host: vec![0; words], gpu: vec![0; words] }
    }

    fn look(&self) {
        assert!(self.buffer.cpu().unwrap() == self.host, "the host side is not what it must be");
    }

    fn run(
        &mut self,
        operation: &Operation,
        other: &mut Modelled,
        streams: &[Stream],
        pools: &[BufferPool<u32>; 2],
    ) {
        let words = self.host.len();
        let cut = |range: &Range<usize>| range.start.min(words)..range.end.min(words);
        let buffer = &mut self.buffer;
        match operation {
            Operation::Write(range, value) => {
                buffer.cpu_mut().unwrap()[cut(range)].fill(*value);
                self.host[cut(range)].fill(*value);
            }
            Operation::Upload(range, on) => {
                buffer.copy_to_gpu(cut(range), &streams[*on]).unwrap();
                self.gpu[cut(range)].copy_from_slice(&self.host[cut(range)]);
            }
            Operation::Download(range, on) => {
                buffer.copy_to_cpu(cut(range), &streams[*on]).unwrap();
                self.host[cut(range)].copy_from_slice(&self.gpu[cut(range)]);
            }
            Operation::Fill(value, on) => {
                buffer.fill(*value, &streams[*on]).unwrap();
                self.host.fill(*value);
                self.gpu.fill(*value);
            }
            Operation::FillCpu(value) => {
                buffer.fill_cpu(*value).unwrap();
                self.host.fill(*value);
            }
            Operation::FillGpu(value, on) => {
                buffer.fill_gpu(*value, &streams[*on]).unwrap();
                self.gpu.fill(*value);
            }
            Operation::Kernel(value, on) => {
                let stream = &streams[*on];
                let mut view = buffer.gpu_on(stream).unwrap();
                if let Some(words) = view.as_host_slice_mut() {
                    words.fill(*value);
                } else if !view.is_empty() {
                    common::store(view.as_mut_ptr(), view.len(), *value, stream);
                }
                self.gpu.fill(*value);
            }
            Operation::Resize(words) => {
                buffer.resize(*words).unwrap();
                self.host = vec![0; *words];
                self.gpu = vec![0; *words];
            }
            Operation::Synchronize(on) => streams[*on].synchronize().unwrap(),
            Operation::WaitForBuffer => {
                buffer.synchronize().unwrap();
                assert!(buffer.is_idle().unwrap());
            }
            Operation::Replace { forget, words } => {
                let next = Modelled::new(*words, buffer.device());
                let before = mem::replace(self, next);
                match forget {
                    true => common::forget(before),
                    false => drop(before),
                }
            }
            Operation::Acquire { zeroed } => {
                let mut buffer = pools[usize::from(*zeroed)].acquire().unwrap();
                let value = match zeroed {
                    true => 0,
                    // What the last holder left, which may have been another thread, is not written down.
                    false => {
                        buffer.fill(9, &streams[0]).unwrap();
                        9
                    }
                };
                let words = buffer.numel();
                *self = Modelled { buffer, host: vec![value; words], gpu: vec![value; words] };
            }
            Operation::Swap => mem::swap(self, other),
            Operation::Look => self.look(),
        }
    }

    /// Both sides.
    fn finish(mut self, stream: &Stream) {
        self.look();
        self.buffer.copy_to_cpu(.., stream).unwrap();
        self.host.clone_from(&self.gpu);
        self.look();
    }
}

/// One thread's sequence, on streams that it shares with the others.
fn run(operations: &[Operation], device: Device, streams: &[Stream], pools: &[BufferPool<u32>; 2]) {
    let mut modelled = Modelled::new(MOST / 2, device);
    let mut other = Modelled::new(7, device);
    for operation in operations {
        modelled.run(operation, &mut other, streams, pools);
    }
    modelled.finish(&streams[0]);
    other.finish(&streams[1]);
}

#[test]
fn any_sequence_of_operations_does_what_it_would_do_one_by_one() {
    let _turn = common::turn();
    // `PROPTEST_CASES` for a longer run; each case is a sequence for each of two threads.
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    for device in common::devices() {
        let config = Config {
            cases: cases.unwrap_or(1000),
            failure_persistence: None,
            max_shrink_iters: 2000,
            ..Config::default()
        };
        if device != Device::Cpu {
            // What the kernels need is loaded here, and not by two threads at once: ThreadSanitizer does not see
            // the one wait for the other.
            drop(common::Gate::close(&Stream::new(device).unwrap()));
        }
        let sequence = || prop::collection::vec(operation(), 1..40);
        let outcome = TestRunner::new(config).run(&(sequence(), sequence()), |(first, second)| {
            let streams: Vec<Stream> = (0..STREAMS).map(|_| Stream::new(device).unwrap()).collect();
            // Of so few buffers that they are used again.
            let pools = [false, true].map(|zeroed| {
                let options = PoolOptions { zeroed, ..Default::default() };
                BufferPool::with_options(MOST / 3, device, 2, options).unwrap()
            });
            std::thread::scope(|scope| {
                let beside = scope.spawn(|| run(&second, device, &streams, &pools));
                run(&first, device, &streams, &pools);
                beside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            });
            Ok(())
        });
        outcome.unwrap_or_else(|failure| panic!("on {device}: {failure}"));
    }
}
