//! The work of a buffer on streams: copies, fills, and use by kernels.
//!
//! An operation checks its arguments and the stream before it changes anything. Once it tries to
//! enqueue, its record is pending, whatever CUDA returns.

use std::ops::Range;
use std::ptr;

use crate::buffer::storage::{BOTH, Storage};
use crate::cuda::calls::copy::Direction;
use crate::error::{Result, Side};
use crate::flight::record::Record;
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::copy;

/// The other end of a copy from or to the host side.
#[derive(Clone, Copy)]
pub(crate) enum Peer {
    /// The same range of the device side.
    DeviceSide,
    /// Device memory that somebody else owns.
    Foreign(*mut u8),
}

impl Storage {
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
        if direction == Direction::Down {
            self.refuse_read_only()?;
        }
        let sides: &[Side] = match peer {
            Peer::DeviceSide => &BOTH,
            Peer::Foreign(_) => &[Side::Host],
        };
        let entered = self.enter_for_work(sides, stream)?;
        // SAFETY: the caller vouches for the peer.
        unsafe { self.copy_entered(direction, range, peer, entered.as_ref()) }
    }

    /// Writes a range of the host side after pending copies, and uploads it.
    pub(crate) fn write(&mut self, start: usize, bytes: &[u8], stream: &Stream) -> Result<()> {
        self.refuse_read_only()?;
        let entered = self.enter_for_work(&BOTH, stream)?;
        let range = start..start + bytes.len();
        if range.is_empty() {
            return Ok(());
        }
        self.wait_to_write()?;
        let to = self.host.wrapping_add(start);
        // SAFETY: the caller's range lies in the host side, which no copy uses after the wait. The
        // bytes are borrowed from elsewhere: this storage is borrowed exclusively.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        // SAFETY: no memory of others takes part.
        unsafe { self.copy_entered(Direction::Up, range, Peer::DeviceSide, entered.as_ref()) }
    }

    /// Copies as [`copy`](Self::copy), on a stream that was entered for both sides that take part.
    ///
    /// # Safety
    ///
    /// As for [`copy`](Self::copy).
    #[inline]
    unsafe fn copy_entered(
        &mut self,
        direction: Direction,
        range: Range<usize>,
        peer: Peer,
        entered: Option<&EnteredStream<'_>>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (device, is_own) = match peer {
            Peer::DeviceSide => (self.device_side.at(range.start), true),
            Peer::Foreign(address) => (address, false),
        };
        self.zero_if_pending()?;
        if let Some(entered) = entered {
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
        unsafe { self.transfer(direction, to, from, range.len(), entered) }?;
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
        self.refuse_read_only()?;
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

    /// Orders `stream` after all pending work, and lets its kernels use the host side in place from
    /// now on. Returns the address for them.
    pub(crate) fn use_host_on(&mut self, stream: &Stream) -> Result<*mut u8> {
        self.refuse_read_only()?;
        let entered = self.enter_for_work(&[Side::Host], stream)?;
        let Some(entered) = &entered else {
            self.zero_if_pending()?;
            return Ok(self.host);
        };
        self.refuse_unmapped()?;
        self.zero_if_pending()?;
        self.order(entered)?;
        self.host_is_writable = false;
        self.host_uses_mut().kernels_mut().open_on(entered)?;
        Ok(self.host)
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
    pub(super) unsafe fn transfer(
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
        // Readers of the host side do not wait for uploads, so an upload supersedes no kernel.
        if direction == Direction::Down
            && let Some(uses) = &mut self.host_uses
        {
            uses.records_mut().iter_mut().for_each(Record::supersede);
        }
        Ok(())
    }
}
