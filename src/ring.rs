//! Rings: several host halves for one device half, so that the host writes the next step's input while the upload of
//! the one before is still queued.
//!
//! A ring has a current host half, and everything else is a group's: each half remembers what reads it, the uploads
//! of all are ordered by the device half that they write.

use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeBounds;

use bytemuck::Pod;

use crate::buffer::BufferOptions;
use crate::device::Device;
use crate::error::Result;
use crate::group::{GroupView, MembersMut, host, host_mut};
use crate::layout::{GroupLayout, GroupLayoutBuilder, Key, MemberRows};
use crate::members::Members;
use crate::shape::Shape;
use crate::stream::Stream;
use crate::view::GpuView;

/// Several host halves for one [`BufferGroup`](crate::BufferGroup)'s device half, whose addresses never change: a whole
/// step's input is written while those of earlier steps are still on their way.
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
/// let mut ring = GroupRing::new(&builder.finish(), device, 2)?;
/// for step in 0..10 {
///     ring.advance()?; // waits only where both halves are still being uploaded
///     ring.cpu_mut(ids)?[..4].fill(step);
///     ring.cpu_mut(positions)?[..4].fill(step.into());
///     ring.copy_to_gpu(&[ids.rows(..4), positions.rows(..4)], &stream)?;
///     let view = ring.gpu_on(&stream)?;
///     assert_eq!(view.member(ids).len(), 1024);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct GroupRing(Members);

impl GroupRing {
    /// A ring of so many host halves, each with every member zeroed, and a zeroed device half. With one half it is a
    /// group that waits in [`advance`](Self::advance).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGroup`](crate::Error::InvalidGroup) for a ring without halves; otherwise as for
    /// [`BufferGroup::new`](crate::BufferGroup::new).
    pub fn new(layout: &GroupLayout, device: Device, halves: usize) -> Result<GroupRing> {
        GroupRing::with_options(layout, device, halves, BufferOptions::default())
    }

    /// A ring made as `options` say.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`Error::PinningUnavailable`](crate::Error::PinningUnavailable) where pinning
    /// is required.
    pub fn with_options(
        layout: &GroupLayout,
        device: Device,
        halves: usize,
        options: BufferOptions,
    ) -> Result<GroupRing> {
        Members::new(layout, device, halves, options).map(GroupRing)
    }

    /// Makes the host half the current one that was so longest ago, of those whose uploads have finished: this one again
    /// only where all others are in flight. Waits only where all are, for the one that was current longest ago. What was
    /// written to it last is still there.
    ///
    /// # Errors
    ///
    /// An error of the driver's, which may be that of earlier work. The current half stays the current one.
    pub fn advance(&mut self) -> Result<()> {
        self.0.advance()
    }

    /// [`advance`](Self::advance), or `false` where it would wait.
    ///
    /// # Errors
    ///
    /// As for [`advance`](Self::advance).
    pub fn try_advance(&mut self) -> Result<bool> {
        self.0.try_advance()
    }

    /// A member in the current host half, to read. Waits for nothing.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    pub fn cpu<T: Pod>(&self, key: Key<T>) -> Result<&[T]> {
        host(&self.0, key)
    }

    /// A member in the current host half, to write. Waits for uploads of the member out of this half.
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::cpu`](crate::BufferGroup::cpu).
    pub fn cpu_mut<T: Pod>(&mut self, key: Key<T>) -> Result<&mut [T]> {
        host_mut(&mut self.0, key)
    }

    /// Several members in the current host half at once: [`BufferGroup::members_mut`](crate::BufferGroup::members_mut).
    pub fn members_mut(&mut self) -> MembersMut<'_> {
        MembersMut::new(&mut self.0)
    }

    /// Copies rows of members from the current host half to the device half:
    /// [`BufferGroup::copy_to_gpu`](crate::BufferGroup::copy_to_gpu).
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::copy_to_gpu`](crate::BufferGroup::copy_to_gpu).
    pub fn copy_to_gpu(&mut self, members: &[MemberRows], stream: &Stream) -> Result<()> {
        self.0.copy_to_gpu(members, stream)
    }

    /// The device halves of all members: [`BufferGroup::gpu_on`](crate::BufferGroup::gpu_on).
    ///
    /// # Errors
    ///
    /// As for [`BufferGroup::gpu_on`](crate::BufferGroup::gpu_on).
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GroupView<'_>> {
        self.0.use_on(stream)?;
        Ok(GroupView(&self.0))
    }

    /// Whether nothing that this ring was used for is still running.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::is_idle`](crate::CpuGpuBuffer::is_idle).
    pub fn is_idle(&self) -> Result<bool> {
        self.0.is_idle()
    }

    /// Waits until [`is_idle`](Self::is_idle), and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    pub fn synchronize(&self) -> Result<()> {
        self.0.wait_for_all()
    }

    /// The number of host halves.
    pub fn halves(&self) -> usize {
        self.0.halves()
    }

    /// The layout it was made of.
    pub fn layout(&self) -> &GroupLayout {
        self.0.layout()
    }

    /// The device of the device half.
    pub fn device(&self) -> Device {
        self.0.device()
    }

    /// Whether the host halves are pinned.
    pub fn is_pinned(&self) -> bool {
        self.0.is_pinned()
    }
}

impl fmt::Debug for GroupRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupRing")
            .field("halves", &self.halves())
            .field("device", &self.device())
            .field("pinned", &self.is_pinned())
            .finish_non_exhaustive()
    }
}

/// Several pinned host halves of one shape, and one device half at an address that never changes.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, UploadRing};
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let mut slots = UploadRing::<i64>::new([1024, 2], device, 2)?;
/// for step in 0..10 {
///     let host = slots.advance()?; // waits only where both halves are still being uploaded
///     host[..6].fill(step);
///     slots.copy_to_gpu(..3, &stream)?; // returns at once
///     let view = slots.gpu_on(&stream)?;
///     assert_eq!(view.shape(), [1024, 2]);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct UploadRing<T: Pod> {
    members: Members,
    key: Key<T>,
    elements: PhantomData<T>,
}

impl<T: Pod + Send + Sync> UploadRing<T> {
    /// A ring of so many zeroed host halves, and a zeroed device half.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGroup`](crate::Error::InvalidGroup) for a ring without halves; otherwise as for
    /// [`CpuGpuBuffer::new`](crate::CpuGpuBuffer::new).
    pub fn new(shape: impl Into<Shape>, device: Device, halves: usize) -> Result<UploadRing<T>> {
        UploadRing::with_options(shape, device, halves, BufferOptions::default())
    }

    /// A ring made as `options` say.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`Error::PinningUnavailable`](crate::Error::PinningUnavailable) where pinning
    /// is required.
    pub fn with_options(
        shape: impl Into<Shape>,
        device: Device,
        halves: usize,
        options: BufferOptions,
    ) -> Result<UploadRing<T>> {
        let mut builder = GroupLayoutBuilder::new();
        let key = builder.add(shape);
        let members = Members::new(&builder.finish(), device, halves, options)?;
        Ok(UploadRing { members, key, elements: PhantomData })
    }
}

impl<T: Pod> UploadRing<T> {
    /// Makes the host half the current one that was so longest ago, of those whose uploads have finished, and gives it, to
    /// write: this one again only where all others are in flight. Waits only where all are, for the one that was current
    /// longest ago. What was written to it last is still there.
    ///
    /// # Errors
    ///
    /// An error of the driver's, which may be that of earlier work. The current half stays the current one.
    pub fn advance(&mut self) -> Result<&mut [T]> {
        self.members.advance()?;
        self.cpu_mut()
    }

    /// [`advance`](Self::advance), or `None` where it would wait.
    ///
    /// # Errors
    ///
    /// As for [`advance`](Self::advance).
    pub fn try_advance(&mut self) -> Result<Option<&mut [T]>> {
        match self.members.try_advance()? {
            true => self.cpu_mut().map(Some),
            false => Ok(None),
        }
    }

    /// The current host half, to read. Waits for nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`](crate::Error::Forked).
    pub fn cpu(&self) -> Result<&[T]> {
        host(&self.members, self.key)
    }

    /// The current host half, to write. Waits for its upload.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::cpu_mut`](crate::CpuGpuBuffer::cpu_mut).
    pub fn cpu_mut(&mut self) -> Result<&mut [T]> {
        host_mut(&mut self.members, self.key)
    }

    /// Copies rows of the current host half to the same rows of the device half, on `stream`, after everything that
    /// the ring has pending on any stream. Returns as soon as the copy is enqueued.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::copy_to_gpu`](crate::CpuGpuBuffer::copy_to_gpu).
    pub fn copy_to_gpu(&mut self, rows: impl RangeBounds<usize>, stream: &Stream) -> Result<()> {
        self.members.copy_to_gpu(&[self.key.rows(rows)], stream)
    }

    /// The device half, for kernels and libraries on `stream`: [`CpuGpuBuffer::gpu_on`](crate::CpuGpuBuffer::gpu_on).
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::gpu_on`](crate::CpuGpuBuffer::gpu_on).
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GpuView<'_, T>> {
        self.members.use_on(stream)?;
        GroupView(&self.members).get(self.key)
    }

    /// The address of the device half, ordered with nothing, not even with its first zeroing. It never changes. Null
    /// where there are no bytes.
    pub fn device_ptr(&self) -> *mut T {
        let (_, member) = self.members.layout().find(self.key).expect("the ring's own key");
        self.members.gpu_of(member).cast()
    }

    /// Whether nothing that this ring was used for is still running.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::is_idle`](crate::CpuGpuBuffer::is_idle).
    pub fn is_idle(&self) -> Result<bool> {
        self.members.is_idle()
    }

    /// Waits until [`is_idle`](Self::is_idle), and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    pub fn synchronize(&self) -> Result<()> {
        self.members.wait_for_all()
    }

    /// The dimensions.
    pub fn shape(&self) -> &[usize] {
        let (_, member) = self.members.layout().find(self.key).expect("the ring's own key");
        member.shape.dims()
    }

    /// The number of host halves.
    pub fn halves(&self) -> usize {
        self.members.halves()
    }

    /// The device of the device half.
    pub fn device(&self) -> Device {
        self.members.device()
    }

    /// Whether the host halves are pinned.
    pub fn is_pinned(&self) -> bool {
        self.members.is_pinned()
    }
}

impl<T: Pod> fmt::Debug for UploadRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UploadRing")
            .field("shape", &self.shape())
            .field("halves", &self.halves())
            .field("device", &self.device())
            .field("pinned", &self.is_pinned())
            .finish_non_exhaustive()
    }
}
