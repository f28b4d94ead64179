//! Copies between two buffers.
//!
//! Both record the copy: the buffer whose device side takes part as a use of that side by the
//! stream, and the buffer whose host side takes part as an upload or a download.
//!
//! The host side may belong to a buffer of another device, because pinned memory is portable ("CUDA
//! C++ Programming Guide, Page-Locked Host Memory").

use std::ops::Range;
use std::ptr;

use crate::buffer::storage::Storage;
use crate::cuda::calls;
use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::copy;

impl Storage {
    /// Copies a range of the host side of `from` to the bytes of this device side that begin at
    /// `at`.
    ///
    /// # Safety
    ///
    /// The range lies in `from`, and as many bytes at `at` lie in this storage.
    pub(crate) unsafe fn copy_to_gpu_from(
        &mut self,
        at: usize,
        from: &mut Storage,
        range: Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.enter_with(from, Side::Device, Side::Host, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        from.zero_if_pending()?;
        let (to, host) = (self.device_side.at(at), from.host.wrapping_add(range.start));
        let Some(entered) = &entered else {
            // SAFETY: the caller vouches for the ranges, and on the CPU nothing is in flight. The
            // storages are distinct values, and so are their sides.
            unsafe { ptr::copy_nonoverlapping(host, to, range.len()) };
            return Ok(());
        };
        self.order(entered)?;
        from.host_writers().try_for_each(|writer| writer.order_before(entered))?;
        self.initialize_unless_all(range.len(), entered)?;
        let memory = &from.slab;
        let uses = from.host_uses.get_or_insert_with(Default::default);
        let upload = uses.upload_mut(stream)?;
        from.host_is_writable = false;
        self.device_side.device_use_mut().open_on(entered)?;
        let direction = Direction::Up;
        upload.submit(entered, || {
            // SAFETY: the caller vouches for the ranges. The upload keeps the host side from being
            // written and released until the copies have finished. The device use keeps this device
            // side, and orders other work on it.
            unsafe { copy::enqueue(direction, memory.host(), to, host, range.len(), entered) }
        })?;
        self.device_side.mark_initialized();
        Ok(())
    }

    /// Copies a range of the device side of `from` to the bytes of this host side that begin at
    /// `at`. The stream is of the device of `from`.
    ///
    /// # Safety
    ///
    /// As for [`copy_to_gpu_from`](Self::copy_to_gpu_from).
    pub(crate) unsafe fn copy_to_cpu_from(
        &mut self,
        at: usize,
        from: &mut Storage,
        range: Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        self.refuse_read_only()?;
        let entered = from.enter_with(self, Side::Device, Side::Host, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        self.zero_if_pending()?;
        let (device, host) = (from.device_side.at(range.start), self.host.wrapping_add(at));
        let Some(entered) = &entered else {
            // SAFETY: as in `copy_to_gpu_from`.
            unsafe { ptr::copy_nonoverlapping(device, host, range.len()) };
            return Ok(());
        };
        from.order(entered)?;
        self.order(entered)?;
        from.device_side.use_on(entered)?;
        // SAFETY: the caller vouches for the ranges. The device use of `from` keeps its device
        // side, which is initialized, and orders other work on it.
        unsafe { self.transfer(Direction::Down, host, device, range.len(), Some(entered)) }
    }

    /// Copies a range of the device side of `from` to the bytes of this device side that begin at
    /// `at`. The stream is of this storage's device.
    ///
    /// # Safety
    ///
    /// As for [`copy_to_gpu_from`](Self::copy_to_gpu_from).
    pub(crate) unsafe fn copy_gpu_from(
        &mut self,
        at: usize,
        from: &mut Storage,
        range: Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.enter_with(from, Side::Device, Side::Device, stream)?;
        if range.is_empty() {
            return Ok(());
        }
        let (to, device) = (self.device_side.at(at), from.device_side.at(range.start));
        let Some(entered) = &entered else {
            // SAFETY: as in `copy_to_gpu_from`.
            unsafe { ptr::copy_nonoverlapping(device, to, range.len()) };
            return Ok(());
        };
        if let Device::Cuda(peer) = from.device()
            && from.device() != self.device()
        {
            from.initialize_on_its_device()?;
            entered.context().enable_peer(peer);
        }
        self.order(entered)?;
        from.order(entered)?;
        self.initialize_unless_all(range.len(), entered)?;
        from.device_side.use_on(entered)?;
        self.device_side.device_use_mut().open_on(entered)?;
        // SAFETY: the caller vouches for the ranges. `from` is initialized. The device uses keep
        // both sides until the copy has finished, and order other work on them.
        unsafe { calls::copy::memcpy_on_devices(to, device, range.len(), entered.raw()) }?;
        // A capture that began meanwhile may have taken the copy.
        entered.refuse_capture()?;
        self.device_side.mark_initialized();
        Ok(())
    }

    /// Checks that a side of this storage and one of `other` may take part in a copy on `stream`,
    /// which is of this storage's device, and enters it. Returns `None` on the CPU, and if this
    /// storage has no bytes.
    fn enter_with<'s>(
        &self,
        other: &Storage,
        side: Side,
        other_side: Side,
        stream: &'s Stream,
    ) -> Result<Option<EnteredStream<'s>>> {
        let (device, other_device) = (self.device(), other.device());
        if (device == Device::Cpu) != (other_device == Device::Cpu) {
            return Err(Error::DeviceMismatch { expected: device, actual: other_device });
        }
        let entered = self.enter_for_work(&[side], stream)?;
        if other.bytes() > 0 {
            other.device_side.refuse_child()?;
            other.wait_for_consumers(&[other_side])?;
        }
        Ok(entered)
    }

    /// Zeroes the device side before its first use, unless a copy of `bytes` bytes initializes all
    /// of it.
    fn initialize_unless_all(&mut self, bytes: usize, entered: &EnteredStream<'_>) -> Result<()> {
        match bytes < self.bytes() {
            true => self.device_side.initialize(entered),
            false => Ok(()),
        }
    }

    /// Zeroes the device side before its first use, on a stream of its own device. Work of another
    /// device cannot do that.
    fn initialize_on_its_device(&mut self) -> Result<()> {
        match self.device_side.is_initialized() {
            true => Ok(()),
            false => self.use_on(&Stream::new(self.device())?),
        }
    }
}
