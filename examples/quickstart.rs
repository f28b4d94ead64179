//! Streams a file through a GPU and back.
//!
//! The file goes from disk to pinned memory, to the device, and back to pinned memory. Several
//! pieces are in flight, so that reading, upload and download overlap. A digest then shows that
//! every byte is unchanged.
//!
//! ```text
//! cargo run --release --example quickstart [FILE] [--device cpu|cuda:N] [--serial]
//! ```
//!
//! Without a file, the example moves its own executable. `--serial` waits for each step before the
//! next.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, Device, Stream};

type Failure = Box<dyn std::error::Error>;

/// The bytes of a piece, and the most pieces in flight.
const PIECE: usize = 4 << 20;
const IN_FLIGHT: usize = 4;

/// A piece of the file that is copied back into the host side of a buffer.
struct Piece {
    down: CpuGpuBuffer<u8>,
    bytes: usize,
}

/// Enqueues the copies of the next piece to the device and back. `None` after the last piece.
fn send(
    file: &mut File,
    pool: &BufferPool<u8>,
    stream: &Stream,
    serial: bool,
) -> Result<Option<Piece>, Failure> {
    // An earlier upload of this buffer may still be queued. `cpu_mut` waits for it.
    let mut up = pool.acquire()?;
    let bytes = read_piece(file, up.cpu_mut()?)?;
    if bytes == 0 {
        return Ok(None);
    }
    up.copy_to_gpu(..bytes, stream)?;
    if serial {
        stream.synchronize()?;
    }
    let mut down = pool.acquire()?;
    down.copy_to_cpu_from(0, &mut up, ..bytes, stream)?;
    if serial {
        stream.synchronize()?;
    }
    // `up` returns to the pool with both copies queued. Its next user waits for them if it must.
    Ok(Some(Piece { down, bytes }))
}

/// Reads the next bytes of the file into `piece`. Returns their number.
fn read_piece(file: &mut File, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match file.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Moves the whole file, and calls `back` for every piece that came back, in order.
fn stream_file(
    path: &Path,
    pool: &BufferPool<u8>,
    streams: &[Stream],
    serial: bool,
    mut back: impl FnMut(&[u8]),
) -> Result<(u64, Duration), Failure> {
    let mut file = File::open(path).map_err(|error| describe(path, error))?;
    let start = Instant::now();
    let mut total = 0;
    let mut under_way = VecDeque::new();
    let most = if serial { 1 } else { streams.len() };
    for stream in streams.iter().cycle() {
        let sent = send(&mut file, pool, stream, serial);
        let Some(piece) = sent.map_err(|error| describe(path, error))? else { break };
        total += piece.bytes as u64;
        under_way.push_back(piece);
        if under_way.len() == most {
            under_way.pop_front().map(|piece| received(&piece, &mut back)).transpose()?;
        }
    }
    for piece in under_way {
        received(&piece, &mut back)?;
    }
    Ok((total, start.elapsed()))
}

/// Waits for a piece and passes it to `back`.
fn received(piece: &Piece, back: &mut impl FnMut(&[u8])) -> cpu_gpu_buffer::Result<()> {
    back(piece.down.cpu_rows(..piece.bytes)?);
    Ok(())
}

fn describe(path: &Path, error: impl std::fmt::Display) -> Failure {
    format!("{}: {error}", path.display()).into()
}

struct Arguments {
    file: PathBuf,
    device: Device,
    serial: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let (mut file, mut device, mut serial) = (None, None, false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("serial") => serial = true,
            lexopt::Arg::Long("device") => {
                let value = parser.value()?;
                device = Some(value.to_string_lossy().parse::<Device>()?);
            }
            lexopt::Arg::Value(value) if file.is_none() => file = Some(PathBuf::from(value)),
            other => return Err(other.unexpected().into()),
        }
    }
    let device = match device {
        None => Device::auto(),
        Some(Device::Cuda(ordinal)) => Device::cuda(ordinal)?,
        Some(Device::Cpu) => Device::Cpu,
    };
    let file = file.map_or_else(std::env::current_exe, Ok)?;
    Ok(Arguments { file, device, serial })
}

fn run() -> Result<(), Failure> {
    let Arguments { file, device, serial } = arguments()?;
    // Each piece in flight needs two buffers.
    let pool = BufferPool::new(PIECE, device, 2 * IN_FLIGHT)?;
    let mut streams = Vec::new();
    for _ in 0..IN_FLIGHT {
        streams.push(Stream::new(device)?);
    }

    // The digest of the file itself. Reading it also fills the page cache, so that the rates below
    // are those of the transfers.
    let mut expected = blake3::Hasher::new();
    let opened = File::open(&file).map_err(|error| describe(&file, error))?;
    expected.update_reader(opened).map_err(|error| describe(&file, error))?;
    let expected = expected.finalize();

    let mut seen = blake3::Hasher::new();
    let (bytes, _) = stream_file(&file, &pool, &streams, serial, |piece| {
        seen.update(piece);
    })?;
    let seen = seen.finalize();

    let mut out = io::stdout();
    let memory = if pool.acquire()?.is_pinned() { "pinned" } else { "pageable" };
    writeln!(out, "device  {device}, host memory {memory}")?;
    writeln!(out, "file    {}, {bytes} bytes", file.display())?;
    writeln!(out, "digest  {seen} (blake3)")?;
    // The rates are measured in further runs, without the digest. A GPU runs both ways.
    let ways = if device == Device::Cpu { vec![serial] } else { vec![true, false] };
    for serial in ways {
        let (bytes, time) = stream_file(&file, &pool, &streams, serial, |_| {})?;
        let rate = bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9;
        let way = if serial { "serial" } else { "overlapped" };
        writeln!(out, "rate    {rate:.2} GB/s each way, {way}")?;
    }
    if seen != expected {
        return Err(format!("the bytes on disk have the digest {expected}").into());
    }
    writeln!(out, "every byte came back")?;
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}
