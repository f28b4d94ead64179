//! Both sides of a buffer as bytes, with the records of what is in flight: the in-flight rule.
//!
//! The owner of the memory holds the state, never a guard, so that there is nothing whose forgetting
//! could make a race. Three records answer three questions:
//!
//! | record | set by | consulted by |
//! |---|---|---|
//! | `upload`: reads the host side | `copy_to_gpu` | writers of the host side, and all below |
//! | `download`: writes the host side | `copy_to_cpu` | readers and writers of the host side, and all below |
//! | `device_use`, lazy | `gpu_on`, `fill_gpu`, the first zeroing | other streams, release, `synchronize`, `is_idle` |
//!
//! Whatever is enqueued waits, in stream order, for everything that stands on other streams; so the
//! newest use is ordered after all before it, and a transfer covers the device uses before it.
//!
//! What is lent to tensors of other libraries is looked after by `src/flight/exports.rs`: whatever touches a side
//! settles that first.
//!
//! An operation checks its arguments and the stream first, and changes nothing where they are refused.
//! From the moment it tries to enqueue, its record stands, whatever CUDA answers.

use std::alloc::Layout;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut, Range};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::cuda::device::context;
use crate::cuda::fork;
use crate::cuda::raw::{self, Direction};
use crate::device::Device;
use crate::error::{Error, Result, Side};
#[cfg(feature = "dlpack")]
use crate::flight::exports::{Exports, Loan};
use crate::flight::left_behind::{LeftBehindCount, reclaim_before_allocating};
use crate::flight::record::Record;
use crate::memory::options::BufferOptions;
use crate::memory::slab::Slab;
use crate::shape::Shape;
use crate::slots::Lease;
#[cfg(feature = "dlpack")]
use crate::slots::Segment;
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::fill;

/// What most operations touch.
pub(crate) const BOTH: [Side; 2] = [Side::Host, Side::Device];

/// A buffer's storage, which goes where it came from.
pub(crate) struct StorageHandle(ManuallyDrop<Origin>);

/// Where a storage is.
enum Origin {
    Own(Box<Storage>),
    /// In a pool, which gets it back as it is.
    Pool(Lease<Storage>),
}

impl StorageHandle {
    /// Two zeroed sides of a form, in a slab of their own.
    pub(crate) fn own(
        side_layout: SideLayout,
        device: Device,
        options: BufferOptions,
    ) -> Result<StorageHandle> {
        reclaim_before_allocating(side_layout.layout.size(), device);
        let mut one = Storage::allocate_many(side_layout, 1, device, options, None)?;
        Ok(StorageHandle::of(Origin::Own(Box::new(one.pop().expect("one was asked for")))))
    }

    /// What a pool handed out.
    #[inline]
    pub(crate) fn pool(slot: Lease<Storage>) -> StorageHandle {
        StorageHandle::of(Origin::Pool(slot))
    }

    #[inline]
    fn of(origin: Origin) -> StorageHandle {
        StorageHandle(ManuallyDrop::new(origin))
    }

    /// Gives memory of its own up for lost where a use of it could not be [closed](Storage::close_with_event): its stream is in
    /// capture, say. Whether that will ever have ended nobody can ask later, when the stream may be gone.
    #[cfg(feature = "dlpack")]
    pub(crate) fn abandon_if_open(&self) -> bool {
        let records = [&self.upload, &self.download, &self.device_use];
        let open = matches!(*self.0, Origin::Own(_)) && records.iter().any(|it| it.is_open());
        if open {
            self.slab.abandon();
        }
        open
    }

    /// Gives a slot of which nothing is in flight back to its pool, and calls nothing: the answer is what is to be dropped
    /// when no lock is held.
    #[cfg(feature = "dlpack")]
    pub(crate) fn give_back(self) -> (Option<StorageHandle>, Option<Arc<Segment<Storage>>>) {
        let mut handle = ManuallyDrop::new(self);
        // SAFETY: the end of the value, which is not dropped.
        match unsafe { ManuallyDrop::take(&mut handle.0) } {
            own @ Origin::Own(_) => (Some(StorageHandle::of(own)), None),
            Origin::Pool(slot) => {
                let mut slot = ManuallyDrop::new(slot);
                // The device was waited for.
                slot.supersede_open();
                // SAFETY: the end of the lease, which is not dropped.
                (None, unsafe { slot.release() })
            }
        }
    }
}

impl Drop for StorageHandle {
    /// What is given back waits for nothing, but [stands for nothing more](Storage::close_with_event). What was lent goes when that
    /// is over.
    #[inline]
    fn drop(&mut self) {
        #[cfg(feature = "dlpack")]
        if let Some(exports) = self.exports.take() {
            // SAFETY: the end of the value, of which nobody looks at what is taken.
            let origin = unsafe { ManuallyDrop::take(&mut self.0) };
            return exports.buffer_dropped(StorageHandle::of(origin));
        }
        if let Origin::Pool(storage) = &*self.0 {
            storage.close_with_event();
        }
        // SAFETY: the end of the value, which goes once.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

impl Deref for StorageHandle {
    type Target = Storage;

    #[inline]
    fn deref(&self) -> &Storage {
        match &*self.0 {
            Origin::Own(storage) => storage,
            Origin::Pool(lease) => lease,
        }
    }
}

impl DerefMut for StorageHandle {
    #[inline]
    fn deref_mut(&mut self) -> &mut Storage {
        match &mut *self.0 {
            Origin::Own(storage) => storage,
            Origin::Pool(lease) => lease,
        }
    }
}

/// What is to be stored in either side.
#[derive(Clone, Copy)]
pub(crate) struct SideLayout {
    pub(crate) shape: Shape,
    /// The elements of the shape.
    pub(crate) numel: usize,
    /// All of them.
    pub(crate) layout: Layout,
}

pub(crate) struct Storage {
    device: Device,
    // Addresses in the slab.
    host: *mut u8,
    gpu: *mut u8,
    /// Of either side.
    capacity: usize,
    /// Of either side, of those that are in use.
    bytes: usize,
    shape: Shape,
    numel: usize,
    /// Not of the shape and size that it was made with.
    reshaped: bool,
    options: BufferOptions,
    /// So many bytes of the device side are defined, in stream order. The others in use still have to be
    /// zeroed, before the first use.
    initialized_bytes: usize,
    /// The host side still has to be zeroed, once no transfer of the holder before uses it.
    unzeroed: AtomicBool,
    zeroing: Mutex<()>,
    /// Nothing has to be waited for before the host side is written: seen once, and true until the next transfer.
    host_is_writable: bool,
    upload: Record,
    download: Record,
    device_use: Record,
    /// Where sides were lent to tensors.
    #[cfg(feature = "dlpack")]
    exports: Option<Arc<Exports>>,
    /// How many buffers of its pool tensors left behind, if it is in one.
    #[cfg(feature = "dlpack")]
    left_behind_count: Option<LeftBehindCount>,
    /// Last: the events go before the memory, as they were made after it.
    slab: Arc<Slab>,
}

// SAFETY: the bytes behind the addresses are this value's alone, and the slab that it keeps owns them.
unsafe impl Send for Storage {}
// SAFETY: through a shared reference the addresses can be read, and the host side zeroed once, under a lock.
unsafe impl Sync for Storage {}

// The other parts must not rely on the promises above.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(Record, Arc<Slab>, AtomicBool, Mutex<()>)>();
    #[cfg(feature = "dlpack")]
    send_and_sync::<Arc<Exports>>();
};

impl Storage {
    /// Storages of one form in one slab, both sides of each zeroed.
    /// A pool gives its count of buffers that were left behind.
    pub(crate) fn allocate_many(
        side_layout: SideLayout,
        count: usize,
        device: Device,
        options: BufferOptions,
        left_behind_count: Option<&LeftBehindCount>,
    ) -> Result<Vec<Storage>> {
        let _ = left_behind_count;
        let SideLayout { shape, numel, layout } = side_layout;
        u32::try_from(count).map_err(|_| Error::InvalidShape {
            reason: format!("{count} buffers are more than can be told apart"),
        })?;
        let bytes = layout.size();
        let stride = layout.pad_to_align().size();
        // The last one needs no padding.
        let whole = count
            .checked_sub(1)
            .map_or(Some(0), |before| stride.checked_mul(before)?.checked_add(bytes));
        let whole = whole.and_then(|whole| Layout::from_size_align(whole, layout.align()).ok());
        let whole = whole.ok_or_else(|| Error::InvalidShape {
            reason: format!("{count} buffers of {bytes} bytes overflow isize"),
        })?;
        let mut storages = Vec::new();
        storages.try_reserve_exact(count).map_err(|_| Error::OutOfMemory {
            side: Side::Host,
            bytes: count.saturating_mul(size_of::<Storage>()),
            device,
        })?;
        let context = match device {
            Device::Cpu => None,
            // Nothing to allocate, nothing to ask.
            Device::Cuda(_) if whole.size() == 0 => None,
            Device::Cuda(ordinal) => Some(context(ordinal)?),
        };
        let slab = Arc::new(Slab::new(whole, whole, context, device, options)?);
        let storage = |number| Storage {
            device,
            host: slab.host().as_ptr().wrapping_add(number * stride),
            gpu: slab.gpu_ptr().wrapping_add(number * stride),
            capacity: bytes,
            bytes,
            shape,
            numel,
            reshaped: false,
            options,
            initialized_bytes: if context.is_some() { 0 } else { bytes },
            unzeroed: AtomicBool::new(false),
            zeroing: Mutex::new(()),
            host_is_writable: true,
            upload: Record::idle(),
            download: Record::idle(),
            device_use: Record::idle(),
            #[cfg(feature = "dlpack")]
            exports: None,
            #[cfg(feature = "dlpack")]
            left_behind_count: left_behind_count.cloned(),
            slab: Arc::clone(&slab),
        };
        storages.extend((0..count).map(storage));
        Ok(storages)
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    #[cfg(feature = "dlpack")]
    pub(crate) fn left_behind_count(&self) -> Option<&LeftBehindCount> {
        self.left_behind_count.as_ref()
    }

    #[inline]
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    #[inline]
    pub(crate) fn numel(&self) -> usize {
        self.numel
    }

    /// Of either side, of those that are in use.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn options(&self) -> BufferOptions {
        self.options
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.slab.host().is_pinned()
    }

    pub(crate) fn pinning_error(&self) -> Option<&Error> {
        self.slab.host().pinning_error()
    }

    #[inline]
    pub(crate) fn host_ptr(&self) -> *mut u8 {
        self.host
    }

    #[inline]
    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        self.gpu
    }

    /// Is of this form from now on, in the same memory, and zeroed.
    pub(crate) fn reshape_zeroed(&mut self, side_layout: SideLayout) -> Result<()> {
        let bytes = side_layout.layout.size();
        assert!(bytes <= self.capacity);
        self.wait_for_consumers(&BOTH)?;
        self.wait_to_write()?;
        // SAFETY: within the host side, which no transfer reads or writes any more.
        unsafe { ptr::write_bytes(self.host, 0, bytes) };
        self.mark_uninitialized(bytes);
        (self.shape, self.numel, self.bytes) = (side_layout.shape, side_layout.numel, bytes);
        self.reshaped = true;
        Ok(())
    }

    /// Is of the form that it was made with from now on, with what the holder before left there, or zeroes in both
    /// sides. Waits for nothing.
    #[inline]
    pub(crate) fn reset_for_reuse(&mut self, side_layout: &SideLayout, zeroed: bool) {
        if self.reshaped {
            (self.shape, self.numel, self.bytes) =
                (side_layout.shape, side_layout.numel, self.capacity);
            self.reshaped = false;
        }
        if zeroed {
            *self.unzeroed.get_mut() = true;
            self.host_is_writable = false;
            self.mark_uninitialized(self.bytes);
        }
    }

    /// The first `bytes` of the device side are to be zeroed; on the CPU they are, at once.
    fn mark_uninitialized(&mut self, bytes: usize) {
        match self.device {
            // SAFETY: within the device side, which on the CPU has no work in flight.
            Device::Cpu => unsafe { ptr::write_bytes(self.gpu, 0, bytes) },
            Device::Cuda(_) => self.initialized_bytes = 0,
        }
    }

    // ---- what the host waits for ----

    /// Waits until the host side may be read.
    #[inline]
    pub(crate) fn wait_to_read(&self) -> Result<()> {
        self.refuse_child()?;
        self.wait_for_consumers(&[Side::Host])?;
        self.download.wait()?;
        self.zero_if_pending()
    }

    /// Waits until the host side may be written.
    #[inline]
    pub(crate) fn wait_to_write(&mut self) -> Result<()> {
        self.refuse_child()?;
        match self.host_is_writable {
            true => Ok(()),
            false => self.wait_for_host_transfers(),
        }
    }

    /// Waits for the transfers of the host side, and zeroes it if it has to be.
    #[inline(never)]
    fn wait_for_host_transfers(&mut self) -> Result<()> {
        self.wait_for_consumers(&[Side::Host])?;
        self.download.wait()?;
        self.upload.wait()?;
        self.zero_if_pending()?;
        self.host_is_writable = true;
        Ok(())
    }

    /// Whether the host side may be read now.
    pub(crate) fn may_read(&self) -> Result<bool> {
        self.refuse_child()?;
        #[cfg(feature = "dlpack")]
        if let Some(exports) = &self.exports
            && !exports.are_consumers_done(&[Side::Host])?
        {
            return Ok(false);
        }
        if !self.download.is_finished()? {
            return Ok(false);
        }
        if self.unzeroed.load(Ordering::Acquire) {
            if !self.upload.is_finished()? {
                return Ok(false);
            }
            self.zero_host()?;
        }
        Ok(true)
    }

    /// Whether the host side may be written now.
    pub(crate) fn may_write(&self) -> Result<bool> {
        Ok(self.may_read()? && self.upload.is_finished()?)
    }

    /// Zeroes the host side, once, after the transfers of the holder before.
    #[cold]
    fn zero_host(&self) -> Result<()> {
        self.download.wait()?;
        self.upload.wait()?;
        let _zeroing = self.zeroing.lock().unwrap_or_else(|poison| poison.into_inner());
        if self.unzeroed.load(Ordering::Relaxed) {
            // SAFETY: within the host side. No transfer uses it, and nobody else looks at it: whoever wants to
            // comes through here first, and waits for the lock or sees the flag.
            unsafe { ptr::write_bytes(self.host, 0, self.bytes) };
            self.unzeroed.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Whether the host side is known to be free to write, without asking anybody, and no stream may be about to
    /// use the device side.
    #[inline]
    pub(crate) fn is_known_ready(&self) -> bool {
        self.upload.is_known_finished()
            && self.download.is_known_finished()
            && !self.device_use.is_open()
    }

    /// Asks the driver once for what may keep the host side from being [known ready](Self::is_known_ready).
    pub(crate) fn poll(&self) -> Result<()> {
        let pending = match self.download.is_known_finished() {
            true => &self.upload,
            false => &self.download,
        };
        pending.poll()
    }

    /// Waits until nothing uses either side.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.refuse_child()?;
        self.wait_for_consumers(&BOTH)?;
        self.download.wait()?;
        self.upload.wait()?;
        self.device_use.wait()
    }

    /// Whether nothing uses either side.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.refuse_child()?;
        #[cfg(feature = "dlpack")]
        if self.exports.as_ref().is_some_and(|exports| !exports.is_idle()) {
            return Ok(false);
        }
        Ok(self.download.is_finished()?
            && self.upload.is_finished()?
            && self.device_use.is_finished()?)
    }

    /// What could not be [closed](Self::close_with_event) is over: somebody has waited for all that its stream was sent. (If that was
    /// captured, nothing of the graph may use this memory: it belongs to a view that is gone.)
    #[cfg(feature = "dlpack")]
    fn supersede_open(&mut self) {
        for record in [&mut self.upload, &mut self.download, &mut self.device_use] {
            if record.is_open() {
                record.supersede();
            }
        }
    }

    /// No longer stands for what streams are sent from now on: they have nothing to do with the next holder, and may be
    /// captured, or destroyed.
    #[inline]
    pub(crate) fn close_with_event(&self) {
        for record in [&self.upload, &self.download, &self.device_use] {
            record.close_with_event();
        }
    }

    // ---- what streams do ----

    /// Copies a range of the host side to the same range of the device side.
    pub(crate) fn copy_to_gpu(&mut self, range: Range<usize>, stream: &Stream) -> Result<()> {
        let entered = self.enter_for_work(&BOTH, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        if let Some(entered) = &entered {
            self.order(entered)?;
            if range.len() < self.bytes {
                self.initialize(entered)?;
            }
        }
        let (to, from) = (self.gpu_at(range.start), self.host_at(range.start));
        // SAFETY: the range lies in both sides.
        unsafe { self.transfer(Direction::Up, to, from, range.len(), entered.as_ref()) }?;
        self.initialized_bytes = self.bytes;
        Ok(())
    }

    /// Copies a range of the host side to device memory of somebody else's.
    ///
    /// # Safety
    ///
    /// From the call until the copy has finished in stream order, as many bytes at `to` as the
    /// range has
    ///
    /// - are allocated, valid for writes, and memory of `stream`'s device (on the CPU, of the
    ///   program);
    /// - are read and written by nothing else.
    pub(crate) unsafe fn copy_to_device_ptr(
        &mut self,
        range: Range<usize>,
        to: *mut u8,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.enter_for_work(&[Side::Host], stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        if let Some(entered) = &entered {
            self.order(entered)?;
        }
        let from = self.host_at(range.start);
        // SAFETY: the caller vouches for `to`.
        unsafe { self.transfer(Direction::Up, to, from, range.len(), entered.as_ref()) }
    }

    /// Copies a range of the device side to the same range of the host side.
    pub(crate) fn copy_to_cpu(&mut self, range: Range<usize>, stream: &Stream) -> Result<()> {
        let entered = self.enter_for_work(&BOTH, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        if let Some(entered) = &entered {
            self.order(entered)?;
            self.initialize(entered)?;
        }
        let (to, from) = (self.host_at(range.start), self.gpu_at(range.start));
        // SAFETY: the range lies in both sides.
        unsafe { self.transfer(Direction::Down, to, from, range.len(), entered.as_ref()) }
    }

    /// Copies device memory of somebody else's to a range of the host side.
    ///
    /// # Safety
    ///
    /// From the call until the copy has finished in stream order, as many bytes at `from` as the
    /// range has
    ///
    /// - are allocated, valid for reads, initialised, and memory of `stream`'s device (on the CPU,
    ///   of the program);
    /// - are written by nothing.
    pub(crate) unsafe fn copy_from_device_ptr(
        &mut self,
        range: Range<usize>,
        from: *const u8,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.enter_for_work(&[Side::Host], stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        if let Some(entered) = &entered {
            self.order(entered)?;
        }
        let to = self.host_at(range.start);
        // SAFETY: the caller vouches for `from`.
        unsafe { self.transfer(Direction::Down, to, from, range.len(), entered.as_ref()) }
    }

    /// Fills the used part of a CUDA device side with `element`, whose length divides it.
    pub(crate) fn fill_gpu(&mut self, element: &[u8], stream: &Stream) -> Result<()> {
        let Some(entered) = &self.enter_for_work(&[Side::Device], stream)? else {
            return Ok(());
        };
        self.order(entered)?;
        self.device_use.open_on(entered)?;
        // SAFETY: the device side is this value's, and `device_use` and `order` keep others from it.
        unsafe { fill::enqueue(self.gpu, self.bytes, element, entered) }?;
        self.initialized_bytes = self.bytes;
        Ok(())
    }

    /// Zeroes the used part of both sides: of the host side at once, after pending copies, and of
    /// the device side on `stream`.
    pub(crate) fn zero(&mut self, stream: &Stream) -> Result<()> {
        self.enter_for_work(&BOTH, stream)?;
        self.wait_to_write()?;
        match self.device {
            Device::Cpu => self.mark_uninitialized(self.bytes),
            Device::Cuda(_) => self.fill_gpu(&[0], stream)?,
        }
        // SAFETY: within the host side, which no copy touches since the wait: a fill enqueues none.
        unsafe { ptr::write_bytes(self.host, 0, self.bytes) };
        Ok(())
    }

    /// Orders `stream` after everything, and remembers that it may use the device side from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.enter_for_work(&[Side::Device], stream)? else {
            return Ok(());
        };
        self.order(entered)?;
        self.initialize(entered)?;
        self.device_use.open_on(entered)
    }

    // ---- what is lent to tensors ----

    /// Lends the device side to a tensor whose consumer uses it on `stream`, first. The answer is its address, too; where
    /// there are no bytes, null.
    #[cfg(feature = "dlpack")]
    pub(crate) fn lend_gpu(&mut self, stream: &Stream) -> Result<(*mut u8, Option<Loan>)> {
        let entered = self.enter_for_work(&[], stream)?;
        if self.bytes == 0 {
            return Ok((ptr::null_mut(), None));
        }
        // A consumer before may still use it, and knows nothing of the next.
        if !self.is_lent(Side::Device) {
            self.wait_for_consumers(&[Side::Device])?;
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
            let initialized = self.initialize(entered);
            // The stream may be destroyed before the record is asked about.
            self.device_use.close_with_event();
            if self.device_use.is_open() {
                // The next use of the device side waits for the devices instead of the record.
                self.exports().mark_unknown(Side::Device);
                self.device_use.supersede();
            }
            initialized?;
        }
        // Last: a refused export leaves the buffer as it was.
        let loan = self.exports().lend(Side::Device);
        Ok((self.gpu, Some(loan)))
    }

    /// Lends the device side, guarded and ordered with nothing. As for [`lend_gpu`](Self::lend_gpu).
    #[cfg(feature = "dlpack")]
    pub(crate) fn lend_gpu_unordered(&mut self) -> Result<(*mut u8, Option<Loan>)> {
        self.refuse_child()?;
        if self.bytes == 0 {
            return Ok((ptr::null_mut(), None));
        }
        let loan = self.exports().lend(Side::Device);
        Ok((self.gpu, Some(loan)))
    }

    /// Lends the memory of the device side, which nothing else knows of. As for [`lend_gpu`](Self::lend_gpu).
    #[cfg(feature = "dlpack")]
    pub(crate) fn lend_gpu_unguarded(&mut self) -> Result<(*mut u8, Option<Loan>)> {
        self.refuse_child()?;
        if self.bytes == 0 {
            return Ok((ptr::null_mut(), None));
        }
        let loan = self.exports().lend_unguarded();
        Ok((self.gpu, Some(loan)))
    }

    /// Lends the host side to a tensor, with nothing of this storage's in flight. As for [`lend_gpu`](Self::lend_gpu).
    #[cfg(feature = "dlpack")]
    pub(crate) fn lend_cpu(&mut self) -> Result<(*mut u8, Option<Loan>)> {
        self.refuse_child()?;
        if self.bytes == 0 {
            return Ok((ptr::null_mut(), None));
        }
        // While it is lent, nothing comes to be in flight.
        if !self.is_lent(Side::Host) {
            self.wait_to_write()?;
        }
        let loan = self.exports().lend(Side::Host);
        self.host_is_writable = false;
        Ok((self.host, Some(loan)))
    }

    #[cfg(feature = "dlpack")]
    fn is_lent(&self, side: Side) -> bool {
        self.exports.as_ref().is_some_and(|exports| exports.is_lent(side))
    }

    #[cfg(feature = "dlpack")]
    fn exports(&mut self) -> &Arc<Exports> {
        self.exports.get_or_insert_with(|| Arc::new(Exports::new(self.device)))
    }

    /// Checks that `stream` can be given work of this storage that touches these sides, and enters it. `None` where
    /// CUDA has nothing to do with it: on the CPU, and where there are no bytes.
    #[inline]
    pub(crate) fn enter_for_work<'s>(
        &self,
        touches: &[Side],
        stream: &'s Stream,
    ) -> Result<Option<EnteredStream<'s>>> {
        if stream.device() != self.device {
            return Err(Error::DeviceMismatch { expected: self.device, actual: stream.device() });
        }
        if self.bytes == 0 {
            return Ok(None);
        }
        let entered = stream.enter()?;
        if let Some(entered) = &entered {
            entered.refuse_capture()?;
        }
        // After that: it may wait for the device, which ends captures.
        self.wait_for_consumers(touches)?;
        Ok(entered)
    }

    /// Sees to it that no tensor's consumer uses these sides: an error where a tensor lives; otherwise waits for
    /// the devices, if nobody has since the last one went.
    #[inline]
    pub(crate) fn wait_for_consumers(&self, touches: &[Side]) -> Result<()> {
        #[cfg(feature = "dlpack")]
        if let Some(exports) = &self.exports {
            return exports.wait_for_consumers(touches);
        }
        let _ = touches;
        Ok(())
    }

    /// Makes what is sent to the stream from now on wait for what stands on other streams.
    #[inline]
    fn order(&self, entered: &EnteredStream<'_>) -> Result<()> {
        self.upload.order_before(entered)?;
        self.download.order_before(entered)?;
        self.device_use.order_before(entered)
    }

    /// Zeroes what is in use of the device side and not defined.
    #[inline]
    fn initialize(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if self.initialized_bytes >= self.bytes {
            return Ok(());
        }
        self.device_use.open_on(entered)?;
        let (from, bytes) =
            (self.gpu_at(self.initialized_bytes), self.bytes - self.initialized_bytes);
        // SAFETY: the device side is this value's, and `device_use` and `order` keep others from it.
        unsafe { fill::enqueue(from, bytes, &[0], entered) }?;
        self.initialized_bytes = self.bytes;
        Ok(())
    }

    /// Before a transfer of the host side: zeroes it if it has to be, which waits.
    #[inline]
    fn zero_if_pending(&self) -> Result<()> {
        match self.unzeroed.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.zero_host(),
        }
    }

    /// Copies on the stream, which was ordered after everything; at once, where there is none. The record of
    /// the `direction` stands for the copy.
    ///
    /// # Safety
    ///
    /// - One range lies in the host side, as `direction` says.
    /// - The other is of as many bytes of the stream's device, valid for the copy and initialised
    ///   if they are read.
    /// - Until the copy has finished in stream order, these stay allocated, nothing writes them,
    ///   and nothing reads them if the copy writes them.
    #[inline]
    unsafe fn transfer(
        &mut self,
        direction: Direction,
        to: *mut u8,
        from: *const u8,
        bytes: usize,
        entered: Option<&EnteredStream<'_>>,
    ) -> Result<()> {
        let Some(entered) = entered else {
            // SAFETY: the caller vouches for both ranges; on the CPU nothing is in flight.
            unsafe { ptr::copy(from, to, bytes) };
            return Ok(());
        };
        self.host_is_writable = false;
        let (record, host) = match direction {
            Direction::Up => (&mut self.upload, from),
            Direction::Down => (&mut self.download, to.cast_const()),
        };
        let memory = self.slab.host();
        // One ticket and one event answer for all parts.
        record.submit(entered, || {
            memory.for_each_registration(host, bytes, |at, bytes| {
                let (to, from) = (to.wrapping_add(at), from.wrapping_add(at));
                // SAFETY: the caller vouches for the ranges. The record keeps the host side from being written
                // (and, for a download, read) and both sides from being released until the copy has finished.
                unsafe { raw::memcpy(direction, to, from, bytes, entered.raw()) }
            })
        })?;
        self.device_use.supersede();
        Ok(())
    }

    #[inline]
    fn host_at(&self, offset: usize) -> *mut u8 {
        self.host.wrapping_add(offset)
    }

    #[inline]
    fn gpu_at(&self, offset: usize) -> *mut u8 {
        self.gpu.wrapping_add(offset)
    }

    /// In a forked child the host side of a CUDA buffer is not there.
    #[inline]
    fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }
}

impl Drop for Storage {
    /// Waits for what is in flight. If the driver cannot say that it is over, the memory is leaked:
    /// something may still be using it. Memory that is leaked already need not be waited for.
    fn drop(&mut self) {
        if !self.slab.is_abandoned() && self.wait_for_all().is_err() {
            self.slab.abandon();
        }
    }
}
