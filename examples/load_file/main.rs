//! Loads a file, or a range of it, into device memory that somebody else owns.
//!
//! ```text
//! cargo run --release --example load_file FILE [--range BEGIN..END] [--device cpu|cuda:N]
//!     [--readers N] [--direct]
//! ```
//!
//! `--direct` reads past the page cache. A terminal shows a progress bar. `loader.rs` and
//! `source.rs` are for other programs, too.

mod loader;
mod source;

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning, Stream};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lexopt::prelude::*;

use loader::{Failure, Loader, Part};
use source::Source;

struct Arguments {
    path: PathBuf,
    range: Option<Range<u64>>,
    device: Option<Device>,
    readers: usize,
    direct: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let (mut path, mut range, mut device) = (None, None, None);
    let (mut readers, mut direct) = (loader::readers(), false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("range") => range = Some(parser.value()?.parse_with(parse_range)?),
            Long("device") => device = Some(parser.value()?.parse()?),
            Long("readers") => readers = parser.value()?.parse::<NonZeroUsize>()?.get(),
            Long("direct") => direct = true,
            Value(value) if path.is_none() => path = Some(PathBuf::from(value)),
            other => return Err(other.unexpected().into()),
        }
    }
    let path = path.ok_or("the path of a file is missing")?;
    Ok(Arguments { path, range, device, readers, direct })
}

fn parse_range(text: &str) -> Result<Range<u64>, Failure> {
    let (begin, end) = text.split_once("..").ok_or("a range is BEGIN..END, in bytes")?;
    Ok(begin.parse()?..end.parse()?)
}

fn run() -> Result<(), Failure> {
    let arguments = arguments()?;
    let source = Source::open(&arguments.path, arguments.direct)?;
    let range = arguments.range.unwrap_or(0..source.len());
    let device = arguments.device.unwrap_or_else(Device::auto);
    let stream = Stream::new(device)?;
    let bytes = usize::try_from(range.end.min(source.len()).saturating_sub(range.start))?;
    // The device side stands for another library's memory. Nobody writes the host side, so it
    // takes no memory.
    let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
    let mut target = CpuGpuBuffer::<u8>::with_options(bytes, device, options)?;
    let to = target.gpu_on(&stream)?.as_mut_ptr();

    let loader = Loader::new(&stream, arguments.readers)?;
    let bar = progress_bar(bytes as u64);
    let start = Instant::now();
    let sources = [source];
    let parts = vec![Part { source: 0, bytes: range, to }];
    // SAFETY: the device side has the bytes of the range. It is used by this alone from the view,
    // which is of this stream, until the bytes are there.
    let loaded = unsafe { loader.load(&sources, parts, |read| bar.inc(read)) };
    bar.finish_and_clear();
    loaded?;
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    if let Some(reason) = sources[0].refused() {
        eprintln!("load_file: through the page cache, because the file system refuses: {reason}");
    }
    let digest = digest(&mut target, &stream)?;
    println!("{}, {bytes} bytes, digest {digest} (blake3)", arguments.path.display());
    println!(
        "{device}, {:.2} GB/s with {} readers",
        bytes as f64 / seconds / 1e9,
        arguments.readers
    );
    Ok(())
}

/// On standard error. Hidden if that is not a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(style).expect("a template of the library's");
    ProgressBar::with_draw_target(Some(bytes), target).with_style(style)
}

/// The digest of the device side.
fn digest(target: &mut CpuGpuBuffer<u8>, stream: &Stream) -> Result<blake3::Hash, Failure> {
    const PIECE: usize = 4 << 20;
    let mut piece = CpuGpuBuffer::<u8>::new(PIECE.min(target.numel()), target.device())?;
    let mut digest = blake3::Hasher::new();
    for start in (0..target.numel()).step_by(PIECE) {
        let end = target.numel().min(start + PIECE);
        piece.copy_to_cpu_from(0, target, start..end, stream)?;
        digest.update(piece.cpu_rows(..end - start)?);
    }
    Ok(digest.finalize())
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("load_file: {error}");
    ExitCode::FAILURE
}
