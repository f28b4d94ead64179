//! Streams a file through a GPU and back.
//!
//! Several readers take pieces of the file. Each reads a piece into pinned memory, uploads it, and
//! downloads it into another buffer, while the others do the same. Digests then show that every
//! byte is unchanged. Without a file, the example moves its own executable.
//!
//!     cargo run --release --example quickstart [FILE] [--device cpu|cuda:N] [--readers N]

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs::File, iter, num::NonZeroUsize, process::ExitCode, thread, time::Instant};

use blake3::Hash;
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
use lexopt::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
const PIECE: u64 = 4 << 20;

/// How far pieces go. In `Serial`, a piece has come back before the next one is read.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Read,
    Upload,
    RoundTrip,
    Serial,
}

/// A thread's own file, stream and buffers.
struct Reader {
    file: File,
    stream: Stream,
    buffers: [CpuGpuBuffer<u8>; 3],
}

impl Reader {
    fn new(path: &Path, device: Device) -> Result<Reader> {
        let buffer = || CpuGpuBuffer::new(PIECE as usize, device);
        let buffers = [buffer()?, buffer()?, buffer()?];
        Ok(Reader { file: File::open(path)?, stream: Stream::new(device)?, buffers })
    }

    /// Moves pieces as long as there are any. Returns where they begin, and their digests.
    fn run(&mut self, way: Way, bytes: u64, next: &AtomicU64) -> Result<Vec<(u64, Hash)>> {
        let (mut digests, mut under_way) = (Vec::new(), None);
        let starts = iter::repeat_with(|| next.fetch_add(PIECE, Ordering::Relaxed));
        for start in starts.take_while(|start| *start < bytes) {
            let len = PIECE.min(bytes - start) as usize;
            // The last buffer takes the pieces that come back.
            self.buffers[..if way == Way::Upload { 3 } else { 2 }].rotate_left(1);
            let [up, _, down] = &mut self.buffers;
            // Waits for an earlier upload that may still read this host side.
            let host = &mut up.cpu_mut()?[..len];
            self.file.seek(SeekFrom::Start(start))?;
            self.file.read_exact(host)?;
            if way == Way::Read {
                digests.push((start, digest(host)));
                continue;
            }
            up.copy_to_gpu(..len, &self.stream)?;
            if way == Way::Upload {
                continue;
            }
            // The piece before this one has come back, or `cpu_rows` waits for it.
            if let Some((before, len)) = under_way.replace((start, len)) {
                digests.push((before, digest(down.cpu_rows(..len)?)));
            }
            down.copy_to_cpu_from(0, up, ..len, &self.stream)?;
            if way == Way::Serial {
                self.stream.synchronize()?;
            }
        }
        if let Some((last, len)) = under_way {
            digests.push((last, digest(self.buffers[2].cpu_rows(..len)?)));
        }
        self.stream.synchronize()?;
        Ok(digests)
    }
}

/// The digest of the digests of a piece's halves. Two threads compute it.
fn digest(piece: &[u8]) -> Hash {
    let (first, second) = piece.split_at(piece.len() / 2);
    thread::scope(|scope| {
        let second = scope.spawn(|| blake3::hash(second));
        let halves = [blake3::hash(first), second.join().expect("no panic")];
        blake3::hash(&halves.map(|half| *half.as_bytes()).concat())
    })
}

/// Moves the whole file. Returns the digest of the pieces' digests, and the rate.
fn stream_file(way: Way, bytes: u64, readers: &mut [Reader]) -> Result<(Hash, String)> {
    let (start, next) = (Instant::now(), AtomicU64::new(0));
    let mut digests = thread::scope(|scope| {
        let run = |reader| scope.spawn(|| Reader::run(reader, way, bytes, &next));
        let running: Vec<_> = readers.iter_mut().map(run).collect();
        let digests = running.into_iter().map(|thread| thread.join().expect("no panic"));
        digests.collect::<Result<Vec<_>>>().map(|digests| digests.concat())
    })?;
    let rate = bytes as f64 / start.elapsed().as_secs_f64().max(1e-9) / 1e9;
    digests.sort_unstable_by_key(|(start, _)| *start);
    let digests: Vec<u8> = digests.iter().flat_map(|(_, digest)| *digest.as_bytes()).collect();
    Ok((blake3::hash(&digests), format!("{rate:.2} GB/s")))
}

fn move_file(path: &Path, device: Device, readers: usize) -> Result<()> {
    let file = Some(std::fs::metadata(path)?).filter(|file| file.is_file());
    let bytes = file.ok_or("it is not a regular file")?.len();
    let readers = readers.min(bytes.div_ceil(PIECE) as usize).max(1);
    let readers: Result<Vec<_>> = (0..readers).map(|_| Reader::new(path, device)).collect();
    let readers = &mut readers?[..];
    // Digests of the file itself. Reading it also fills the page cache.
    let (expected, _) = stream_file(Way::Read, bytes, readers)?;
    let (seen, round_trip) = stream_file(Way::RoundTrip, bytes, readers)?;
    if seen != expected {
        return Err("other bytes came back, or the file changed".into());
    }
    let (_, upload) = stream_file(Way::Upload, bytes, readers)?;
    let (_, serial) = stream_file(Way::Serial, bytes, &mut readers[..1])?;
    let (readers, pinned) = (readers.len(), readers[0].buffers[0].is_pinned());
    println!("{}, {bytes} bytes, digest {seen}: every byte came back", path.display());
    println!("{device}, host memory pinned: {pinned}; upload {upload} with {readers} readers");
    println!("round trip {round_trip} each way, with digests; serial, with one reader, {serial}");
    Ok(())
}

fn run() -> Result<()> {
    let (mut path, mut device, mut readers) = (None, None, None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("device") => device = Some(parser.value()?.parse::<Device>()?),
            Long("readers") => readers = Some(parser.value()?.parse::<NonZeroUsize>()?.get()),
            Value(value) if path.is_none() => path = Some(PathBuf::from(value)),
            other => return Err(other.unexpected().into()),
        }
    }
    let path = path.map_or_else(std::env::current_exe, Ok)?;
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let (device, readers) = (device.unwrap_or_else(Device::auto), readers.unwrap_or(cores.min(8)));
    move_file(&path, device, readers).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("quickstart: {error}");
    ExitCode::FAILURE
}
