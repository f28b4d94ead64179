//! One kernel that copies many ranges between mapped host memory and device memory: `kernels/gather.cu`.

use std::ffi::c_void;

use crate::error::Result;
use crate::moves::Piece;
use crate::raw;
use crate::stream::EnteredStream;
use crate::sys;

/// Pieces in the parameter of each kernel, as in `kernels/gather.cu`. The larger one is within the 4,096 bytes that
/// every driver takes ("CUDA C++ Programming Guide, `__global__` Function Parameters").
const SHORT: usize = 16;
const LONG: usize = 224;

const THREADS: usize = 256;

/// So many blocks for each piece, at most: with one load of 16 bytes under way in each thread, 32 blocks keep
/// PCIe 5 busy, and a few multiprocessors.
const MOST_BLOCKS: usize = 32;

/// As in `kernels/gather.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    offset: u64,
    bytes: u64,
}

/// Enqueues copies of the pieces from one slab to the same places of the other.
///
/// # Safety
///
/// Of `to` and `from`, both aligned to 16, one is device memory and the other host memory that kernels of the stream's
/// device reach under this address. The pieces lie in both and are not empty, and nothing else touches them against
/// the copies until those have finished in stream order.
pub(crate) unsafe fn enqueue(
    to: *mut u8,
    from: *const u8,
    pieces: &[Piece],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    // A launch wants the kernel's own context, not just any.
    let _current = entered.context().enter_unless_current()?;
    let kernels = &entered.context().kernels;
    for pieces in pieces.chunks(LONG) {
        // What a launch carries is what it costs the caller.
        if pieces.len() <= SHORT {
            // SAFETY: the caller vouches for the pieces; this kernel takes so many, and its context is current.
            unsafe { launch::<SHORT>(kernels.gather_16, to, from, pieces, entered) }?;
        } else {
            // SAFETY: as above.
            unsafe { launch::<LONG>(kernels.gather_224, to, from, pieces, entered) }?;
        }
    }
    Ok(())
}

/// # Safety
///
/// As for [`enqueue`]; `kernel` takes `MOST` pieces, which these are no more than, and its context is current.
unsafe fn launch<const MOST: usize>(
    kernel: sys::CUfunction,
    mut to: *mut u8,
    mut from: *const u8,
    pieces: &[Piece],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    let mut entries = [Entry { offset: 0, bytes: 0 }; MOST];
    let mut longest = 0;
    for (entry, Piece { bytes, .. }) in entries.iter_mut().zip(pieces) {
        *entry = Entry { offset: bytes.start as u64, bytes: bytes.len() as u64 };
        longest = longest.max(bytes.len());
    }
    let blocks = longest.div_ceil(THREADS * 16).clamp(1, MOST_BLOCKS);
    let grid = [blocks as u32, pieces.len() as u32];
    let mut parameters: [*mut c_void; 3] =
        [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut entries).cast()];
    // SAFETY: the parameters are those of `cgb_gather_16` and `cgb_gather_224`, which copy the first entries, as many
    // as the grid has columns; the caller vouches for them and for the context.
    unsafe { raw::launch(kernel, grid, THREADS as u32, &mut parameters, entered.raw()) }
}
