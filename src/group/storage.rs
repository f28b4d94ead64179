//! The members of a group as bytes, with the records of what is in flight: the in-flight rule for many at once.
//!
//! A call moves rows of several members, and one event answers for all that it moved: a [`Record`] as a single buffer
//! has it. Members refer to the calls that concern them:
//!
//! | a member's | is the newest call that | is consulted by |
//! |---|---|---|
//! | `upload` | read its bytes in that host slot | writers of them |
//! | `download` | wrote its bytes in that host slot | readers and writers of them |
//! | `latest` | touched its bytes in the device side | other streams |
//!
//! A call is ordered, in stream order, after the `latest` of each member that it touches, and after the device uses,
//! which are the group's: so the newest call of a member is ordered after all before it, and what no member refers to
//! any more is covered by something newer. Its record serves again.
//!
//! There is one device side. There may be several host slots, of which one is current: uploads come
//! from it, and the others keep their records. Slots are taken strictly in turn.

use std::alloc::Layout;
use std::ops::Range;
use std::ptr;

use bytemuck::Pod;

use crate::cuda::calls::copy::Direction;
use crate::cuda::devices::context;
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result, reserve};
use crate::flight::left_behind::reclaim_before_allocating;
use crate::flight::record::Record;
use crate::group::layout::{GroupLayout, GroupTable, Member, MemberKey, MemberRows};
use crate::memory::options::BufferOptions;
use crate::memory::options::HostFlags;
use crate::memory::slab::Slab;
use crate::stream::stream::{EnteredStream, Stream};
use crate::switches;
use crate::transfer::copy;
use crate::transfer::fill;
use crate::transfer::gather;
use crate::transfer::plan::{CopyPath, CopyRange, choose_path, join};

pub(crate) struct GroupStorage {
    layout: GroupLayout,
    device: Device,
    // Addresses in the slab.
    host: *mut u8,
    gpu: *mut u8,
    /// From one host slot to the next.
    stride: usize,
    host_slots: Vec<HostSlot>,
    /// The current host slot.
    current: usize,
    submissions: Vec<Submission>,
    /// Of each member.
    latest: Vec<Option<usize>>,
    /// Lazy, as a single buffer's: what streams may do with the device side from now on.
    device_use: Record,
    /// The device side was zeroed, in stream order.
    initialized: bool,
    /// Kernels reach the host slots, under the same addresses.
    mapped: bool,
    /// What a call works with, kept for the next one.
    ranges: Vec<CopyRange>,
    named: Vec<bool>,
    /// Last: the events go before the memory, as they were made after it.
    slab: Slab,
}

/// Nobody needs so many; each has a few words of its own, even if its members have no bytes.
const MOST_SLOTS: usize = 1 << 16;

/// The copies in flight from and to one host slot: of each member, a call.
#[derive(Default)]
struct HostSlot {
    upload: NewestSubmissions,
    download: NewestSubmissions,
}

/// Of each member, the newest call of one direction. There is no table before the first call.
#[derive(Default)]
struct NewestSubmissions(Vec<Option<usize>>);

impl NewestSubmissions {
    /// Makes the table for so many members, if there is none.
    fn reserve(&mut self, members: usize, device: Device) -> Result<()> {
        if self.0.is_empty() {
            self.0 = filled(None, members, device)?;
        }
        Ok(())
    }

    fn of(&self, member: usize) -> Option<usize> {
        *self.0.get(member)?
    }

    /// The calls that members refer to; one that moved several is there several times.
    fn all(&self) -> impl Iterator<Item = usize> {
        self.0.iter().flatten().copied()
    }
}

/// So many copies of a value.
fn filled<E: Clone>(value: E, count: usize, device: Device) -> Result<Vec<E>> {
    let mut all = Vec::new();
    reserve(&mut all, count, device)?;
    all.resize(count, value);
    Ok(all)
}

/// A call, and how many members refer to it.
struct Submission {
    record: Record,
    references: usize,
}

// SAFETY: the bytes behind the addresses are this value's alone, and the slab that it keeps owns them; elements that
// are stored there are `Send` and `Sync`, as the builder of a layout and the rings ask for.
unsafe impl Send for GroupStorage {}
// SAFETY: through a shared reference elements can be read, and what is behind the addresses otherwise stays as it is.
unsafe impl Sync for GroupStorage {}

// The other parts must not rely on the promises above.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(GroupLayout, Vec<HostSlot>, Vec<Submission>, Record, Vec<CopyRange>, Slab)>();
};

impl GroupStorage {
    /// So many host slots, and a device side, each zeroed.
    pub(crate) fn new(
        layout: &GroupLayout,
        device: Device,
        depth: usize,
        options: BufferOptions,
    ) -> Result<GroupStorage> {
        let table = layout.table();
        let one = table.layout;
        let stride = one.pad_to_align().size();
        let before = depth.checked_sub(1);
        let before = before.ok_or(Error::InvalidGroup { reason: "it has no host slot" })?;
        if depth > MOST_SLOTS {
            return Err(Error::InvalidGroup { reason: "it has more than 65,536 host slots" });
        }
        // The last one needs no padding.
        let host = stride.checked_mul(before).and_then(|before| before.checked_add(one.size()));
        let host = host.and_then(|bytes| Layout::from_size_align(bytes, one.align()).ok());
        let host = host.ok_or_else(|| Error::InvalidShape {
            reason: format!("{depth} host slots of {} bytes overflow isize", one.size()),
        })?;
        let context = match device {
            // Nothing to allocate, nothing to ask.
            Device::Cuda(ordinal) if one.size() > 0 => Some(context(ordinal)?),
            _ => None,
        };
        // Before the memory, which costs more.
        let count = table.members.len();
        let mut slots = Vec::new();
        reserve(&mut slots, depth, device)?;
        slots.resize_with(depth, HostSlot::default);
        let latest = filled(None, count, device)?;
        let named = filled(false, count, device)?;
        reclaim_before_allocating(one.size(), device);
        let slab = Slab::new(host, one, context, device, options)?;
        let mapped = match context {
            Some(context)
                if options.host_flags.contains(HostFlags::MAPPED)
                    && !switches::are_mapped_kernels_off() =>
            {
                let _current = context.enter()?;
                slab.host().is_mapped(host.size())
            }
            _ => false,
        };
        Ok(GroupStorage {
            layout: layout.clone(),
            device,
            host: slab.host().as_ptr(),
            gpu: slab.gpu_ptr(),
            stride,
            host_slots: slots,
            current: 0,
            submissions: Vec::new(),
            latest,
            device_use: Record::idle(),
            initialized: context.is_none(),
            mapped,
            ranges: Vec::new(),
            named,
            slab,
        })
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.slab.host().is_pinned()
    }

    pub(crate) fn layout(&self) -> &GroupLayout {
        &self.layout
    }

    pub(crate) fn depth(&self) -> usize {
        self.host_slots.len()
    }

    fn table(&self) -> &GroupTable {
        self.layout.table()
    }

    /// The bytes of one side.
    fn bytes(&self) -> usize {
        self.table().layout.size()
    }

    /// The first byte of the current host slot.
    fn host(&self) -> *mut u8 {
        self.host.wrapping_add(self.current * self.stride)
    }

    /// The address of a member's current host slot, and its elements.
    fn host_of(&self, member: &Member) -> (*mut u8, usize) {
        (self.host().wrapping_add(member.bytes.start), member.numel)
    }

    /// The address of a member's device side; null where the group has no bytes.
    pub(crate) fn gpu_of(&self, member: &Member) -> *mut u8 {
        match self.gpu.is_null() {
            true => self.gpu,
            false => self.gpu.wrapping_add(member.bytes.start),
        }
    }

    // ---- what the host waits for ----

    /// Waits until a member's current host slot may be read; the answer is its address, and its elements.
    pub(crate) fn wait_to_read<T: Pod>(&self, key: MemberKey<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.refuse_child()?;
        self.wait_for(self.host_slots[self.current].download.of(index))?;
        Ok(self.host_of(member))
    }

    /// Waits until a member's current host slot may be written; the answer is as for [`wait_to_read`](Self::wait_to_read).
    pub(crate) fn wait_to_write<T: Pod>(&self, key: MemberKey<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.wait_for_transfers(index)?;
        Ok(self.host_of(member))
    }

    fn wait_for_transfers(&self, index: usize) -> Result<()> {
        self.refuse_child()?;
        let slot = &self.host_slots[self.current];
        self.wait_for(slot.download.of(index))?;
        self.wait_for(slot.upload.of(index))
    }

    fn wait_for(&self, submission: Option<usize>) -> Result<()> {
        match submission {
            None => Ok(()),
            Some(submission) => self.submissions[submission].record.wait(),
        }
    }

    /// Waits until nothing uses any side.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.refuse_child()?;
        self.submissions.iter().try_for_each(|submission| submission.record.wait())?;
        self.device_use.wait()
    }

    /// Whether nothing uses any side.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.refuse_child()?;
        for submission in &self.submissions {
            if !submission.record.is_finished()? {
                return Ok(false);
            }
        }
        self.device_use.is_finished()
    }

    /// Makes the next host slot, in turn, the current one; `false` if a copy of it is in flight.
    pub(crate) fn try_advance(&mut self) -> Result<bool> {
        self.refuse_child()?;
        let next = self.next();
        for copy in self.copies_of(next) {
            if !copy.is_finished()? {
                return Ok(false);
            }
        }
        self.current = next;
        Ok(true)
    }

    /// Makes the next host slot, in turn, the current one, after all copies of it.
    pub(crate) fn advance(&mut self) -> Result<()> {
        self.refuse_child()?;
        let next = self.next();
        self.copies_of(next).try_for_each(Record::wait)?;
        self.current = next;
        Ok(())
    }

    /// The host slot whose turn is next.
    fn next(&self) -> usize {
        (self.current + 1) % self.host_slots.len()
    }

    /// The records of the copies from and to a host slot.
    fn copies_of(&self, slot: usize) -> impl Iterator<Item = &Record> {
        let HostSlot { upload, download } = &self.host_slots[slot];
        upload.all().chain(download.all()).map(|submission| &self.submissions[submission].record)
    }

    // ---- several members at once ----

    /// No member is named yet.
    pub(crate) fn name_none(&mut self) {
        self.named.fill(false);
    }

    /// Waits until the current host slot of a member that is not named yet may be written, and names it; the answer is
    /// as for [`wait_to_read`](Self::wait_to_read).
    pub(crate) fn wait_and_name<T: Pod>(&mut self, key: MemberKey<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        if self.named[index] {
            return Err(Error::DuplicateMember { index });
        }
        self.wait_for_transfers(index)?;
        let host = self.host_of(member);
        self.named[index] = true;
        Ok(host)
    }

    // ---- what streams do ----

    /// Copies rows of members of the current host slot to the same rows of the device side.
    pub(crate) fn copy_to_gpu(&mut self, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.copy(Direction::Up, rows, stream)
    }

    /// Copies rows of members of the device side to the same rows of the current host slot.
    pub(crate) fn copy_to_cpu(&mut self, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.copy(Direction::Down, rows, stream)
    }

    fn copy(&mut self, direction: Direction, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.collect(rows)?;
        let entered = self.enter_for_work(stream)?;
        if self.ranges.is_empty() {
            return Ok(());
        }
        self.join(direction);
        let host = self.host();
        let (to, from) = match direction {
            Direction::Up => (self.gpu, host),
            Direction::Down => (host, self.gpu),
        };
        let Some(entered) = &entered else {
            for CopyRange { bytes, .. } in &self.ranges {
                let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
                // SAFETY: the piece lies in both sides; on the CPU nothing is in flight.
                unsafe { ptr::copy(from, to, bytes.len()) };
            }
            return Ok(());
        };
        self.order(entered)?;
        self.initialize(entered)?;
        // What the stream of `gpu_on` is sent from now on has nothing to do with this group.
        self.device_use.close_with_event();
        let submission = self.begin(direction, entered)?;
        let (ranges, memory) = (&self.ranges, self.slab.host());
        let bytes = ranges.iter().map(|range| range.bytes.len()).sum();
        let path = choose_path(ranges.len(), bytes, self.mapped);
        self.submissions[submission].record.submit_open(entered, || match path {
            // SAFETY: the pieces lie in both sides. The records keep the host side from being written (and, for a
            // download, read) and both sides from being released until the copies have finished.
            CopyPath::Kernel => unsafe { gather::enqueue(to, from, ranges, entered) },
            CopyPath::Copies => ranges.iter().try_for_each(|CopyRange { bytes, .. }| {
                let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
                // SAFETY: as above.
                unsafe { copy::enqueue(direction, memory, to, from, bytes.len(), entered) }
            }),
        })
    }

    /// Finds the bytes that rows are of, in the order of their places.
    fn collect(&mut self, rows: &[MemberRows]) -> Result<()> {
        self.ranges.clear();
        reserve(&mut self.ranges, rows.len(), self.device)?;
        self.named.fill(false);
        for rows in rows {
            let (index, bytes) = self.layout.locate(rows)?;
            name(&mut self.named, index)?;
            if !bytes.is_empty() {
                self.ranges.push(CopyRange { bytes, members: index..index + 1 });
            }
        }
        if !self.ranges.is_sorted_by_key(|range| range.members.start) {
            self.ranges.sort_unstable_by_key(|range| range.members.start);
        }
        Ok(())
    }

    /// Joins pieces between which lies nothing, or what may be carried along.
    fn join(&mut self, direction: Direction) {
        let table = self.layout.table();
        // A download would write what the host did not ask for, and another slot than the last one
        // may hold what the device side held some steps ago.
        let carries = direction == Direction::Up && self.host_slots.len() == 1;
        join(&mut self.ranges, |range, next| {
            let gap = range.bytes.end..next.bytes.start;
            let mut carried = 0;
            // The rest of the last member, what is between, and what comes before in the next one.
            for member in &table.members[range.members.end - 1..=next.members.start] {
                let within = overlap(&member.bytes, &gap);
                if within > 0 && !(member.mirrored && carries) {
                    return None;
                }
                carried += within;
            }
            Some(carried)
        });
    }

    /// Makes what is sent to the stream from now on wait for what stands on other streams and concerns the members
    /// that the pieces touch.
    fn order(&self, entered: &EnteredStream<'_>) -> Result<()> {
        let mut before = None;
        for index in self.ranges.iter().flat_map(|range| range.members.clone()) {
            // Neighbours often went together.
            if self.latest[index] != before
                && let Some(submission) = self.latest[index]
            {
                self.submissions[submission].record.order_before(entered)?;
                before = Some(submission);
            }
        }
        self.device_use.order_before(entered)
    }

    /// Zeroes the device side, once.
    fn initialize(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if self.initialized {
            return Ok(());
        }
        self.device_use.open_on(entered)?;
        let bytes = self.bytes();
        // SAFETY: the device side is this value's, nothing was sent to it yet, and `device_use` keeps others from it.
        unsafe { fill::enqueue(self.gpu, bytes, &[0], entered) }?;
        self.initialized = true;
        Ok(())
    }

    /// A call that the members which the pieces touch refer to from now on, and that stands.
    fn begin(&mut self, direction: Direction, entered: &EnteredStream<'_>) -> Result<usize> {
        let slot = &mut self.host_slots[self.current];
        let transfers = match direction {
            Direction::Up => &mut slot.upload,
            Direction::Down => &mut slot.download,
        };
        transfers.reserve(self.latest.len(), self.device)?;
        let unused = self.submissions.iter().position(|submission| submission.references == 0);
        let number = match unused {
            Some(number) => number,
            None => {
                reserve(&mut self.submissions, 1, self.device)?;
                self.submissions.push(Submission { record: Record::idle(), references: 0 });
                self.submissions.len() - 1
            }
        };
        // Before anything refers to it, since this may fail.
        self.submissions[number].record.open_on(entered)?;
        for index in self.ranges.iter().flat_map(|range| range.members.clone()) {
            for newest in [&mut transfers.0[index], &mut self.latest[index]] {
                self.submissions[number].references += 1;
                if let Some(before) = newest.replace(number) {
                    let before = &mut self.submissions[before];
                    before.references -= 1;
                    if before.references == 0 {
                        before.record.supersede();
                    }
                }
            }
        }
        Ok(number)
    }

    /// Orders `stream` after everything, and remembers that it may use the device side from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.enter_for_work(stream)? else {
            return Ok(());
        };
        self.submissions
            .iter()
            .try_for_each(|submission| submission.record.order_before(entered))?;
        self.device_use.order_before(entered)?;
        self.initialize(entered)?;
        self.device_use.open_on(entered)
    }

    /// Checks that `stream` can be given work of this group, and enters it. `None` where CUDA has nothing to do with
    /// it: on the CPU, and where there are no bytes.
    fn enter_for_work<'s>(&self, stream: &'s Stream) -> Result<Option<EnteredStream<'s>>> {
        if stream.device() != self.device {
            return Err(Error::DeviceMismatch { expected: self.device, actual: stream.device() });
        }
        if self.bytes() == 0 {
            return Ok(None);
        }
        let entered = stream.enter()?;
        if let Some(entered) = &entered {
            entered.refuse_capture()?;
        }
        Ok(entered)
    }

    /// In a forked child the host slots of a CUDA group are not there.
    fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }
}

/// Names a member, once.
fn name(named: &mut [bool], index: usize) -> Result<()> {
    match std::mem::replace(&mut named[index], true) {
        false => Ok(()),
        true => Err(Error::DuplicateMember { index }),
    }
}

/// The bytes that two ranges have in common.
fn overlap(one: &Range<usize>, other: &Range<usize>) -> usize {
    one.end.min(other.end).saturating_sub(one.start.max(other.start))
}

impl Drop for GroupStorage {
    /// Waits for what is in flight. Where that cannot be known, since the driver does not answer, the memory is
    /// leaked: something may still be using it.
    fn drop(&mut self) {
        if self.wait_for_all().is_err() {
            self.slab.abandon();
        }
    }
}
