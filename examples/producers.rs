//! Several threads feed one GPU through a pool.
//!
//! Each producer takes a buffer, fills it, uploads it and sends it on. One consumer receives the
//! batches and returns the buffers while its work on them is still queued. Finally the program
//! checks every batch that the GPU received.
//!
//! ```text
//! cargo run --release --example producers [--device cpu|cuda:N] [--producers N] [--batches N]
//!                                         [--buffers N]
//! ```
//!
//! `--buffers` is the number of buffers that the pool begins with. The pool grows if it needs more.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, Device, Stream};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The most rows of a batch, and the words of a row.
const ROWS: usize = 512;
const WIDTH: usize = 128;
/// The most batches that the consumer has not checked yet.
const UNSEEN: usize = 8;

/// A batch in the device side of a buffer. Its upload may still be queued on the producer's stream.
struct Batch {
    buffer: CpuGpuBuffer<u32>,
    rows: usize,
    sum: u32,
}

/// Makes batches of pseudo-random rows and sends them to the consumer.
fn produce(
    number: u32,
    batches: usize,
    pool: &BufferPool<u32>,
    to: &mpsc::SyncSender<Batch>,
) -> Result<(), Failure> {
    let stream = Stream::new(pool.device())?;
    let mut state = number.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        // Xorshift, by Marsaglia.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    for _ in 0..batches {
        let mut buffer = pool.acquire()?;
        let rows = 1 + next() as usize % ROWS;
        let mut sum = 0u32;
        // This waits for the buffer's last upload. The pool prefers buffers without one in flight.
        for word in buffer.cpu_rows_mut(..rows)? {
            *word = next();
            sum = sum.wrapping_add(*word);
        }
        buffer.copy_to_gpu(..rows, &stream)?;
        // The consumer has failed and reports the reason.
        if to.send(Batch { buffer, rows, sum }).is_err() {
            break;
        }
    }
    Ok(())
}

/// The batches that were checked.
#[derive(Default)]
struct Seen {
    batches: usize,
    bytes: usize,
    wrong: usize,
}

impl Seen {
    /// Waits for a batch and compares its sum.
    fn look(&mut self, Batch { buffer, rows, sum }: &Batch) -> Result<(), Failure> {
        let got = buffer.cpu_rows(..*rows)?.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
        self.batches += 1;
        self.bytes += rows * WIDTH * 4;
        self.wrong += usize::from(got != *sum);
        Ok(())
    }
}

/// Works on the batches on one stream, in the order of their arrival.
fn consume(pool: &BufferPool<u32>, from: &mpsc::Receiver<Batch>) -> Result<Seen, Failure> {
    let stream = Stream::new(pool.device())?;
    let mut seen = Seen::default();
    let mut unseen = VecDeque::new();
    for Batch { mut buffer, rows, sum } in from {
        // A program would launch kernels here, with the address of `gpu_on`. This one copies the
        // rows back. The consumer's stream waits for the producer's. This thread waits for neither.
        let mut result = pool.acquire()?;
        result.copy_to_cpu_from(0, &mut buffer, ..rows, &stream)?;
        // The buffer returns to the pool with its work still queued.
        drop(buffer);
        unseen.push_back(Batch { buffer: result, rows, sum });
        if unseen.len() > UNSEEN {
            unseen.pop_front().map(|batch| seen.look(&batch)).transpose()?;
        }
    }
    for batch in unseen {
        seen.look(&batch)?;
    }
    Ok(seen)
}

struct Arguments {
    device: Device,
    producers: u32,
    batches: usize,
    buffers: usize,
}

fn arguments() -> Result<Arguments, Failure> {
    let (mut device, mut producers, mut batches, mut buffers) = (None, 4, 2000, 4);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("device") => {
                device = Some(parser.value()?.to_string_lossy().parse::<Device>()?);
            }
            lexopt::Arg::Long("producers") => {
                producers = parser.value()?.to_string_lossy().parse()?
            }
            lexopt::Arg::Long("batches") => batches = parser.value()?.to_string_lossy().parse()?,
            lexopt::Arg::Long("buffers") => buffers = parser.value()?.to_string_lossy().parse()?,
            other => return Err(other.unexpected().into()),
        }
    }
    let device = match device {
        None => Device::auto(),
        Some(Device::Cuda(ordinal)) => Device::cuda(ordinal)?,
        Some(Device::Cpu) => Device::Cpu,
    };
    Ok(Arguments { device, producers, batches, buffers })
}

fn run() -> Result<(), Failure> {
    let Arguments { device, producers, batches, buffers } = arguments()?;
    let pool = BufferPool::new([ROWS, WIDTH], device, buffers)?;
    // The channel holds one batch for each producer.
    let (to, from) = mpsc::sync_channel(producers as usize);
    let start = Instant::now();
    let seen = thread::scope(|scope| {
        let threads: Vec<_> = (0..producers)
            .map(|number| {
                let (to, pool) = (to.clone(), &pool);
                scope.spawn(move || produce(number, batches, pool, &to))
            })
            .collect();
        drop(to);
        let seen = consume(&pool, &from);
        // Producers that still send, after the consumer has failed, return.
        drop(from);
        for thread in threads {
            thread.join().map_err(|_| "a producer panicked")??;
        }
        seen
    })?;
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    let stats = pool.stats();
    println!("device  {device}, {producers} producers");
    println!(
        "moved   {} batches, {} bytes each way, {:.2} GB/s",
        seen.batches,
        seen.bytes,
        seen.bytes as f64 / seconds / 1e9
    );
    println!(
        "pool    {} buffers, at most {} out at once, grown {} times, handed out in flight {} times",
        stats.total, stats.high_water, stats.growths, stats.in_flight
    );
    if seen.wrong > 0 || seen.batches != producers as usize * batches {
        return Err(format!("{} batches are wrong", seen.wrong).into());
    }
    if stats.available != stats.total {
        return Err("a buffer was not given back".into());
    }
    println!("every batch arrived as it was made");
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("producers: {error}");
            ExitCode::FAILURE
        }
    }
}
