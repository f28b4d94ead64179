//! Groups: buffers of any types and shapes that share one slab for each side.
//!
//! The in-flight rule is in [`storage`](crate::group::storage). This file turns keys into elements.

use std::fmt;
use std::slice;

use bytemuck::Pod;

use crate::buffer::view::GpuView;
use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::error::Result;
use crate::group::layout::{GroupLayout, MemberKey, MemberRows};
use crate::group::storage::GroupStorage;
use crate::memory::options::BufferOptions;
use crate::stream::stream::Stream;

/// Buffers of one [`GroupLayout`], its members, in one pinned slab and one device slab.
///
/// One call copies rows of any members, at about the cost of a single copy. An accessor waits for
/// copies of its member, and for nothing else. The device addresses never change.
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let ids = builder.add::<i32>(1024);
/// let positions = builder.add::<i64>(1024);
/// let layout = builder.build()?;
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let mut group = BufferGroup::new(&layout, device)?;
/// group.cpu_mut(ids)?[..3].copy_from_slice(&[11, 12, 13]);
/// group.cpu_mut(positions)?[..3].copy_from_slice(&[0, 1, 2]);
/// group.copy_to_gpu(&[ids.rows(..3), positions.rows(..3)], &stream)?; // returns at once
///
/// let mut view = group.gpu_on(&stream)?; // for kernels: addresses, ordered after the copy
/// assert_eq!(view.member(positions)?.shape(), [1024]);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct BufferGroup(GroupStorage);

impl BufferGroup {
    /// Makes a group with both sides of every member zeroed. The host side is pinned if possible.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::new`](crate::CpuGpuBuffer::new), except for the shapes, which
    /// [`build`](crate::GroupLayoutBuilder::build) has checked.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let lengths = builder.add::<i32>(64);
    /// let layout = builder.build()?;
    /// // Two groups of one layout, for two models say: a key serves both.
    /// let mut first = BufferGroup::new(&layout, Device::Cpu)?;
    /// let second = BufferGroup::new(&layout, Device::Cpu)?;
    /// first.cpu_mut(lengths)?.fill(1);
    /// assert_eq!(second.cpu(lengths)?, [0; 64]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(layout: &GroupLayout, device: Device) -> Result<BufferGroup> {
        BufferGroup::with_options(layout, device, BufferOptions::default())
    }

    /// Makes a group with the given options.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and
    /// [`Error::PinningUnavailable`](crate::Error::PinningUnavailable) if pinning is required and
    /// fails.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, BufferOptions, Device, GroupLayoutBuilder, Pinning};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
    /// let group = BufferGroup::with_options(&builder.build()?, Device::auto(), options)?;
    /// assert!(!group.is_pinned()); // one slab: all members are, or none
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(
        layout: &GroupLayout,
        device: Device,
        options: BufferOptions,
    ) -> Result<BufferGroup> {
        GroupStorage::new(layout, device, 1, options).map(BufferGroup)
    }

    // ---- host sides ----

    /// The host side of a member, to read. Waits only for pending copies *into* it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`](crate::Error::InvalidKey) for a key of another layout, or an error of
    /// the driver. Earlier work on the stream may have caused it.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (sampled, finished) = (builder.add::<u32>(4), builder.add::<u8>(4));
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// group.copy_to_cpu(&[sampled.rows(..), finished.rows(..)], &stream)?;
    /// let ids = group.cpu(sampled)?; // waits for that copy
    /// assert_eq!(ids.len(), group.cpu(finished)?.len()); // both can be looked at
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu<T: Pod>(&self, key: MemberKey<T>) -> Result<&[T]> {
        host(&self.0, key)
    }

    /// The host side of a member, to write. Waits only for pending copies into or out of it, and
    /// not for copies of other members.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, positions) = (builder.add::<i32>(8), builder.add::<i64>(8));
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// group.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// group.cpu_mut(positions)?.fill(3); // waits for nothing
    /// group.cpu_mut(ids)?.fill(4); // waits for the copy
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<&mut [T]> {
        host_mut(&mut self.0, key)
    }

    /// The host side of a member, to read, or `None` if [`cpu`](Self::cpu) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let sampled = builder.add::<u32>(4);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// group.copy_to_cpu(&[sampled.rows(..)], &stream)?;
    /// while group.try_cpu(sampled)?.is_none() {
    ///     std::thread::yield_now(); // other work
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu<T: Pod>(&self, key: MemberKey<T>) -> Result<Option<&[T]>> {
        try_host(&self.0, key)
    }

    /// The host side of a member, to write, or `None` if [`cpu_mut`](Self::cpu_mut) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// if let Some(ids) = group.try_cpu_mut(ids)? {
    ///     ids.fill(4);
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<Option<&mut [T]>> {
        try_host_mut(&mut self.0, key)
    }

    /// The host sides of several members at once, to write, also from several threads.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let temperatures = builder.add::<f32>(8);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    ///
    /// let mut members = group.members_mut();
    /// let (ids, temperatures) = (members.cpu_mut(ids)?, members.cpu_mut(temperatures)?);
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| ids.fill(7));
    ///     scope.spawn(|| temperatures.fill(0.8));
    /// });
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn members_mut(&mut self) -> MembersMut<'_> {
        MembersMut::new(&mut self.0)
    }

    // ---- transfers ----

    /// Copies rows of members from the host side to the device side on `stream`.
    ///
    /// The copy comes after all pending work of those members on any stream. This returns as soon
    /// as the copy is enqueued. No other bytes are copied, except of
    /// [mirrored](crate::GroupLayoutBuilder::add_mirrored) members. A copy of no members does
    /// nothing. A member may occur any number of times, with any rows in any order.
    ///
    /// Ranges that touch or overlap are joined, and so are neighbours if nothing lies between their
    /// rows. One kernel that reads the pinned slab copies the remaining ranges, with a launch for
    /// each 224 of them. Long ranges are copied one by one. The kernel waits for free
    /// multiprocessors as any kernel does.
    ///
    /// # Errors
    ///
    /// These leave the group unchanged:
    ///
    /// - [`Error::InvalidKey`](crate::Error::InvalidKey): a key is one of another layout.
    /// - [`Error::OutOfRange`](crate::Error::OutOfRange), which names the member.
    /// - [`Error::DeviceMismatch`](crate::Error::DeviceMismatch)
    /// - [`Error::StreamCapturing`](crate::Error::StreamCapturing)
    /// - [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    ///
    /// After an error of the driver the copy counts as in flight until the driver confirms that it
    /// is not.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let table = builder.add::<i32>([4, 2]);
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// group.cpu_mut(ids)?.fill(5);
    /// group.cpu_mut(table)?.fill(6);
    /// group.copy_to_gpu(&[ids.rows(..2), table.rows(3..)], &stream)?;
    /// group.copy_to_gpu(&[], &stream)?; // a step in which nothing has changed
    /// let mut view = group.gpu_on(&stream)?;
    /// assert_eq!(view.member(ids)?.as_host_slice(), Some(&[5, 5, 0, 0][..]));
    /// assert_eq!(view.member(table)?.as_host_slice(), Some(&[0, 0, 0, 0, 0, 0, 6, 6][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "H2D")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_gpu(&mut self, members: &[MemberRows], stream: &Stream) -> Result<()> {
        self.0.copy(Direction::Up, members, stream)
    }

    /// Copies rows of members from the device side to the host side on `stream`.
    ///
    /// Order and cost are those of [`copy_to_gpu`](Self::copy_to_gpu). Only the requested rows are
    /// copied.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let sampled = builder.add::<u32>(4);
    /// let scores = builder.add::<f32>([4, 2]);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// let stream = Stream::new(Device::Cpu)?;
    /// group.copy_to_cpu(&[sampled.rows(..3), scores.rows(1..2)], &stream)?;
    /// assert_eq!(group.cpu(sampled)?, [0; 4]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "D2H")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_cpu(&mut self, members: &[MemberRows], stream: &Stream) -> Result<()> {
        self.0.copy(Direction::Down, members, stream)
    }

    /// Returns `true` if no work of this group is pending.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::is_idle`](crate::CpuGpuBuffer::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// group.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// if !group.is_idle()? {
    ///     println!("{ids:?} is on its way");
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_idle(&self) -> Result<bool> {
        self.0.is_idle()
    }

    /// Waits until no work of this group is pending, and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// group.copy_to_gpu(&[ids.rows(..)], &stream)?;
    /// group.synchronize()?; // dropping it now waits for no work of its own
    /// assert!(group.is_idle()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        self.0.wait_for_all()
    }

    // ---- the device side ----

    /// The device sides of all members, for kernels and libraries on `stream`.
    ///
    /// Orders the stream after all pending work of the group. Later work of the group comes after
    /// the work that the stream is given by then.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
    /// [`Error::StreamCapturing`](crate::Error::StreamCapturing), or an error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, logits) = (builder.add::<i32>(8), builder.add::<f32>([8, 100]));
    /// let (copies, kernels) = (Stream::new(Device::auto())?, Stream::new(Device::auto())?);
    /// let mut group = BufferGroup::new(&builder.build()?, copies.device())?;
    /// group.copy_to_gpu(&[ids.rows(..)], &copies)?;
    /// let mut view = group.gpu_on(&kernels)?; // `kernels` comes after the copy, for every member
    /// let (reads, writes) = (view.member(ids)?.as_ptr(), view.member(logits)?.as_mut_ptr());
    /// // Launch on `kernels.as_raw()` here, while the view lives.
    /// group.copy_to_cpu(&[logits.rows(..)], &copies)?; // comes after the kernel
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GroupView<'_>> {
        self.0.use_on(stream)?;
        Ok(GroupView::new(&mut self.0))
    }

    /// The address of a member's device side, without any ordering.
    ///
    /// Use it for logging, and for graph capture after [`gpu_on`](Self::gpu_on), since even the
    /// first zeroing may be pending. The address never changes. It is null if the group has no
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`](crate::Error::InvalidKey).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let (ids, positions) = (builder.add::<i32>(8), builder.add::<i64>(8));
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// let captured = group.device_ptr(positions)?; // what a graph is captured with
    /// assert_eq!(captured.addr(), group.device_ptr(ids)?.addr() + 256); // aligned to 256 bytes
    /// assert_eq!(group.gpu_on(&stream)?.member(positions)?.as_mut_ptr(), captured);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device_ptr<T: Pod>(&self, key: MemberKey<T>) -> Result<*mut T> {
        let (_, member) = self.0.layout().find(key)?;
        Ok(self.0.gpu_of(member).cast())
    }

    // ---- what it is ----

    /// The dimensions of a member.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`](crate::Error::InvalidKey).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// let [requests, blocks] = group.shape(table)? else { unreachable!() };
    /// assert_eq!(group.cpu(table)?.len(), requests * blocks);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape<T: Pod>(&self, key: MemberKey<T>) -> Result<&[usize]> {
        Ok(self.0.layout().find(key)?.1.shape.dims())
    }

    /// The layout of this group.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// let ring = GroupRing::new(group.layout(), Device::Cpu, 2)?; // of the same members
    /// assert_eq!(ring.cpu(ids)?, group.cpu(ids)?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn layout(&self) -> &GroupLayout {
        self.0.layout()
    }

    /// The device of the device side.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::auto())?;
    /// let stream = Stream::new(group.device())?; // of another device it would be refused
    /// assert_eq!(group.copy_to_gpu(&[ids.rows(..)], &stream), Ok(()));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.0.device()
    }

    /// Returns `true` if the host side is pinned.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// builder.add::<i32>(8);
    /// let group = BufferGroup::new(&builder.build()?, Device::auto())?;
    /// if !group.is_pinned() {
    ///     println!("no kernel gathers the members: it reads pinned memory only");
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "page-locked")]
    pub fn is_pinned(&self) -> bool {
        self.0.is_pinned()
    }
}

impl fmt::Debug for BufferGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.layout().table().members.len();
        let (device, pinned) = (self.device(), self.is_pinned());
        write!(f, "BufferGroup(members={members}, device={device}, pinned={pinned})")
    }
}

/// A member in the current host slot, to read. Waits for copies that write it.
pub(crate) fn host<T: Pod>(members: &GroupStorage, key: MemberKey<T>) -> Result<&[T]> {
    host_back(members, 0, key)
}

/// A member in the host slot that was current `steps` advances ago, to read. Waits for copies that
/// write it.
pub(crate) fn host_back<T: Pod>(
    members: &GroupStorage,
    steps: usize,
    key: MemberKey<T>,
) -> Result<&[T]> {
    let (address, len) = members.wait_to_read(steps, key)?;
    // SAFETY: the member has `len` elements of `T`: the layout checked the key. They are aligned
    // and initialized: they began as zeroes, and any bytes are a `Pod`. No copy writes them, and
    // none can be enqueued while this borrow lives.
    Ok(unsafe { slice::from_raw_parts(address.cast(), len) })
}

/// A member in the current host slot, to write. Waits for copies that use it.
pub(crate) fn host_mut<T: Pod>(members: &mut GroupStorage, key: MemberKey<T>) -> Result<&mut [T]> {
    let (address, len) = members.wait_to_write(key)?;
    // SAFETY: the elements are there, aligned and initialized, as in `host_back`. No copy uses them
    // after the wait, and the group is borrowed exclusively.
    Ok(unsafe { slice::from_raw_parts_mut(address.cast(), len) })
}

/// A member in the current host slot, to read, or `None` if a copy writes it.
pub(crate) fn try_host<T: Pod>(members: &GroupStorage, key: MemberKey<T>) -> Result<Option<&[T]>> {
    match members.may_read(key)? {
        true => host(members, key).map(Some),
        false => Ok(None),
    }
}

/// A member in the current host slot, to write, or `None` if a copy uses it.
pub(crate) fn try_host_mut<T: Pod>(
    members: &mut GroupStorage,
    key: MemberKey<T>,
) -> Result<Option<&mut [T]>> {
    match members.may_write(key)? {
        true => host_mut(members, key).map(Some),
        false => Ok(None),
    }
}

/// Gives the host sides of several members at once: see [`BufferGroup::members_mut`].
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let (starts, lengths) = (builder.add::<i32>(4), builder.add::<i32>(3));
/// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
/// group.cpu_mut(lengths)?.copy_from_slice(&[5, 0, 2]);
///
/// let mut members = group.members_mut();
/// let (starts, lengths) = (members.cpu_mut(starts)?, members.cpu_mut(lengths)?);
/// for (i, length) in lengths.iter().enumerate() {
///     starts[i + 1] = starts[i] + length;
/// }
/// assert_eq!(*starts, [0, 5, 5, 7]);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct MembersMut<'g>(&'g mut GroupStorage);

impl<'g> MembersMut<'g> {
    pub(crate) fn new(members: &'g mut GroupStorage) -> MembersMut<'g> {
        members.name_none();
        MembersMut(members)
    }

    /// The host side of a member, to write, as from [`BufferGroup::cpu_mut`]. Each member can be
    /// taken once.
    ///
    /// # Errors
    ///
    /// [`Error::DuplicateMember`](crate::Error::DuplicateMember) the second time. Otherwise as for
    /// [`BufferGroup::cpu`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, Error, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(4);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// let mut members = group.members_mut();
    /// let first = members.cpu_mut(ids)?;
    /// assert_eq!(members.cpu_mut(ids).err(), Some(Error::DuplicateMember { index: 0 }));
    /// first.fill(1); // still the only way to it
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<&'g mut [T]> {
        let (address, len) = self.0.wait_to_write_and_name(key)?;
        // SAFETY: the elements are there, aligned and initialized, as in `host_back`. No copy uses
        // the member after the wait, and none can be enqueued while the group is borrowed for `'g`.
        // Members do not overlap, and `wait_to_write_and_name` checked that this one was not taken
        // before.
        Ok(unsafe { slice::from_raw_parts_mut(address.cast(), len) })
    }

    /// A member in the host slot of a ring that was current `steps` advances ago, to read, beside
    /// writes of the current slot. Waits for downloads of that member into that slot.
    ///
    /// An older slot can be read any number of times. With 0 steps it is the current slot, and the
    /// member counts as taken.
    ///
    /// # Errors
    ///
    /// As for [`GroupRing::cpu_back`](crate::GroupRing::cpu_back), and
    /// [`Error::DuplicateMember`](crate::Error::DuplicateMember) if `steps` is 0 and the member was
    /// taken before.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let counts = builder.add::<u32>(3);
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// ring.cpu_mut(counts)?.copy_from_slice(&[1, 2, 3]);
    /// ring.advance()?;
    /// let mut members = ring.members_mut();
    /// let (before, now) = (members.cpu_back(1, counts)?, members.cpu_mut(counts)?);
    /// now.iter_mut().zip(before).for_each(|(now, before)| *now = before + 1);
    /// assert_eq!(*now, [2, 3, 4]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_back<T: Pod>(&mut self, steps: usize, key: MemberKey<T>) -> Result<&'g [T]> {
        let (address, len) = match steps {
            0 => self.0.wait_to_read_and_name(key)?,
            _ => self.0.wait_to_read(steps, key)?,
        };
        // SAFETY: the elements are there, aligned and initialized, as in `host_back`. No copy
        // writes them after the wait, and none can be enqueued while the group is borrowed for
        // `'g`. `cpu_mut` gives members of the current slot alone. This is another slot, or a
        // member that counts as taken, which `cpu_mut` has not given and will not give.
        Ok(unsafe { slice::from_raw_parts(address.cast(), len) })
    }
}

impl fmt::Debug for MembersMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.0.layout().table().members.len();
        write!(f, "MembersMut(members={members}, device={})", self.0.device())
    }
}

/// The device sides of a group's members, for work on the stream given to `gpu_on`.
///
/// It is to a group as a [`GpuView`] is to a single buffer.
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, GroupView, MemberKey, Stream};
///
/// /// What a kernel of the model's is launched with.
/// fn arguments(
///     mut view: GroupView<'_>,
///     ids: MemberKey<i32>,
///     positions: MemberKey<i64>,
/// ) -> cpu_gpu_buffer::Result<(*const i32, *const i64)> {
///     Ok((view.member(ids)?.as_ptr(), view.member(positions)?.as_ptr()))
/// }
/// let mut builder = GroupLayoutBuilder::new();
/// let (ids, positions) = (builder.add(8), builder.add(8));
/// let stream = Stream::new(Device::auto())?;
/// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
/// let (ids, positions) = arguments(group.gpu_on(&stream)?, ids, positions)?;
/// assert!(ids.addr() < positions.addr()); // in the order in which they were added
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct GroupView<'a>(&'a mut GroupStorage);

impl<'a> GroupView<'a> {
    pub(crate) fn new(members: &'a mut GroupStorage) -> GroupView<'a> {
        members.name_none();
        GroupView(members)
    }

    /// The device side of a member. Each member can be taken once.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidKey`](crate::Error::InvalidKey) for a key of another layout.
    /// - [`Error::DuplicateMember`](crate::Error::DuplicateMember) the second time.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, Error, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([16, 4]);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// let mut view = group.gpu_on(&stream)?;
    /// assert_eq!(view.member(table)?.rows(2..4)?.shape(), [2, 4]);
    /// assert_eq!(view.member(table).err(), Some(Error::DuplicateMember { index: 0 }));
    /// let foreign = GroupLayoutBuilder::new().add::<i32>(8);
    /// assert_eq!(view.member(foreign).err(), Some(Error::InvalidKey));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn member<T: Pod>(&mut self, key: MemberKey<T>) -> Result<GpuView<'a, T>> {
        let (index, member) = self.0.layout().find(key)?;
        let (shape, numel, address) = (member.shape, member.numel, self.0.gpu_of(member));
        self.0.name(index)?;
        Ok(GpuView::new(address.cast(), shape, numel, self.0.device()))
    }

    /// The device of the memory.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// let mut view = group.gpu_on(&stream)?;
    /// // Where this is the CPU, members can be looked at.
    /// assert_eq!(view.device() == Device::Cpu, view.member(ids)?.as_host_slice().is_some());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.0.device()
    }
}

impl fmt::Debug for GroupView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.0.layout().table().members.len();
        write!(f, "GroupView(members={members}, device={})", self.device())
    }
}
