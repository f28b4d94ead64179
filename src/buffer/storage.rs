//! The bytes of a buffer, and the in-flight rule.
//!
//! The owner of the memory keeps the records of pending work. There are no guards, so forgetting a
//! value can make no race. Three records answer three questions:
//!
//! | record | set by | waited for by |
//! |---|---|---|
//! | `upload`: reads the host side | `copy_to_gpu` | writers of the host side, and the last row |
//! | `download`: writes the host side | `copy_to_cpu` | readers and writers of the host side, and the last row |
//! | `device_use`, open | `gpu_on`, `fill_gpu`, the first zeroing | other streams, release, `synchronize`, `is_idle` |
//!
//! Enqueued work comes, in stream order, after all pending work on other streams. The newest use is
//! therefore ordered after all earlier ones, and a copy supersedes the device uses before it.
//!
//! Sides that are lent to tensors have rules of their own: see
//! `flight/exports`. Every operation on a side follows them first.
//!
//! An operation checks its arguments and the stream before it changes anything. Once it tries to
//! enqueue, its record is pending, whatever CUDA returns.

use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::buffer::side_layout::SideLayout;
use crate::cuda::calls::copy::Direction;
use crate::cuda::devices::context;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::flight::device_side::DeviceSide;
#[cfg(feature = "dlpack")]
use crate::flight::exports::Exports;
use crate::flight::left_behind::LeftBehindCount;
use crate::flight::record::Record;
use crate::memory::options::BufferOptions;
use crate::memory::slab::Slab;
use crate::shape::Shape;
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::copy;

/// Both sides, which most operations touch.
pub(crate) const BOTH: [Side; 2] = [Side::Host, Side::Device];

/// The other end of a copy from or to the host side.
#[derive(Clone, Copy)]
pub(crate) enum Peer {
    /// The same range of the device side.
    DeviceSide,
    /// Device memory that somebody else owns.
    Foreign(*mut u8),
}

/// Both sides of a buffer as bytes, with the records of pending work.
pub(crate) struct Storage {
    pub(super) device_side: DeviceSide,
    // An address in the slab.
    host: *mut u8,
    /// The bytes that a side has room for.
    capacity: usize,
    shape: Shape,
    numel: usize,
    /// The shape or the size is not the original one.
    reshaped: bool,
    options: BufferOptions,
    /// The host side is still to be zeroed, after the transfers of its last holder.
    unzeroed: AtomicBool,
    zeroing: Mutex<()>,
    /// A write of the host side needs no wait. True until the next transfer.
    pub(super) host_is_writable: bool,
    upload: Record,
    download: Record,
    /// The state that is shared with tensors, once a side was lent.
    #[cfg(feature = "dlpack")]
    pub(super) exports: Option<Arc<Exports>>,
    /// The count of the pool that owns this storage.
    #[cfg(feature = "dlpack")]
    left_behind_count: Option<LeftBehindCount>,
    /// The last field: events are destroyed before the memory is released.
    slab: Arc<Slab>,
}

// SAFETY: the bytes behind the address belong to this value alone, and the slab that it keeps owns
// them.
unsafe impl Send for Storage {}
// SAFETY: a shared reference reads the host side, and zeroes it once, under a lock.
unsafe impl Sync for Storage {}

// The other fields must not rely on these promises.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(DeviceSide, Record, Arc<Slab>, AtomicBool, Mutex<()>)>();
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
        let _ = left_behind_count;
        let SideLayout { shape, numel, layout } = side_layout;
        let bytes = layout.size();
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
        let storage = |number| Storage {
            device_side: DeviceSide::new(
                device,
                slab.gpu_ptr().wrapping_add(number * stride),
                bytes,
            ),
            host: slab.host().as_ptr().wrapping_add(number * stride),
            capacity: bytes,
            shape,
            numel,
            reshaped: false,
            options,
            unzeroed: AtomicBool::new(false),
            zeroing: Mutex::new(()),
            host_is_writable: true,
            upload: Record::idle(),
            download: Record::idle(),
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
        self.wait_for_consumers(&[Side::Host])?;
        self.download.wait()?;
        self.upload.wait()?;
        self.zero_if_pending()?;
        self.host_is_writable = true;
        Ok(())
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

    /// Returns `true` if the host side may be written now.
    pub(crate) fn may_write(&self) -> Result<bool> {
        Ok(self.may_read()? && self.upload.is_finished()?)
    }

    /// Zeroes the host side if that is pending. This waits for the transfers of its last holder.
    #[inline]
    fn zero_if_pending(&self) -> Result<()> {
        match self.unzeroed.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.zero_host(),
        }
    }

    /// Zeroes the host side, once, after the transfers of its last holder.
    #[cold]
    fn zero_host(&self) -> Result<()> {
        self.download.wait()?;
        self.upload.wait()?;
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
        self.upload.is_known_finished()
            && self.download.is_known_finished()
            && !self.device_side.device_use().is_open()
    }

    /// Queries, once, the event that may keep the host side from being
    /// [known ready](Self::is_known_ready).
    pub(crate) fn poll(&self) -> Result<()> {
        let pending = match self.download.is_known_finished() {
            true => &self.upload,
            false => &self.download,
        };
        pending.poll()
    }

    /// Waits until nothing uses either side.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.device_side.refuse_child()?;
        self.wait_for_consumers(&BOTH)?;
        self.download.wait()?;
        self.upload.wait()?;
        self.device_side.device_use().wait()
    }

    /// Returns `true` if nothing uses either side.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.device_side.refuse_child()?;
        #[cfg(feature = "dlpack")]
        if self.exports.as_ref().is_some_and(|exports| !exports.is_idle()) {
            return Ok(false);
        }
        Ok(self.download.is_finished()?
            && self.upload.is_finished()?
            && self.device_side.device_use().is_finished()?)
    }

    fn records(&self) -> [&Record; 3] {
        [&self.upload, &self.download, self.device_side.device_use()]
    }

    /// Ends open use. Later work of these streams belongs to other holders, and the streams may be
    /// captured or destroyed.
    #[inline]
    pub(crate) fn close_with_event(&self) {
        self.records().into_iter().for_each(Record::close_with_event);
    }

    // ---- work on streams ----

    /// Copies a range between the host side and its peer.
    ///
    /// # Safety
    ///
    /// If the peer is foreign, these hold from the call until the copy has finished in stream
    /// order, for as many bytes at its address as the range has:
    ///
    /// - They are allocated, and memory of `stream`'s device (on the CPU, of the program).
    /// - For an upload they are valid for writes, and nothing else reads or writes them.
    /// - For a download they are valid for reads and initialized, and nothing writes them.
    pub(crate) unsafe fn copy(
        &mut self,
        direction: Direction,
        range: Range<usize>,
        peer: Peer,
        stream: &Stream,
    ) -> Result<()> {
        let (sides, device): (&[Side], _) = match peer {
            Peer::DeviceSide => (&BOTH, self.device_side.at(range.start)),
            Peer::Foreign(address) => (&[Side::Host], address),
        };
        let entered = self.enter_for_work(sides, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        let is_own = matches!(peer, Peer::DeviceSide);
        if let Some(entered) = &entered {
            self.order(entered)?;
            // An upload of everything initializes the device side itself.
            if is_own && (direction == Direction::Down || range.len() < self.bytes()) {
                self.device_side.initialize(entered)?;
            }
        }
        let host = self.host.wrapping_add(range.start);
        let (to, from) = match direction {
            Direction::Up => (device, host),
            Direction::Down => (host, device),
        };
        // SAFETY: the range lies in the host side. The peer is the same range of the device side,
        // or the caller vouches for it.
        unsafe { self.transfer(direction, to, from, range.len(), entered.as_ref()) }?;
        if is_own {
            self.device_side.mark_initialized();
        }
        Ok(())
    }

    /// Fills the device side with `element`, whose length divides the bytes in use.
    pub(crate) fn fill_gpu(&mut self, element: &[u8], stream: &Stream) -> Result<()> {
        let entered = self.enter_for_work(&[Side::Device], stream)?;
        self.fill_device_side(element, entered.as_ref())
    }

    /// Fills the device side as [`fill_gpu`](Self::fill_gpu), and waits until the host side may be
    /// written.
    pub(crate) fn fill_gpu_and_wait_to_write(
        &mut self,
        element: &[u8],
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.enter_for_work(&BOTH, stream)?;
        self.wait_to_write()?;
        self.fill_device_side(element, entered.as_ref())
    }

    fn fill_device_side(
        &mut self,
        element: &[u8],
        entered: Option<&EnteredStream<'_>>,
    ) -> Result<()> {
        if let Some(entered) = entered {
            self.order(entered)?;
        }
        if self.bytes() == 0 {
            return Ok(());
        }
        self.device_side.fill(element, entered)
    }

    /// Zeroes the used part of both sides: the host side at once, after pending copies, and the
    /// device side on `stream`.
    pub(crate) fn zero(&mut self, stream: &Stream) -> Result<()> {
        self.fill_gpu_and_wait_to_write(&[0], stream)?;
        // SAFETY: the range lies in the host side, and no copy uses it: a fill enqueues none.
        unsafe { ptr::write_bytes(self.host, 0, self.bytes()) };
        Ok(())
    }

    /// Orders `stream` after all pending work, and lets it use the device side from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.enter_for_work(&[Side::Device], stream)? else {
            return Ok(());
        };
        self.order(entered)?;
        self.device_side.use_on(entered)
    }

    /// Checks that `stream` may be given work on these sides, and enters it. Returns `None` if CUDA
    /// is not involved: on the CPU, and if there are no bytes.
    #[inline]
    pub(super) fn enter_for_work<'s>(
        &self,
        sides: &[Side],
        stream: &'s Stream,
    ) -> Result<Option<EnteredStream<'s>>> {
        let entered = self.device_side.enter_for_work(stream)?;
        // After the question for a capture: a wait for the device would end it.
        if self.bytes() > 0 {
            self.wait_for_consumers(sides)?;
        }
        Ok(entered)
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
        self.device_side.device_use().order_before(entered)
    }

    /// Copies on the stream, or at once if there is none. The record of `direction` stands for the
    /// copy. The stream comes after all pending work.
    ///
    /// # Safety
    ///
    /// - One range lies in the host side, as `direction` says.
    /// - The other is as many bytes of the stream's device, valid for the copy, and initialized if
    ///   the copy reads them.
    /// - Until the copy has finished in stream order, both stay allocated, nothing else writes
    ///   them, and nothing reads the bytes that the copy writes.
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
            // SAFETY: the caller vouches for both ranges, and on the CPU nothing is in flight.
            unsafe { ptr::copy(from, to, bytes) };
            return Ok(());
        };
        self.host_is_writable = false;
        let record = match direction {
            Direction::Up => &mut self.upload,
            Direction::Down => &mut self.download,
        };
        let memory = self.slab.host();
        // One ticket and one event stand for all parts.
        record.submit(entered, || {
            // SAFETY: the caller vouches for the ranges. The record keeps the host side from being
            // written (and, for a download, read) and both sides from being released until the
            // copies have finished.
            unsafe { copy::enqueue(direction, memory, to, from, bytes, entered) }
        })?;
        self.device_side.device_use_mut().supersede();
        Ok(())
    }
}

/// The parts that only exported storage needs.
#[cfg(feature = "dlpack")]
impl Storage {
    pub(super) fn left_behind_count(&self) -> Option<&LeftBehindCount> {
        self.left_behind_count.as_ref()
    }

    /// Takes the state that is shared with tensors.
    #[inline]
    pub(super) fn take_exports(&mut self) -> Option<Arc<Exports>> {
        self.exports.take()
    }

    pub(super) fn is_open(&self) -> bool {
        self.records().into_iter().any(Record::is_open)
    }

    /// Never releases the memory, because work that uses it may never be known to be finished.
    pub(super) fn leak(&self) {
        self.slab.abandon();
    }

    /// Ends open use that could not be [closed](Self::close_with_event), after a wait for the
    /// devices. If that use was captured, no launch of the graph may use this memory: it belonged
    /// to a view that is gone.
    pub(super) fn supersede_open(&mut self) {
        for record in [&mut self.upload, &mut self.download, self.device_side.device_use_mut()] {
            if record.is_open() {
                record.supersede();
            }
        }
    }
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
