//! Fills with copies of an element of any size.
//!
//! There are three ways on a device:
//!
//! - A short fill whose bytes repeat every 1, 2 or 4 bytes is a memset of the driver. It costs the
//!   caller a third of a kernel launch.
//! - Otherwise the host repeats the element until the length is a multiple of 16 bytes: a *period*.
//!   A kernel of `kernels/fill.cu` takes the period as a parameter and repeats it.
//! - An element may be too long for a parameter. It is then written once, in slices. Another kernel
//!   repeats it from device memory.

use std::ffi::c_void;
use std::ptr;

use crate::cuda::calls;
use crate::cuda::kernels::Kernels;
use crate::error::Result;
use crate::stream::stream::EnteredStream;
use crate::sys;

/// The bytes from which a fill goes to a kernel, even if memset could do it.
///
/// From there on memset costs the caller as much as a launch, and the kernel is at least as fast
/// (H100, docs/benchmarks.md, "Fill").
const KERNEL_FROM: usize = 64 << 10;

/// The vectors of 16 bytes in the pattern of each fill kernel, as in `kernels/fill.cu`.
const SHORT: usize = 16;
const LONG: usize = 224;

/// The rows of a block of the fill kernels, as in `kernels/fill.cu`.
const STORES: usize = 2;

/// The most threads of a block of each fill kernel, unless a row needs more.
const SHORT_THREADS: usize = 256;
const LONG_THREADS: usize = 512;

/// The threads of a block of the repeat kernels, and about how often each thread stores.
const REPEAT_THREADS: usize = 256;
const REPEAT_STORES: usize = 4;

/// The most threads of a block on every device.
const MOST_THREADS: usize = 1024;

/// A fill kernel's parameter, which begins with the period.
#[repr(C, align(16))]
struct Pattern<const VECTORS: usize>([[u8; 16]; VECTORS]);

/// Enqueues a fill of `bytes` bytes at `to` with copies of `element`.
///
/// Returns an error if another thread's capture took the fill, as [`EnteredStream::record`] does.
///
/// # Safety
///
/// - The range is memory of the stream's device, valid for writes.
/// - Until the fill has finished in stream order, the range stays allocated. Nothing else reads or
///   writes it.
/// - `element` is not empty, and `bytes` is a multiple of its length.
pub(crate) unsafe fn enqueue(
    to: *mut u8,
    bytes: usize,
    element: &[u8],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let raw = entered.raw();
    let sent = match choose(element, to.addr(), bytes) {
        Method::One(value) => {
            // SAFETY: the caller vouches for the range.
            unsafe { calls::copy::memset_d8(to, value, bytes, raw) }
        }
        Method::Two(value) => {
            // SAFETY: the caller vouches for the range, and 2 divides its address and length.
            unsafe { calls::copy::memset_d16(to, value, bytes / 2, raw) }
        }
        Method::Four(value) => {
            // SAFETY: the caller vouches for the range, and 4 divides its address and length.
            unsafe { calls::copy::memset_d32(to, value, bytes / 4, raw) }
        }
        Method::Kernel(unit) => {
            // SAFETY: the caller vouches for the range. `entered` has made the context current.
            unsafe { launch(&entered.context().kernels, to, bytes, unit, raw) }
        }
    };
    sent.and_then(|()| entered.refuse_capture())
}

/// Fills `bytes` bytes of the program's own memory at `to` with copies of `element`.
///
/// # Safety
///
/// - The range is valid for writes, and nothing else reads or writes it meanwhile.
/// - `element` is not empty, lies outside of the range, and its length divides `bytes`.
pub(crate) unsafe fn on_cpu(to: *mut u8, bytes: usize, element: &[u8]) {
    /// The most bytes to copy from, so that they stay in the first cache.
    const SOURCE: usize = 16 << 10;
    if let [value] = *element {
        // SAFETY: the caller vouches for the range.
        return unsafe { ptr::write_bytes(to, value, bytes) };
    }
    let mut filled = element.len().min(bytes);
    // SAFETY: `filled` is at most `bytes` and at most the length of the element. The caller vouches
    // for both ranges.
    unsafe { ptr::copy_nonoverlapping(element.as_ptr(), to, filled) };
    let source = (SOURCE / element.len()).max(1) * element.len();
    while filled < bytes {
        let next = filled.min(source).min(bytes - filled);
        // SAFETY: `filled` is less than `bytes`.
        let rest = unsafe { to.add(filled) };
        // SAFETY: `next` is at most the filled bytes before `rest`, and at most the bytes left.
        unsafe { ptr::copy_nonoverlapping(to.cast_const(), rest, next) };
        filled += next;
    }
}

/// The mechanism that fills a range.
#[derive(Debug, PartialEq)]
enum Method<'element> {
    /// A memset of single bytes.
    One(u8),
    /// A memset of units of two bytes.
    Two(u16),
    /// A memset of units of four bytes.
    Four(u32),
    /// A kernel that repeats this unit.
    Kernel(&'element [u8]),
}

/// Chooses the method that fills `bytes` bytes at `address` with copies of `element`.
fn choose(element: &[u8], address: usize, bytes: usize) -> Method<'_> {
    let repeats = |width: &usize| {
        element.len().is_multiple_of(*width)
            && element[*width..] == element[..element.len() - *width]
    };
    // Units that repeat within 16 bytes all have a period of one vector.
    let unit =
        [1, 2, 4, 8, 16].into_iter().find(repeats).map_or(element, |width| &element[..width]);
    let memset = bytes < KERNEL_FROM && address.is_multiple_of(unit.len());
    match *unit {
        [a] if memset => Method::One(a),
        [a, b] if memset => Method::Two(u16::from_ne_bytes([a, b])),
        [a, b, c, d] if memset => Method::Four(u32::from_ne_bytes([a, b, c, d])),
        _ => Method::Kernel(unit),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The vectors of 16 bytes in a period of copies of `length` bytes.
fn period(length: usize) -> usize {
    length / gcd(length, 16)
}

/// Enqueues the kernels that fill a range with copies of `unit`.
///
/// # Safety
///
/// - As for [`enqueue`].
/// - The context of `stream` is current.
unsafe fn launch(
    kernels: &Kernels,
    to: *mut u8,
    bytes: usize,
    unit: &[u8],
    stream: sys::cudaStream_t,
) -> Result<()> {
    let vectors = period(unit.len());
    if vectors <= LONG {
        // SAFETY: the caller vouches for the range and the context.
        return unsafe { launch_fill(kernels, to, bytes, unit, vectors, stream) };
    }
    for (at, slice) in unit.chunks(LONG * 16).enumerate() {
        let to = to.wrapping_add(at * LONG * 16);
        let vectors = slice.len().div_ceil(16);
        // SAFETY: a slice of the first unit, which lies in the range. The caller vouches for the
        // context.
        unsafe { launch_fill(kernels, to, slice.len(), slice, vectors, stream) }?;
    }
    // The first period is repeated byte by byte. The rest is repeated in vectors.
    let head = to.addr().next_multiple_of(16) - to.addr();
    let round = bytes.min(head + vectors * 16);
    // SAFETY: the caller vouches for the range and the context. The first unit has been written.
    unsafe { launch_repeat::<1>(kernels.repeat1, to, round, unit.len(), stream) }?;
    // SAFETY: as above. The period from the first aligned vector on has been written, too.
    unsafe { launch_repeat::<16>(kernels.repeat16, to, bytes, vectors * 16, stream) }
}

/// Enqueues one fill kernel that repeats `unit`.
///
/// `period` vectors hold whole copies of `unit`, or the range has at most one copy.
///
/// # Safety
///
/// - As for [`enqueue`].
/// - `period` is at most [`LONG`].
/// - The context of `stream` is current.
unsafe fn launch_fill(
    kernels: &Kernels,
    to: *mut u8,
    bytes: usize,
    unit: &[u8],
    period: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    // A shorter parameter costs the caller less.
    if period <= SHORT {
        let (kernel, threads) = (kernels.short, SHORT_THREADS);
        // SAFETY: the caller vouches for the range and the context. This kernel's pattern has
        // `SHORT` vectors.
        unsafe { launch_pattern::<SHORT>(kernel, threads, to, bytes, unit, period, stream) }
    } else {
        let (kernel, threads) = (kernels.long, LONG_THREADS);
        // SAFETY: as above, with `LONG` vectors.
        unsafe { launch_pattern::<LONG>(kernel, threads, to, bytes, unit, period, stream) }
    }
}

/// Enqueues a fill kernel whose pattern has `VECTORS` vectors.
///
/// # Safety
///
/// - As for [`launch_fill`].
/// - `kernel` takes a pattern of `VECTORS` vectors, and `period` is at most that.
unsafe fn launch_pattern<const VECTORS: usize>(
    kernel: sys::CUfunction,
    threads: usize,
    mut to: *mut u8,
    bytes: usize,
    unit: &[u8],
    period: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    // The pattern begins at the first address that is a multiple of 16. The bytes before it are the
    // end of the period.
    let head = to.addr().next_multiple_of(16) - to.addr();
    let mut pattern = Pattern([[0; 16]; VECTORS]);
    let written = pattern.0[..period].as_flattened_mut();
    for copy in written.chunks_mut(unit.len()) {
        copy.copy_from_slice(&unit[..copy.len()]);
    }
    written.rotate_left(head);
    let vectors = bytes.saturating_sub(head) / 16;
    let (blocks, threads) = grid(vectors, period, threads);
    let mut bytes = bytes as u64;
    let mut period = period as u32;
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut to).cast(),
        (&raw mut bytes).cast(),
        (&raw mut period).cast(),
        (&raw mut pattern).cast(),
    ];
    // SAFETY: the parameters are those of the fill kernels, which write `bytes` bytes at `to`. The
    // caller vouches for the range and the context.
    unsafe { calls::module::launch(kernel, [blocks, 1], threads, &mut parameters, stream) }
}

/// The blocks of a fill, and the threads of each block.
///
/// A row has a vector for each thread and holds whole periods. It holds whole cache lines of 128
/// bytes, too, except for odd periods of more than 128 vectors. A block has at most `threads`
/// threads, unless a row needs more.
fn grid(vectors: usize, period: usize, threads: usize) -> (u32, u32) {
    let lines = period * 8 / gcd(period, 8);
    let row = if lines <= MOST_THREADS { lines } else { period };
    let threads = (threads / row).max(1) * row;
    (blocks(vectors.div_ceil(threads * STORES).max(1)), threads as u32)
}

/// Converts a number of blocks. A grid has at most 2^31 - 1.
///
/// Blocks cover at least 256 vectors, so that a grid covers 8 TB. Bytes are repeated for at most 16
/// periods.
fn blocks(count: usize) -> u32 {
    i32::try_from(count).expect("a device has less memory").cast_unsigned()
}

/// Enqueues a kernel that repeats a period through a range, in units of `WIDTH` bytes.
///
/// The period has `period` bytes. It begins at the first address that is a multiple of `WIDTH`.
///
/// # Safety
///
/// - As for [`enqueue`].
/// - The context of `stream` is current.
/// - The first period and the bytes before it have been written.
/// - `kernel` is the one that repeats units of `WIDTH` bytes. `WIDTH` divides `period`.
unsafe fn launch_repeat<const WIDTH: usize>(
    kernel: sys::CUfunction,
    mut to: *mut u8,
    bytes: usize,
    period: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let head = to.addr().next_multiple_of(WIDTH) - to.addr();
    if bytes <= head + period {
        return Ok(());
    }
    let columns = (period / WIDTH).div_ceil(REPEAT_THREADS);
    let periods = (bytes - head).div_ceil(period);
    let turns = (periods - 1).div_ceil(REPEAT_STORES);
    let grid = blocks(columns * turns);
    let (mut bytes, mut period, mut columns) = (bytes as u64, period as u64, columns as u32);
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut to).cast(),
        (&raw mut bytes).cast(),
        (&raw mut period).cast(),
        (&raw mut columns).cast(),
    ];
    // SAFETY: the parameters are those of `cgb_repeat1` and `cgb_repeat16`, which read the first
    // period and write after it. The caller vouches for the range and the context.
    unsafe {
        calls::module::launch(kernel, [grid, 1], REPEAT_THREADS as u32, &mut parameters, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernels::{IMAGE, PTX};
    use crate::device::Device;
    use crate::runtime::{self, test_name};
    use crate::stream::stream::Stream;

    const MARGIN: usize = 64;

    /// A stream of a CUDA device. Without a device, the test is reported as left out.
    fn cuda(test: &str) -> Option<Stream> {
        let Device::Cuda(ordinal) = Device::auto() else {
            runtime::left_out(test, "no CUDA device");
            return None;
        };
        if runtime::is_simulated() {
            runtime::left_out(
                test,
                "no hardware: launches are checked here, and not the kernels themselves",
            );
        }
        Some(Stream::new(Device::Cuda(ordinal)).unwrap())
    }

    /// Runs `fill` on `room` bytes of device memory that hold `0xee`, and returns the contents.
    fn after(
        stream: &Stream,
        room: usize,
        fill: impl FnOnce(*mut u8, &EnteredStream<'_>) -> Result<()>,
    ) -> Vec<u8> {
        let entered = stream.enter().unwrap().unwrap();
        let _current = entered.context().enter().unwrap();
        let base = calls::memory::malloc(room).unwrap();
        let mut host = vec![0; room];
        // SAFETY: within the allocation, which only this stream uses.
        unsafe { calls::copy::memset_d8(base, 0xee, room, entered.raw()) }.unwrap();
        fill(base, &entered).unwrap();
        let (to, down) = (host.as_mut_ptr(), calls::copy::Direction::Down);
        // SAFETY: both sides have `room` bytes. Nothing uses them before the stream is done.
        unsafe { calls::copy::memcpy(down, to, base, room, entered.raw()) }.unwrap();
        stream.synchronize().unwrap();
        // SAFETY: allocated above, and nothing is in flight.
        unsafe { calls::memory::free(base) }.unwrap();
        host
    }

    /// Fills a range at `offset` from a multiple of 16, and checks it and the bytes beside it.
    fn check(stream: &Stream, element: &[u8], count: usize, offset: usize) {
        let (begin, bytes) = (MARGIN + offset, element.len() * count);
        let seen = after(stream, begin + bytes + MARGIN, |base, entered| {
            // SAFETY: within the allocation, which only this stream uses.
            unsafe { enqueue(base.wrapping_add(begin), bytes, element, entered) }
        });
        let (before, rest) = seen.split_at(begin);
        let (filled, behind) = rest.split_at(bytes);
        let what = format!("{bytes} bytes at {offset}, elements of {}", element.len());
        assert!(filled == element.repeat(count), "{what}");
        assert!(before.iter().chain(behind).all(|byte| *byte == 0xee), "beside {what}");
    }

    fn element(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at * 31 + at / 256 + 3) as u8).collect()
    }

    #[test]
    fn a_fill_on_the_cpu_repeats_the_element_and_touches_nothing_beside_it() {
        for size in [1, 2, 3, 7, 16, 100] {
            for count in [0, 1, 2, 3, 8, 13, 40_000] {
                let (element, bytes) = (element(size), size * count);
                let mut memory = vec![0xee; bytes + 2 * MARGIN];
                let to = memory[MARGIN..].as_mut_ptr();
                // SAFETY: within the vector, which nothing else uses.
                unsafe { on_cpu(to, bytes, &element) };
                let (before, rest) = memory.split_at(MARGIN);
                let (filled, behind) = rest.split_at(bytes);
                assert!(filled == element.repeat(count), "{count} of {size}");
                assert!(before.iter().chain(behind).all(|byte| *byte == 0xee), "{count} of {size}");
            }
        }
    }

    #[test]
    fn a_fill_begins_and_ends_anywhere() {
        let Some(stream) = cuda(test_name!()) else { return };
        for size in (1..=17).chain([48, 100, 225, 3584, 3585, 4000, 4096]) {
            for offset in [0, 1, 2, 3, 4, 7, 8, 12, 15] {
                for count in [1, 2, 3, 15, 16, 17, (40_000 / size).max(18)] {
                    check(&stream, &element(size), count, offset);
                }
            }
        }
    }

    #[test]
    fn a_fill_is_the_same_by_a_memset_and_by_a_kernel() {
        let Some(stream) = cuda(test_name!()) else { return };
        for size in (1..=17).chain([48, 100, 3584, 3585, 4000]) {
            let most = KERNEL_FROM / size;
            for count in [most - 1, most, most + 1] {
                for offset in [0, 4, 6, 15] {
                    check(&stream, &element(size), count, offset);
                    check(&stream, &vec![0x3c; size], count, offset);
                }
            }
        }
    }

    #[test]
    fn only_a_short_fill_that_a_memset_can_express_goes_to_one() {
        let (a, b, c, d) = (1, 2, 3, 4);
        let ab = u16::from_ne_bytes([a, b]);
        let abcd = u32::from_ne_bytes([a, b, c, d]);
        for short in [48, KERNEL_FROM - 48] {
            assert_eq!(choose(&[a], 1, short), Method::One(a));
            assert_eq!(choose(&[a, a, a], 1, short), Method::One(a));
            assert_eq!(choose(&[0; 100], 1, short), Method::One(0));
            assert_eq!(choose(&[a, b], 2, short), Method::Two(ab));
            assert_eq!(choose(&[a, b, a, b, a, b], 6, short), Method::Two(ab));
            assert_eq!(choose(&[a, b, c, d, a, b, c, d], 4, short), Method::Four(abcd));
        }
        for bytes in [48, KERNEL_FROM - 48, KERNEL_FROM, 16 * KERNEL_FROM] {
            // A memset of that unit does not take the address.
            assert_eq!(choose(&[a, b], 1, bytes), Method::Kernel(&[a, b]));
            assert_eq!(choose(&[a, b, c, d], 2, bytes), Method::Kernel(&[a, b, c, d]));
            // The elements are no units of a memset.
            for element in [&[a, b, a][..], &[a, b, c, d, a, b], &[a, a, a, a, a, a, a, b]] {
                assert_eq!(choose(element, 0, bytes), Method::Kernel(element));
            }
            let eight = [a, b, c, d, d, c, b, a];
            assert_eq!(choose(&eight.repeat(3), 0, bytes), Method::Kernel(&eight));
        }
        for long in [KERNEL_FROM, 16 * KERNEL_FROM] {
            assert_eq!(choose(&[a], 0, long), Method::Kernel(&[a]));
            assert_eq!(choose(&[0; 100], 0, long), Method::Kernel(&[0]));
            assert_eq!(choose(&[a, b, a, b], 0, long), Method::Kernel(&[a, b]));
            assert_eq!(choose(&[a, b, c, d], 0, long), Method::Kernel(&[a, b, c, d]));
        }
    }

    #[test]
    fn rows_are_whole_periods_and_whole_lines_and_cover_the_range() {
        for period in 1..=LONG {
            for most in [SHORT_THREADS, LONG_THREADS] {
                for vectors in [0, 1, 255, 256, 257, 65_536, 65_537] {
                    let (blocks, threads) = grid(vectors, period, most);
                    let (blocks, threads) = (blocks as usize, threads as usize);
                    assert!(threads <= MOST_THREADS && threads.is_multiple_of(period));
                    let lines = threads.is_multiple_of(8);
                    assert!(lines || (period > 128 && !period.is_multiple_of(2)), "{period}");
                    assert!((blocks - 1) * threads * STORES <= vectors);
                    assert!(blocks * threads * STORES >= vectors && threads >= 16);
                }
            }
        }
    }

    #[test]
    fn the_image_and_the_ptx_that_stands_in_for_it_both_load_and_fill() {
        let test = "the_image_and_the_ptx_that_stands_in_for_it_both_load_and_fill";
        let Some(stream) = cuda(test) else { return };
        let entered = stream.enter().unwrap().unwrap();
        let _current = entered.context().enter().unwrap();
        let element = element(12);
        for image in [&IMAGE.0, PTX.as_bytes()] {
            // SAFETY: one is a whole fat binary, and the other is PTX that ends with a NUL.
            let kernels = unsafe { Kernels::of(image) }.unwrap();
            let seen = after(&stream, 48_000, |base, entered| {
                // SAFETY: within the allocation, which only this stream uses.
                unsafe { launch(&kernels, base, 48_000, &element, entered.raw()) }
            });
            assert!(seen == element.repeat(4_000));
        }
    }
}
