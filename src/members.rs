//! The members of a group as bytes, with the records of what is in flight: the in-flight rule for many at once.
//!
//! A call moves rows of several members, and one event answers for all that it moved: a [`Record`] as a single buffer
//! has it. Members refer to the calls that concern them:
//!
//! | a member's | is the newest call that | is consulted by |
//! |---|---|---|
//! | `upload` | read its bytes in that host half | writers of them |
//! | `download` | wrote its bytes in that host half | readers and writers of them |
//! | `latest` | touched its bytes in the device half | other streams |
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

use crate::buffer::BufferOptions;
use crate::device::{Device, context};
use crate::error::{Error, Result, reserve};
use crate::fill;
use crate::fork;
use crate::gather;
use crate::host::HostFlags;
use crate::layout::{Form, GroupLayout, Key, Member, MemberRows};
use crate::moves::{Piece, Way, cheapest, join};
use crate::raw::{self, Direction};
use crate::record::Record;
use crate::slab::Slab;
use crate::stream::{EnteredStream, Stream};
use crate::switches;

pub(crate) struct Members {
    layout: GroupLayout,
    device: Device,
    // Addresses in the slab.
    host: *mut u8,
    gpu: *mut u8,
    /// From one host half to the next.
    stride: usize,
    halves: Vec<Half>,
    /// The current host slot.
    current: usize,
    calls: Vec<Call>,
    /// Of each member.
    latest: Vec<Option<usize>>,
    /// Lazy, as a single buffer's: what streams may do with the device half from now on.
    device_use: Record,
    /// The device half was zeroed, in stream order.
    defined: bool,
    /// Kernels reach the host halves, under the same addresses.
    mapped: bool,
    /// What a call works with, kept for the next one.
    pieces: Vec<Piece>,
    named: Vec<bool>,
    /// Last: the events go before the memory, as they were made after it.
    slab: Slab,
}

/// Nobody needs so many; each has a few words of its own, even if its members have no bytes.
const MOST_HALVES: usize = 1 << 16;

/// The copies in flight from and to one host slot: of each member, a call.
#[derive(Default)]
struct Half {
    upload: Calls,
    download: Calls,
}

/// Of each member, the newest call of one direction. There is no table before the first call.
#[derive(Default)]
struct Calls(Vec<Option<usize>>);

impl Calls {
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
struct Call {
    record: Record,
    references: usize,
}

// SAFETY: the bytes behind the addresses are this value's alone, and the slab that it keeps owns them; elements that
// are stored there are `Send` and `Sync`, as the builder of a layout and the rings ask for.
unsafe impl Send for Members {}
// SAFETY: through a shared reference elements can be read, and what is behind the addresses otherwise stays as it is.
unsafe impl Sync for Members {}

// The other parts must not rely on the promises above.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(GroupLayout, Vec<Half>, Vec<Call>, Record, Vec<Piece>, Slab)>();
};

impl Members {
    /// So many host halves, and a device half, each zeroed.
    pub(crate) fn new(
        layout: &GroupLayout,
        device: Device,
        halves: usize,
        options: BufferOptions,
    ) -> Result<Members> {
        let form = layout.form_for(device)?;
        let one = form.layout;
        let stride = one.pad_to_align().size();
        let before = halves.checked_sub(1);
        let before = before.ok_or(Error::InvalidGroup { reason: "it has no host half" })?;
        if halves > MOST_HALVES {
            return Err(Error::InvalidGroup { reason: "it has more than 65,536 host halves" });
        }
        // The last one needs no padding.
        let host = stride.checked_mul(before).and_then(|before| before.checked_add(one.size()));
        let host = host.and_then(|bytes| Layout::from_size_align(bytes, one.align()).ok());
        let host = host.ok_or_else(|| Error::InvalidShape {
            reason: format!("{halves} halves of {} bytes overflow isize", one.size()),
        })?;
        let context = match device {
            // Nothing to allocate, nothing to ask.
            Device::Cuda(ordinal) if one.size() > 0 => Some(context(ordinal)?),
            _ => None,
        };
        // Before the memory, which costs more.
        let count = form.members.len();
        let mut slots = Vec::new();
        reserve(&mut slots, halves, device)?;
        slots.resize_with(halves, Half::default);
        let latest = filled(None, count, device)?;
        let named = filled(false, count, device)?;
        let slab = Slab::new(host, one, context, device, options, false)?;
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
        Ok(Members {
            layout: layout.clone(),
            device,
            host: slab.host().as_ptr(),
            gpu: slab.gpu_ptr(),
            stride,
            halves: slots,
            current: 0,
            calls: Vec::new(),
            latest,
            device_use: Record::idle(),
            defined: context.is_none(),
            mapped,
            pieces: Vec::new(),
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

    pub(crate) fn halves(&self) -> usize {
        self.halves.len()
    }

    fn form(&self) -> &Form {
        self.layout.form().expect("a group is made of a valid layout")
    }

    /// The bytes of one half.
    fn bytes(&self) -> usize {
        self.form().layout.size()
    }

    /// The first byte of the current host half.
    fn host(&self) -> *mut u8 {
        self.host.wrapping_add(self.current * self.stride)
    }

    /// The address of a member's current host half, and its elements.
    fn host_of(&self, member: &Member) -> (*mut u8, usize) {
        (self.host().wrapping_add(member.bytes.start), member.numel)
    }

    /// The address of a member's device half; null where the group has no bytes.
    pub(crate) fn gpu_of(&self, member: &Member) -> *mut u8 {
        match self.gpu.is_null() {
            true => self.gpu,
            false => self.gpu.wrapping_add(member.bytes.start),
        }
    }

    // ---- what the host waits for ----

    /// Waits until a member's current host half may be read; the answer is its address, and its elements.
    pub(crate) fn wait_to_read<T: Pod>(&self, key: Key<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.refuse_child()?;
        self.wait_for(self.halves[self.current].download.of(index))?;
        Ok(self.host_of(member))
    }

    /// Waits until a member's current host half may be written; the answer is as for [`wait_to_read`](Self::wait_to_read).
    pub(crate) fn wait_to_write<T: Pod>(&self, key: Key<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        self.wait_for_transfers(index)?;
        Ok(self.host_of(member))
    }

    fn wait_for_transfers(&self, index: usize) -> Result<()> {
        self.refuse_child()?;
        let half = &self.halves[self.current];
        self.wait_for(half.download.of(index))?;
        self.wait_for(half.upload.of(index))
    }

    fn wait_for(&self, call: Option<usize>) -> Result<()> {
        match call {
            None => Ok(()),
            Some(call) => self.calls[call].record.wait(),
        }
    }

    /// Waits until nothing uses any half.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        self.refuse_child()?;
        self.calls.iter().try_for_each(|call| call.record.wait())?;
        self.device_use.wait()
    }

    /// Whether nothing uses any half.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.refuse_child()?;
        for call in &self.calls {
            if !call.record.is_finished()? {
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
        (self.current + 1) % self.halves.len()
    }

    /// The records of the copies from and to a host slot.
    fn copies_of(&self, slot: usize) -> impl Iterator<Item = &Record> {
        let Half { upload, download } = &self.halves[slot];
        upload.all().chain(download.all()).map(|call| &self.calls[call].record)
    }

    // ---- several members at once ----

    /// No member is named yet.
    pub(crate) fn name_none(&mut self) {
        self.named.fill(false);
    }

    /// Waits until the current host half of a member that is not named yet may be written, and names it; the answer is
    /// as for [`wait_to_read`](Self::wait_to_read).
    pub(crate) fn wait_and_name<T: Pod>(&mut self, key: Key<T>) -> Result<(*mut u8, usize)> {
        let (index, member) = self.layout.find(key)?;
        if self.named[index] {
            return Err(Error::DuplicateMember { index });
        }
        self.wait_for_transfers(index)?;
        let place = self.host_of(member);
        self.named[index] = true;
        Ok(place)
    }

    // ---- what streams do ----

    /// Copies rows of members of the current host half to the same rows of the device half.
    pub(crate) fn copy_to_gpu(&mut self, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.copy(Direction::Up, rows, stream)
    }

    /// Copies rows of members of the device half to the same rows of the current host half.
    pub(crate) fn copy_to_cpu(&mut self, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.copy(Direction::Down, rows, stream)
    }

    fn copy(&mut self, direction: Direction, rows: &[MemberRows], stream: &Stream) -> Result<()> {
        self.collect(rows)?;
        let entered = self.admit(stream)?;
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.join(direction);
        let host = self.host();
        let (to, from) = match direction {
            Direction::Up => (self.gpu, host),
            Direction::Down => (host, self.gpu),
        };
        let Some(entered) = &entered else {
            for Piece { bytes, .. } in &self.pieces {
                let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
                // SAFETY: the piece lies in both sides; on the CPU nothing is in flight.
                unsafe { ptr::copy(from, to, bytes.len()) };
            }
            return Ok(());
        };
        self.order(entered)?;
        self.define(entered)?;
        // What the stream of `gpu_on` is sent from now on has nothing to do with this group.
        self.device_use.close();
        let call = self.begin(direction, entered)?;
        let (pieces, memory) = (&self.pieces, self.slab.host());
        let bytes = pieces.iter().map(|piece| piece.bytes.len()).sum();
        let way = cheapest(pieces.len(), bytes, self.mapped);
        self.calls[call].record.submit_standing(entered, || match way {
            // SAFETY: the pieces lie in both halves. The records keep the host half from being written (and, for a
            // download, read) and both halves from being released until the copies have finished.
            Way::Kernel => unsafe { gather::enqueue(to, from, pieces, entered) },
            Way::Copies => pieces.iter().try_for_each(|Piece { bytes, .. }| {
                let (to, from) = (to.wrapping_add(bytes.start), from.wrapping_add(bytes.start));
                memory.in_parts(host.wrapping_add(bytes.start), bytes.len(), |at, bytes| {
                    let (to, from) = (to.wrapping_add(at), from.wrapping_add(at));
                    // SAFETY: as above.
                    unsafe { raw::memcpy(direction, to, from, bytes, entered.raw()) }
                })
            }),
        })
    }

    /// Finds the bytes that rows are of, in the order of their places.
    fn collect(&mut self, rows: &[MemberRows]) -> Result<()> {
        self.pieces.clear();
        reserve(&mut self.pieces, rows.len(), self.device)?;
        self.named.fill(false);
        for rows in rows {
            let (index, bytes) = self.layout.locate(rows)?;
            name(&mut self.named, index)?;
            if !bytes.is_empty() {
                self.pieces.push(Piece { bytes, members: index..index + 1 });
            }
        }
        if !self.pieces.is_sorted_by_key(|piece| piece.members.start) {
            self.pieces.sort_unstable_by_key(|piece| piece.members.start);
        }
        Ok(())
    }

    /// Joins pieces between which lies nothing, or what may be carried along.
    fn join(&mut self, direction: Direction) {
        let form = self.layout.form().expect("a group is made of a valid layout");
        // A download would write what the host did not ask for, and another slot than the last one
        // may hold what the device side held some steps ago.
        let carries = direction == Direction::Up && self.halves.len() == 1;
        join(&mut self.pieces, |piece, next| {
            let gap = piece.bytes.end..next.bytes.start;
            let mut carried = 0;
            // The rest of the last member, what is between, and what comes before in the next one.
            for member in &form.members[piece.members.end - 1..=next.members.start] {
                let within = overlap(&member.bytes, &gap);
                if within > 0 && !(member.host_owned && carries) {
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
        for index in self.pieces.iter().flat_map(|piece| piece.members.clone()) {
            // Neighbours often went together.
            if self.latest[index] != before
                && let Some(call) = self.latest[index]
            {
                self.calls[call].record.order_before(entered)?;
                before = Some(call);
            }
        }
        self.device_use.order_before(entered)
    }

    /// Zeroes the device half, once.
    fn define(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if self.defined {
            return Ok(());
        }
        self.device_use.stand_for(entered)?;
        let bytes = self.bytes();
        // SAFETY: the device half is this value's, nothing was sent to it yet, and `device_use` keeps others from it.
        unsafe { fill::enqueue(self.gpu, bytes, &[0], entered) }?;
        self.defined = true;
        Ok(())
    }

    /// A call that the members which the pieces touch refer to from now on, and that stands.
    fn begin(&mut self, direction: Direction, entered: &EnteredStream<'_>) -> Result<usize> {
        let half = &mut self.halves[self.current];
        let transfers = match direction {
            Direction::Up => &mut half.upload,
            Direction::Down => &mut half.download,
        };
        transfers.reserve(self.latest.len(), self.device)?;
        let free = self.calls.iter().position(|call| call.references == 0);
        let number = match free {
            Some(number) => number,
            None => {
                reserve(&mut self.calls, 1, self.device)?;
                self.calls.push(Call { record: Record::idle(), references: 0 });
                self.calls.len() - 1
            }
        };
        // Before anything refers to it, since this may fail.
        self.calls[number].record.stand_for(entered)?;
        for index in self.pieces.iter().flat_map(|piece| piece.members.clone()) {
            for place in [&mut transfers.0[index], &mut self.latest[index]] {
                self.calls[number].references += 1;
                if let Some(before) = place.replace(number) {
                    let before = &mut self.calls[before];
                    before.references -= 1;
                    if before.references == 0 {
                        before.record.cover();
                    }
                }
            }
        }
        Ok(number)
    }

    /// Orders `stream` after everything, and remembers that it may use the device half from now on.
    pub(crate) fn use_on(&mut self, stream: &Stream) -> Result<()> {
        let Some(entered) = &self.admit(stream)? else {
            return Ok(());
        };
        self.calls.iter().try_for_each(|call| call.record.order_before(entered))?;
        self.device_use.order_before(entered)?;
        self.define(entered)?;
        self.device_use.stand_for(entered)
    }

    /// Checks that `stream` can be given work of this group, and enters it. `None` where CUDA has nothing to do with
    /// it: on the CPU, and where there are no bytes.
    fn admit<'s>(&self, stream: &'s Stream) -> Result<Option<EnteredStream<'s>>> {
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

    /// In a forked child the host halves of a CUDA group are not there.
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

impl Drop for Members {
    /// Waits for what is in flight. Where that cannot be known, since the driver does not answer, the memory is
    /// leaked: something may still be using it.
    fn drop(&mut self) {
        if self.wait_for_all().is_err() {
            self.slab.abandon();
        }
    }
}
