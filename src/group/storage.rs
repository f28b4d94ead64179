//! The bytes of a group, and the in-flight rule for many members at once.
//!
//! A copy call is one [submission](crate::group::submissions), whatever it moves. Each member
//! refers to the submissions that concern it:
//!
//! | table | the newest submission that | waited for by |
//! |---|---|---|
//! | `upload` of a host slot | reads the member's bytes in that slot | writers of them |
//! | `download` of a host slot | writes the member's bytes in that slot | readers and writers of them |
//! | `latest` | touches the member's bytes in the device side | other streams |
//!
//! Stream order puts a submission after the `latest` of each member that it touches, and after the
//! device uses. A device use concerns the whole group. The newest submission of a member is
//! therefore ordered after all earlier ones, and a submission that no member refers to is covered
//! by a newer one.
//!
//! There is one device side. There may be several host slots. A copy in either direction uses the
//! current slot, and the other slots keep their tables. Neither the order nor the cover depends on
//! slots:
//!
//! - Each submission touches the device side of its members. `latest` is one table for all slots
//!   and both directions, so the submissions of one member form one sequence.
//! - A copy replaces entries of its direction in the current slot, and of `latest`. The submission
//!   in each of these entries moved the same member, so the new one comes after it. An older slot
//!   refers to its own newest copies, however many copies other slots make.
//! - A host slot is written by its downloads and by the program. A reader of any slot waits for the
//!   `download` of that slot. A writer has the current slot, and waits for both tables of it.
//! - [`advance`](GroupStorage::advance) takes a slot when nothing that its tables refer to is in
//!   flight. The tables keep finished submissions, which costs no driver call.
//! - Bytes that a copy moves beside the named ones are padding, which no one reads, or rows that an
//!   upload carries. A download carries nothing, and a ring of several slots carries nothing, since
//!   its current slot may hold older rows than the device side.

use bytemuck::Pod;

use crate::cuda::devices::context;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flight::device_side::DeviceSide;
use crate::flight::left_behind::reclaim_before_allocating;
use crate::flight::record::Record;
use crate::group::host_slots::{self, HostSlots};
use crate::group::layout::{GroupLayout, Member, MemberKey};
use crate::group::submissions::{NewestSubmissions, Submissions, filled};
use crate::memory::options::{BufferOptions, HostFlags};
use crate::memory::slab::Slab;
use crate::stream::stream::Stream;
use crate::switches;
use crate::transfer::plan::CopyRange;

/// Both sides of a group as bytes, with the records of pending work.
pub(crate) struct GroupStorage {
    pub(super) layout: GroupLayout,
    pub(super) device_side: DeviceSide,
    pub(super) host_slots: HostSlots,
    pub(super) submissions: Submissions,
    /// The newest submission that touches the device side of each member.
    pub(super) latest: NewestSubmissions,
    /// Kernels reach the host slots under the same addresses.
    pub(super) mapped: bool,
    /// The ranges of the newest copy. The list is kept for the next one.
    pub(super) ranges: Vec<CopyRange>,
    /// The members that were taken from a value that gives each once. The list is kept for the next
    /// one.
    named: Vec<bool>,
    /// The last field: events are destroyed before the memory is released.
    pub(super) slab: Slab,
}

impl GroupStorage {
    /// Allocates `depth` host slots and a device side, all zeroed.
    pub(crate) fn new(
        layout: &GroupLayout,
        device: Device,
        depth: usize,
        options: BufferOptions,
    ) -> Result<GroupStorage> {
        let table = layout.table();
        let side = table.layout;
        let (host, stride) = host_slots::layout_of(depth, side)?;
        let context = match device {
            // Otherwise nothing is allocated on a device.
            Device::Cuda(ordinal) if side.size() > 0 => Some(context(ordinal)?),
            _ => None,
        };
        // The lists before the memory, which costs more.
        let members = table.members.len();
        let mut host_slots = HostSlots::without_memory(depth, stride, device)?;
        let mut latest = NewestSubmissions::default();
        latest.reserve(members, device)?;
        let named = filled(false, members, device)?;
        reclaim_before_allocating(side.size(), device);
        let slab = Slab::new(host, side, context, device, options)?;
        host_slots.place(slab.host().as_ptr());
        let mapped = match context {
            Some(context)
                if options.host_flags.contains(HostFlags::MAPPED)
                    && !switches::are_mapped_kernels_off() =>
            {
                let _current = context.enter()?;
                slab.host().is_mapped(slab.host().as_ptr(), host.size()).unwrap_or(false)
            }
            _ => false,
        };
        Ok(GroupStorage {
            layout: layout.clone(),
            device_side: DeviceSide::new(device, slab.gpu_ptr(), side.size()),
            host_slots,
            submissions: Submissions::none(),
            latest,
            mapped,
            ranges: Vec::new(),
            named,
            slab,
        })
    }

    pub(crate) fn device(&self) -> Device {
        self.device_side.device()
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.slab.host().is_pinned()
    }

    pub(crate) fn layout(&self) -> &GroupLayout {
        &self.layout
    }

    pub(crate) fn depth(&self) -> usize {
        self.host_slots.depth()
    }

    /// The address of a member in the current host slot, and its number of elements.
    fn host_of(&self, member: &Member) -> (*mut u8, usize) {
        (self.host_slots.at(member.bytes.start), member.numel)
    }

    /// The address of a member's device side, or null if the group has no bytes.
    pub(crate) fn gpu_of(&self, member: &Member) -> *mut u8 {
        self.device_side.at(member.bytes.start)
    }

    // ---- the host side ----

    /// Waits until a member may be read in the host slot that was current `steps` advances ago.
    /// Returns its address and its number of elements.
    pub(crate) fn wait_to_read<T: Pod>(
        &self,
        steps: usize,
        key: MemberKey<T>,
    ) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        let slot = self.host_slots.back(steps)?;
        self.device_side.refuse_child()?;
        self.wait_for(self.host_slots.slot(slot).download.of(index))?;
        Ok((self.host_slots.at_slot(slot, member.bytes.start), member.numel))
    }

    /// Returns `true` if a member may be read now in the current host slot.
    pub(crate) fn may_read<T: Pod>(&self, key: MemberKey<T>) -> Result<bool> {
        let (index, _) = self.layout.find(key)?;
        self.device_side.refuse_child()?;
        self.is_finished(self.host_slots.current().download.of(index))
    }

    /// Returns `true` if a member may be written now in the current host slot.
    pub(crate) fn may_write<T: Pod>(&self, key: MemberKey<T>) -> Result<bool> {
        let (index, _) = self.layout.find(key)?;
        Ok(self.may_read(key)? && self.is_finished(self.host_slots.current().upload.of(index))?)
    }

    /// Waits until a member may be written in the current host slot. Returns its address and its
    /// number of elements.
    pub(crate) fn wait_to_write<T: Pod>(&self, key: MemberKey<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.wait_for_transfers(index)?;
        Ok(self.host_of(member))
    }

    fn wait_for_transfers(&self, index: usize) -> Result<()> {
        self.device_side.refuse_child()?;
        let slot = self.host_slots.current();
        self.wait_for(slot.download.of(index))?;
        self.wait_for(slot.upload.of(index))
    }

    fn is_finished(&self, submission: Option<usize>) -> Result<bool> {
        match submission {
            None => Ok(true),
            Some(number) => self.submissions.record(number).is_finished(),
        }
    }

    fn wait_for(&self, submission: Option<usize>) -> Result<()> {
        match submission {
            None => Ok(()),
            Some(number) => self.submissions.record(number).wait(),
        }
    }

    /// Forgets which members are named, before several are taken.
    pub(crate) fn name_none(&mut self) {
        self.named.fill(false);
    }

    fn refuse_named(&self, index: usize) -> Result<()> {
        match self.named[index] {
            false => Ok(()),
            true => Err(Error::DuplicateMember { index }),
        }
    }

    /// Names a member. A named member is refused.
    pub(crate) fn name(&mut self, index: usize) -> Result<()> {
        self.refuse_named(index)?;
        self.named[index] = true;
        Ok(())
    }

    /// Waits as [`wait_to_write`](Self::wait_to_write), and names the member. A named member is
    /// refused.
    pub(crate) fn wait_to_write_and_name<T: Pod>(
        &mut self,
        key: MemberKey<T>,
    ) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.refuse_named(index)?;
        self.wait_for_transfers(index)?;
        let host = self.host_of(member);
        self.named[index] = true;
        Ok(host)
    }

    /// Waits as [`wait_to_read`](Self::wait_to_read) in the current host slot, and names the
    /// member. A named member is refused.
    pub(crate) fn wait_to_read_and_name<T: Pod>(
        &mut self,
        key: MemberKey<T>,
    ) -> Result<(*mut u8, usize)> {
        let (index, _) = self.layout.find(key)?;
        self.refuse_named(index)?;
        let host = self.wait_to_read(0, key)?;
        self.named[index] = true;
        Ok(host)
    }

    /// Switches to the next host slot. Returns `false` and does not switch if a copy of that slot
    /// is in flight.
    pub(crate) fn try_advance(&mut self) -> Result<bool> {
        self.device_side.refuse_child()?;
        for number in self.host_slots.next().all() {
            if !self.submissions.record(number).is_finished()? {
                return Ok(false);
            }
        }
        self.host_slots.advance();
        Ok(true)
    }

    /// Switches to the next host slot, after all copies of that slot.
    pub(crate) fn advance(&mut self) -> Result<()> {
        self.device_side.refuse_child()?;
        for number in self.host_slots.next().all() {
            self.submissions.record(number).wait()?;
        }
        self.host_slots.advance();
        Ok(())
    }

    // ---- pending work ----

    /// Waits until nothing uses either side.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.device_side.refuse_child()?;
        self.submissions.records().try_for_each(Record::wait)?;
        self.device_side.device_use().wait()
    }

    /// Whether nothing uses either side.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.device_side.refuse_child()?;
        for record in self.submissions.records() {
            if !record.is_finished()? {
                return Ok(false);
            }
        }
        self.device_side.device_use().is_finished()
    }

    /// Orders `stream` after all pending work, and lets it use the device side from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.device_side.enter_for_work(stream)? else {
            return Ok(());
        };
        self.submissions.records().try_for_each(|record| record.order_before(entered))?;
        self.device_side.device_use().order_before(entered)?;
        self.device_side.use_on(entered)
    }
}

impl Drop for GroupStorage {
    /// Waits until nothing uses either side. If that fails, something may still use the memory, so
    /// it is leaked.
    fn drop(&mut self) {
        if self.wait_for_all().is_err() {
            self.slab.abandon();
        }
    }
}
