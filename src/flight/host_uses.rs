//! Uses of a host side by kernels, and by the device sides of other buffers.
//!
//! Most host sides have no such use, so a buffer makes this value at its first one.

use std::slice;

use crate::error::{Result, reserve};
use crate::flight::record::Record;
use crate::stream::stream::{EnteredStream, Stream};

/// The records of a host side's uses beyond the copies from and to its own device side.
pub(crate) struct HostUses {
    /// Kernels are known to reach the host side.
    pub(crate) is_mapped: bool,
    /// Kernels that read or write the host side in place. Open.
    kernels: Record,
    /// Uploads to device sides of other buffers, one record for each stream. They only read, so
    /// they need no order among each other.
    uploads: Vec<Record>,
}

impl Default for HostUses {
    fn default() -> HostUses {
        HostUses { is_mapped: false, kernels: Record::idle(), uploads: Vec::new() }
    }
}

impl HostUses {
    #[inline]
    pub(crate) fn kernels(&self) -> &Record {
        &self.kernels
    }

    pub(crate) fn kernels_mut(&mut self) -> &mut Record {
        &mut self.kernels
    }

    /// The record for an upload on `stream` to another buffer. Its own work, if some is pending, is
    /// on the same stream.
    pub(crate) fn upload_mut(&mut self, stream: &Stream) -> Result<&mut Record> {
        let uploads = &mut self.uploads;
        let index = match uploads.iter().position(|upload| upload.is_on(stream)) {
            Some(index) => index,
            None => match uploads.iter().position(Record::is_known_finished) {
                Some(index) => index,
                None => {
                    reserve(uploads, 1, stream.device())?;
                    uploads.push(Record::idle());
                    uploads.len() - 1
                }
            },
        };
        Ok(&mut uploads[index])
    }

    /// All records: that of kernels first.
    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        slice::from_ref(&self.kernels).iter().chain(&self.uploads)
    }

    pub(crate) fn records_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        slice::from_mut(&mut self.kernels).iter_mut().chain(&mut self.uploads)
    }

    /// Orders everything that the stream is given from now on after all these uses.
    pub(crate) fn order_before(&self, entered: &EnteredStream<'_>) -> Result<()> {
        self.records().try_for_each(|record| record.order_before(entered))
    }
}
