//! Loads parts of files into device memory, by several readers.
//!
//! A reader takes pieces of a file. It reads each into pinned memory and enqueues the uploads of
//! the parts that lie in it. While they run, it reads the next piece into another buffer.

use std::error::Error;
use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use cpu_gpu_buffer::{BufferPool, CpuGpuBuffer, Stream};

use crate::source::{ALIGNMENT, Source};

pub type Failure = Box<dyn Error + Send + Sync>;

/// The bytes of a piece.
const PIECE: u64 = 4 << 20;
/// The buffers of a reader.
const BUFFERS: usize = 3;
/// More gain nothing, as measured with one GPU. So many take 96 MB of pinned memory.
const MOST_READERS: usize = 8;

/// The number of readers on this machine.
pub fn readers() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_READERS))
}

/// Bytes of a file, and their place on the device.
#[derive(Clone)]
pub struct Part {
    /// The index of the file.
    pub source: usize,
    pub bytes: Range<u64>,
    /// The address of the first byte.
    pub to: *mut u8,
}

// SAFETY: the address is only passed to CUDA, from any thread.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

/// A piece of a file, with the parts that it meets.
struct Piece<'a> {
    source: &'a Source,
    bytes: Range<u64>,
    parts: &'a [Part],
}

/// Cuts the files into pieces that meet a part. The parts are sorted, and lie in their files.
fn pieces<'a>(sources: &'a [Source], parts: &'a [Part]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    for parts in parts.chunk_by(|part, next| part.source == next.source) {
        let source = &sources[parts[0].source];
        let mut at = 0;
        while let Some(next) = parts.get(parts.partition_point(|part| part.bytes.end <= at)) {
            // Pieces begin at multiples of their length, as reads past the page cache need it.
            let start = next.bytes.start.max(at) / PIECE * PIECE;
            at = start + PIECE;
            let from = parts.partition_point(|part| part.bytes.end <= start);
            let to = parts.partition_point(|part| part.bytes.start < at);
            pieces.push(Piece {
                source,
                bytes: start..at.min(source.len()),
                parts: &parts[from..to],
            });
        }
    }
    pieces
}

/// An error if a part is not in its file, or two of the sorted parts overlap.
fn check(sources: &[Source], parts: &[Part]) -> Result<(), Failure> {
    for part in parts {
        let source = &sources[part.source];
        if part.bytes.start > part.bytes.end || part.bytes.end > source.len() {
            let (path, len) = (source.path().display(), source.len());
            return Err(format!("{path}: it has {len} bytes, and no range {:?}", part.bytes).into());
        }
    }
    for (part, next) in parts.iter().zip(&parts[1.min(parts.len())..]) {
        if part.source == next.source && part.bytes.end > next.bytes.start {
            let path = sources[part.source].path().display();
            return Err(format!("{path}: {:?} and {:?} overlap", part.bytes, next.bytes).into());
        }
    }
    Ok(())
}

/// Pinned memory for readers, and the stream of their uploads.
pub struct Loader {
    pool: BufferPool<u8>,
    stream: Stream,
    readers: usize,
}

impl Loader {
    /// Allocates the pinned memory.
    pub fn new(stream: &Stream, readers: usize) -> cpu_gpu_buffer::Result<Loader> {
        let pool = BufferPool::new(PIECE as usize, stream.device(), readers * BUFFERS)?;
        Ok(Loader { pool, stream: stream.clone(), readers })
    }

    /// Loads the parts, and calls `progress` with the bytes of each piece that was read.
    ///
    /// All uploads have finished when this returns, also with an error. After an error, `to` holds
    /// some of the bytes.
    ///
    /// # Errors
    ///
    /// If a part is not in its file, two parts overlap, a file cannot be read, ends too early or
    /// changes, or an upload fails.
    ///
    /// # Safety
    ///
    /// Until this returns, for each part:
    ///
    /// - `to` is valid for writes of its bytes. It is memory of the stream's device, or of the
    ///   program on `Device::Cpu`.
    /// - Nobody else uses it, except work that the stream was sent before.
    pub unsafe fn load(
        &self,
        sources: &[Source],
        parts: Vec<Part>,
        progress: impl Fn(u64) + Sync,
    ) -> Result<(), Failure> {
        // SAFETY: the caller vouches for the parts.
        let loaded = unsafe { self.upload(sources, parts, &progress) };
        // Buffers that go back to a pool wait for nothing, so uploads may be under way.
        let finished = self.stream.synchronize();
        loaded?;
        finished?;
        Ok(sources.iter().try_for_each(Source::check_unchanged)?)
    }

    /// As [`load`](Self::load). The uploads may be under way afterwards.
    ///
    /// # Safety
    ///
    /// As for [`load`](Self::load), until the uploads have finished.
    unsafe fn upload(
        &self,
        sources: &[Source],
        mut parts: Vec<Part>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Failure> {
        parts.sort_by_key(|part| (part.source, part.bytes.start));
        check(sources, &parts)?;
        parts.retain(|part| !part.bytes.is_empty());
        let pieces = pieces(sources, &parts);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let take = || pieces.get(next.fetch_add(1, Ordering::Relaxed));
        let read = || {
            // The others stop when one fails.
            let mut pieces = iter::from_fn(take).take_while(|_| !failed.load(Ordering::Relaxed));
            // SAFETY: the caller vouches for the parts.
            let result = unsafe { self.read_pieces(&mut pieces, progress) };
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        };
        let readers = self.readers.min(pieces.len());
        thread::scope(|scope| {
            let running: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
            // All are joined before the first error is returned.
            let results: Vec<_> = running.into_iter().map(|reader| reader.join()).collect();
            results.into_iter().try_for_each(|result| result.expect("no reader panics"))
        })
    }

    /// # Safety
    ///
    /// As for [`upload`](Self::upload).
    unsafe fn read_pieces<'a>(
        &self,
        pieces: &mut dyn Iterator<Item = &'a Piece<'a>>,
        progress: &dyn Fn(u64),
    ) -> Result<(), Failure> {
        let buffers: cpu_gpu_buffer::Result<Vec<_>> =
            (0..BUFFERS).map(|_| self.pool.acquire()).collect();
        let mut buffers = buffers?;
        for piece in pieces {
            buffers.rotate_left(1);
            let staging = &mut buffers[0];
            let len = (piece.bytes.end - piece.bytes.start) as usize;
            // Waits for the earlier uploads from this buffer.
            let host = &mut staging.cpu_mut()?[..len.next_multiple_of(ALIGNMENT)];
            piece.source.read(piece.bytes.start, host, len)?;
            for part in piece.parts {
                let start = part.bytes.start.max(piece.bytes.start);
                let end = part.bytes.end.min(piece.bytes.end);
                let rows = (start - piece.bytes.start) as usize..(end - piece.bytes.start) as usize;
                // The buffer's row 0 would be here.
                let to = part.to.wrapping_add((start - part.bytes.start) as usize);
                let to = to.wrapping_sub(rows.start);
                // SAFETY: the rows are those of the part in this piece. The caller vouches for
                // their place on the device, until the uploads have finished.
                unsafe { staging.copy_to_device_ptr(rows, to, &self.stream) }?;
            }
            progress(len as u64);
        }
        // An error of an upload that is still under way.
        Ok(buffers.iter().try_for_each(CpuGpuBuffer::synchronize)?)
    }
}
