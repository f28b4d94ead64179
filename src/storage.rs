//! Both halves of a buffer as bytes, with the records of what is in flight: the in-flight rule.
//!
//! The owner of the memory holds the state, never a guard, so that there is nothing whose forgetting
//! could make a race. Three records answer three questions:
//!
//! | record | set by | consulted by |
//! |---|---|---|
//! | `upload`: reads the host half | `copy_to_gpu` | writers of the host half, and all below |
//! | `download`: writes the host half | `copy_to_cpu` | readers and writers of the host half, and all below |
//! | `device_use`, lazy | `gpu_on`, `fill_gpu`, the first zeroing | other streams, release, `synchronize`, `is_idle` |
//!
//! Whatever is enqueued waits, in stream order, for everything that stands on other streams; so the
//! newest use is ordered after all before it, and a transfer covers the device uses before it.
//!
//! An operation checks its arguments and the stream first, and changes nothing where they are refused.
//! From the moment it tries to enqueue, its record stands, whatever CUDA answers.

use std::alloc::Layout;
use std::ops::Range;
use std::ptr;

use crate::buffer::BufferOptions;
use crate::device::{Device, context};
use crate::device_memory::DeviceMemory;
use crate::error::{Error, Result};
use crate::fill;
use crate::fork;
use crate::host::HostMemory;
use crate::raw;
use crate::record::Record;
use crate::stream::{EnteredStream, Stream};
use crate::sys::cudaMemcpyKind;

const UP: cudaMemcpyKind = cudaMemcpyKind::cudaMemcpyHostToDevice;
const DOWN: cudaMemcpyKind = cudaMemcpyKind::cudaMemcpyDeviceToHost;

pub(crate) struct Storage {
    device: Device,
    host: HostMemory,
    gpu: DeviceMemory,
    /// Of either half.
    capacity: usize,
    /// Of either half, of those that are in use.
    bytes: usize,
    /// The device half still has to be zeroed, in stream order, before its first use.
    fresh: bool,
    upload: Record,
    download: Record,
    device_use: Record,
}

impl Storage {
    /// Two zeroed halves of `layout`'s size and alignment.
    pub(crate) fn new(layout: Layout, device: Device, options: BufferOptions) -> Result<Storage> {
        let context = match device {
            Device::Cpu => None,
            // Nothing to allocate, nothing to ask.
            Device::Cuda(_) if layout.size() == 0 => None,
            Device::Cuda(ordinal) => Some(context(ordinal)?),
        };
        // The device first: it has less memory, and what it lacks need not be pinned in vain.
        let gpu = DeviceMemory::new(layout, context, device)?;
        let host = HostMemory::new(layout, options.pinning, options.host_flags, context, device)?;
        Ok(Storage {
            device,
            host,
            gpu,
            capacity: layout.size(),
            bytes: layout.size(),
            fresh: context.is_some(),
            upload: Record::idle(),
            download: Record::idle(),
            device_use: Record::idle(),
        })
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.host.is_pinned()
    }

    pub(crate) fn host_ptr(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        self.gpu.as_ptr()
    }

    /// Uses the first `bytes` of either half from now on, and zeroes them.
    pub(crate) fn restart(&mut self, bytes: usize) -> Result<()> {
        assert!(bytes <= self.capacity);
        self.wait_to_write()?;
        // SAFETY: within the host half, which no transfer reads or writes any more.
        unsafe { ptr::write_bytes(self.host.as_ptr(), 0, bytes) };
        if let DeviceMemory::Cpu(memory) = &self.gpu {
            // SAFETY: within the device half, which on the CPU has no work in flight.
            unsafe { ptr::write_bytes(memory.as_ptr(), 0, bytes) };
        }
        self.fresh = matches!(self.gpu, DeviceMemory::Cuda { .. });
        self.bytes = bytes;
        Ok(())
    }

    // ---- what the host waits for ----

    /// Waits until the host half may be read.
    #[inline]
    pub(crate) fn wait_to_read(&self) -> Result<()> {
        self.refuse_child()?;
        self.download.wait()
    }

    /// Waits until the host half may be written.
    #[inline]
    pub(crate) fn wait_to_write(&self) -> Result<()> {
        self.wait_to_read()?;
        self.upload.wait()
    }

    /// Whether the host half may be read now.
    pub(crate) fn may_read(&self) -> Result<bool> {
        self.refuse_child()?;
        self.download.is_finished()
    }

    /// Whether the host half may be written now.
    pub(crate) fn may_write(&self) -> Result<bool> {
        Ok(self.may_read()? && self.upload.is_finished()?)
    }

    /// Waits until nothing uses either half.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.wait_to_write()?;
        self.device_use.wait()
    }

    /// Whether nothing uses either half.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        Ok(self.may_write()? && self.device_use.is_finished()?)
    }

    // ---- what streams do ----

    /// Copies a range of the host half to the same range of the device half.
    pub(crate) fn copy_to_gpu(&mut self, range: Range<usize>, stream: &Stream) -> Result<()> {
        let entered = self.admit(stream)?;
        if range.is_empty() {
            return Ok(());
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
            if range.len() < self.bytes {
                self.zero_if_fresh(entered)?;
            }
        }
        let (to, from) = (self.gpu_at(range.start), self.host_at(range.start));
        // SAFETY: the range lies in both halves.
        unsafe { self.transfer(UP, to, from, range.len(), entered.as_ref()) }?;
        self.fresh = false;
        Ok(())
    }

    /// Copies a range of the host half to device memory of somebody else's.
    ///
    /// # Safety
    ///
    /// `to` has room for the range, and nothing else touches it until the copy has finished.
    pub(crate) unsafe fn copy_to_device_ptr(
        &mut self,
        range: Range<usize>,
        to: *mut u8,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.admit(stream)?;
        if range.is_empty() {
            return Ok(());
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
        }
        let from = self.host_at(range.start);
        // SAFETY: the caller vouches for `to`.
        unsafe { self.transfer(UP, to, from, range.len(), entered.as_ref()) }
    }

    /// Copies a range of the device half to the same range of the host half.
    pub(crate) fn copy_to_cpu(&mut self, range: Range<usize>, stream: &Stream) -> Result<()> {
        let entered = self.admit(stream)?;
        if range.is_empty() {
            return Ok(());
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
            self.zero_if_fresh(entered)?;
        }
        let (to, from) = (self.host_at(range.start), self.gpu_at(range.start));
        // SAFETY: the range lies in both halves.
        unsafe { self.transfer(DOWN, to, from, range.len(), entered.as_ref()) }
    }

    /// Copies device memory of somebody else's to a range of the host half.
    ///
    /// # Safety
    ///
    /// `from` has as many bytes as the range, and nothing writes them until the copy has finished.
    pub(crate) unsafe fn copy_from_device_ptr(
        &mut self,
        range: Range<usize>,
        from: *const u8,
        stream: &Stream,
    ) -> Result<()> {
        let entered = self.admit(stream)?;
        if range.is_empty() {
            return Ok(());
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
        }
        let to = self.host_at(range.start);
        // SAFETY: the caller vouches for `from`.
        unsafe { self.transfer(DOWN, to, from, range.len(), entered.as_ref()) }
    }

    /// Fills the used part of a CUDA device half with `element`, whose length divides it.
    pub(crate) fn fill_gpu(&mut self, element: &[u8], stream: &Stream) -> Result<()> {
        let Some(entered) = &self.admit(stream)? else {
            return Ok(());
        };
        self.order(entered)?;
        self.device_use.stand_for(entered)?;
        // SAFETY: the device half is this value's, and `device_use` and `order` keep others from it.
        unsafe { fill::enqueue(self.gpu.as_ptr(), self.bytes, element, entered) }?;
        self.fresh = false;
        Ok(())
    }

    /// Orders `stream` after everything, and remembers that it may use the device half from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.admit(stream)? else {
            return Ok(());
        };
        self.order(entered)?;
        self.zero_if_fresh(entered)?;
        self.device_use.stand_for(entered)
    }

    /// Checks that `stream` can be given work of this storage, and enters it. `None` where CUDA has
    /// nothing to do with it: on the CPU, and where there are no bytes.
    #[inline]
    pub(crate) fn admit<'s>(&self, stream: &'s Stream) -> Result<Option<EnteredStream<'s>>> {
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
        Ok(entered)
    }

    /// Makes what is sent to the stream from now on wait for what stands on other streams.
    #[inline]
    fn order(&self, entered: &EnteredStream<'_>) -> Result<()> {
        self.upload.order_before(entered)?;
        self.download.order_before(entered)?;
        self.device_use.order_before(entered)
    }

    fn zero_if_fresh(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if !self.fresh {
            return Ok(());
        }
        self.device_use.stand_for(entered)?;
        // SAFETY: the device half is this value's, and `device_use` and `order` keep others from it.
        unsafe { raw::memset_d8(self.gpu.as_ptr(), 0, self.bytes, entered.raw()) }?;
        self.fresh = false;
        Ok(())
    }

    /// Copies on the stream, which was ordered after everything; at once, where there is none. The record of
    /// the `direction` stands for the copy.
    ///
    /// # Safety
    ///
    /// One range lies in the host half. The other is of as many bytes of device memory, that nothing else
    /// uses against the copy until it has finished in stream order.
    #[inline]
    unsafe fn transfer(
        &mut self,
        direction: cudaMemcpyKind,
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
        let record = match direction {
            UP => &mut self.upload,
            _ => &mut self.download,
        };
        record.submit(entered, || {
            // SAFETY: the caller vouches for the ranges. The record keeps the host half from being written
            // (and, for a download, read) and both halves from being released until the copy has finished.
            unsafe { raw::memcpy_async(to, from, bytes, direction, entered.raw()) }
        })?;
        self.device_use.cover();
        Ok(())
    }

    #[inline]
    fn host_at(&self, offset: usize) -> *mut u8 {
        self.host.as_ptr().wrapping_add(offset)
    }

    #[inline]
    fn gpu_at(&self, offset: usize) -> *mut u8 {
        self.gpu.as_ptr().wrapping_add(offset)
    }

    /// In a forked child the host half of a CUDA buffer is not there.
    #[inline]
    fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }
}

impl Drop for Storage {
    /// Waits for what is in flight. Where that cannot be known, since the driver does not answer, the
    /// memory is leaked: something may still be using it.
    fn drop(&mut self) {
        if self.wait_for_all().is_err() {
            self.host.leak();
            self.gpu.leak();
        }
    }
}
