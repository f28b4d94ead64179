//! Small pinned memory, cut from chunks that are registered once.
//!
//! The system calls of a registration cost the same for one page and for 2 MB. Small memory is
//! therefore a piece of a chunk of [registered pages](crate::memory::registered). One empty chunk
//! stays with its device. Returning a piece to its chunk calls no CUDA.
//!
//! No lock is held during a CUDA call: the call may wait for a device that waits for another
//! thread's piece. Two threads that find no room at the same time make a chunk each.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::Result;
use crate::memory::options::HostFlags;
use crate::memory::registered::Registered;

/// The size of a chunk in bytes: one hugepage.
pub(crate) const CHUNK: usize = 2 << 20;

/// The most bytes of a piece, so that a chunk holds two.
///
/// Mapping, registering and releasing 1 MB takes 320 us (H100, docs/benchmarks.md, "Pinned
/// memory").
const LARGEST: usize = 1 << 20;

/// Offsets and sizes of pieces are multiples of this.
const UNIT: usize = 256;

/// Returns whether memory of this layout can be a piece.
pub(crate) fn fits(layout: Layout) -> bool {
    layout.size() <= LARGEST && layout.align() <= LARGEST
}

/// Rounds a layout that [fits] up to whole units.
fn in_units(layout: Layout) -> Layout {
    let bytes = layout.size().next_multiple_of(UNIT);
    Layout::from_size_align(bytes, layout.align().max(UNIT)).expect("it is small")
}

/// The byte that debug builds fill returned pieces with.
const GIVEN_BACK: u8 = 0xdd;

/// The most empty chunks that a device keeps for each set of flags.
const KEPT: usize = 1;

/// The chunks of one device. They outlive its buffers.
pub(crate) struct DeviceChunks {
    context: &'static Context,
    /// Indexed by the bits of the flags that the chunks are registered with.
    chunks: [Chunks; HostFlags::OWN.bits() as usize + 1],
}

/// Chunks that are registered with the same flags.
#[derive(Default)]
struct Chunks {
    /// Keyed by address.
    all: Mutex<BTreeMap<usize, Chunk>>,
    /// Set once CUDA has refused these flags for a reason other than a shortage.
    refused: AtomicBool,
}

/// The chunks of a device, created on the first call.
pub(crate) fn of_device(context: &'static Context) -> &'static DeviceChunks {
    static DEVICES: Mutex<Vec<&'static DeviceChunks>> = Mutex::new(Vec::new());
    let mut devices = DEVICES.lock().unwrap_or_else(|poison| poison.into_inner());
    let known = devices.iter().find(|known| ptr::eq(known.context, context));
    known.copied().unwrap_or_else(|| {
        let made: &DeviceChunks =
            Box::leak(Box::new(DeviceChunks { context, chunks: Default::default() }));
        devices.push(made);
        made
    })
}

impl DeviceChunks {
    fn chunks(&'static self, flags: HostFlags) -> &'static Chunks {
        &self.chunks[flags.bits() as usize]
    }

    /// Takes a zeroed piece from a chunk that has room. The layout [fits] and is not empty.
    pub(crate) fn piece(&'static self, layout: Layout, flags: HostFlags) -> Option<Piece> {
        let (chunks, layout) = (self.chunks(flags), in_units(layout));
        let address = chunks.lock().values_mut().find_map(|chunk| chunk.take(layout))?;
        let bytes = layout.size();
        // SAFETY: the piece has that size, and nothing else uses it.
        unsafe { address.write_bytes(0, bytes) };
        Some(Piece { chunks, address, bytes })
    }

    /// Takes a zeroed piece from a new chunk. The device's context is current.
    pub(crate) fn piece_of_new_chunk(
        &'static self,
        layout: Layout,
        flags: HostFlags,
    ) -> Result<Piece> {
        let (chunks, layout) = (self.chunks(flags), in_units(layout));
        let whole = Layout::from_size_align(CHUNK, CHUNK).expect("a chunk is a valid layout");
        // Fresh pages are zero.
        let mut chunk = Chunk {
            pages: Registered::new(whole, flags.bits(), self.context)?,
            free: Free::all(CHUNK),
        };
        let address = chunk.take(layout).expect("a chunk has room for the largest piece");
        chunks.lock().insert(chunk.pages.address().addr().get(), chunk);
        Ok(Piece { chunks, address, bytes: layout.size() })
    }

    pub(crate) fn refuses_registering(&'static self, flags: HostFlags) -> bool {
        self.chunks(flags).refused.load(Ordering::Relaxed)
    }

    pub(crate) fn remember_refusal(&'static self, flags: HostFlags) {
        self.chunks(flags).refused.store(true, Ordering::Relaxed);
    }
}

impl Chunks {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Chunk>> {
        self.all.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Returns a piece to its chunk. The caller releases the returned chunk, without the lock.
    fn give_back(&self, address: NonNull<u8>, bytes: usize) -> Option<Chunk> {
        let mut chunks = self.lock();
        let address = address.addr().get();
        let (start, chunk) = chunks.range_mut(..=address).next_back()?;
        let (start, offset) = (*start, address - *start);
        chunk.free.give_back(offset..offset + bytes);
        if !chunk.free.is_all(CHUNK) {
            return None;
        }
        let empty = chunks.values().filter(|chunk| chunk.free.is_all(CHUNK)).count();
        (empty > KEPT).then(|| chunks.remove(&start))?
    }
}

/// Registered pages and their free ranges.
struct Chunk {
    pages: Registered,
    free: Free,
}

impl Chunk {
    fn take(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        let offset = self.free.take(layout)?;
        // SAFETY: the offset lies in the chunk.
        Some(unsafe { self.pages.address().add(offset) })
    }
}

/// The free ranges of a chunk.
struct Free {
    /// Sorted. No two of them touch.
    ranges: Vec<Range<usize>>,
    /// An upper bound of their lengths, so that a fragmented chunk costs no search.
    longest: usize,
}

impl Free {
    fn all(bytes: usize) -> Free {
        Free { ranges: iter::once(0..bytes).collect(), longest: bytes }
    }

    fn is_all(&self, bytes: usize) -> bool {
        matches!(self.ranges.as_slice(), [range] if *range == (0..bytes))
    }

    /// Takes the first place that the layout fits into, and returns its offset.
    fn take(&mut self, layout: Layout) -> Option<usize> {
        if layout.size() > self.longest {
            return None;
        }
        for at in 0..self.ranges.len() {
            let Range { start, end } = self.ranges[at];
            let begin = start.next_multiple_of(layout.align());
            if begin.checked_add(layout.size()).is_some_and(|stop| stop <= end) {
                let rest = [start..begin, begin + layout.size()..end];
                self.ranges.splice(at..=at, rest.into_iter().filter(|range| !range.is_empty()));
                return Some(begin);
            }
        }
        // No range was long enough, so the bound becomes exact.
        self.longest = self.ranges.iter().map(Range::len).max().unwrap_or(0);
        None
    }

    /// Frees a range that was taken, and joins it with free neighbours.
    fn give_back(&mut self, range: Range<usize>) {
        let next = self.ranges.partition_point(|free| free.start < range.start);
        let joins_before = next > 0 && self.ranges[next - 1].end == range.start;
        let joins_next = self.ranges.get(next).is_some_and(|free| free.start == range.end);
        let joined = match (joins_before, joins_next) {
            (true, true) => {
                self.ranges[next - 1].end = self.ranges.remove(next).end;
                next - 1
            }
            (true, false) => {
                self.ranges[next - 1].end = range.end;
                next - 1
            }
            (false, true) => {
                self.ranges[next].start = range.start;
                next
            }
            (false, false) => {
                self.ranges.insert(next, range);
                next
            }
        };
        self.longest = self.longest.max(self.ranges[joined].len());
    }
}

/// A piece of a chunk. Dropping it returns the piece to the chunk.
pub(crate) struct Piece {
    chunks: &'static Chunks,
    address: NonNull<u8>,
    bytes: usize,
}

impl Piece {
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }
}

// SAFETY: the value never reads through the address, and a chunk takes pieces back on any thread.
unsafe impl Send for Piece {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for Piece {}

impl Drop for Piece {
    fn drop(&mut self) {
        // Another thread may have held the lock at the fork. A child cannot take it.
        if fork::forked() {
            return;
        }
        if cfg!(debug_assertions) {
            // The memory stays mapped and pinned. Only its contents show a use after the return.
            // SAFETY: the piece is still this value's own.
            unsafe { self.address.write_bytes(GIVEN_BACK, self.bytes) };
        }
        // `give_back` has released the lock before the chunk is dropped.
        drop(self.chunks.give_back(self.address, self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bytes: usize, align: usize) -> Layout {
        Layout::from_size_align(bytes, align).unwrap()
    }

    #[test]
    fn pieces_lie_apart_and_aligned_in_the_first_range_that_holds_them() {
        let mut free = Free::all(10_000);
        assert_eq!(free.take(layout(100, 256)), Some(0));
        assert_eq!(free.take(layout(300, 256)), Some(256));
        assert_eq!(free.take(layout(1, 4096)), Some(4096));
        // This one lies between the second and the third.
        assert_eq!(free.take(layout(3000, 256)), Some(768));
        assert_eq!(free.take(layout(6000, 256)), None);
        assert_eq!(free.take(layout(10_000 - 4352, 256)), Some(4352));
        assert_eq!(free.ranges, [100..256, 556..768, 3768..4096, 4097..4352]);
    }

    #[test]
    fn a_chunk_is_whole_again_in_whatever_order_its_pieces_come_back() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut free = Free::all(3000);
            let pieces = [0, 1, 2].map(|_| free.take(layout(1000, 8)).unwrap());
            assert!(free.ranges.is_empty());
            for piece in order {
                assert!(!free.is_all(3000));
                free.give_back(pieces[piece]..pieces[piece] + 1000);
            }
            assert!(free.is_all(3000), "{order:?}");
        }
    }

    #[test]
    fn a_chunk_without_a_long_range_is_passed_over_until_one_comes_back() {
        let mut free = Free::all(3000);
        let pieces = [0, 1, 2].map(|_| free.take(layout(1000, 8)).unwrap());
        free.give_back(pieces[0]..pieces[0] + 1000);
        free.give_back(pieces[2]..pieces[2] + 1000);
        assert_eq!((free.take(layout(1500, 8)), free.longest), (None, 1000));
        free.give_back(pieces[1]..pieces[1] + 1000);
        assert_eq!((free.longest, free.take(layout(1500, 8))), (3000, Some(0)));
    }
}
