//! Pages of this process's own: fresh, hence zero, and on hugepages if they fill some.
//!
//! A forked child reads them as zeroes, and writes to pages of its own (`MADV_WIPEONFORK`).
//! Inherited pages would be copied on write, which can move a page of the parent's away from under
//! a transfer. Kernels before 4.14 lack that advice. There the child has no pages
//! (`MADV_DONTFORK`), and its next mapping may lie where a slice from before the fork still points.
//!
//! Most of what large pinned memory costs is the kernel's zeroing of it, page by page, when it is first touched. One
//! thread does that at a fraction of what the memory can take, so several do.

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What a hugepage covers, on x86-64 and, with 4 KB pages, aarch64.
const HUGE: usize = 2 << 20;

// How pages are shared out to threads that touch them. Measured on an H100 with 16 virtual cores, hugepages, touched
// and then registered, in ms by 1, 4, 8 and 16 threads: 8 MB 0.73, 0.81 (no more parts); 16 MB 2.0, 1.1, 1.0; 64 MB 13,
// 5.3, 4.7, 3.0; 256 MB 63, 24, 20, 12; 1 GB 215, 86, 81, 46. `MADV_POPULATE_WRITE` instead of a write to each page is
// as fast by 4 threads, and slower than one by 8 and 16: it holds the lock of the address space.
/// What a thread touches at a time: a multiple of a hugepage. There are as many threads as there are parts.
const PART: usize = 4 << 20;
/// And no more than this.
const MOST: usize = 16;
/// Up to so many bytes the calling thread touches them alone, sooner than others are started.
const ALONE: usize = 8 << 20;

/// Of so many bytes and more, several threads give the pages back: of 1 GB in 1.2 ms instead of 4.
#[cfg(target_os = "linux")]
const MANY: usize = 256 << 20;

/// How many threads touch so many bytes, on so many cores.
fn threads(bytes: usize, cores: usize) -> usize {
    match bytes {
        0..=ALONE => 1,
        _ => bytes.div_ceil(PART).min(cores).clamp(1, MOST),
    }
}

/// Private anonymous pages, unmapped with the value.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// Zeroed pages for a layout.
    pub(crate) fn new(layout: Layout) -> Option<Mapping> {
        let page = page()?;
        let bytes = layout.size().checked_next_multiple_of(page)?;
        let huge = bytes >= HUGE;
        let align = layout.align().max(if huge { HUGE } else { page });
        // The kernel aligns to pages; more than that takes room to cut the piece from.
        let room = bytes.checked_add(align - page)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), room, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let before = base.align_offset(align);
        let after = room - bytes - before;
        // SAFETY: `before` is at most the room that was added.
        let address = unsafe { base.add(before) };
        // SAFETY: the piece ends within the mapping.
        let end = unsafe { address.add(bytes) };
        for (cut, bytes) in [(base, before), (end, after)] {
            if bytes > 0 {
                // SAFETY: whole pages of the mapping that no value covers. A failure leaves them mapped.
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
            // SAFETY: advice on pages of this value's own. It may be refused, and small pages serve too.
            unsafe { libc::madvise(address, self.bytes, libc::MADV_HUGEPAGE) };
        }
        let advised = [libc::MADV_WIPEONFORK, libc::MADV_DONTFORK].into_iter().any(|advice| {
            // SAFETY: advice on pages of this value's own, to which nothing refers yet.
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

    /// Sees to it that there is memory behind the pages, before anybody else knows of them, where that takes several
    /// threads, or is quicker than leaving it to whoever registers them.
    pub(crate) fn touch(&self) {
        if self.bytes > PART {
            // SAFETY: nobody knows of the pages yet, and they are zero.
            let touch = |part, bytes| unsafe { touch(part, bytes) };
            self.each_part(threads(self.bytes, cores()), &touch);
        }
    }

    /// Frees the memory behind the pages, which is most of what unmapping them takes.
    #[cfg(target_os = "linux")]
    fn give_back(&mut self) {
        let discard = |part: NonNull<u8>, bytes| {
            // SAFETY: pages of this value's own, which nothing refers to any more. It may be refused, and is then
            // left to unmapping.
            unsafe { libc::madvise(part.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
        };
        self.each_part(threads(self.bytes, cores()), &discard);
    }

    /// Hands each part to one of so many threads, of which the calling one is the first.
    fn each_part(&self, threads: usize, work: &(impl Fn(NonNull<u8>, usize) + Sync)) {
        let parts = Parts { pages: self, next: AtomicUsize::new(0) };
        thread::scope(|scope| {
            // A thread that cannot be started is not missed: the parts are those threads' that are there.
            let start = |_| thread::Builder::new().spawn_scoped(scope, || parts.each(work)).ok();
            let others: Vec<_> = (1..threads).filter_map(start).collect();
            parts.each(work);
            // The scope would wait, too, in a way that ThreadSanitizer does not see.
            others.into_iter().for_each(|other| drop(other.join()));
        });
    }

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
            // SAFETY: the value's own pages, which nothing refers to any more.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
        }
    }
}

/// Pages that threads share out among them, each the next part that there is.
struct Parts<'a> {
    pages: &'a Mapping,
    next: AtomicUsize,
}

// SAFETY: the address is only handed on, and no two threads get the same part.
unsafe impl Sync for Parts<'_> {}

impl Parts<'_> {
    /// Hands parts to `work` until there are none left.
    fn each(&self, work: &impl Fn(NonNull<u8>, usize)) {
        let bytes = self.pages.bytes;
        loop {
            let start = self.next.fetch_add(PART, Ordering::Relaxed);
            if start >= bytes {
                return;
            }
            // SAFETY: within the mapping.
            let part = unsafe { self.pages.address.add(start) };
            work(part, PART.min(bytes - start));
        }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Writes to each page the zero that is there already.
///
/// # Safety
///
/// The pages are mapped, and zero, and nobody else uses them.
unsafe fn touch(part: NonNull<u8>, bytes: usize) {
    let Some(page) = page() else { return };
    for at in (0..bytes).step_by(page) {
        // SAFETY: within the pages that the caller vouches for.
        let byte = unsafe { part.add(at) };
        // SAFETY: as above. Volatile, since nobody reads what it writes.
        unsafe { byte.write_volatile(0) };
    }
}

fn page() -> Option<usize> {
    // SAFETY: no arguments that could be wrong.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn mapping(bytes: usize) -> Mapping {
        Mapping::new(Layout::from_size_align(bytes, 1).unwrap()).unwrap()
    }

    /// How many of its pages there is memory behind.
    fn resident(mapping: &Mapping) -> usize {
        let mut seen = vec![0u8; mapping.bytes.div_ceil(page().unwrap())];
        let address = mapping.address.as_ptr().cast();
        // SAFETY: a byte for each page of the mapping.
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
        assert_eq!(PART % HUGE, 0);
    }

    #[test]
    fn every_page_is_touched_by_however_many_threads_there_are() {
        let page = page().unwrap();
        for (bytes, by) in [(1, 1), (PART, 1), (3 * PART + page + 1, 1), (3 * PART + page + 1, 5)] {
            let mut mapping = mapping(bytes);
            assert_eq!(resident(&mapping), 0);
            // SAFETY: nobody else knows of the pages, and they are zero.
            mapping.each_part(by, &|part, bytes| unsafe { touch(part, bytes) });
            assert_eq!(resident(&mapping), bytes.div_ceil(page), "{bytes} bytes by {by}");
            mapping.give_back();
            assert_eq!(resident(&mapping), 0, "{bytes} bytes by {by}");
        }
    }
}
