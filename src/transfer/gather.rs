//! Copies of many ranges by one kernel, between mapped host memory and device memory.
//!
//! The kernel is in `kernels/gather.cu`.

use std::ffi::c_void;

use crate::cuda::calls;
use crate::cuda::kernel_graph::KernelGraph;
use crate::error::Result;
use crate::stream::stream::EnteredStream;
use crate::transfer::plan::CopyRange;

/// The ranges in the parameter of each kernel, as in `kernels/gather.cu`.
///
/// Every driver takes parameters of 4,096 bytes ("CUDA C++ Programming Guide, `__global__` Function
/// Parameters"). The larger table is within that.
const FEW: usize = 32;
const MANY: usize = 224;

/// Threads of a block.
const THREADS: u32 = 256;

/// The most blocks for each range.
///
/// Each thread has one load of 16 bytes in flight. 32 blocks saturate PCIe 5 and occupy a few
/// multiprocessors.
const MOST_BLOCKS: usize = 32;

/// The blocks of a graph for each range that needs no more.
const FEW_BLOCKS: usize = 8;

/// A range, as in `kernels/gather.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    offset: u64,
    bytes: u64,
}

impl Entry {
    /// Fills in an entry for each range. Returns the number of blocks for the longest range.
    fn fill_in(entries: &mut [Entry], ranges: &[CopyRange]) -> usize {
        let mut longest = 0;
        for (entry, CopyRange { bytes, .. }) in entries.iter_mut().zip(ranges) {
            *entry = Entry { offset: bytes.start as u64, bytes: bytes.len() as u64 };
            longest = longest.max(bytes.len());
        }
        longest.div_ceil(THREADS as usize * 16)
    }
}

/// Enqueues copies of ranges from one slab to the same offsets of another.
///
/// # Safety
///
/// - `to` and `from` are aligned to 16 bytes.
/// - One of them is memory of the stream's device. The other is host memory that the device's
///   kernels reach at this address.
/// - The ranges lie in both and are not empty. Those of `from` are initialized in stream order.
/// - Until the copies have finished in stream order, both slabs stay allocated. Nothing else writes
///   the ranges in either slab, and nothing reads them in `to`.
pub(crate) unsafe fn enqueue(
    to: *mut u8,
    from: *const u8,
    ranges: &[CopyRange],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    for ranges in ranges.chunks(MANY) {
        if ranges.len() <= FEW {
            // SAFETY: the caller vouches for the ranges, and there are at most `FEW`.
            unsafe { enqueue_few(to, from, ranges, entered) }?;
        } else {
            // SAFETY: as above, and there are at most `MANY`.
            unsafe { enqueue_many(to, from, ranges, entered) }?;
        }
    }
    Ok(())
}

/// Enqueues a few ranges by the stream's graph, or by a launch if the graph is not available.
///
/// # Safety
///
/// - As for [`enqueue`].
/// - There are at most `FEW` ranges.
unsafe fn enqueue_few(
    mut to: *mut u8,
    mut from: *const u8,
    ranges: &[CopyRange],
    entered: &EnteredStream<'_>,
) -> Result<()> {
    let mut entries = [Entry { offset: 0, bytes: 0 }; FEW];
    // A graph whose grid changes costs as much as a launch, so there are two grids alone.
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
            // SAFETY: the parameters are those of `cgb_gather_32`, and `entered` has made its
            // context current.
            unsafe { KernelGraph::new(kernel, grid, THREADS, parameters, entered.context()) }
        })
    });
    if let Some(graph) = graph
        // SAFETY: as above.
        && unsafe { graph.set(kernel, grid, THREADS, parameters) }.is_ok()
    {
        // SAFETY: as above. The caller vouches for the ranges. The kernel skips empty entries.
        return unsafe { graph.launch(entered.raw()) };
    }
    // SAFETY: as above. The caller vouches for the ranges.
    unsafe { calls::module::launch(kernel, grid, THREADS, parameters, entered.raw()) }
}

/// Enqueues many ranges by a launch.
///
/// # Safety
///
/// - As for [`enqueue`].
/// - There are at most `MANY` ranges.
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
    // SAFETY: the parameters are those of `cgb_gather_224`. It copies one entry for each column of
    // the grid. The caller vouches for these. `entered` has made the kernel's context current.
    unsafe { calls::module::launch(kernel, grid, THREADS, parameters, entered.raw()) }
}
