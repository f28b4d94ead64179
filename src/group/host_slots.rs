//! The host slots of a group or a ring: one of them is current, and each has its own records.
//!
//! A group has one slot. A ring has several, and takes them strictly in turn. All copies use the
//! current slot.

use std::alloc::Layout;

use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::error::{Error, Result, reserve};
use crate::group::submissions::NewestSubmissions;

/// The largest depth. A slot costs a few words, even if its members have no bytes.
const MAX_DEPTH: usize = 1 << 16;

/// The host slots, one after another in the slab.
pub(super) struct HostSlots {
    // An address in the slab.
    first: *mut u8,
    /// The distance from one slot to the next.
    stride: usize,
    slots: Vec<HostSlot>,
    /// The index of the current slot.
    current: usize,
    /// The number of slots that were the current one, of which one still is.
    visited: usize,
}

// SAFETY: the bytes behind the address belong to this value alone. They are elements of types that
// are `Send` and `Sync`: the builder of a layout and the rings require that.
unsafe impl Send for HostSlots {}
// SAFETY: a shared reference gives the address, and reads no byte.
unsafe impl Sync for HostSlots {}

// The other fields must not rely on these promises.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<Vec<HostSlot>>();
};

/// The newest copies of each member from and to one host slot.
#[derive(Default)]
pub(super) struct HostSlot {
    pub(super) upload: NewestSubmissions,
    pub(super) download: NewestSubmissions,
}

impl HostSlot {
    /// The submissions of both directions.
    pub(super) fn all(&self) -> impl Iterator<Item = usize> {
        self.upload.all().chain(self.download.all())
    }

    pub(super) fn newest_mut(&mut self, direction: Direction) -> &mut NewestSubmissions {
        match direction {
            Direction::Up => &mut self.upload,
            Direction::Down => &mut self.download,
        }
    }
}

/// The memory of `depth` slots of one layout, each aligned, and the distance between two of them.
pub(super) fn layout_of(depth: usize, slot: Layout) -> Result<(Layout, usize)> {
    let before = depth.checked_sub(1);
    let before = before.ok_or(Error::InvalidGroup { reason: "it has no host slot" })?;
    if depth > MAX_DEPTH {
        return Err(Error::InvalidGroup { reason: "it has more than 65,536 host slots" });
    }
    let stride = slot.pad_to_align().size();
    // The last one needs no padding.
    let bytes = stride.checked_mul(before).and_then(|start| start.checked_add(slot.size()));
    let whole = bytes.and_then(|bytes| Layout::from_size_align(bytes, slot.align()).ok());
    let whole = whole.ok_or_else(|| Error::InvalidShape {
        reason: format!("{depth} host slots of {} bytes overflow isize", slot.size()),
    })?;
    Ok((whole, stride))
}

impl HostSlots {
    /// The slots without their memory: [`place`](Self::place) gives them its address.
    pub(super) fn without_memory(depth: usize, stride: usize, device: Device) -> Result<HostSlots> {
        let mut slots = Vec::new();
        reserve(&mut slots, depth, device)?;
        slots.resize_with(depth, HostSlot::default);
        Ok(HostSlots { first: std::ptr::null_mut(), stride, slots, current: 0, visited: 1 })
    }

    /// Sets the address of the first slot.
    pub(super) fn place(&mut self, first: *mut u8) {
        self.first = first;
    }

    pub(super) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// The address of the byte at `offset` of the current slot.
    #[inline]
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        self.at_slot(self.current, offset)
    }

    /// The address of the byte at `offset` of any slot.
    #[inline]
    pub(super) fn at_slot(&self, slot: usize, offset: usize) -> *mut u8 {
        self.first.wrapping_add(slot * self.stride + offset)
    }

    /// The index of the slot that was current `steps` advances ago. Returns an error if there is no
    /// such slot, or another step has taken it since.
    #[inline]
    pub(super) fn back(&self, steps: usize) -> Result<usize> {
        let (depth, rows) = (self.slots.len(), self.visited);
        if steps >= rows {
            let end = steps.saturating_add(1);
            return Err(Error::OutOfRange { start: steps, end, rows, member: None });
        }
        Ok((self.current + depth - steps) % depth)
    }

    #[inline]
    pub(super) fn slot(&self, slot: usize) -> &HostSlot {
        &self.slots[slot]
    }

    #[inline]
    pub(super) fn current(&self) -> &HostSlot {
        &self.slots[self.current]
    }

    #[inline]
    pub(super) fn current_mut(&mut self) -> &mut HostSlot {
        &mut self.slots[self.current]
    }

    /// The slot that [`advance`](Self::advance) makes the current one.
    pub(super) fn next(&self) -> &HostSlot {
        &self.slots[self.next_index()]
    }

    /// Makes the next slot, in turn, the current one.
    pub(super) fn advance(&mut self) {
        self.current = self.next_index();
        self.visited = (self.visited + 1).min(self.slots.len());
    }

    fn next_index(&self) -> usize {
        (self.current + 1) % self.slots.len()
    }
}
