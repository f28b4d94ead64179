//! The cost of acquiring and releasing, for each thread.
//!
//! The contenders are crossbeam's queues, a stack with a lock and a bitmap of one word. A second
//! case makes a pool, and the same number of single buffers.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, PoolOptions};
use crossbeam_queue::{ArrayQueue, SegQueue};

use super::job::{Job, compare, compare_lifecycles, lifecycle};
use crate::figures::Run;
use crate::measure::Named;
use crate::setup::Setup;

pub const ACQUIRE: &str = "BufferPool::acquire";
/// The number of things that a thread holds at a time.
pub const HELD: [(&str, usize); 2] = [("1 held at a time", 1), ("4 held at a time", 4)];

const SLOTS: usize = 64;
const BUFFERS: usize = 4096;

pub fn plan(_setup: &Setup) -> Vec<Job> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = super::threads::THREADS.into_iter().filter(move |threads| *threads <= cores);
    let contention = HELD.into_iter().flat_map(|(case, hold)| {
        threads.clone().map(move |threads| -> Job {
            Box::new(move |setup, run| contention(setup, run, case, hold, threads))
        })
    });
    contention.chain([Box::new(creation) as Job]).collect()
}

/// Nanoseconds for one acquire and release, in one of several threads.
///
/// A thread holds `hold` things at a time. A round takes about `time`.
fn cost<T>(
    threads: usize,
    hold: usize,
    time: Duration,
    take: &(impl Fn() -> Option<T> + Sync),
    give: &(impl Fn(T) + Sync),
) -> f64 {
    let start = Barrier::new(threads);
    let one = || {
        let mut held = Vec::with_capacity(hold);
        let mut pairs = 0u64;
        start.wait();
        let begin = Instant::now();
        while begin.elapsed() < time {
            // Many iterations between two looks at the clock.
            for _ in 0..64 {
                while held.len() < hold {
                    match take() {
                        Some(thing) => held.push(thing),
                        // A contender may be empty for a moment.
                        None => std::hint::spin_loop(),
                    }
                }
                held.drain(..).for_each(|thing| give(black_box(thing)));
                pairs += hold as u64;
            }
        }
        begin.elapsed().as_secs_f64() * 1e9 / pairs as f64
    };
    let costs: f64 = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    costs / threads as f64
}

/// A bitmap, and the first bit to try.
struct Bitmap {
    bits: AtomicU64,
    hint: AtomicU64,
}

impl Bitmap {
    fn take(&self) -> Option<u32> {
        let mut seen = self.bits.load(Ordering::Relaxed);
        while seen != 0 {
            let hint = self.hint.load(Ordering::Relaxed) as u32;
            let bit = (seen.rotate_right(hint).trailing_zeros() + hint) % 64;
            let next = seen & !(1 << bit);
            match self.bits.compare_exchange_weak(seen, next, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => {
                    self.hint.store(u64::from(bit + 1) % 64, Ordering::Relaxed);
                    return Some(bit);
                }
                Err(now) => seen = now,
            }
        }
        None
    }

    fn give(&self, bit: u32) {
        self.bits.fetch_or(1 << bit, Ordering::Release);
    }
}

fn contention(setup: &Setup, run: &mut Run, case: &str, hold: usize, threads: usize) {
    let options = PoolOptions { max_buffers: Some(SLOTS), ..Default::default() };
    let pool = BufferPool::<u8>::with_options(4096, setup.device, SLOTS, options).unwrap();
    let array = ArrayQueue::new(SLOTS);
    let segments = SegQueue::new();
    for slot in 0..SLOTS as u32 {
        array.push(slot).unwrap();
        segments.push(slot);
    }
    let stack = Mutex::new((0..SLOTS as u32).collect::<Vec<u32>>());
    let bitmap = Bitmap { bits: AtomicU64::new(u64::MAX), hint: AtomicU64::new(0) };

    let time = Duration::from_millis(if setup.short { 1 } else { 20 });
    let contenders = vec![
        // Running out of buffers would be an error. The pool has enough for all threads.
        Named::new(ACQUIRE, || cost(threads, hold, time, &|| Some(pool.acquire().unwrap()), &drop)),
        Named::new("BufferPool::try_acquire", || {
            cost(threads, hold, time, &|| pool.try_acquire(), &drop)
        }),
        Named::new("crossbeam ArrayQueue", || {
            cost(threads, hold, time, &|| array.pop(), &|slot| array.push(slot).unwrap())
        }),
        Named::new("crossbeam SegQueue", || {
            cost(threads, hold, time, &|| segments.pop(), &|slot| segments.push(slot))
        }),
        Named::new("`Mutex<Vec>`", || {
            cost(threads, hold, time, &|| stack.lock().unwrap().pop(), &|slot| {
                stack.lock().unwrap().push(slot);
            })
        }),
        Named::new("bitmap, one word", || {
            cost(threads, hold, time, &|| bitmap.take(), &|slot| bitmap.give(slot))
        }),
    ];
    compare(run, setup.rounds(7), ("pool", case, threads), "ns", contenders);
    assert_eq!(pool.available(), SLOTS, "slots are lost");
}

/// Makes and drops many buffers, in one pool and one by one.
fn creation(setup: &Setup, run: &mut Run) {
    let device = setup.device;
    let buffers = if setup.short { 64 } else { BUFFERS };
    let pool =
        lifecycle("one BufferPool", move || BufferPool::<u8>::new(4096, device, buffers).unwrap());
    let single = lifecycle("single buffers", move || {
        let one = |_| CpuGpuBuffer::<u8>::new(4096, device).unwrap();
        (0..buffers).map(one).collect::<Vec<_>>()
    });
    let cases = ["making buffers of 4 KB", "dropping buffers of 4 KB"];
    compare_lifecycles(run, setup.rounds(3), ("pool", cases, buffers), &mut [pool, single]);
}
