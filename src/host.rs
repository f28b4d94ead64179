//! Host memory, pinned where CUDA is: zeroed, aligned, and given back as it was made.
//!
//! There are two ways to pin memory, and where the first fails the second stands in. Large memory is fresh
//! [pages](crate::pages), which are zero already, [registered](crate::registered) with the runtime: several times
//! faster than `cudaHostAlloc`, which zeroes what it gives with one thread. Small memory comes from `cudaHostAlloc`,
//! which cuts it from chunks that it keeps, while a registration is a matter of system calls.
//!
//! The pages are not inherited across `fork`. What `cudaHostAlloc` gives is the driver's own shared mapping, which no
//! child's copy-on-write moves away from under the parent's transfers; a child is refused either way.

use std::alloc::{self, Layout};
use std::iter;
use std::mem;
use std::ops::Range;
use std::ptr::{self, NonNull};

use bitflags::bitflags;

use crate::device::{Context, Device};
use crate::error::{Error, Result, Side};
use crate::fork;
use crate::raw;
#[cfg(unix)]
use crate::registered::Registered;
use crate::sys;

/// Memory of up to so many bytes comes from `cudaHostAlloc`, where that works. Measured on an H100, in us, zeroed and
/// then released, against mapped, registered and then released: 4 KB 2.9 + 2.7, 68 + 43; 1 MB 39 + 2.9, 231 + 89; but
/// 2 MB 555 + 227, 181 + 70. The small ones while one of the chunks is alive that they are cut from; a chunk costs 0.8 ms.
const SMALL: usize = 1 << 20;

bitflags! {
    /// How pinned host memory is made: `cudaHostRegister`, `cudaHostAlloc`. Write-combined memory is not
    /// to be had: reading it is slow, and on current hardware copies from it are no faster.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, HostFlags};
    ///
    /// // Pinned, and nothing more asked for.
    /// let options = BufferOptions { host_flags: HostFlags::empty(), ..Default::default() };
    /// let buffer = CpuGpuBuffer::<u8>::with_options(100, Device::auto(), options)?;
    /// assert_eq!(BufferOptions::default().host_flags, HostFlags::PORTABLE | HostFlags::MAPPED);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct HostFlags: u32 {
        /// Pinned for every device, not only the buffer's.
        const PORTABLE = sys::cudaHostAllocPortable;
        /// Kernels can read and write it.
        const MAPPED = sys::cudaHostAllocMapped;
    }
}

// The flags serve both functions.
const _: () = assert!(
    sys::cudaHostAllocPortable == sys::cudaHostRegisterPortable
        && sys::cudaHostAllocMapped == sys::cudaHostRegisterMapped
);

/// Whether host memory is pinned, which is what lets a copy run beside the program.
///
/// ```
/// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning};
///
/// for pinning in [Pinning::Never, Pinning::Preferred, Pinning::Required] {
///     let options = BufferOptions { pinning, ..Default::default() };
///     match CpuGpuBuffer::<u8>::with_options(100, Device::Cpu, options) {
///         Ok(buffer) => assert!(!buffer.is_pinned()),
///         Err(error) => assert_eq!((pinning, error.to_string().contains("the CPU")), (Pinning::Required, true)),
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Pinning {
    /// Pinned, or an error.
    Required,
    /// Pinned where that works, and pageable where it does not, on the CPU for instance;
    /// [`is_pinned`](crate::CpuGpuBuffer::is_pinned) says which.
    #[default]
    Preferred,
    /// Pageable. Copies of pageable memory are staged by the driver and may make the caller wait.
    Never,
}

/// An owned piece of host memory.
pub(crate) struct HostMemory {
    address: NonNull<u8>,
    /// The bytes that one registration covers, from the first byte on; `usize::MAX` where one covers all, or none is
    /// needed.
    piece: usize,
    kind: Kind,
}

enum Kind {
    /// No bytes.
    Empty,
    /// From the allocator, at an address that may lie before the aligned one.
    Pageable { base: *mut u8, room: Layout },
    /// Pages that go with it.
    #[cfg(unix)]
    Registered { _pages: Registered },
    /// From `cudaHostAlloc`, at an address that may lie before the aligned one.
    Allocated { base: *mut u8, context: &'static Context },
}

// SAFETY: the memory belongs to the value alone, and can be released on any thread.
unsafe impl Send for HostMemory {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Zeroed memory; pinned for `context`'s device as `pinning` says.
    pub(crate) fn new(
        layout: Layout,
        pinning: Pinning,
        flags: HostFlags,
        context: Option<&'static Context>,
        device: Device,
    ) -> Result<HostMemory> {
        if layout.size() == 0 {
            return Ok(HostMemory::empty(layout));
        }
        let reason = match (pinning, context) {
            (Pinning::Never, _) => None,
            (_, None) => Some("the device is the CPU".to_string()),
            (_, Some(context)) => match HostMemory::pinned(layout, flags, context) {
                Ok(memory) => return Ok(memory),
                Err(error) => Some(error.to_string()),
            },
        };
        match (pinning, reason) {
            (Pinning::Required, Some(reason)) => {
                Err(Error::PinningUnavailable { bytes: layout.size(), reason })
            }
            _ => HostMemory::pageable(layout).ok_or(Error::OutOfMemory {
                side: Side::Host,
                bytes: layout.size(),
                device,
            }),
        }
    }

    fn empty(layout: Layout) -> HostMemory {
        let aligned = ptr::without_provenance_mut(layout.align());
        HostMemory::whole(NonNull::new(aligned).expect("an alignment is not 0"), Kind::Empty)
    }

    fn whole(address: NonNull<u8>, kind: Kind) -> HostMemory {
        HostMemory { address, piece: usize::MAX, kind }
    }

    /// Zeroed pageable memory of a layout that is not empty.
    ///
    /// The allocator gives large memory as fresh pages, untouched, unless it is asked for more than
    /// its usual alignment: then it writes every byte. So the alignment is made here.
    fn pageable(layout: Layout) -> Option<HostMemory> {
        let room = Layout::from_size_align(layout.size().checked_add(layout.align())?, 1).ok()?;
        // SAFETY: the room has a size.
        let base = unsafe { alloc::alloc_zeroed(room) };
        if base.is_null() {
            return None;
        }
        // SAFETY: `room` leaves `align` bytes before what is asked for, and the offset is smaller.
        let address = unsafe { base.add(base.align_offset(layout.align())) };
        Some(HostMemory::whole(NonNull::new(address)?, Kind::Pageable { base, room }))
    }

    /// Zeroed pinned memory of a layout that is not empty. Where neither way works, the error is `cudaHostAlloc`'s.
    fn pinned(layout: Layout, flags: HostFlags, context: &'static Context) -> Result<HostMemory> {
        let _current = context.enter()?;
        // No bits but those that have a name: others mean other things to the two functions.
        let flags = flags & HostFlags::all();
        let registered = || HostMemory::registered(layout, flags, context);
        let allocated = || HostMemory::allocated(layout, flags, context);
        match layout.size() {
            ..=SMALL => allocated().or_else(|error| registered().ok_or(error)),
            _ => registered().map_or_else(allocated, Ok),
        }
    }

    #[cfg(unix)]
    fn registered(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Option<HostMemory> {
        let pages = Registered::new(layout, flags.bits(), context)?;
        let (address, piece) = (pages.address(), pages.piece());
        Some(HostMemory { address, piece, kind: Kind::Registered { _pages: pages } })
    }

    #[cfg(not(unix))]
    fn registered(_: Layout, _: HostFlags, _: &'static Context) -> Option<HostMemory> {
        None
    }

    fn allocated(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Result<HostMemory> {
        // `cudaHostAlloc` aligns to pages; more than that takes room to move in.
        let room = layout.size().saturating_add(layout.align() - 1);
        let base = raw::host_alloc(room, flags.bits())?;
        let offset = base.align_offset(layout.align());
        // SAFETY: `room` leaves `align - 1` bytes before what is asked for.
        let address = unsafe { base.add(offset) };
        // SAFETY: `size` bytes are left behind the offset, and nobody else knows of them.
        unsafe { ptr::write_bytes(address, 0, layout.size()) };
        let address = NonNull::new(address).expect("cudaHostAlloc gives an address");
        Ok(HostMemory::whole(address, Kind::Allocated { base, context }))
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    pub(crate) fn is_pinned(&self) -> bool {
        match &self.kind {
            Kind::Empty | Kind::Pageable { .. } => false,
            #[cfg(unix)]
            Kind::Registered { .. } => true,
            Kind::Allocated { .. } => true,
        }
    }

    /// Whether kernels of the current device reach all `bytes` of the memory, under the addresses that it has here.
    pub(crate) fn is_mapped(&self, bytes: usize) -> bool {
        let reached = |at| {
            let part = self.as_ptr().wrapping_add(at);
            raw::host_device_ptr(part).is_ok_and(|address| address == part)
        };
        self.is_pinned() && parts(0..bytes, self.piece).all(|part| reached(part.start))
    }

    /// Cuts the `bytes` at `from`, which lie in the memory, where registrations meet, and hands each part to `copy`, as
    /// its offset from `from` and its length, until that fails. CUDA refuses a copy that spans two registrations.
    #[inline]
    pub(crate) fn in_parts(
        &self,
        from: *const u8,
        bytes: usize,
        mut copy: impl FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        match self.piece {
            usize::MAX => copy(0, bytes),
            piece => {
                let start = from.addr() - self.address.addr().get();
                parts(start..start + bytes, piece)
                    .try_for_each(|part| copy(part.start - start, part.len()))
            }
        }
    }

    /// Never gives the memory back: something may still be reading or writing it.
    pub(crate) fn leak(&mut self) {
        mem::forget(mem::replace(self, HostMemory::empty(Layout::new::<()>())));
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        match &mut self.kind {
            Kind::Empty => {}
            Kind::Pageable { base, room } => {
                // SAFETY: allocated with this layout, and given back once.
                unsafe { alloc::dealloc(*base, *room) };
            }
            #[cfg(unix)]
            Kind::Registered { .. } => {}
            Kind::Allocated { base, context } => {
                if fork::forked() {
                    return;
                }
                let _current = context.enter();
                // SAFETY: allocated by this value; whoever drops it saw its transfers finish.
                let released = unsafe { raw::free_host(*base) };
                // With the context broken, there is nothing that could be done.
                let _ = released;
            }
        }
    }
}

/// Cuts a range at the multiples of `piece`.
pub(crate) fn parts(range: Range<usize>, piece: usize) -> impl Iterator<Item = Range<usize>> {
    let mut rest = range;
    iter::from_fn(move || {
        let start = rest.start;
        rest.start = rest.end.min((start / piece + 1).saturating_mul(piece));
        (start < rest.start).then_some(start..rest.start)
    })
}

/// Whether host memory can be pinned: there is a CUDA device, and a page was pinned for it.
///
/// ```
/// println!("pinned memory: {}", cpu_gpu_buffer::is_pinned_memory_available());
/// ```
pub fn is_pinned_memory_available() -> bool {
    let Device::Cuda(ordinal) = Device::auto() else {
        return false;
    };
    let layout = Layout::new::<[u8; 4096]>();
    let flags = HostFlags::PORTABLE | HostFlags::MAPPED;
    let pinned = crate::device::context(ordinal)
        .and_then(|context| HostMemory::pinned(layout, flags, context));
    pinned.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = usize::MAX;

    #[test]
    fn a_range_is_cut_where_pieces_meet_and_nowhere_else() {
        for (range, expected) in [
            (0..1, &[0, 1][..]),
            (0..10, &[0, 10]),
            (9..10, &[9, 10]),
            (10..20, &[10, 20]),
            (9..11, &[9, 10, 10, 11]),
            (0..30, &[0, 10, 10, 20, 20, 30]),
            (7..33, &[7, 10, 10, 20, 20, 30, 30, 33]),
            (5..5, &[]),
            (MAX - 7..MAX, &[MAX - 7, MAX - 5, MAX - 5, MAX]),
        ] {
            let bounds = parts(range, 10).flat_map(|part| [part.start, part.end]);
            assert_eq!(bounds.collect::<Vec<_>>(), expected);
        }
        assert!(parts(3..MAX, MAX).eq(iter::once(3..MAX)));
    }
}
