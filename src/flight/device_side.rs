//! The device side that a buffer or a group owns, and its uses that no copy stands for.
//!
//! A kernel, a fill and the first zeroing use the device side alone. One record, `device_use`,
//! answers for them. It is open: it stands for everything that its stream is given until somebody
//! asks.

use std::ptr;

use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flight::record::Record;
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::fill;

/// The device side of a buffer or of a group.
pub(crate) struct DeviceSide {
    device: Device,
    address: *mut u8,
    /// The bytes in use, of the device side and of the host side alike.
    bytes: usize,
    /// The first bytes that are initialized, in stream order. The rest is zeroed before its first
    /// use.
    initialized_bytes: usize,
    device_use: Record,
}

// SAFETY: the bytes behind the address belong to this value alone.
unsafe impl Send for DeviceSide {}
// SAFETY: a shared reference gives the address and the record, and reads no byte.
unsafe impl Sync for DeviceSide {}

impl DeviceSide {
    /// A device side of `bytes` bytes at `address`. On the CPU they are initialized.
    pub(crate) fn new(device: Device, address: *mut u8, bytes: usize) -> DeviceSide {
        let initialized_bytes = if device == Device::Cpu { bytes } else { 0 };
        DeviceSide { device, address, bytes, initialized_bytes, device_use: Record::idle() }
    }

    #[inline]
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The bytes in use.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of the first byte, or null if there are no bytes.
    #[inline]
    pub(crate) fn address(&self) -> *mut u8 {
        self.address
    }

    /// The address of the byte at `offset`.
    #[inline]
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        self.address.wrapping_add(offset)
    }

    /// The uses of the device side that no copy stands for.
    #[inline]
    pub(crate) fn device_use(&self) -> &Record {
        &self.device_use
    }

    /// The record of [`device_use`](Self::device_use), to change.
    #[inline]
    pub(crate) fn device_use_mut(&mut self) -> &mut Record {
        &mut self.device_use
    }

    /// Returns [`Error::Forked`] in a child process, which has no host side of a CUDA device.
    #[inline]
    pub(crate) fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }

    /// Checks that `stream` may be given work of this device side, and enters it. Returns `None` if
    /// CUDA is not involved: on the CPU, and if there are no bytes.
    #[inline]
    pub(crate) fn enter_for_work<'s>(
        &self,
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
        Ok(entered)
    }

    /// Returns `true` if all bytes in use are initialized, in stream order.
    #[inline]
    pub(crate) fn is_initialized(&self) -> bool {
        self.initialized_bytes >= self.bytes
    }

    /// Zeroes the bytes that are not initialized. The caller has ordered the stream after all
    /// pending work.
    #[inline]
    pub(crate) fn initialize(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if self.is_initialized() {
            return Ok(());
        }
        self.device_use.open_on(entered)?;
        let (to, bytes) = (self.at(self.initialized_bytes), self.bytes - self.initialized_bytes);
        // SAFETY: the bytes belong to this value. The stream comes after their earlier uses, and
        // `device_use` orders later ones after the fill.
        unsafe { fill::enqueue(to, bytes, &[0], entered) }?;
        self.initialized_bytes = self.bytes;
        Ok(())
    }

    /// Lets `entered` use the device side from now on. The caller has ordered the stream after all
    /// pending work.
    pub(crate) fn use_on(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        self.initialize(entered)?;
        self.device_use.open_on(entered)
    }

    /// Fills the bytes in use with `element`, whose length divides them. Without a stream, on the
    /// CPU, the fill is done when this returns. Otherwise the caller has ordered the stream after
    /// all pending work.
    pub(crate) fn fill(
        &mut self,
        element: &[u8],
        entered: Option<&EnteredStream<'_>>,
    ) -> Result<()> {
        match entered {
            Some(entered) => {
                self.device_use.open_on(entered)?;
                // SAFETY: as in `initialize`.
                unsafe { fill::enqueue(self.address, self.bytes, element, entered) }?;
            }
            // SAFETY: the bytes belong to this value, and on the CPU nothing is in flight.
            None => unsafe { fill::on_cpu(self.address, self.bytes, element) },
        }
        self.mark_initialized();
        Ok(())
    }

    /// All bytes in use are initialized: a copy or a fill of all of them is enqueued.
    #[inline]
    pub(crate) fn mark_initialized(&mut self) {
        self.initialized_bytes = self.bytes;
    }

    /// Has `bytes` bytes in use from now on. Bytes beyond the initialized ones are zeroed before
    /// their first use.
    #[inline]
    pub(crate) fn set_bytes(&mut self, bytes: usize) {
        self.bytes = bytes;
    }

    /// Makes the bytes in use read as zeroes: at once on the CPU, otherwise before their first use.
    pub(crate) fn reset(&mut self) {
        match self.device {
            // SAFETY: the bytes belong to this value, and on the CPU nothing is in flight.
            Device::Cpu => unsafe { ptr::write_bytes(self.address, 0, self.bytes) },
            Device::Cuda(_) => self.initialized_bytes = 0,
        }
    }
}
