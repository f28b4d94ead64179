//! Streams a file through a GPU and back: disk to pinned memory, to the device, to pinned memory, with
//! several buffers in flight so that reading, upload and download overlap; then proves by a digest that
//! every byte survived.
//!
//! ```text
//! cargo run --release --example quickstart [FILE] [--device cpu|cuda:N] [--serial]
//! ```
//!
//! Without a file it moves its own executable. `--serial` waits for each step before the next.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

type Failure = Box<dyn std::error::Error>;

/// Bytes that move at once, and how many such pieces are under way.
const PIECE: usize = 4 << 20;
const IN_FLIGHT: usize = 4;

/// A piece of the file on its way: `up` is filled from disk and uploaded into its device half, which
/// comes back into the host half of `down`.
struct Lane {
    up: CpuGpuBuffer<u8>,
    down: CpuGpuBuffer<u8>,
    stream: Stream,
    bytes: usize,
}

impl Lane {
    fn new(device: Device) -> cpu_gpu_buffer::Result<Lane> {
        Ok(Lane {
            up: CpuGpuBuffer::new(PIECE, device)?,
            down: CpuGpuBuffer::new(PIECE, device)?,
            stream: Stream::new(device)?,
            bytes: 0,
        })
    }

    /// Reads the next piece and sends it there and back. The host half is free for reading into when
    /// its last upload is done; nothing here has to remember that.
    fn send(&mut self, file: &mut File, serial: bool) -> Result<(), Failure> {
        self.bytes = read_piece(file, self.up.cpu_mut()?)?;
        self.up.copy_to_gpu(..self.bytes, &self.stream)?;
        if serial {
            self.stream.synchronize()?;
        }
        let there = self.up.gpu_on(&self.stream)?;
        // SAFETY: `there` is as many bytes as `down`, and the copy goes through the stream that `up` was
        // told of, while the view lives.
        unsafe { self.down.copy_from_device_ptr(..self.bytes, there.as_ptr(), &self.stream) }?;
        if serial {
            self.stream.synchronize()?;
        }
        Ok(())
    }

    /// What came back; waits until it is there.
    fn receive(&mut self) -> cpu_gpu_buffer::Result<&[u8]> {
        let bytes = std::mem::take(&mut self.bytes);
        Ok(&self.down.cpu()?[..bytes])
    }
}

/// Fills `piece` as far as the file goes.
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

/// Moves the whole file; `back` is shown every piece that came back, in order.
fn stream_file(
    path: &Path,
    lanes: &mut [Lane],
    serial: bool,
    mut back: impl FnMut(&[u8]),
) -> Result<(u64, Duration), Failure> {
    let mut file = File::open(path).map_err(|error| describe(path, error))?;
    let start = Instant::now();
    let mut total = 0;
    let used = if serial { 1 } else { lanes.len() };
    'pieces: loop {
        for lane in &mut lanes[..used] {
            back(lane.receive()?);
            lane.send(&mut file, serial).map_err(|error| describe(path, error))?;
            total += lane.bytes as u64;
            if lane.bytes < PIECE {
                break 'pieces;
            }
        }
    }
    // The pieces still under way, the oldest first: it follows the one sent last.
    let last = lanes[..used].iter().position(|lane| lane.bytes < PIECE).unwrap_or(0);
    lanes[..used].rotate_left((last + 1) % used);
    for lane in &mut lanes[..used] {
        back(lane.receive()?);
    }
    Ok((total, start.elapsed()))
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
    let mut lanes = Vec::new();
    for _ in 0..IN_FLIGHT {
        lanes.push(Lane::new(device)?);
    }

    // What is on the disk, without any buffer; this also brings the file into the system's cache, so that
    // the rates below are those of the transfers.
    let mut expected = blake3::Hasher::new();
    let opened = File::open(&file).map_err(|error| describe(&file, error))?;
    expected.update_reader(opened).map_err(|error| describe(&file, error))?;
    let expected = expected.finalize();

    let mut seen = blake3::Hasher::new();
    let (bytes, _) = stream_file(&file, &mut lanes, serial, |piece| {
        seen.update(piece);
    })?;
    let seen = seen.finalize();

    let mut out = io::stdout();
    let memory = if lanes[0].up.is_pinned() { "pinned" } else { "pageable" };
    writeln!(out, "device  {device}, host memory {memory}")?;
    writeln!(out, "file    {}, {bytes} bytes", file.display())?;
    writeln!(out, "digest  {seen} (blake3)")?;
    // The rates are taken in runs of their own, without the digest's work in them. On a GPU both ways
    // are run for comparison.
    let ways = if device == Device::Cpu { vec![serial] } else { vec![true, false] };
    for serial in ways {
        let (bytes, time) = stream_file(&file, &mut lanes, serial, |_| {})?;
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
