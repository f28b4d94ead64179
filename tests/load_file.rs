//! The loader of `examples/load_file`: any parts of any files arrive, and whatever is wrong with a
//! file is an error that names it.

mod common;
#[path = "../examples/load_file/loader.rs"]
mod loader;
#[path = "../examples/load_file/source.rs"]
mod source;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use common::{device_bytes, is_all};
use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning, Stream};
use loader::{Failure, Loader, Part};
use source::Source;

const PIECE: usize = 4 << 20;

/// A file that is removed at the end of its test.
struct Temporary(PathBuf);

impl Temporary {
    fn new(bytes: &[u8]) -> Temporary {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("cgb-load-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Temporary(path)
    }

    fn open(&self) -> Source {
        Source::open(&self.0, false).unwrap()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    let mut pattern = vec![0; bytes];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut pattern);
    pattern
}

/// Device memory for a part, with a byte on either side that nobody writes.
struct Target {
    buffer: CpuGpuBuffer<u8>,
    to: *mut u8,
}

impl Target {
    fn new(bytes: usize, stream: &Stream) -> Target {
        let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
        let mut buffer = CpuGpuBuffer::with_options(bytes + 2, stream.device(), options).unwrap();
        buffer.fill_gpu(0xee, stream).unwrap();
        let to = buffer.gpu_on(stream).unwrap().as_mut_ptr().wrapping_add(1);
        Target { buffer, to }
    }

    fn part(&self, source: usize, bytes: Range<usize>) -> Part {
        Part { source, bytes: bytes.start as u64..bytes.end as u64, to: self.to }
    }

    #[track_caller]
    fn holds(&self, expected: &[u8]) {
        let (bytes, buffer) = (expected.len(), &self.buffer);
        assert!(bytes + 2 == buffer.numel());
        let seen = device_bytes(buffer.device(), buffer.device_ptr(), bytes + 2);
        assert!(seen[1..=bytes] == *expected, "{bytes} bytes are not those of the file");
        assert!(seen[0] == 0xee && seen[bytes + 1] == 0xee, "beside {bytes} bytes");
    }
}

/// Loads into the targets of a test.
fn loaded(
    sources: &[Source],
    parts: Vec<Part>,
    stream: &Stream,
    readers: usize,
) -> Result<u64, Failure> {
    let read = AtomicU64::new(0);
    let progress = |bytes| {
        read.fetch_add(bytes, Ordering::Relaxed);
    };
    // SAFETY: the parts are those of targets, which the test uses after this alone.
    unsafe { Loader::new(stream, readers)?.load(sources, parts, progress) }?;
    Ok(read.into_inner())
}

#[test]
fn parts_of_several_files_arrive_wherever_they_begin_and_end() {
    let _turn = common::turn();
    let contents = [pattern(3 * PIECE - 1, 1), pattern(4095, 2), pattern(0, 3)];
    let files = contents.each_ref().map(|bytes| Temporary::new(bytes));
    let ranges = [
        (0, PIECE - 1..PIECE + 1),
        (0, 0..1),
        (0, 1..1),
        (0, 1..4095),
        (0, PIECE + 1..3 * PIECE - 1),
        (1, 17..4095),
        (2, 0..0),
    ];
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let usual = loader::readers();
        for (direct, readers) in [(false, 1), (false, usual), (true, 3), (false, 16)] {
            let open = |file: &Temporary| Source::open(&file.0, direct).unwrap();
            let sources = files.each_ref().map(open);
            let targets = ranges.each_ref().map(|(_, range)| Target::new(range.len(), &stream));
            let parts = ranges.iter().zip(&targets);
            let parts = parts.map(|((file, range), to)| to.part(*file, range.clone()));
            let read = loaded(&sources, parts.collect(), &stream, readers).unwrap();
            // Every piece meets a part.
            assert_eq!(read as usize, contents[0].len() + contents[1].len());
            for ((file, range), target) in ranges.iter().zip(&targets) {
                target.holds(&contents[*file][range.clone()]);
            }
        }
    }
}

#[test]
fn pieces_without_a_part_are_not_read() {
    let _turn = common::turn();
    let file = Temporary::new(&pattern(5 * PIECE, 4));
    let stream = Stream::new(Device::Cpu).unwrap();
    let (first, last) = (Target::new(9, &stream), Target::new(9, &stream));
    let parts = vec![last.part(0, 5 * PIECE - 9..5 * PIECE), first.part(0, 0..9)];
    assert_eq!(loaded(&[file.open()], parts, &stream, 8).unwrap(), 2 * PIECE as u64);
}

/// What is wrong, by the error's text.
#[track_caller]
fn refused(result: Result<impl Sized, impl ToString>, path: &Path, expected: &str) {
    let text = result.err().expect("an error").to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains(expected), "{text}");
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error() {
    let _turn = common::turn();
    let file = Temporary::new(&pattern(3 * PIECE, 5));
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        for readers in [1, 4] {
            std::fs::write(&file.0, pattern(3 * PIECE, 5)).unwrap();
            let source = file.open();
            let target = Target::new(3 * PIECE, &stream);
            let cut = File::options().write(true).open(&file.0).unwrap();
            cut.set_len(2 * PIECE as u64 + 7).unwrap();
            let result = loaded(&[source], vec![target.part(0, 0..3 * PIECE)], &stream, readers);
            refused(result, &file.0, &format!("it ends at byte {}", 2 * PIECE + 7));
            // Nothing is in flight to the target.
            assert!(stream.is_idle().unwrap());
        }
    }
}

#[test]
fn a_file_that_is_written_while_it_is_read_is_an_error() {
    let _turn = common::turn();
    let file = Temporary::new(&pattern(100, 6));
    let stream = Stream::new(Device::Cpu).unwrap();
    let (source, target) = (file.open(), Target::new(100, &stream));
    let written = File::options().write(true).open(&file.0).unwrap();
    written.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
    let result = loaded(&[source], vec![target.part(0, 0..100)], &stream, 1);
    refused(result, &file.0, "changed while it was read");
}

#[test]
fn parts_beyond_the_file_and_parts_that_overlap_are_errors_and_write_nothing() {
    let _turn = common::turn();
    let file = Temporary::new(&pattern(100, 7));
    let stream = Stream::new(Device::Cpu).unwrap();
    let target = Target::new(100, &stream);
    let backwards = Part { bytes: Range { start: 9, end: 5 }, ..target.part(0, 0..1) };
    for (parts, expected) in [
        (vec![target.part(0, 1..101)], "it has 100 bytes, and no range 1..101"),
        (vec![backwards], "no range 9..5"),
        (vec![target.part(0, 0..50), target.part(0, 49..60)], "0..50 and 49..60 overlap"),
    ] {
        refused(loaded(&[file.open()], parts, &stream, 2), &file.0, expected);
        target.holds(&[0xee; 100]);
        assert!(is_all(target.buffer.cpu().unwrap(), 0));
    }
}

#[test]
fn what_is_no_regular_file_or_cannot_be_read_is_an_error() {
    let folder = std::env::temp_dir();
    refused(Source::open(&folder, false).map(drop), &folder, "not a regular file");
    let none = folder.join("cgb-load-none");
    refused(Source::open(&none, true).map(drop), &none, "");
    #[cfg(target_os = "linux")]
    {
        let pipe = folder.join(format!("cgb-load-pipe-{}", std::process::id()));
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        // Opening it would wait for a writer.
        refused(Source::open(&pipe, false).map(drop), &pipe, "not a regular file");
        std::fs::remove_file(&pipe).unwrap();
        // The page at address 0 is not mapped.
        let memory = Path::new("/proc/self/mem");
        let read = Source::open(memory, false).unwrap().read(0, &mut [0; 8], 8);
        refused(read, memory, "nput/output error");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_system_that_refuses_reads_past_the_page_cache_is_named_and_the_file_read() {
    // Files of /proc have no pages.
    let path = Path::new("/proc/self/maps");
    let source = Source::open(path, true).unwrap();
    assert!(source.refused().is_some());
    let mut bytes = [0; 16];
    source.read(0, &mut bytes, 16).unwrap();
    assert!(bytes.is_ascii());
}
