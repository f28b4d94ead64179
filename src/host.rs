//! Host memory, pinned where CUDA is: zeroed, aligned, and given back as it was made.
//!
//! Pinned memory is made of fresh pages, which are zero already, registered with the runtime; that is
//! several times faster than `cudaHostAlloc`, which stands in where registering fails. The pages are not
//! inherited across `fork` (`MADV_DONTFORK`): a child's copy-on-write could otherwise move a page of the
//! parent's away from under a transfer.

use std::alloc::{self, Layout};
use std::mem;
use std::ptr::{self, NonNull};

use bitflags::bitflags;

use crate::device::{Context, Device};
use crate::error::{Error, Result, Side};
use crate::fork;
use crate::raw;
use crate::sys::{self, cudaError};

bitflags! {
    /// How pinned host memory is made: `cudaHostRegister`, `cudaHostAlloc`. Write-combined memory is not
    /// to be had: reading it is slow, and on current hardware copies from it are no faster.
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
    kind: Kind,
}

enum Kind {
    /// No bytes.
    Empty,
    /// From the allocator, at an address that may lie before the aligned one.
    Pageable { base: *mut u8, room: Layout },
    /// Pages of this value's own, registered with the runtime.
    #[cfg(unix)]
    Registered { mapping: Mapping, context: &'static Context },
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
        HostMemory {
            address: NonNull::new(aligned).expect("an alignment is not 0"),
            kind: Kind::Empty,
        }
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
        Some(HostMemory { address: NonNull::new(address)?, kind: Kind::Pageable { base, room } })
    }

    fn pinned(layout: Layout, flags: HostFlags, context: &'static Context) -> Result<HostMemory> {
        let _current = context.enter()?;
        // No bits but those that have a name: others mean other things to the two functions.
        let flags = flags & HostFlags::all();
        #[cfg(unix)]
        if let Some(memory) = HostMemory::registered(layout, flags, context) {
            return Ok(memory);
        }
        // `cudaHostAlloc` aligns to pages; more than that takes room to move in.
        let room = layout.size().saturating_add(layout.align() - 1);
        let base = raw::host_alloc(room, flags.bits())?;
        let offset = base.align_offset(layout.align());
        // SAFETY: `room` leaves `align - 1` bytes before what is asked for.
        let address = unsafe { base.add(offset) };
        // SAFETY: `size` bytes are left behind the offset, and nobody else knows of them.
        unsafe { ptr::write_bytes(address, 0, layout.size()) };
        Ok(HostMemory {
            address: NonNull::new(address).expect("cudaHostAlloc gives an address"),
            kind: Kind::Allocated { base, context },
        })
    }

    #[cfg(unix)]
    fn registered(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Option<HostMemory> {
        let mut mapping = Mapping::new(layout)?;
        let address = mapping.address.as_ptr();
        // SAFETY: the pages are mapped, and unmapped only when they are known not to be registered.
        let status = unsafe { raw::host_register(address, mapping.bytes, flags.bits()) };
        if status.is_err() {
            // Why it failed matters to nobody, since `cudaHostAlloc` is asked next; but the error may be
            // that of earlier work, and the pages registered all the same.
            // SAFETY: nothing was copied from or to them yet.
            match unsafe { raw::host_unregister(address) } {
                Ok(())
                | Err(Error::Cuda {
                    code:
                        cudaError::cudaErrorHostMemoryNotRegistered
                        | cudaError::cudaErrorInvalidValue
                        | cudaError::cudaErrorNotSupported,
                    ..
                }) => {}
                Err(_) => mapping.leak(),
            }
            return None;
        }
        Some(HostMemory { address: mapping.address, kind: Kind::Registered { mapping, context } })
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
            Kind::Registered { mapping, context } => {
                if fork::forked() {
                    return mapping.leak();
                }
                // The address says enough, should the context not be had.
                let _current = context.enter();
                // SAFETY: registered by this value; whoever drops it saw its transfers finish.
                let released = unsafe { raw::host_unregister(mapping.address.as_ptr()) };
                if released.is_err() {
                    // The context is broken: the pages stay as they are.
                    mapping.leak();
                }
            }
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

/// Private anonymous pages, unmapped with the value.
#[cfg(unix)]
struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

#[cfg(unix)]
impl Mapping {
    /// What a hugepage covers, on x86-64 and, with 4 KB pages, aarch64.
    const HUGE: usize = 2 << 20;

    /// Zeroed pages for a layout; on hugepages where they fill some.
    fn new(layout: Layout) -> Option<Mapping> {
        // SAFETY: no arguments that could be wrong.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
        let bytes = layout.size().checked_next_multiple_of(page)?;
        let huge = bytes >= Self::HUGE;
        let align = layout.align().max(if huge { Self::HUGE } else { page });
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

    fn leak(&mut self) {
        self.bytes = 0;
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the value's own pages, which nothing refers to any more.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
        }
    }
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
