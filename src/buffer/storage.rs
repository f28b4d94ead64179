//! The bytes of a buffer, and the in-flight rule.
//!
//! The owner of the memory keeps the records of pending work. There are no guards, so forgetting a
//! value can make no race. Each record answers a question:
//!
//! | record | set by | waited for by |
//! |---|---|---|
//! | `upload`: reads the host side | `copy_to_gpu` | writers of the host side, and the last row |
//! | `download`: writes the host side | `copy_to_cpu` | readers and writers of the host side, and the last row |
//! | `device_use`, open | `gpu_on`, `fill_gpu`, the first zeroing, copies with other buffers | other streams, release, `synchronize`, `is_idle` |
//! | `host_uses`: kernels, open | `cpu_on` | readers and writers of the host side, and the last row |
//! | `host_uses`: uploads | `copy_to_gpu_from` of another buffer | writers of the host side, and the last row |
//!
//! Enqueued work comes, in stream order, after all pending work on other streams. The newest use is
//! therefore ordered after all earlier ones, and a copy supersedes the device uses before it.
//!
//! Sides that are lent to tensors have rules of their own: see
//! `flight/exports`. Every operation on a side follows them first.

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::buffer::side_layout::SideLayout;
use crate::cuda::devices::context;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::flight::device_side::DeviceSide;
#[cfg(feature = "dlpack")]
use crate::flight::exports::Exports;
use crate::flight::host_uses::HostUses;
use crate::flight::left_behind::LeftBehindCount;
use crate::flight::record::Record;
use crate::memory::options::{BufferOptions, HostFlags};
use crate::memory::slab::Slab;
use crate::shape::Shape;
use crate::stream::stream::EnteredStream;

/// Both sides, which most operations touch.
pub(crate) const BOTH: [Side; 2] = [Side::Host, Side::Device];

/// Both sides of a buffer as bytes, with the records of pending work.
pub(crate) struct Storage {
    pub(super) device_side: DeviceSide,
    // An address in the slab.
    pub(super) host: *mut u8,
    /// The bytes that a side has room for.
    capacity: usize,
    shape: Shape,
    numel: usize,
    /// The shape or the size is not the original one.
    reshaped: bool,
    pub(super) options: BufferOptions,
    /// The host side is still to be zeroed, after the transfers of its last holder.
    unzeroed: AtomicBool,
    zeroing: Mutex<()>,
    /// A write of the host side needs no wait. True until the next transfer, and never if the host
    /// side is read-only.
    pub(super) host_is_writable: bool,
    pub(super) upload: Record,
    pub(super) download: Record,
    /// Uses of the host side by kernels and by other buffers, once there was one.
    pub(super) host_uses: Option<Box<HostUses>>,
    /// The state that is shared with tensors, once a side was lent.
    #[cfg(feature = "dlpack")]
    pub(super) exports: Option<Arc<Exports>>,
    /// The count of the pool that owns this storage.
    #[cfg(feature = "dlpack")]
    pub(super) left_behind_count: Option<LeftBehindCount>,
    /// The last field: events are destroyed before the memory is released.
    pub(super) slab: Arc<Slab>,
}

// SAFETY: the bytes behind the address belong to this value alone, and the slab that it keeps owns
// them.
unsafe impl Send for Storage {}
// SAFETY: a shared reference reads the host side, and zeroes it once, under a lock.
unsafe impl Sync for Storage {}

// The other fields must not rely on these promises.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(DeviceSide, Record, HostUses, Arc<Slab>, AtomicBool, Mutex<()>)>();
    #[cfg(feature = "dlpack")]
    send_and_sync::<Arc<Exports>>();
};

impl Storage {
    /// `count` storages of one layout in one slab, both sides of each zeroed. A pool passes its
    /// count of buffers that are left behind.
    pub(crate) fn allocate_many(
        side_layout: SideLayout,
        count: usize,
        device: Device,
        options: BufferOptions,
        left_behind_count: Option<&LeftBehindCount>,
    ) -> Result<Vec<Storage>> {
        let (whole, stride) = side_layout.many(count)?;
        let mut storages = Vec::new();
        storages.try_reserve_exact(count).map_err(|_| Error::OutOfMemory {
            side: Side::Host,
            bytes: count.saturating_mul(size_of::<Storage>()),
            device,
        })?;
        let context = match device {
            Device::Cpu => None,
            // Nothing is allocated, so no device is needed.
            Device::Cuda(_) if whole.size() == 0 => None,
            Device::Cuda(ordinal) => Some(context(ordinal)?),
        };
        let slab = Arc::new(Slab::new(whole, whole, context, device, options)?);
        let storage = |number| {
            let offset = number * stride;
            Storage::in_slab(&slab, offset, side_layout, device, options, left_behind_count)
        };
        storages.extend((0..count).map(storage));
        Ok(storages)
    }

    /// The storage at an offset of a slab.
    pub(super) fn in_slab(
        slab: &Arc<Slab>,
        offset: usize,
        SideLayout { shape, numel, layout }: SideLayout,
        device: Device,
        options: BufferOptions,
        left_behind_count: Option<&LeftBehindCount>,
    ) -> Storage {
        let _ = left_behind_count;
        let bytes = layout.size();
        Storage {
            device_side: DeviceSide::new(device, slab.gpu_ptr().wrapping_add(offset), bytes),
            host: slab.host().as_ptr().wrapping_add(offset),
            capacity: bytes,
            shape,
            numel,
            reshaped: false,
            options,
            unzeroed: AtomicBool::new(false),
            zeroing: Mutex::new(()),
            host_is_writable: !options.host_flags.contains(HostFlags::READ_ONLY),
            upload: Record::idle(),
            download: Record::idle(),
            host_uses: None,
            #[cfg(feature = "dlpack")]
            exports: None,
            #[cfg(feature = "dlpack")]
            left_behind_count: left_behind_count.cloned(),
            slab: Arc::clone(slab),
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.device_side.device()
    }

    #[inline]
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    #[inline]
    pub(crate) fn numel(&self) -> usize {
        self.numel
    }

    /// The bytes in use of either side.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.device_side.bytes()
    }

    pub(crate) fn options(&self) -> BufferOptions {
        self.options
    }

    /// The bytes that a side has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.slab.host().is_pinned()
    }

    pub(crate) fn pinning_error(&self) -> Option<&Error> {
        self.slab.host().pinning_error()
    }

    /// Returns [`NotMapped`](Error::NotMapped) unless kernels reach the host side under its own
    /// address. Asks the driver once.
    pub(super) fn refuse_unmapped(&mut self) -> Result<()> {
        if self.host_uses.as_ref().is_some_and(|uses| uses.is_mapped) {
            return Ok(());
        }
        let is_mapped = self.options.host_flags.contains(HostFlags::MAPPED)
            && self.slab.host().is_mapped(self.host, self.capacity)?;
        if !is_mapped {
            return Err(Error::NotMapped);
        }
        self.host_uses_mut().is_mapped = true;
        Ok(())
    }

    /// The record of uses by kernels and other buffers, made at the first use.
    pub(super) fn host_uses_mut(&mut self) -> &mut HostUses {
        self.host_uses.get_or_insert_with(Default::default)
    }

    #[inline]
    pub(crate) fn host_ptr(&self) -> *mut u8 {
        self.host
    }

    #[inline]
    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        self.device_side.address()
    }

    /// Takes another shape in the same memory, and zeroes both sides.
    pub(crate) fn reshape_zeroed(&mut self, side_layout: SideLayout) -> Result<()> {
        let bytes = side_layout.layout.size();
        assert!(bytes <= self.capacity);
        self.wait_for_consumers(&BOTH)?;
        self.wait_to_write()?;
        // SAFETY: the range lies in the host side, and no transfer uses it after the wait.
        unsafe { ptr::write_bytes(self.host, 0, bytes) };
        self.device_side.set_bytes(bytes);
        self.device_side.reset();
        (self.shape, self.numel) = (side_layout.shape, side_layout.numel);
        self.reshaped = true;
        Ok(())
    }

    /// Restores the pool's shape, and zeroes lazily if `zeroed`. Never blocks.
    #[inline]
    pub(crate) fn reset_for_reuse(&mut self, side_layout: &SideLayout, zeroed: bool) {
        if self.reshaped {
            (self.shape, self.numel) = (side_layout.shape, side_layout.numel);
            self.device_side.set_bytes(self.capacity);
            self.reshaped = false;
        }
        if zeroed {
            *self.unzeroed.get_mut() = true;
            self.host_is_writable = false;
            self.device_side.reset();
        }
    }

    // ---- the host side ----

    /// Waits until the host side may be read.
    #[inline]
    pub(crate) fn wait_to_read(&self) -> Result<()> {
        self.device_side.refuse_child()?;
        self.wait_for_consumers(&[Side::Host])?;
        self.download.wait()?;
        if let Some(uses) = &self.host_uses {
            uses.kernels().wait()?;
        }
        self.zero_if_pending()
    }

    /// Waits until the host side may be written.
    #[inline]
    pub(crate) fn wait_to_write(&mut self) -> Result<()> {
        self.device_side.refuse_child()?;
        match self.host_is_writable {
            true => Ok(()),
            false => self.wait_for_host_transfers(),
        }
    }

    /// Waits for the transfers of the host side, and zeroes it if that is pending.
    #[inline(never)]
    fn wait_for_host_transfers(&mut self) -> Result<()> {
        self.refuse_read_only()?;
        self.wait_for_consumers(&[Side::Host])?;
        self.wait_for_host_records()?;
        self.zero_if_pending()?;
        self.host_is_writable = true;
        Ok(())
    }

    /// Waits for all pending work that reads or writes the host side.
    fn wait_for_host_records(&self) -> Result<()> {
        self.host_records().try_for_each(Record::wait)
    }

    /// Returns `true` if the host side may be read now.
    pub(crate) fn may_read(&self) -> Result<bool> {
        self.device_side.refuse_child()?;
        #[cfg(feature = "dlpack")]
        if let Some(exports) = &self.exports
            && !exports.are_consumers_done(&[Side::Host])?
        {
            return Ok(false);
        }
        if !all_finished(self.host_writers())? {
            return Ok(false);
        }
        if self.unzeroed.load(Ordering::Acquire) {
            if !all_finished(self.host_records())? {
                return Ok(false);
            }
            self.zero_host()?;
        }
        Ok(true)
    }

    /// Returns `true` if the host side may be written now.
    pub(crate) fn may_write(&self) -> Result<bool> {
        self.refuse_read_only()?;
        Ok(self.may_read()? && all_finished(self.host_records())?)
    }

    /// Zeroes the host side if that is pending. This waits for the transfers of its last holder.
    #[inline]
    pub(super) fn zero_if_pending(&self) -> Result<()> {
        match self.unzeroed.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.zero_host(),
        }
    }

    /// Zeroes the host side, once, after the transfers of its last holder.
    #[cold]
    fn zero_host(&self) -> Result<()> {
        self.wait_for_host_records()?;
        let _zeroing = self.zeroing.lock().unwrap_or_else(|poison| poison.into_inner());
        if self.unzeroed.load(Ordering::Relaxed) {
            // SAFETY: the range lies in the host side. No transfer uses it, and no other thread
            // reads it: each reader comes through here first, and waits for the lock or sees the
            // flag.
            unsafe { ptr::write_bytes(self.host, 0, self.bytes()) };
            self.unzeroed.store(false, Ordering::Release);
        }
        Ok(())
    }

    // ---- pending work ----

    /// Returns `true` if the host side is known to be writable, and no record of the device side is
    /// open. Calls no CUDA.
    #[inline]
    pub(crate) fn is_known_ready(&self) -> bool {
        // Taking a buffer from a pool comes here. Loops over arrays and slices are inlined, chains
        // are not.
        self.own_host_records().into_iter().all(Record::is_known_finished)
            && self.other_host_records().iter().all(Record::is_known_finished)
            && !self.device_side.device_use().is_open()
    }

    /// Queries, once, the event that may keep the host side from being
    /// [known ready](Self::is_known_ready).
    pub(crate) fn poll(&self) -> Result<()> {
        match self.host_records().find(|record| !record.is_known_finished()) {
            Some(pending) => pending.poll(),
            None => Ok(()),
        }
    }

    /// Waits until nothing uses either side.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.device_side.refuse_child()?;
        self.wait_for_consumers(&BOTH)?;
        self.records().try_for_each(Record::wait)
    }

    /// Returns `true` if nothing uses either side.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.device_side.refuse_child()?;
        #[cfg(feature = "dlpack")]
        if self.exports.as_ref().is_some_and(|exports| !exports.is_idle()) {
            return Ok(false);
        }
        all_finished(self.records())
    }

    /// Waits until no consumer of a tensor uses these sides. Returns an error if a tensor of one of
    /// them lives.
    #[inline]
    pub(crate) fn wait_for_consumers(&self, sides: &[Side]) -> Result<()> {
        #[cfg(feature = "dlpack")]
        if let Some(exports) = &self.exports {
            return exports.wait_for_consumers(sides);
        }
        let _ = sides;
        Ok(())
    }

    /// Orders everything that the stream is given from now on after pending work of other streams.
    #[inline]
    pub(super) fn order(&self, entered: &EnteredStream<'_>) -> Result<()> {
        self.upload.order_before(entered)?;
        self.download.order_before(entered)?;
        if let Some(uses) = &self.host_uses {
            uses.order_before(entered)?;
        }
        self.device_side.device_use().order_before(entered)
    }

    /// The records of work that writes the host side.
    #[inline]
    pub(super) fn host_writers(&self) -> impl Iterator<Item = &Record> {
        [&self.download].into_iter().chain(self.host_uses.as_deref().map(HostUses::kernels))
    }

    /// The records of work that reads or writes the host side.
    #[inline]
    fn host_records(&self) -> impl Iterator<Item = &Record> {
        self.own_host_records().into_iter().chain(self.other_host_records())
    }

    #[inline]
    fn own_host_records(&self) -> [&Record; 2] {
        [&self.download, &self.upload]
    }

    #[inline]
    fn other_host_records(&self) -> &[Record] {
        self.host_uses.as_deref().map_or(&[], HostUses::records)
    }

    #[inline]
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        self.host_records().chain([self.device_side.device_use()])
    }

    /// Ends open use. Later work of these streams belongs to other holders, and the streams may be
    /// captured or destroyed.
    #[inline]
    pub(crate) fn close_if_open(&self) {
        // Giving a buffer back to its pool comes here, as in `is_known_ready`.
        self.own_host_records().into_iter().for_each(Record::close_if_open);
        self.other_host_records().iter().for_each(Record::close_if_open);
        self.device_side.device_use().close_if_open();
    }
}

/// Returns `true` if the work of all these records is finished.
fn all_finished<'r>(mut records: impl Iterator<Item = &'r Record>) -> Result<bool> {
    records.try_fold(true, |finished, record| Ok(finished && record.is_finished()?))
}

impl Drop for Storage {
    /// Waits for pending work. If the driver cannot confirm that the memory is unused, it is
    /// leaked. Leaked memory is not waited for again.
    fn drop(&mut self) {
        if !self.slab.is_abandoned() && self.wait_for_all().is_err() {
            self.slab.abandon();
        }
    }
}
