//! Rings: several host slots for one device side. The host writes the next input while the previous
//! upload is still queued.
//!
//! A ring is a group whose current host slot changes. Each slot has its own records of copies. The
//! uploads of all slots write the same device side, and so come one after another.

use std::fmt;

use bytemuck::Pod;

use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::error::Result;
use crate::group::group::{
    GroupView, MembersMut, host, host_back, host_mut, try_host, try_host_mut,
};
use crate::group::layout::{GroupLayout, MemberKey, MemberRows};
use crate::group::storage::GroupStorage;
use crate::memory::options::BufferOptions;
use crate::stream::stream::Stream;

/// Several host slots for the members of a layout, and one device side at fixed addresses.
///
/// The program writes the input of a step while uploads of earlier steps are still queued.
///
/// The slots are taken strictly in turn.
///
/// ```
/// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let ids = builder.add::<i32>(1024);
/// let positions = builder.add::<i64>(1024);
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let mut ring = GroupRing::new(&builder.build()?, device, 2)?;
/// for step in 0..10 {
///     ring.advance()?; // waits only if this slot is still being uploaded
///     ring.cpu_mut(ids)?[..4].fill(step);
///     ring.cpu_mut(positions)?[..4].fill(step.into());
///     ring.copy_to_gpu(&[ids.rows(..4), positions.rows(..4)], &stream)?;
///     let mut view = ring.gpu_on(&stream)?;
///     assert_eq!(view.member(ids)?.len(), 1024);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[doc(alias = "double buffer")]
#[doc(alias = "ring buffer")]
#[doc(alias = "triple buffer")]
pub struct GroupRing(GroupStorage);

impl GroupRing {
    /// Makes a ring of `depth` host slots and one device side, all zeroed.
    ///
    /// A ring of one slot is a group that waits in [`advance`](Self::advance).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGroup`](crate::Error::InvalidGroup) if `depth` is 0 or above 65,536.
    /// Otherwise as for [`BufferGroup::new`](crate::BufferGroup::new).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Error, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let layout = builder.build()?;
    /// let ring = GroupRing::new(&layout, Device::Cpu, 3)?;
    /// assert_eq!(ring.cpu(ids)?, [0; 4]);
    /// assert!(matches!(GroupRing::new(&layout, Device::Cpu, 0), Err(Error::InvalidGroup { .. })));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(layout: &GroupLayout, device: Device, depth: usize) -> Result<GroupRing> {
        GroupRing::with_options(layout, device, depth, BufferOptions::default())
    }

    /// Makes a ring with the given options.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and
    /// [`Error::PinningUnavailable`](crate::Error::PinningUnavailable) if pinning is required and
    /// fails.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferOptions, Device, Error, GroupLayoutBuilder, GroupRing, Pinning};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// builder.add::<i32>(1024);
    /// // An upload of a pageable slot is not queued: then a ring is of no use.
    /// let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
    /// match GroupRing::with_options(&builder.build()?, Device::auto(), 2, options) {
    ///     Ok(ring) => assert!(ring.is_pinned()),
    ///     Err(Error::PinningUnavailable { reason, .. }) => println!("no ring: {reason}"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(
        layout: &GroupLayout,
        device: Device,
        depth: usize,
        options: BufferOptions,
    ) -> Result<GroupRing> {
        GroupStorage::new(layout, device, depth, options).map(GroupRing)
    }

    /// Switches to the next host slot. Blocks until the copies of that slot are done.
    ///
    /// The slots are taken strictly in turn. A new ring is at slot 0. A slot keeps its contents
    /// until it is written again.
    ///
    /// # Errors
    ///
    /// An error of the driver. Earlier work may have caused it. On error the current slot does not
    /// change.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// ring.cpu_mut(ids)?.fill(1);
    /// ring.advance()?;
    /// assert_eq!(ring.cpu(ids)?, [0; 4]); // the other slot, never written
    /// ring.advance()?;
    /// assert_eq!(ring.cpu(ids)?, [1; 4]); // the first again, as it was left
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn advance(&mut self) -> Result<()> {
        self.0.advance()
    }

    /// Switches to the next host slot, or returns `false` if a copy of that slot is in flight.
    ///
    /// Unlike [`advance`](Self::advance), this never blocks.
    ///
    /// # Errors
    ///
    /// As for [`advance`](Self::advance).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(1024);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// let mut put_off = 0;
    /// for step in 0..10 {
    ///     if !ring.try_advance()? {
    ///         put_off += 1; // the next slot is still to be sent: something else first
    ///         ring.advance()?;
    ///     }
    ///     ring.cpu_mut(ids)?.fill(step);
    ///     ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// }
    /// assert!(put_off < 10);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_advance(&mut self) -> Result<bool> {
        self.0.try_advance()
    }

    /// A member in the current host slot, to read. Waits for downloads of that member into this
    /// slot, and not for its uploads.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// ring.cpu_mut(ids)?.fill(6);
    /// ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// assert_eq!(ring.cpu(ids)?, [6; 4]); // being uploaded, and read at once
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu<T: Pod>(&self, key: MemberKey<T>) -> Result<&[T]> {
        host(&self.0, key)
    }

    /// A member in the current host slot, to write. Waits for copies of that member from and into
    /// this slot.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, step_of_slot) = (builder.add::<i32>(4), builder.add::<u64>(1));
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// for step in 1..6 {
    ///     ring.advance()?;
    ///     // A member that is never uploaded tells how old the slot is.
    ///     let before = std::mem::replace(&mut ring.cpu_mut(step_of_slot)?[0], step);
    ///     assert_eq!(before, step.saturating_sub(2));
    ///     ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<&mut [T]> {
        host_mut(&mut self.0, key)
    }

    /// A member in the host slot that was current `steps` advances ago, to read. Waits for
    /// downloads of that member into that slot.
    ///
    /// A loop reads the results of the step before while the current step runs.
    /// [`MembersMut::cpu_back`] does so beside writes of the current slot.
    ///
    /// # Errors
    ///
    /// - [`Error::OutOfRange`](crate::Error::OutOfRange) if `steps` is not below the depth, or
    ///   above the number of advances. `rows` is then the number of slots that can be read.
    /// - Otherwise as for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, sampled) = (builder.add::<u32>(2), builder.add::<u32>(2));
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// for step in 0..5 {
    ///     ring.advance()?;
    ///     ring.cpu_mut(ids)?.fill(step);
    ///     ring.copy_to_gpu(&[ids.into()], &stream)?;
    ///     let mut view = ring.gpu_on(&stream)?;
    ///     let (ids, mut out) = (view.member(ids)?, view.member(sampled)?);
    ///     if let (Some(ids), Some(out)) = (ids.as_host_slice(), out.as_host_slice_mut()) {
    ///         out.copy_from_slice(ids); // instead of a kernel
    ///     }
    ///     ring.copy_to_cpu(&[sampled.into()], &stream)?;
    ///     if step > 0 {
    ///         // The step before, while this one runs.
    ///         assert_eq!(ring.cpu_back(1, sampled)?, [step - 1; 2]);
    ///     }
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_back<T: Pod>(&self, steps: usize, key: MemberKey<T>) -> Result<&[T]> {
        host_back(&self.0, steps, key)
    }

    /// A member in the current host slot, to read, or `None` if [`cpu`](Self::cpu) would wait.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    pub fn try_cpu<T: Pod>(&self, key: MemberKey<T>) -> Result<Option<&[T]>> {
        try_host(&self.0, key)
    }

    /// A member in the current host slot, to write, or `None` if [`cpu_mut`](Self::cpu_mut) would
    /// wait.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// ring.copy_to_gpu(&[ids.into()], &stream)?;
    /// assert!(ring.try_cpu(ids)?.is_some()); // an upload only reads the slot
    /// if ring.try_cpu_mut(ids)?.is_none() {
    ///     ring.advance()?; // the slot is still being uploaded: the next one
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<Option<&mut [T]>> {
        try_host_mut(&mut self.0, key)
    }

    /// Several members in the current host slot at once, to write.
    ///
    /// See [`BufferGroup::members_mut`](crate::BufferGroup::members_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, positions) = (builder.add::<i32>(3), builder.add::<i64>(3));
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// let mut members = ring.members_mut();
    /// let rows = members.cpu_mut(ids)?.iter_mut().zip(members.cpu_mut(positions)?);
    /// for (row, (id, position)) in rows.enumerate() {
    ///     (*id, *position) = (100 + row as i32, row as i64);
    /// }
    /// assert_eq!(ring.cpu(positions)?, [0, 1, 2]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn members_mut(&mut self) -> MembersMut<'_> {
        MembersMut::new(&mut self.0)
    }

    /// Copies rows of members from the current host slot to the device side on `stream`.
    ///
    /// See [`BufferGroup::copy_to_gpu`](crate::BufferGroup::copy_to_gpu).
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::copy_to_gpu`](crate::BufferGroup::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(3);
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// for id in [1, 2, 3] {
    ///     ring.advance()?;
    ///     ring.cpu_mut(ids)?.fill(id);
    ///     // All rows that kernels look at: the other slot does not know what this one sent.
    ///     ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// }
    /// assert_eq!(ring.gpu_on(&stream)?.member(ids)?.as_host_slice(), Some(&[3; 3][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "H2D")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_gpu(&mut self, members: &[MemberRows], stream: &Stream) -> Result<()> {
        self.0.copy(Direction::Up, members, stream)
    }

    /// Copies rows of members from the device side to the current host slot on `stream`.
    ///
    /// See [`BufferGroup::copy_to_cpu`](crate::BufferGroup::copy_to_cpu). [`cpu`](Self::cpu) waits
    /// for the copy, and so does [`cpu_back`](Self::cpu_back) after an advance.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::copy_to_gpu`](crate::BufferGroup::copy_to_gpu).
    #[doc(alias = "D2H")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_cpu(&mut self, members: &[MemberRows], stream: &Stream) -> Result<()> {
        self.0.copy(Direction::Down, members, stream)
    }

    /// The device sides of all members, for kernels and libraries on `stream`.
    ///
    /// See [`BufferGroup::gpu_on`](crate::BufferGroup::gpu_on).
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::gpu_on`](crate::BufferGroup::gpu_on).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 3)?;
    /// let address = ring.gpu_on(&stream)?.member(ids)?.as_ptr();
    /// ring.advance()?;
    /// assert_eq!(ring.gpu_on(&stream)?.member(ids)?.as_ptr(), address); // for every slot
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GroupView<'_>> {
        self.0.use_on(stream)?;
        Ok(GroupView::new(&mut self.0))
    }

    /// The address of a member's device side, without any ordering.
    ///
    /// See [`BufferGroup::device_ptr`](crate::BufferGroup::device_ptr). All slots share it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`](crate::Error::InvalidKey).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let mut ring = GroupRing::new(&builder.build()?, Device::auto(), 2)?;
    /// let captured = ring.device_ptr(ids)?; // what a graph is captured with
    /// ring.advance()?;
    /// assert_eq!(ring.device_ptr(ids)?, captured);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device_ptr<T: Pod>(&self, key: MemberKey<T>) -> Result<*mut T> {
        let (_, member) = self.0.layout().find(key)?;
        Ok(self.0.gpu_of(member).cast())
    }

    /// Returns `true` if no work of this ring is pending.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::is_idle`](crate::CpuGpuBuffer::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// ring.advance()?;
    /// while !ring.is_idle()? { // the slot that is no longer the current one counts
    ///     std::thread::yield_now();
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_idle(&self) -> Result<bool> {
        self.0.is_idle()
    }

    /// Waits until no work of this ring is pending, and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = GroupRing::new(&builder.build()?, stream.device(), 2)?;
    /// ring.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// ring.synchronize()?;
    /// assert!(ring.try_advance()?); // no slot is in flight
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        self.0.wait_for_all()
    }

    /// The dimensions of a member.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`](crate::Error::InvalidKey).
    pub fn shape<T: Pod>(&self, key: MemberKey<T>) -> Result<&[usize]> {
        Ok(self.0.layout().find(key)?.1.shape.dims())
    }

    /// The number of host slots.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 3)?;
    /// for _ in 0..ring.depth() {
    ///     ring.advance()?;
    ///     ring.cpu_mut(ids)?.fill(-1); // in every slot, before the loop begins
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn depth(&self) -> usize {
        self.0.depth()
    }

    /// The layout of the members.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// // A warm-up with inputs of its own, of the same members.
    /// let mut dummy = BufferGroup::new(ring.layout(), Device::Cpu)?;
    /// dummy.cpu_mut(ids)?.fill(1);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn layout(&self) -> &GroupLayout {
        self.0.layout()
    }

    /// The device of the device side.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// builder.add::<i32>(4);
    /// let ring = GroupRing::new(&builder.build()?, Device::auto(), 2)?;
    /// let copies = Stream::new(ring.device())?;
    /// assert_eq!(copies.device(), Device::auto());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.0.device()
    }

    /// Returns `true` if the host slots are pinned.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// builder.add::<i32>(4);
    /// let ring = GroupRing::new(&builder.build()?, Device::auto(), 2)?;
    /// let depth = if ring.is_pinned() { ring.depth() } else { 1 };
    /// println!("{depth} steps can be under way");
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "page-locked")]
    pub fn is_pinned(&self) -> bool {
        self.0.is_pinned()
    }
}

impl fmt::Debug for GroupRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (depth, device, pinned) = (self.depth(), self.device(), self.is_pinned());
        write!(f, "GroupRing(depth={depth}, device={device}, pinned={pinned})")
    }
}
