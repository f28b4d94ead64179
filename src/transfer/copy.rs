//! Copies between a host side and device memory, enqueued on a stream.

use crate::cuda::calls::copy::{Direction, memcpy};
use crate::error::Result;
use crate::memory::host::HostMemory;
use crate::stream::stream::EnteredStream;

/// Enqueues a copy of `bytes` bytes between `host` and memory of the stream's device.
///
/// A range that spans several registrations of host memory takes a copy for each.
///
/// # Safety
///
/// - The host's range, which is `from` or `to` as `direction` says, lies in `host`.
/// - The other range lies in memory of the stream's device.
/// - `from` is valid for reads and initialized in stream order. `to` is valid for writes.
/// - Until the copies have finished in stream order, both ranges stay allocated. Nothing else
///   writes either range, and nothing reads `to`.
#[inline]
pub(crate) unsafe fn enqueue(
    direction: Direction,
    host: &HostMemory,
    to: *mut u8,
    from: *const u8,
    bytes: usize,
    entered: &EnteredStream<'_>,
) -> Result<()> {
    let at = match direction {
        Direction::Up => from,
        Direction::Down => to.cast_const(),
    };
    for range in host.registered_ranges(at, bytes) {
        let (to, from) = (to.wrapping_add(range.start), from.wrapping_add(range.start));
        // SAFETY: parts of the caller's ranges, for which the caller vouches.
        unsafe { memcpy(direction, to, from, range.len(), entered.raw()) }?;
    }
    Ok(())
}
