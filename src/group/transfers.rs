//! A copy call of a group, in its phases.
//!
//! 1. *Plan*: find the bytes of the rows, and join neighbours.
//! 2. *Order*: the stream waits for pending work of other streams on the same members.
//! 3. *Begin*: a submission is open on the stream, and the members refer to it.
//! 4. *Enqueue*: one kernel or single copies, then the event of the submission.
//!
//! An error before the third phase leaves the members as they were. After it the copy counts as in
//! flight, whatever CUDA returns.

use std::ops::Range;
use std::ptr;

use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::error::{Result, reserve};
use crate::group::layout::MemberRows;
use crate::group::storage::GroupStorage;
use crate::stream::stream::{EnteredStream, Stream};
use crate::transfer::plan::{self, CopyPath, CopyRange, choose_path};
use crate::transfer::{copy, gather};

impl GroupStorage {
    /// Copies rows of members between the current host slot and the device side.
    pub(crate) fn copy(
        &mut self,
        direction: Direction,
        rows: &[MemberRows],
        stream: &Stream,
    ) -> Result<()> {
        self.plan(direction, rows)?;
        let entered = self.device_side.enter_for_work(stream)?;
        if self.ranges.is_empty() {
            return Ok(());
        }
        let Some(entered) = &entered else {
            self.copy_on_cpu(direction);
            return Ok(());
        };
        self.order(entered)?;
        self.device_side.initialize(entered)?;
        // Later work of the stream of `gpu_on` does not belong to this group.
        self.device_side.device_use().close_if_open();
        let submission = self.begin(direction, entered)?;
        self.enqueue(submission, direction, entered)
    }

    /// The first bytes of the destination and of the source.
    fn ends(&self, direction: Direction) -> (*mut u8, *mut u8) {
        let (host, device) = (self.host_slots.at(0), self.device_side.address());
        match direction {
            Direction::Up => (device, host),
            Direction::Down => (host, device),
        }
    }

    // ---- plan ----

    /// Finds the ranges to copy, in the order of their places.
    fn plan(&mut self, direction: Direction, rows: &[MemberRows]) -> Result<()> {
        self.collect(rows)?;
        self.join(direction);
        Ok(())
    }

    /// Finds the bytes of the rows, in the order of their places.
    fn collect(&mut self, rows: &[MemberRows]) -> Result<()> {
        self.ranges.clear();
        reserve(&mut self.ranges, rows.len(), self.device_side.device())?;
        for rows in rows {
            let (index, bytes) = self.layout.locate(rows)?;
            if !bytes.is_empty() {
                self.ranges.push(CopyRange { bytes, members: index..index + 1 });
            }
        }
        if !self.ranges.is_sorted_by_key(|range| range.bytes.start) {
            self.ranges.sort_unstable_by_key(|range| range.bytes.start);
        }
        Ok(())
    }

    /// Joins ranges if they touch or overlap, or if the bytes between them are padding, or may be
    /// carried along.
    fn join(&mut self, direction: Direction) {
        let members = &self.layout.table().members;
        // A download would write rows that the host did not ask for. In a ring another slot may
        // hold older rows than the device side.
        let carries = direction == Direction::Up && self.host_slots.depth() == 1;
        // On the CPU as on a GPU whose kernels reach the host side.
        let by_kernel = self.mapped || self.device_side.device() == Device::Cpu;
        plan::join(&mut self.ranges, by_kernel, |range, next| {
            let gap = range.bytes.end..next.bytes.start;
            let mut carried = 0;
            // The end of the last member, the members between, and the start of the next one. They
            // may be one member.
            for member in &members[range.members.end - 1..=next.members.start] {
                let within = overlap(&member.bytes, &gap);
                if within > 0 && !(member.mirrored && carries) {
                    return None;
                }
                carried += within;
            }
            Some(carried)
        });
    }

    // ---- order, begin, enqueue ----

    /// Orders everything that the stream is given from now on after pending work of other streams
    /// on the members of the ranges.
    fn order(&self, entered: &EnteredStream<'_>) -> Result<()> {
        let mut before = None;
        for index in self.ranges.iter().flat_map(|range| range.members.clone()) {
            let latest = self.latest.of(index);
            // Neighbours often went together.
            if latest != before
                && let Some(number) = latest
            {
                self.submissions.record(number).order_before(entered)?;
                before = latest;
            }
        }
        self.device_side.device_use().order_before(entered)
    }

    /// Opens a submission on the stream, and makes the members of the ranges refer to it. Returns
    /// its number.
    fn begin(&mut self, direction: Direction, entered: &EnteredStream<'_>) -> Result<usize> {
        let device = self.device_side.device();
        let transfers = self.host_slots.current_mut().newest_mut(direction);
        transfers.reserve(self.layout.table().members.len(), device)?;
        let number = self.submissions.unused(device)?;
        // This may fail, so it comes before the references.
        self.submissions.record_mut(number).open_on(entered)?;
        for index in self.ranges.iter().flat_map(|range| range.members.clone()) {
            self.submissions.refer(transfers.of_mut(index), number);
            self.submissions.refer(self.latest.of_mut(index), number);
        }
        Ok(number)
    }

    /// Enqueues the copies of the ranges, and records the event of the submission.
    fn enqueue(
        &mut self,
        submission: usize,
        direction: Direction,
        entered: &EnteredStream<'_>,
    ) -> Result<()> {
        let (to, from) = self.ends(direction);
        let (ranges, memory) = (&self.ranges, self.slab.host());
        let bytes = ranges.iter().map(|range| range.bytes.len()).sum();
        let path = choose_path(ranges.len(), bytes, self.mapped);
        self.submissions.record_mut(submission).submit_open(entered, || match path {
            // SAFETY: the ranges lie in both sides. Until the copies have finished, the records
            // keep the host side from being written (and, during a download, read), and both sides
            // from being released.
            CopyPath::Kernel => unsafe { gather::enqueue(to, from, ranges, entered) },
            CopyPath::Copies => ranges.iter().try_for_each(|CopyRange { bytes, .. }| {
                let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
                // SAFETY: as above.
                unsafe { copy::enqueue(direction, memory, to, from, bytes.len(), entered) }
            }),
        })
    }

    /// Copies the ranges at once.
    fn copy_on_cpu(&self, direction: Direction) {
        let (to, from) = self.ends(direction);
        for CopyRange { bytes, .. } in &self.ranges {
            let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
            // SAFETY: the range lies in both sides, and on the CPU nothing is in flight.
            unsafe { ptr::copy(from, to, bytes.len()) };
        }
    }
}

/// The number of bytes that two ranges have in common.
fn overlap(one: &Range<usize>, other: &Range<usize>) -> usize {
    one.end.min(other.end).saturating_sub(one.start.max(other.start))
}
