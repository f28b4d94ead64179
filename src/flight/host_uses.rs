//! Uses of a host side by kernels, and by the device sides of other buffers.
//!
//! Most host sides have no such use, so a buffer makes this value at its first one.

use crate::error::{Result, reserve};
use crate::flight::record::Record;
use crate::stream::stream::{EnteredStream, Stream};

/// The records of a host side's uses beyond the copies from and to its own device side.
pub(crate) struct HostUses {
    /// Kernels are known to reach the host side.
    pub(crate) is_mapped: bool,
    /// First the record of kernels that read or write the host side in place, which is open. Then
    /// the uploads to device sides of other buffers, one record for each stream. They only read, so
    /// they need no order among each other.
    records: Vec<Record>,
}

/// The index of the first record of an upload.
const UPLOADS: usize = 1;

impl Default for HostUses {
    fn default() -> HostUses {
        HostUses { is_mapped: false, records: vec![Record::idle()] }
    }
}

impl HostUses {
    #[inline]
    pub(crate) fn kernels(&self) -> &Record {
        &self.records[0]
    }

    pub(crate) fn kernels_mut(&mut self) -> &mut Record {
        &mut self.records[0]
    }

    /// The record for an upload on `stream` to another buffer. Its own work, if some is pending, is
    /// on the same stream.
    pub(crate) fn upload_mut(&mut self, stream: &Stream) -> Result<&mut Record> {
        let uploads = &self.records[UPLOADS..];
        let same_stream = uploads.iter().position(|upload| upload.is_on(stream));
        let reusable = || uploads.iter().position(Record::is_known_finished);
        // Streams that come and go are asked, so that their records do not pile up.
        let finished = || uploads.iter().position(|upload| upload.is_finished() == Ok(true));
        let index = match same_stream.or_else(reusable).or_else(finished) {
            Some(index) => UPLOADS + index,
            None => {
                reserve(&mut self.records, 1, stream.device())?;
                self.records.push(Record::idle());
                self.records.len() - 1
            }
        };
        Ok(&mut self.records[index])
    }

    #[inline]
    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    pub(crate) fn records_mut(&mut self) -> &mut [Record] {
        &mut self.records
    }

    /// Orders everything that the stream is given from now on after all these uses.
    pub(crate) fn order_before(&self, entered: &EnteredStream<'_>) -> Result<()> {
        self.records().iter().try_for_each(|record| record.order_before(entered))
    }
}
