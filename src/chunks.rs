//! Small pinned memory: pieces of chunks that are registered once.
//!
//! Registering is a matter of system calls, which cost the same for a page as for 2 MB. So small memory
//! is cut from chunks of [registered pages](crate::registered), and one chunk stays with its device.
//! Giving a piece back calls no CUDA.
//!
//! No lock is held during a call of CUDA's, since the call may wait for a device that waits for
//! another thread's piece. Two threads that find no room at once therefore make a chunk each.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::device::Context;
use crate::error::Result;
use crate::fork;
use crate::host::HostFlags;
use crate::registered::Registered;

/// The bytes of a chunk, which is one hugepage.
const CHUNK: usize = 2 << 20;

/// The most bytes of a piece. Two of them fit into a chunk. Memory of its own takes 320 us for 1 MB to
/// map, register and release (H100).
const LARGEST: usize = 1 << 20;

/// Whether memory of this layout can be a piece.
pub(crate) fn fits(layout: Layout) -> bool {
    layout.size() <= LARGEST && layout.align() <= LARGEST
}

/// The most empty chunks that stay with a device, for each set of flags.
const KEPT: usize = 1;

/// The pinned memory of one device that outlives its buffers.
pub(crate) struct DeviceChunks {
    context: &'static Context,
    /// By the flags that they are registered with.
    chunks: [Chunks; HostFlags::all().bits() as usize + 1],
    refuses_registering: AtomicBool,
}

/// Chunks that were registered with the same flags, by their address.
#[derive(Default)]
struct Chunks(Mutex<BTreeMap<usize, Chunk>>);

/// The state of a device, made when it is first asked for.
pub(crate) fn of_device(context: &'static Context) -> &'static DeviceChunks {
    static DEVICES: Mutex<Vec<&'static DeviceChunks>> = Mutex::new(Vec::new());
    let mut devices = DEVICES.lock().unwrap_or_else(|poison| poison.into_inner());
    let known = devices.iter().find(|known| ptr::eq(known.context, context));
    known.copied().unwrap_or_else(|| {
        let made: &DeviceChunks = Box::leak(Box::new(DeviceChunks {
            context,
            chunks: Default::default(),
            refuses_registering: AtomicBool::new(false),
        }));
        devices.push(made);
        made
    })
}

impl DeviceChunks {
    /// A zeroed piece for a layout that is not empty and [fits](fits). The device's context is current.
    pub(crate) fn piece(&'static self, layout: Layout, flags: HostFlags) -> Result<Piece> {
        let chunks = &self.chunks[flags.bits() as usize];
        if let Some(address) = chunks.take(layout) {
            let bytes = layout.size();
            // SAFETY: the piece is pinned memory that is nobody else's, of that size.
            unsafe { address.write_bytes(0, bytes) };
            return Ok(Piece { chunks, address, bytes });
        }
        let whole = Layout::from_size_align(CHUNK, CHUNK).expect("a chunk is a valid layout");
        let pages = Registered::new(whole, flags.bits(), self.context)?;
        // The pages are fresh, hence zero.
        Ok(chunks.insert(pages, layout))
    }

    /// Whether CUDA refused to register memory of this device for another reason than a shortage.
    pub(crate) fn refuses_registering(&self) -> bool {
        self.refuses_registering.load(Ordering::Relaxed)
    }

    pub(crate) fn remember_refusal(&self) {
        self.refuses_registering.store(true, Ordering::Relaxed);
    }
}

impl Chunks {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Chunk>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// The address of a piece in one of the chunks.
    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.lock().values_mut().find_map(|chunk| chunk.take(layout))
    }

    /// Adds a chunk, and cuts a piece from it.
    fn insert(&'static self, pages: Registered, layout: Layout) -> Piece {
        let mut chunk = Chunk { pages, free: Free::all(CHUNK) };
        let address = chunk.take(layout).expect("a chunk has room for the largest piece");
        self.lock().insert(chunk.pages.address().addr().get(), chunk);
        Piece { chunks: self, address, bytes: layout.size() }
    }

    /// Gives a piece back. Returns a chunk that is to be released, without the lock.
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

/// Registered pages, and the parts of them that are nobody's.
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

/// Ranges of a chunk that are free, in their order. No two of them touch.
struct Free(Vec<Range<usize>>);

impl Free {
    fn all(bytes: usize) -> Free {
        Free(iter::once(0..bytes).collect())
    }

    fn is_all(&self, bytes: usize) -> bool {
        matches!(self.0.as_slice(), [range] if *range == (0..bytes))
    }

    /// The offset of the first range that the layout fits into.
    fn take(&mut self, layout: Layout) -> Option<usize> {
        for at in 0..self.0.len() {
            let Range { start, end } = self.0[at];
            let begin = start.next_multiple_of(layout.align());
            if begin.checked_add(layout.size()).is_some_and(|stop| stop <= end) {
                let rest = [start..begin, begin + layout.size()..end];
                self.0.splice(at..=at, rest.into_iter().filter(|range| !range.is_empty()));
                return Some(begin);
            }
        }
        None
    }

    /// Joins a range that was taken with its neighbours.
    fn give_back(&mut self, range: Range<usize>) {
        let next = self.0.partition_point(|free| free.start < range.start);
        let joins_before = next > 0 && self.0[next - 1].end == range.start;
        let joins_next = self.0.get(next).is_some_and(|free| free.start == range.end);
        match (joins_before, joins_next) {
            (true, true) => self.0[next - 1].end = self.0.remove(next).end,
            (true, false) => self.0[next - 1].end = range.end,
            (false, true) => self.0[next].start = range.start,
            (false, false) => self.0.insert(next, range),
        }
    }
}

/// A piece of a chunk, given back with the value.
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

// SAFETY: the address is only handed on; the chunk can take the piece back on any thread.
unsafe impl Send for Piece {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for Piece {}

impl Drop for Piece {
    fn drop(&mut self) {
        // A thread of the parent may have held the lock when it forked.
        if !fork::forked() {
            // The lock is free again when the chunk is released.
            drop(self.chunks.give_back(self.address, self.bytes));
        }
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
        // Between the second and the third.
        assert_eq!(free.take(layout(3000, 256)), Some(768));
        assert_eq!(free.take(layout(6000, 256)), None);
        assert_eq!(free.take(layout(10_000 - 4352, 256)), Some(4352));
        assert_eq!(free.0, [100..256, 556..768, 3768..4096, 4097..4352]);
    }

    #[test]
    fn a_chunk_is_whole_again_in_whatever_order_its_pieces_come_back() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut free = Free::all(3000);
            let pieces = [0, 1, 2].map(|_| free.take(layout(1000, 8)).unwrap());
            assert!(free.0.is_empty());
            for piece in order {
                assert!(!free.is_all(3000));
                free.give_back(pieces[piece]..pieces[piece] + 1000);
            }
            assert!(free.is_all(3000), "{order:?}");
        }
    }
}
