//! One kernel that copies many ranges between mapped host memory and device memory: `kernels/gather.cu`.

use std::ffi::c_void;

use crate::cuda::calls;
use crate::cuda::kernel_graph::KernelGraph;
use crate::error::Result;
use crate::stream::stream::EnteredStream;
use crate::transfer::plan::CopyRange;

/// Pieces in the parameter of each kernel, as in `kernels/gather.cu`. The larger one is within the 4,096 bytes that
/// every driver takes ("CUDA C++ Programming Guide, `__global__` Function Parameters").
const FEW: usize = 32;
const MANY: usize = 224;

const THREADS: u32 = 256;

/// So many blocks for each piece, at most: with one load of 16 bytes under way in each thread, 32 blocks keep
/// PCIe 5 busy, and a few multiprocessors.
const MOST_BLOCKS: usize = 32;

/// For shorter pieces so many, whatever their length: a graph whose grid changes costs what a launch costs.
const FEW_BLOCKS: usize = 8;

/// As in `kernels/gather.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    offset: u64,
    bytes: u64,
}

impl Entry {
    /// Fills entries in; the answer is how many blocks the longest piece takes.
    fn fill_in(entries: &mut [Entry], ranges: &[CopyRange]) -> usize {
        let mut longest = 0;
        for (entry, CopyRange { bytes, .. }) in entries.iter_mut().zip(ranges) {
            *entry = Entry { offset: bytes.start as u64, bytes: bytes.len() as u64 };
            longest = longest.max(bytes.len());
        }
        longest.div_ceil(THREADS as usize * 16)
    }
}

/// Enqueues copies of the pieces from one slab to the same places of the other.
///
/// # Safety
///
/// - Of `to` and `from`, both aligned to 16, one is memory of the stream's device and the other
///   host memory that its kernels reach under this address.
/// - The pieces lie in both and are not empty; those of `from` are initialised in stream order.
/// - Until the copies have finished in stream order, both stay allocated, nothing else writes the
///   pieces in either, and nothing reads them in `to`.
pub(crate) unsafe fn enqueue(
    to: *mut u8,
    from: *const u8,
    ranges: &[CopyRange],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    for ranges in ranges.chunks(MANY) {
        if ranges.len() <= FEW {
            // SAFETY: the caller vouches for the pieces, which are so few.
            unsafe { enqueue_few(to, from, ranges, entered) }?;
        } else {
            // SAFETY: as above.
            unsafe { enqueue_many(to, from, ranges, entered) }?;
        }
    }
    Ok(())
}

/// By the stream's graph, unless it has none, or another thread is at it just now.
///
/// # Safety
///
/// As for [`enqueue`]; there are no more than `FEW` pieces.
unsafe fn enqueue_few(
    mut to: *mut u8,
    mut from: *const u8,
    ranges: &[CopyRange],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    let mut entries = [Entry { offset: 0, bytes: 0 }; FEW];
    // A graph whose grid is another one than before costs as much as a launch: there are two.
    let blocks = match Entry::fill_in(&mut entries, ranges) {
        0..=FEW_BLOCKS => FEW_BLOCKS,
        _ => MOST_BLOCKS,
    };
    let kernel = entered.context().kernels.gather_32;
    let grid = [blocks as u32, FEW as u32];
    let parameters: &mut [*mut c_void] =
        &mut [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut entries).cast()];
    let mut stream_graph = entered.gather_graph();
    let graph = stream_graph.as_mut().and_then(|stream_graph| {
        stream_graph.for_launch(|| {
            // SAFETY: the parameters are those of `cgb_gather_32`.
            unsafe { KernelGraph::new(kernel, grid, THREADS, parameters, entered.context()) }
        })
    });
    if let Some(graph) = graph
        // SAFETY: as above, and the entry has the kernel's context current.
        && unsafe { graph.set(kernel, grid, THREADS, parameters) }.is_ok()
    {
        // SAFETY: as above; the kernel copies the entries that have bytes, for which the caller vouches.
        return unsafe { graph.launch(entered.raw()) };
    }
    // SAFETY: as above, and the entry has the kernel's context current.
    unsafe { calls::module::launch(kernel, grid, THREADS, parameters, entered.raw()) }
}

/// # Safety
///
/// As for [`enqueue`]; there are no more than `MANY` pieces.
unsafe fn enqueue_many(
    mut to: *mut u8,
    mut from: *const u8,
    ranges: &[CopyRange],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    let mut entries = [Entry { offset: 0, bytes: 0 }; MANY];
    let blocks = Entry::fill_in(&mut entries, ranges).clamp(1, MOST_BLOCKS);
    let kernel = entered.context().kernels.gather_224;
    let grid = [blocks as u32, ranges.len() as u32];
    let parameters: &mut [*mut c_void] =
        &mut [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut entries).cast()];
    // SAFETY: the parameters are those of `cgb_gather_224`, which copies the first entries, as many as the grid has
    // columns; the caller vouches for them, and the entry has the kernel's context current.
    unsafe { calls::module::launch(kernel, grid, THREADS, parameters, entered.raw()) }
}
