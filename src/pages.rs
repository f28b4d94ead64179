//! Pages of this process's own: fresh, hence zero; on hugepages where they fill some; not inherited across `fork`
//! (`MADV_DONTFORK`), since a child's copy-on-write could otherwise move a page of the parent's away from under a
//! transfer.
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
// and then registered, in ms (1, 4 and 16 threads): 64 MB 14.4, 5.3, 3.8; 1 GB 194, 70, 46.
/// What a thread touches at a time: a multiple of a hugepage. There are as many threads as there are parts.
const PART: usize = 16 << 20;
/// And no more than this.
const MOST: usize = 16;

/// How many threads touch so many bytes, on so many cores.
fn threads(bytes: usize, cores: usize) -> usize {
    bytes.div_ceil(PART).min(cores).clamp(1, MOST)
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
        // SAFETY: as above.
        let advised = unsafe { libc::madvise(address, self.bytes, libc::MADV_DONTFORK) };
        (advised == 0).then_some(())
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sees to it that there is memory behind the pages, before anybody else knows of them, where that takes several
    /// threads: whoever registers pages touches them, too. `None` where there is no memory.
    pub(crate) fn touch(&self) -> Option<()> {
        // Small memory is not to pay for the question.
        if self.bytes <= PART {
            return Some(());
        }
        match threads(self.bytes, thread::available_parallelism().map_or(1, usize::from)) {
            1 => Some(()),
            threads => self.touch_by(threads).then_some(()),
        }
    }

    /// By so many threads, of which the calling one is the first.
    fn touch_by(&self, threads: usize) -> bool {
        let untouched = Untouched { pages: self, next: AtomicUsize::new(0) };
        thread::scope(|scope| {
            // A thread that cannot be started is not missed: the parts are those threads' that are there.
            let start =
                |_| thread::Builder::new().spawn_scoped(scope, || untouched.touch_parts()).ok();
            let others: Vec<_> = (1..threads).filter_map(start).collect();
            let touched = untouched.touch_parts();
            others.into_iter().all(|other| other.join().unwrap_or(false)) && touched
        })
    }

    pub(crate) fn leak(&mut self) {
        self.bytes = 0;
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the value's own pages, which nothing refers to any more.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
        }
    }
}

/// Pages that threads touch, each the next part that there is.
struct Untouched<'a> {
    pages: &'a Mapping,
    next: AtomicUsize,
}

// SAFETY: what threads do with the address is to touch parts, and no two get the same.
unsafe impl Sync for Untouched<'_> {}

impl Untouched<'_> {
    /// Touches parts until there are none left; `false` where there is no memory for one.
    fn touch_parts(&self) -> bool {
        let bytes = self.pages.bytes;
        loop {
            let start = self.next.fetch_add(PART, Ordering::Relaxed);
            if start >= bytes {
                return true;
            }
            // SAFETY: within the mapping.
            let part = unsafe { self.pages.address.add(start) };
            // SAFETY: within the mapping; nobody knows of it yet, and no other thread has this part.
            if !unsafe { touch(part, PART.min(bytes - start)) } {
                // The others need not go on.
                self.next.store(bytes, Ordering::Relaxed);
                return false;
            }
        }
    }
}

/// Faults pages in; `false` where there is no memory for them.
///
/// # Safety
///
/// They are mapped, and zero, and nobody else uses them.
unsafe fn touch(part: NonNull<u8>, bytes: usize) -> bool {
    // Since Linux 5.14. Where there is no memory it says so, and a write would end the process.
    #[cfg(target_os = "linux")]
    {
        let address = part.as_ptr().cast();
        // SAFETY: populating private pages changes nothing but that they are there.
        if unsafe { libc::madvise(address, bytes, libc::MADV_POPULATE_WRITE) } == 0 {
            return true;
        }
        let code = std::io::Error::last_os_error().raw_os_error();
        if let Some(libc::ENOMEM | libc::EFAULT | libc::EHWPOISON) = code {
            return false;
        }
    }
    // SAFETY: the caller vouches for the pages.
    unsafe { write(part, bytes) };
    true
}

/// Writes the zero that is there already to each page.
///
/// # Safety
///
/// As for [`touch`].
unsafe fn write(part: NonNull<u8>, bytes: usize) {
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
            (PART, 16, 1),
            (PART + 1, 16, 2),
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
            let mapping = mapping(bytes);
            assert_eq!(resident(&mapping), 0);
            assert!(mapping.touch_by(by));
            assert_eq!(resident(&mapping), bytes.div_ceil(page), "{bytes} bytes by {by}");
        }
    }

    #[test]
    fn a_kernel_that_does_not_populate_is_written_to() {
        let page = page().unwrap();
        let mapping = mapping(7 * page);
        // SAFETY: the mapping's own pages, which nobody else uses.
        unsafe { write(mapping.address, mapping.bytes) };
        assert_eq!(resident(&mapping), 7);
    }

    #[test]
    fn pages_that_cannot_be_had_are_a_failure_and_no_signal() {
        let page = page().unwrap();
        // SAFETY: a NUL-terminated name.
        let empty = unsafe { libc::memfd_create(c"empty".as_ptr(), libc::MFD_CLOEXEC) };
        for by in [1, 3] {
            let mapping = mapping(2 * PART + page);
            // SAFETY: the last page.
            let last = unsafe { mapping.address.add(2 * PART) }.as_ptr().cast();
            // A page behind the end of a file, where a write is a SIGBUS.
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            // SAFETY: in the place of a page of the mapping's, which nothing looks at.
            let mapped = unsafe { libc::mmap(last, page, protection, flags, empty, 0) };
            assert_eq!(mapped, last);
            assert!(!mapping.touch_by(by));
        }
        // SAFETY: opened above.
        assert_eq!(unsafe { libc::close(empty) }, 0);
    }
}
