//! Private zeroed pages, on hugepages if they are large enough.
//!
//! A forked child reads the pages as zeroes and writes to its own (`MADV_WIPEONFORK`). Inherited
//! pages would be copied on write, and the parent could then get a new page while a transfer uses
//! the old one. Kernels before 4.14 lack that advice. There the child has no pages
//! (`MADV_DONTFORK`), and a later mapping of the child may lie at an address that an old slice
//! points to.
//!
//! Most of the cost of large pinned memory is the kernel's zeroing of pages on their first touch.
//! One thread uses a fraction of the memory's bandwidth, so several threads touch the pages. The
//! measurements behind the constants are in docs/benchmarks.md, "Pinned memory".

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::memory::split::HUGEPAGE;

/// The bytes that a thread touches at a time, a multiple of a hugepage.
const PART: usize = 4 << 20;
/// The most threads: 16 threads still gain over 8.
const MOST: usize = 16;
/// The most bytes that the calling thread touches alone: 4 threads gain nothing for 8 MB.
const ALONE: usize = 8 << 20;

/// The fewest bytes that several threads give back: 1 GB takes them 1.2 ms instead of 4 ms.
#[cfg(target_os = "linux")]
const MANY: usize = 256 << 20;

/// The number of threads that touch `bytes` bytes on `cores` cores.
fn threads(bytes: usize, cores: usize) -> usize {
    match bytes {
        0..=ALONE => 1,
        _ => bytes.div_ceil(PART).min(cores).clamp(1, MOST),
    }
}

/// Private anonymous pages. Dropping the value unmaps them.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// Maps zeroed pages for a layout.
    pub(crate) fn new(layout: Layout) -> Option<Mapping> {
        let page = page()?;
        let bytes = layout.size().checked_next_multiple_of(page)?;
        let huge = bytes >= HUGEPAGE;
        let align = layout.align().max(if huge { HUGEPAGE } else { page });
        // The kernel aligns to pages. A larger alignment is cut out of a larger mapping.
        let room = bytes.checked_add(align - page)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses the address of a new mapping, so no other memory changes.
        let base = unsafe { libc::mmap(ptr::null_mut(), room, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let before = base.align_offset(align);
        let after = room - bytes - before;
        // SAFETY: `before` is at most the room that was added for the alignment.
        let address = unsafe { base.add(before) };
        // SAFETY: the aligned pages end within the mapping.
        let end = unsafe { address.add(bytes) };
        for (cut, bytes) in [(base, before), (end, after)] {
            if bytes > 0 {
                // SAFETY: whole pages of the mapping, outside of the value. A failure leaves them
                // mapped.
                unsafe { libc::munmap(cut.cast(), bytes) };
            }
        }
        let mapping = Mapping { address: NonNull::new(address)?, bytes };
        #[cfg(target_os = "linux")]
        mapping.advise(huge)?;
        Some(mapping)
    }

    #[cfg(target_os = "linux")]
    fn advise(&self, huge: bool) -> Option<()> {
        let address = self.address.as_ptr().cast();
        if huge {
            // SAFETY: advice on this value's own pages. The kernel may refuse it, and uses small
            // pages then.
            unsafe { libc::madvise(address, self.bytes, libc::MADV_HUGEPAGE) };
        }
        let advised = [libc::MADV_WIPEONFORK, libc::MADV_DONTFORK].into_iter().any(|advice| {
            // SAFETY: advice on this value's own pages, which nothing refers to yet.
            unsafe { libc::madvise(address, self.bytes, advice) == 0 }
        });
        advised.then_some(())
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Populates the pages if this is faster than the registration's own populating.
    ///
    /// Nothing else uses the pages yet.
    pub(crate) fn touch(&self) {
        if self.bytes > PART {
            // SAFETY: the pages are mapped and zero, and nothing else uses them yet.
            let touch = |part, bytes| unsafe { touch(part, bytes) };
            self.each_part(threads(self.bytes, cores()), &touch);
        }
    }

    /// Frees the memory behind the pages with several threads, so that unmapping is short.
    #[cfg(target_os = "linux")]
    fn give_back(&mut self) {
        let discard = |part: NonNull<u8>, bytes| {
            // SAFETY: this value's own pages, which nothing refers to any more. If the kernel
            // refuses, unmapping frees them.
            unsafe { libc::madvise(part.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
        };
        self.each_part(threads(self.bytes, cores()), &discard);
    }

    /// Calls `work` once for each part, on `threads` threads. The calling thread is one of them.
    fn each_part(&self, threads: usize, work: &(impl Fn(NonNull<u8>, usize) + Sync)) {
        let parts = Parts { pages: self, next: AtomicUsize::new(0) };
        thread::scope(|scope| {
            // The running threads share all parts, so a thread that fails to start changes nothing.
            let start = |_| thread::Builder::new().spawn_scoped(scope, || parts.each(work)).ok();
            let others: Vec<_> = (1..threads).filter_map(start).collect();
            parts.each(work);
            // The scope joins as well, but ThreadSanitizer does not see that.
            others.into_iter().for_each(|other| drop(other.join()));
        });
    }

    /// Leaves the pages mapped for ever.
    pub(crate) fn leak(&mut self) {
        self.bytes = 0;
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.bytes >= MANY {
            self.give_back();
        }
        if self.bytes > 0 {
            // SAFETY: this value's own pages, which nothing refers to any more.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
        }
    }
}

/// The parts of a mapping. Each thread takes the next part that is left.
struct Parts<'a> {
    pages: &'a Mapping,
    next: AtomicUsize,
}

// SAFETY: `next` hands each part to one thread, so no two threads use the same bytes.
unsafe impl Sync for Parts<'_> {}

impl Parts<'_> {
    /// Calls `work` for parts until none is left.
    fn each(&self, work: &impl Fn(NonNull<u8>, usize)) {
        let bytes = self.pages.bytes;
        loop {
            let start = self.next.fetch_add(PART, Ordering::Relaxed);
            if start >= bytes {
                return;
            }
            // SAFETY: `start` is less than the length of the mapping.
            let part = unsafe { self.pages.address.add(start) };
            work(part, PART.min(bytes - start));
        }
    }
}

/// The number of cores that this process can use.
fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Writes a zero to each page, which populates it.
///
/// # Safety
///
/// - The pages are mapped, and they are zero.
/// - Nothing else uses them during the call.
unsafe fn touch(part: NonNull<u8>, bytes: usize) {
    let Some(page) = page() else { return };
    for at in (0..bytes).step_by(page) {
        // SAFETY: `at` is less than `bytes`, and the caller vouches for the pages.
        let byte = unsafe { part.add(at) };
        // SAFETY: as above. The write is volatile, so that it is not optimized away.
        unsafe { byte.write_volatile(0) };
    }
}

/// The size of a page.
fn page() -> Option<usize> {
    // SAFETY: `sysconf` takes any name.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn mapping(bytes: usize) -> Mapping {
        Mapping::new(Layout::from_size_align(bytes, 1).unwrap()).unwrap()
    }

    /// The number of populated pages.
    fn resident(mapping: &Mapping) -> usize {
        let mut seen = vec![0u8; mapping.bytes.div_ceil(page().unwrap())];
        let address = mapping.address.as_ptr().cast();
        // SAFETY: `seen` has a byte for each page of the mapping.
        let status = unsafe { libc::mincore(address, mapping.bytes, seen.as_mut_ptr()) };
        assert_eq!(status, 0);
        seen.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn there_is_a_thread_for_each_part_up_to_the_cores_and_the_most() {
        for (bytes, cores, expected) in [
            (1, 16, 1),
            (ALONE, 16, 1),
            (ALONE + 1, 16, 3),
            (4 * PART, 16, 4),
            (4 * PART, 3, 3),
            (4 * PART, 1, 1),
            (4 * PART, 0, 1),
            (100 * PART, 8, 8),
            (100 * PART, 200, MOST),
            (usize::MAX, usize::MAX, MOST),
        ] {
            assert_eq!(threads(bytes, cores), expected, "{bytes} bytes, {cores} cores");
        }
        assert_eq!(PART % HUGEPAGE, 0);
    }

    #[test]
    fn every_page_is_touched_by_however_many_threads_there_are() {
        let page = page().unwrap();
        for (bytes, by) in [(1, 1), (PART, 1), (3 * PART + page + 1, 1), (3 * PART + page + 1, 5)] {
            let mut mapping = mapping(bytes);
            assert_eq!(resident(&mapping), 0);
            // SAFETY: the pages are mapped and zero, and nothing else uses them.
            mapping.each_part(by, &|part, bytes| unsafe { touch(part, bytes) });
            assert_eq!(resident(&mapping), bytes.div_ceil(page), "{bytes} bytes by {by}");
            mapping.give_back();
            assert_eq!(resident(&mapping), 0, "{bytes} bytes by {by}");
        }
    }
}
