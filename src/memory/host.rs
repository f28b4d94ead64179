//! Zeroed and aligned host memory, pinned if there is a CUDA device.
//!
//! Pinned memory is [pages](crate::memory::pages) that are
//! [registered](crate::memory::registered) with the runtime. Small memory is cut from [chunks] of
//! them.
//!
//! [Adopted](crate::memory::adopted) memory belongs to somebody else. It is registered as it is.
//!
//! If CUDA refuses to register memory, `cudaHostAlloc` is the fallback. The runtime shares that
//! memory with forked children, so the parent and its copies see stores of a child. Registered
//! pages read as zeroes in a child.

use std::alloc::{self, Layout};
use std::mem;
use std::ops::Range;
use std::ptr::{self, NonNull};
#[cfg(unix)]
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::memory::adopted::{Adopted, Attempt, Owner};
#[cfg(unix)]
use crate::memory::chunks::{self, Piece};
#[cfg(unix)]
use crate::memory::memory_info::room_in_groups;
use crate::memory::options::{BufferOptions, HostFlags, Pinning};
#[cfg(unix)]
use crate::memory::registered::Registered;
use crate::memory::split::split_at;
use crate::switches;
#[cfg(unix)]
use crate::sys::cudaError as Status;

/// Owned or adopted host memory.
pub(crate) struct HostMemory {
    address: NonNull<u8>,
    /// The offsets at which a registration ends or begins. None if one registration covers all, or
    /// none is needed.
    bounds: Box<[usize]>,
    kind: Kind,
    /// The reason for pageable memory, if pinning was preferred and failed.
    pinning_error: Option<Box<Error>>,
}

/// The source of the memory, which says how to release it.
enum Kind {
    /// Memory of no bytes.
    Empty,
    /// From the allocator. `base` may lie before the aligned address.
    Pageable { base: *mut u8, room: Layout },
    /// Registered pages of its own.
    #[cfg(unix)]
    Registered { _pages: Registered },
    /// A piece of a chunk, which outlives it.
    #[cfg(unix)]
    Piece { _piece: Piece },
    /// From `cudaHostAlloc`. `base` may lie before the aligned address.
    Allocated { base: *mut u8, context: &'static Context },
    /// Memory of somebody else.
    Adopted(Adopted),
}

// SAFETY: the memory belongs to the value alone, or its adopter vouched for it. It can be released
// on any thread.
unsafe impl Send for HostMemory {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates zeroed memory, pinned for the device of `context` as `pinning` says.
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
        let out_of_memory =
            || Error::OutOfMemory { side: Side::Host, bytes: layout.size(), device };
        let refused = match context_to_pin_in(pinning, context) {
            Err(refused) => refused,
            Ok(context) => match HostMemory::pinned(layout, flags, context) {
                Ok(Some(memory)) => return Ok(memory),
                // The limit applies to pageable memory, too.
                Ok(None) => return Err(out_of_memory()),
                Err(error) => Some(error.to_string()),
            },
        };
        let pinning_error = fallback(pinning, layout.size(), refused)?;
        let mut memory = HostMemory::pageable(layout).ok_or_else(out_of_memory)?;
        memory.pinning_error = pinning_error;
        Ok(memory)
    }

    /// Adopts `bytes` bytes of somebody else, pinned for the device of `context` as `pinning` says.
    ///
    /// # Safety
    ///
    /// Until the owner is let go:
    ///
    /// - The bytes are mapped and initialized. They are valid for reads and, unless `flags` have
    ///   `READ_ONLY`, for writes.
    /// - Nobody else writes them, and nothing reads what the value's users write.
    /// - Nobody else registers or unregisters any of them.
    pub(crate) unsafe fn adopt(
        address: NonNull<u8>,
        bytes: usize,
        owner: Owner,
        options: BufferOptions,
        context: Option<&'static Context>,
    ) -> Result<HostMemory> {
        let BufferOptions { pinning, host_flags } = options;
        let mut adopted = Adopted::pageable(owner);
        let Attempt { bounds, refusal } = match context_to_pin_in(pinning, context) {
            _ if bytes == 0 => Attempt::none(),
            Err(refusal) => Attempt { refusal, ..Attempt::none() },
            Ok(context) => {
                // SAFETY: the caller vouches for the bytes, which no copy uses yet.
                unsafe { adopted.pin(address, bytes, host_flags & HostFlags::all(), context) }
            }
        };
        let pinning_error = fallback(pinning, bytes, refusal)?;
        Ok(HostMemory { address, bounds, kind: Kind::Adopted(adopted), pinning_error })
    }

    fn empty(layout: Layout) -> HostMemory {
        let aligned = ptr::without_provenance_mut(layout.align());
        HostMemory::whole(NonNull::new(aligned).expect("an alignment is not 0"), Kind::Empty)
    }

    fn whole(address: NonNull<u8>, kind: Kind) -> HostMemory {
        HostMemory { address, bounds: Box::default(), kind, pinning_error: None }
    }

    /// Allocates zeroed pageable memory. The layout is not empty.
    ///
    /// For its usual alignment, the allocator returns large memory as fresh, untouched pages. For
    /// a larger alignment it writes every byte. The memory is therefore aligned here.
    fn pageable(layout: Layout) -> Option<HostMemory> {
        let room = Layout::from_size_align(layout.size().checked_add(layout.align())?, 1).ok()?;
        // SAFETY: the size of `room` is not 0.
        let base = unsafe { alloc::alloc_zeroed(room) };
        if base.is_null() {
            return None;
        }
        // SAFETY: `room` has `align` bytes more than the layout, and the offset is less than that.
        let address = unsafe { base.add(base.align_offset(layout.align())) };
        Some(HostMemory::whole(NonNull::new(address)?, Kind::Pageable { base, room }))
    }

    /// Allocates zeroed pinned memory. The layout is not empty.
    ///
    /// `None` if the memory exceeds a limit of this process's control groups. If registering and
    /// `cudaHostAlloc` both fail, the error is that of `cudaHostAlloc`.
    fn pinned(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Result<Option<HostMemory>> {
        let _current = context.enter()?;
        // Bits without a name differ in meaning between the two functions.
        let flags = flags & HostFlags::all();
        #[cfg(unix)]
        return HostMemory::registered_or_allocated(layout, flags, context);
        #[cfg(not(unix))]
        HostMemory::allocated(layout, flags, context).map(Some)
    }

    #[cfg(unix)]
    fn registered_or_allocated(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Result<Option<HostMemory>> {
        let (device, is_small) = (chunks::of_device(context), chunks::fits(layout));
        if is_small && let Some(piece) = device.piece(layout, flags) {
            return Ok(Some(HostMemory::piece(piece)));
        }
        // Both ways touch the pages. The kernel kills a process that exceeds its groups' limits.
        if lacks_room(if is_small { chunks::CHUNK } else { layout.size() }) {
            return Ok(None);
        }
        let mut refusal = None;
        if !device.refuses_registering(flags) {
            let registered = match is_small {
                true => device.piece_of_new_chunk(layout, flags).map(HostMemory::piece),
                false => Registered::new(layout, flags.bits(), context).map(|pages| {
                    let (address, bounds) = (pages.address(), pages.bounds());
                    let kind = Kind::Registered { _pages: pages };
                    HostMemory { address, bounds, kind, pinning_error: None }
                }),
            };
            match registered {
                Ok(memory) => return Ok(Some(memory)),
                Err(error) => refusal = Some(error),
            }
        }
        let memory = HostMemory::allocated(layout, flags, context)?;
        // `cudaHostAlloc` works, so the device is sound and refuses registrations alone.
        if refusal.is_some_and(|refusal| is_for_good(&refusal)) {
            device.remember_refusal(flags);
        }
        Ok(Some(memory))
    }

    #[cfg(unix)]
    fn piece(piece: Piece) -> HostMemory {
        HostMemory::whole(piece.address(), Kind::Piece { _piece: piece })
    }

    fn allocated(
        layout: Layout,
        flags: HostFlags,
        context: &'static Context,
    ) -> Result<HostMemory> {
        // `cudaHostAlloc` aligns to pages. Room for a larger alignment is added.
        let room = layout.size().saturating_add(layout.align() - 1);
        let base = calls::memory::host_alloc(room, flags.bits())?;
        let offset = base.align_offset(layout.align());
        // SAFETY: `room` has `align - 1` bytes more than the layout, and the offset is no more.
        let address = unsafe { base.add(offset) };
        // SAFETY: `size` bytes follow the offset, and nothing else uses them.
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
            Kind::Registered { .. } | Kind::Piece { .. } => true,
            Kind::Allocated { .. } => true,
            Kind::Adopted(adopted) => adopted.is_pinned(),
        }
    }

    /// The reason for pageable memory, if pinning was preferred and failed.
    pub(crate) fn pinning_error(&self) -> Option<&Error> {
        self.pinning_error.as_deref()
    }

    /// Returns whether kernels of the current device reach `bytes` bytes at `from` under the host's
    /// own addresses. The error is that of earlier work.
    pub(crate) fn is_mapped(&self, from: *mut u8, bytes: usize) -> Result<bool> {
        if !self.is_pinned() {
            return Ok(false);
        }
        for range in self.registered_ranges(from, bytes) {
            let address = from.wrapping_add(range.start);
            match calls::memory::host_device_ptr(address) {
                Ok(mapped) if mapped == address => {}
                Ok(_) | Err(Error::Cuda { code: Status::cudaErrorInvalidValue, .. }) => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Splits `bytes` bytes at `from` into ranges that one registration covers each.
    ///
    /// The ranges are offsets from `from`. The bytes lie in this memory. CUDA refuses a copy that
    /// spans two registrations ("CUDA Driver API, Memory Management", `cuMemcpyAsync`).
    #[inline]
    pub(crate) fn registered_ranges(
        &self,
        from: *const u8,
        bytes: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<'_> {
        let start = from.addr() - self.address.addr().get();
        split_at(start..start + bytes, &self.bounds)
            .map(move |range| range.start - start..range.end - start)
    }

    /// Leaks the memory, because something may still read or write it.
    pub(crate) fn leak(&mut self) {
        if let Kind::Adopted(adopted) = &mut self.kind {
            return adopted.leak();
        }
        self.bounds = Box::default();
        mem::forget(mem::replace(self, HostMemory::empty(Layout::new::<()>())));
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        match &mut self.kind {
            Kind::Empty => {}
            Kind::Pageable { base, room } => {
                // SAFETY: allocated with this layout, and released once.
                unsafe { alloc::dealloc(*base, *room) };
            }
            #[cfg(unix)]
            Kind::Registered { .. } | Kind::Piece { .. } => {}
            Kind::Adopted(_) => {}
            Kind::Allocated { base, context } => {
                if fork::forked() {
                    return;
                }
                let _current = context.enter();
                // SAFETY: this value allocated the memory. It is dropped after its transfers have
                // finished, and leaked otherwise.
                let released = unsafe { calls::memory::free_host(*base) };
                // An error says that the context is broken. Nothing can be done then.
                let _ = released;
            }
        }
    }
}

/// The context to pin memory in. Otherwise the reason for pageable memory, if pinned memory was
/// asked for.
fn context_to_pin_in(
    pinning: Pinning,
    context: Option<&'static Context>,
) -> std::result::Result<&'static Context, Option<String>> {
    match (pinning, context) {
        (Pinning::Never, _) => Err(None),
        (Pinning::Preferred, None) => Err(None),
        (Pinning::Required, None) => Err(Some("the device is the CPU".to_string())),
        _ if switches::is_pinning_off() => Err(Some("CPU_GPU_BUFFER_PINNING=never".to_string())),
        (_, Some(context)) => Ok(context),
    }
}

/// Decides about memory that could not be pinned. Returns the error if pinning is required, and
/// otherwise the error that the pageable memory keeps.
fn fallback(pinning: Pinning, bytes: usize, refused: Option<String>) -> Result<Option<Box<Error>>> {
    match refused.map(|reason| Error::PinningUnavailable { bytes, reason }) {
        Some(error) if pinning == Pinning::Required => Err(error),
        error => Ok(error.map(Box::new)),
    }
}

/// Returns whether the error of a registration says that this device refuses all registrations.
///
/// It does so under confidential computing. A shortage may pass. Other errors may come from earlier
/// asynchronous work.
#[cfg(unix)]
fn is_for_good(refusal: &Error) -> bool {
    let refusals = [Status::cudaErrorNotSupported, Status::cudaErrorNotPermitted];
    matches!(refusal, Error::Cuda { code, .. } if refusals.contains(code))
}

/// Returns whether `bytes` bytes exceed the room within the limits of the control groups.
///
/// Reading the limits costs 0.2 ms. They are read again after half of the last room is used up.
#[cfg(unix)]
fn lacks_room(bytes: usize) -> bool {
    /// The bytes that may be touched before the limits are read again.
    static CREDIT: AtomicUsize = AtomicUsize::new(0);
    /// The most credit, because groups may get a limit at any time.
    const MOST: usize = 256 << 20;
    /// Room that is left for page tables, which count, and for the rest of the process.
    const MARGIN: usize = 2 << 20;
    let pay = |credit: usize| credit.checked_sub(bytes);
    if CREDIT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay).is_ok() {
        return false;
    }
    let room = room_in_groups().map_or(usize::MAX, |room| room.saturating_sub(MARGIN));
    CREDIT.store((room.saturating_sub(bytes) / 2).min(MOST), Ordering::Relaxed);
    room < bytes
}

/// Returns whether buffers of a CUDA device can be pinned.
///
/// This is so if there is a CUDA device and `CPU_GPU_BUFFER_PINNING=never` is not set. The function
/// creates no context and pins nothing. It does use CUDA, so a child that is forked later cannot
/// use CUDA.
///
/// ```
/// println!("pinned memory: {}", cpu_gpu_buffer::is_pinned_memory_available());
/// ```
#[doc(alias = "page-locked")]
pub fn is_pinned_memory_available() -> bool {
    Device::cuda_count() > 0 && !switches::is_pinning_off()
}
