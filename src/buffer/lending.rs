//! Lending the sides of a storage to tensors of other libraries.
//!
//! Each function that lends returns the address of the side, and the loan that the tensor keeps. A
//! side without bytes has a null address and no loan.

use std::ptr;
use std::sync::Arc;

use crate::buffer::storage::Storage;
use crate::error::{Result, Side};
use crate::flight::exports::{Exports, Loan};
use crate::flight::left_behind::LeftBehindCount;
use crate::flight::record::Record;
use crate::stream::stream::Stream;

type Lent = (*mut u8, Option<Loan>);

impl Storage {
    /// Lends the device side. The first use by the consumer comes on `stream`, after all pending
    /// work.
    pub(crate) fn lend_gpu(&mut self, stream: &Stream) -> Result<Lent> {
        let entered = self.enter_for_work(&[], stream)?;
        if self.bytes() == 0 {
            return Ok((ptr::null_mut(), None));
        }
        // An earlier consumer may still use it, and does not know of this one.
        if !self.is_lent(Side::Device) {
            self.wait_for_consumers(&[Side::Device])?;
        }
        if let Some(entered) = &entered {
            self.order(entered)?;
            let initialized = self.device_side.initialize(entered);
            // The stream may be destroyed before anybody asks for the record.
            self.device_side.device_use().close_if_open();
            if self.device_side.device_use().is_open() {
                // The next use of the device side waits for the devices instead of the record.
                self.exports().mark_unknown(Side::Device);
                self.device_side.device_use_mut().supersede();
            }
            initialized?;
        }
        // Last: a refused export leaves the buffer unchanged.
        let loan = self.exports().lend(Side::Device);
        Ok((self.gpu_ptr(), Some(loan)))
    }

    /// Lends the device side, guarded but ordered after nothing.
    pub(crate) fn lend_gpu_unordered(&mut self) -> Result<Lent> {
        self.lend_gpu_by(|exports| exports.lend(Side::Device))
    }

    /// Lends the memory of the device side. Nothing guards it.
    pub(crate) fn lend_gpu_unguarded(&mut self) -> Result<Lent> {
        self.lend_gpu_by(Exports::lend_unguarded)
    }

    fn lend_gpu_by(&mut self, lend: impl FnOnce(&Arc<Exports>) -> Loan) -> Result<Lent> {
        self.device_side.refuse_child()?;
        if self.bytes() == 0 {
            return Ok((ptr::null_mut(), None));
        }
        let loan = lend(self.exports());
        Ok((self.gpu_ptr(), Some(loan)))
    }

    /// Lends the host side, after the transfers of this storage. While it is lent, none begins.
    pub(crate) fn lend_cpu(&mut self) -> Result<Lent> {
        self.device_side.refuse_child()?;
        if self.bytes() == 0 {
            return Ok((ptr::null_mut(), None));
        }
        if !self.is_lent(Side::Host) {
            self.wait_to_write()?;
        }
        let loan = self.exports().lend(Side::Host);
        self.host_is_writable = false;
        Ok((self.host_ptr(), Some(loan)))
    }

    fn is_lent(&self, side: Side) -> bool {
        self.exports.as_ref().is_some_and(|exports| exports.is_lent(side))
    }

    fn exports(&mut self) -> &Arc<Exports> {
        let device = self.device();
        self.exports.get_or_insert_with(|| Arc::new(Exports::new(device)))
    }

    pub(super) fn left_behind_count(&self) -> Option<&LeftBehindCount> {
        self.left_behind_count.as_ref()
    }

    /// Takes the state that is shared with tensors.
    #[inline]
    pub(super) fn take_exports(&mut self) -> Option<Arc<Exports>> {
        self.exports.take()
    }

    pub(super) fn is_open(&self) -> bool {
        self.records().any(Record::is_open)
    }

    /// Never releases the memory, because work that uses it may never be known to be finished.
    pub(super) fn leak(&self) {
        self.slab.abandon();
    }

    /// Supersedes records that could not be [closed](Self::close_if_open), after a wait for the
    /// devices. If that use was captured, no launch of the graph may use this memory: it belonged
    /// to a view that is gone.
    pub(super) fn supersede_open(&mut self) {
        let uses = self.host_uses.iter_mut().flat_map(|uses| uses.records_mut());
        let own = [&mut self.upload, &mut self.download, self.device_side.device_use_mut()];
        for record in own.into_iter().chain(uses) {
            if record.is_open() {
                record.supersede();
            }
        }
    }
}
