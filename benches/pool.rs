//! What acquiring and giving back costs each thread, beside what else holds free things: crossbeam's queues, a
//! locked stack, and a plain bitmap of one word. All in one program, round by round in turn, so that whatever
//! slows the machine slows all. And what it costs to make a pool, beside as many single buffers.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, Device, PoolOptions};
use crossbeam_queue::{ArrayQueue, SegQueue};

const SLOTS: usize = 64;
const THREADS: [usize; 5] = [1, 2, 4, 8, 16];
const ROUNDS: usize = 7;
/// What one thread does in a round takes about this long.
const ROUND: Duration = Duration::from_millis(20);

/// Nanoseconds that one thread of several spends on taking and giving back one thing, `hold` at a time.
fn cost<T>(
    threads: usize,
    hold: usize,
    take: &(impl Fn() -> Option<T> + Sync),
    give: &(impl Fn(T) + Sync),
) -> f64 {
    let start = Barrier::new(threads);
    let one = || {
        let mut held = Vec::with_capacity(hold);
        let mut pairs = 0u64;
        start.wait();
        let begin = Instant::now();
        while begin.elapsed() < ROUND {
            // Enough of them that the clock does not count.
            for _ in 0..64 {
                while held.len() < hold {
                    match take() {
                        Some(thing) => held.push(thing),
                        // One of the others that says so while there is one.
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

/// One word, and where to look first.
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

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn contention(device: Device, hold: usize) {
    let options = PoolOptions { max_buffers: Some(SLOTS), ..Default::default() };
    let pool = BufferPool::<u8>::with_options(4096, device, SLOTS, options).unwrap();
    let array = ArrayQueue::new(SLOTS);
    let segments = SegQueue::new();
    for slot in 0..SLOTS as u32 {
        array.push(slot).unwrap();
        segments.push(slot);
    }
    let stack = Mutex::new((0..SLOTS as u32).collect::<Vec<u32>>());
    let bitmap = Bitmap { bits: AtomicU64::new(u64::MAX), hint: AtomicU64::new(0) };

    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads: Vec<usize> = THREADS.into_iter().filter(|threads| *threads <= cores).collect();
    println!("\nns for each acquire and release, {SLOTS} slots, {hold} held at a time:");
    print!("{:<34}", "threads");
    threads.iter().for_each(|threads| print!("{threads:>10}"));
    println!();

    let names = ["BufferPool::acquire", "BufferPool::try_acquire", "crossbeam ArrayQueue"];
    let names = [names, ["crossbeam SegQueue", "Mutex<Vec>", "bitmap, one word"]].concat();
    let mut table = vec![Vec::new(); names.len()];
    for threads in &threads {
        let mut samples = vec![Vec::new(); names.len()];
        for _ in 0..ROUNDS {
            let one_of_each = [
                // An error would be told that the pool is exhausted, which it never is.
                cost(*threads, hold, &|| Some(pool.acquire().unwrap()), &drop),
                cost(*threads, hold, &|| pool.try_acquire(), &drop),
                cost(*threads, hold, &|| array.pop(), &|slot| array.push(slot).unwrap()),
                cost(*threads, hold, &|| segments.pop(), &|slot| segments.push(slot)),
                cost(*threads, hold, &|| stack.lock().unwrap().pop(), &|slot| {
                    stack.lock().unwrap().push(slot);
                }),
                cost(*threads, hold, &|| bitmap.take(), &|slot| bitmap.give(slot)),
            ];
            samples.iter_mut().zip(one_of_each).for_each(|(all, one)| all.push(one));
        }
        table.iter_mut().zip(samples).for_each(|(row, samples)| row.push(median(samples)));
    }
    for (name, row) in names.iter().zip(&table) {
        print!("{name:<34}");
        row.iter().for_each(|cost| print!("{cost:>10.1}"));
        println!();
    }
    let last = threads.len() - 1;
    println!(
        "BufferPool::acquire, {} threads over 1: {:.2}   (goal: at most 1.5)",
        threads[last],
        table[0][last] / table[0][0]
    );
    for (name, row) in names.iter().zip(&table).skip(2) {
        println!(
            "{name} over BufferPool::acquire, {} threads: {:.1}",
            threads[last],
            row[last] / table[0][last]
        );
    }
    assert_eq!(pool.available(), SLOTS, "slots are lost");
    println!("{:?}", pool.stats());
}

fn creation(device: Device) {
    const BUFFERS: usize = 4096;
    // The device's context, which whoever comes first makes.
    drop(CpuGpuBuffer::<u8>::new(4096, device).unwrap());
    let timed = |what: &str, make: &dyn Fn() -> Box<dyn std::any::Any>| {
        let start = Instant::now();
        let made = make();
        let time = start.elapsed();
        drop(made);
        let both = start.elapsed();
        println!(
            "{what:<34}{:>10.2} ms, dropped {:.2} ms later",
            time.as_secs_f64() * 1e3,
            (both - time).as_secs_f64() * 1e3
        );
        time.as_secs_f64()
    };
    println!("\n{BUFFERS} buffers of 4 KB:");
    let pool =
        timed("one pool", &|| Box::new(BufferPool::<u8>::new(4096, device, BUFFERS).unwrap()));
    let single = timed("single buffers", &|| {
        let all: Vec<_> =
            (0..BUFFERS).map(|_| CpuGpuBuffer::<u8>::new(4096, device).unwrap()).collect();
        Box::new(all)
    });
    println!("single buffers over one pool: {:.0}", single / pool);
}

fn main() {
    let device = Device::auto();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    println!("device {device}, {cores} cores");
    contention(device, 1);
    contention(device, 4);
    creation(device);
}
