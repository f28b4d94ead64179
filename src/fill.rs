//! Filling device memory with an element of any size: what goes to the driver's memset, what to a kernel.
//!
//! An element whose bytes repeat every 1, 2 or 4 is a memset, which costs the caller a third of a kernel
//! launch. Any other is written out on the host until it comes round to a multiple of 16 bytes, and a
//! kernel of `kernels/fill.cu` repeats that. An element too long for a kernel's parameters is written
//! once, piece by piece, and then repeated from device memory.

use std::ffi::c_void;

use crate::error::{Error, Result};
use crate::raw;
use crate::stream::EnteredStream;
use crate::sys;

/// Made by `build.rs` from `kernels/fill.cu`, or committed.
static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/fill.fatbin")));

/// As nvcc aligns the images that it embeds, and more.
#[repr(C, align(16))]
struct Aligned<Bytes: ?Sized>(Bytes);

/// The same source as PTX that every driver since CUDA 12.0's compiles, for one that refuses the image.
static PTX: &str = concat!(include_str!("../kernels/fill.ptx"), "\0");

/// The fill kernels, loaded into a context for the life of the process.
pub(crate) struct Kernels {
    fill: sys::CUfunction,
    repeat1: sys::CUfunction,
    repeat16: sys::CUfunction,
}

impl Kernels {
    /// Loads the kernels into the current context.
    pub(crate) fn load() -> Result<Kernels> {
        // SAFETY: a whole fat binary.
        let image = unsafe { Kernels::of(&IMAGE.0) };
        // What the image was refused for is the better reason: the PTX is the second choice.
        // SAFETY: PTX that ends with a NUL.
        image.or_else(|refused| unsafe { Kernels::of(PTX.as_bytes()) }.map_err(|_| refused))
    }

    /// # Safety
    ///
    /// As for [`raw::module_load`].
    unsafe fn of(image: &[u8]) -> Result<Kernels> {
        // SAFETY: the caller vouches for the image.
        let module = unsafe { raw::module_load(image) }?;
        // SAFETY: the module was just loaded.
        let function = |name| unsafe { raw::module_function(module, name) };
        let load = || {
            Ok(Kernels {
                fill: function(c"cgb_fill")?,
                repeat1: function(c"cgb_repeat1")?,
                repeat16: function(c"cgb_repeat16")?,
            })
        };
        load().inspect_err(|_: &Error| {
            // SAFETY: loaded above, and nothing of it was launched.
            let _ = unsafe { raw::module_unload(module) };
        })
    }
}

/// As in `kernels/fill.cu`.
const PATTERN_BYTES: usize = 224 * 16;
const STORES: usize = 4;
const THREADS: usize = 256;

/// The kernel's parameter: whole periods of what is to be written.
#[repr(C, align(16))]
struct Pattern([u8; PATTERN_BYTES]);

/// Enqueues a fill of `bytes` bytes at `to` with copies of `element`.
///
/// # Safety
///
/// The range is device memory of the stream's device that nothing else touches until the fill has finished in
/// stream order; `element` is not empty, and `bytes` is a multiple of its length.
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
    match repeating(element, to.addr()) {
        Some(Unit::One(value)) => {
            // SAFETY: the caller vouches for the range.
            unsafe { raw::memset_d8(to, value, bytes, raw) }
        }
        Some(Unit::Two(value)) => {
            // SAFETY: the caller vouches for the range, and 2 divides its address and length.
            unsafe { raw::memset_d16(to, value, bytes / 2, raw) }
        }
        Some(Unit::Four(value)) => {
            // SAFETY: the caller vouches for the range, and 4 divides its address and length.
            unsafe { raw::memset_d32(to, value, bytes / 4, raw) }
        }
        None => {
            // A launch wants the kernel's own context, not just any.
            let _current = entered.context().enter()?;
            let kernels = &entered.context().kernels;
            let period = element.len() / gcd(element.len(), 16) * 16;
            if period <= PATTERN_BYTES {
                // SAFETY: the caller vouches for the range, and the context is current.
                return unsafe { launch_fill(kernels, to, bytes, element, period, raw) };
            }
            for (at, piece) in element.chunks(PATTERN_BYTES).enumerate() {
                let to = to.wrapping_add(at * PATTERN_BYTES);
                let period = piece.len().next_multiple_of(16);
                // SAFETY: a piece of the first element, which lies in the range; the context is current.
                unsafe { launch_fill(kernels, to, piece.len(), piece, period, raw) }?;
            }
            // SAFETY: the caller vouches for the range, and the context is current.
            unsafe { launch_repeat(kernels, to, bytes, element.len(), raw) }
        }
    }
}

enum Unit {
    One(u8),
    Two(u16),
    Four(u32),
}

/// The shortest unit of 1, 2 or 4 bytes that `element` repeats, where `address` is a multiple of it.
fn repeating(element: &[u8], address: usize) -> Option<Unit> {
    let repeats = |width: usize| {
        element.len().is_multiple_of(width)
            && address.is_multiple_of(width)
            && element.chunks_exact(width).all(|unit| unit == &element[..width])
    };
    match *element {
        [a, ..] if repeats(1) => Some(Unit::One(a)),
        [a, b, ..] if repeats(2) => Some(Unit::Two(u16::from_ne_bytes([a, b]))),
        [a, b, c, d, ..] if repeats(4) => Some(Unit::Four(u32::from_ne_bytes([a, b, c, d]))),
        _ => None,
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Writes `element` over and over; it comes round to its beginning within `period` bytes, or there is
/// no more than one of it.
///
/// # Safety
///
/// As for [`enqueue`]; `period` is a multiple of 16 and at most [`PATTERN_BYTES`]; `stream`'s context is
/// current.
unsafe fn launch_fill(
    kernels: &Kernels,
    mut to: *mut u8,
    bytes: usize,
    element: &[u8],
    period: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    // The kernel's pattern begins at the first multiple of 16 in the range; what lies before it is
    // the end of the period.
    let head = to.addr().next_multiple_of(16) - to.addr();
    let mut pattern = Pattern([0; PATTERN_BYTES]);
    let (body, before) = pattern.0[..period].split_at_mut(period - head);
    let mut rest = element.iter().cycle();
    for (to, from) in before.iter_mut().chain(body).zip(&mut rest) {
        *to = *from;
    }
    let row = THREADS / (period / 16) * (period / 16);
    let vectors = bytes.saturating_sub(head) / 16;
    let blocks = vectors.div_ceil(row * STORES).max(1);
    // A grid has at most 2^31 - 1 blocks, of 8 KB and more: 17 TB.
    let blocks = i32::try_from(blocks).expect("a device has less memory").cast_unsigned();
    let mut bytes = bytes as u64;
    let mut vectors = (period / 16) as u32;
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut to).cast(),
        (&raw mut bytes).cast(),
        (&raw mut vectors).cast(),
        (&raw mut pattern).cast(),
    ];
    // SAFETY: the parameters are those of `cgb_fill`, which writes `bytes` bytes at `to`; the caller
    // vouches for them and for the context.
    unsafe { raw::launch(kernels.fill, blocks, THREADS as u32, &mut parameters, stream) }
}

/// Repeats the first `element` bytes through the range.
///
/// # Safety
///
/// As for [`enqueue`], and `stream`'s context is current.
unsafe fn launch_repeat(
    kernels: &Kernels,
    mut to: *mut u8,
    bytes: usize,
    element: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let wide = element.is_multiple_of(16) && to.addr().is_multiple_of(16);
    let (kernel, width) = if wide { (kernels.repeat16, 16) } else { (kernels.repeat1, 1) };
    let mut units = (bytes / width) as u64;
    let mut period = (element / width) as u64;
    let mut parameters: [*mut c_void; 3] =
        [(&raw mut to).cast(), (&raw mut units).cast(), (&raw mut period).cast()];
    // The kernel strides over the range with however many blocks there are.
    let blocks = (units.div_ceil(THREADS as u64)).clamp(1, 4096) as u32;
    // SAFETY: the parameters are those of `cgb_repeat1` and `cgb_repeat16`, which read the first element and
    // write behind it; the caller vouches for the range and for the context.
    unsafe { raw::launch(kernel, blocks, THREADS as u32, &mut parameters, stream) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::runtime;
    use crate::stream::Stream;

    const ROOM: usize = 64 << 10;

    /// A stream of a CUDA device; where there is none, says what is left out.
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

    /// Runs `fill` on device memory of `0xee`, and gives back what is there then.
    fn after(
        stream: &Stream,
        fill: impl FnOnce(*mut u8, &EnteredStream<'_>) -> Result<()>,
    ) -> Vec<u8> {
        let entered = stream.enter().unwrap().unwrap();
        let _current = entered.context().enter().unwrap();
        let base = raw::malloc(ROOM).unwrap();
        let mut host = vec![0; ROOM];
        // SAFETY: within the allocation, which only this stream uses.
        unsafe { raw::memset_d8(base, 0xee, ROOM, entered.raw()) }.unwrap();
        fill(base, &entered).unwrap();
        let (to, kind) = (host.as_mut_ptr(), sys::cudaMemcpyKind::cudaMemcpyDeviceToHost);
        // SAFETY: as many bytes on both sides, and nothing looks before the stream is done.
        unsafe { raw::memcpy_async(to, base, ROOM, kind, entered.raw()) }.unwrap();
        stream.synchronize().unwrap();
        // SAFETY: allocated above, and nothing is in flight.
        unsafe { raw::free(base) }.unwrap();
        host
    }

    fn element(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at * 31 + at / 256 + 3) as u8).collect()
    }

    #[test]
    fn a_fill_begins_and_ends_anywhere() {
        let Some(stream) = cuda("a_fill_begins_and_ends_anywhere") else { return };
        for size in [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 48, 100, 3584, 3585, 4000, 4096] {
            let element = element(size);
            for offset in [0, 1, 2, 3, 4, 7, 8, 12, 15] {
                for count in [1, 2, 3, 15, 16, 17, 40_000 / size] {
                    let bytes = size * count.min((ROOM - 64) / size);
                    let seen = after(&stream, |base, entered| {
                        // SAFETY: within the allocation, which only this stream uses.
                        unsafe { enqueue(base.wrapping_add(16 + offset), bytes, &element, entered) }
                    });
                    let (before, rest) = seen.split_at(16 + offset);
                    let (filled, behind) = rest.split_at(bytes);
                    let what = format!("{bytes} bytes at {offset}, elements of {size}");
                    assert!(filled.chunks(size).all(|seen| seen == element), "{what}");
                    assert!(before.iter().chain(behind).all(|byte| *byte == 0xee), "beside {what}");
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
            // SAFETY: a whole fat binary, and PTX that ends with a NUL.
            let kernels = unsafe { Kernels::of(image) }.unwrap();
            let seen = after(&stream, |base, entered| {
                // SAFETY: within the allocation, which only this stream uses.
                unsafe { launch_fill(&kernels, base, 48_000, &element, 48, entered.raw()) }
            });
            assert!(seen[..48_000].chunks(12).all(|seen| seen == element));
        }
    }
}
