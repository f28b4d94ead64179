//! A ring for one array: a [`GroupRing`] of one member.

use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;

use bytemuck::Pod;

use crate::buffer::view::GpuView;
use crate::device::Device;
use crate::element::DType;
use crate::error::Result;
use crate::group::layout::{GroupLayoutBuilder, MemberKey};
use crate::group::ring::GroupRing;
use crate::memory::options::BufferOptions;
use crate::shape::{Rows, Shape, select};
use crate::stream::stream::Stream;

/// Several pinned host slots for one array, and one device side at a fixed address.
///
/// The slots are taken strictly in turn. It is a [`GroupRing`] of one member.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, BufferRing};
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let mut slots = BufferRing::<i64>::new([1024, 2], device, 2)?;
/// for step in 0..10 {
///     let host = slots.advance()?; // waits only if this slot is still being uploaded
///     host[..6].fill(step);
///     slots.copy_to_gpu(..3, &stream)?; // returns at once
///     let view = slots.gpu_on(&stream)?;
///     assert_eq!(view.shape(), [1024, 2]);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[doc(alias = "double buffer")]
#[doc(alias = "ring buffer")]
#[doc(alias = "triple buffer")]
pub struct BufferRing<T: Pod> {
    ring: GroupRing,
    key: MemberKey<T>,
    elements: PhantomData<T>,
}

impl<T: Pod + Send + Sync> BufferRing<T> {
    /// Makes a ring of `depth` host slots and one device side, all zeroed.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGroup`](crate::Error::InvalidGroup) if `depth` is 0 or above 65,536.
    /// Otherwise as for [`CpuGpuBuffer::new`](crate::CpuGpuBuffer::new).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, BufferRing};
    ///
    /// let ring = BufferRing::<[f32; 4]>::new(100, Device::Cpu, 2)?;
    /// assert_eq!((ring.shape(), ring.depth()), (&[100][..], 2));
    /// assert_eq!(ring.cpu()?, [[0.0; 4]; 100]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(shape: impl Into<Shape>, device: Device, depth: usize) -> Result<BufferRing<T>> {
        BufferRing::with_options(shape, device, depth, BufferOptions::default())
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
    /// use cpu_gpu_buffer::{BufferOptions, Device, HostFlags, BufferRing};
    ///
    /// let options = BufferOptions { host_flags: HostFlags::PORTABLE, ..Default::default() };
    /// let ring = BufferRing::<u8>::with_options([16, 1024], Device::auto(), 3, options)?;
    /// assert_eq!(ring.depth(), 3);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(
        shape: impl Into<Shape>,
        device: Device,
        depth: usize,
        options: BufferOptions,
    ) -> Result<BufferRing<T>> {
        let mut builder = GroupLayoutBuilder::new();
        let key = builder.add(shape);
        let ring = GroupRing::with_options(&builder.build()?, device, depth, options)?;
        Ok(BufferRing { ring, key, elements: PhantomData })
    }
}

impl<T: Pod> BufferRing<T> {
    /// Switches to the next host slot, and returns it, to write. Blocks until the copies of that
    /// slot are done.
    ///
    /// The slots are taken strictly in turn. A slot keeps its contents until it is written again.
    ///
    /// # Errors
    ///
    /// An error of the driver. Earlier work may have caused it. On error the current slot does not
    /// change.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<u32>::new(4, stream.device(), 2)?;
    /// for step in 1..=4u32 {
    ///     let host = ring.advance()?;
    ///     assert_eq!(host[0], step.saturating_sub(2)); // what this slot held last
    ///     host.fill(step);
    ///     ring.copy_to_gpu(.., &stream)?;
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn advance(&mut self) -> Result<&mut [T]> {
        self.ring.advance()?;
        self.cpu_mut()
    }

    /// Switches to the next host slot, or returns `None` if a copy of that slot is in flight.
    ///
    /// Unlike [`advance`](Self::advance), this never blocks.
    ///
    /// # Errors
    ///
    /// As for [`advance`](Self::advance).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<f32>::new(1024, stream.device(), 2)?;
    /// let (mut sent, mut dropped) = (0, 0);
    /// for frame in 0..100 {
    ///     match ring.try_advance()? {
    ///         Some(host) => {
    ///             host.fill(frame as f32);
    ///             ring.copy_to_gpu(.., &stream)?;
    ///             sent += 1;
    ///         }
    ///         None => dropped += 1, // rather a frame less than one that comes late
    ///     }
    /// }
    /// assert_eq!(sent + dropped, 100);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_advance(&mut self) -> Result<Option<&mut [T]>> {
        match self.ring.try_advance()? {
            true => self.cpu_mut().map(Some),
            false => Ok(None),
        }
    }

    /// The current host slot, to read. Waits for a download into it, and not for its upload.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::cpu`](crate::CpuGpuBuffer::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<u32>::new(3, stream.device(), 2)?;
    /// ring.advance()?.copy_from_slice(&[1, 2, 3]);
    /// ring.copy_to_gpu(.., &stream)?;
    /// assert_eq!(ring.cpu()?.iter().sum::<u32>(), 6); // while the GPU reads it, too
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu(&self) -> Result<&[T]> {
        self.ring.cpu(self.key)
    }

    /// The current host slot, to write. Waits for its copies.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::cpu_mut`](crate::CpuGpuBuffer::cpu_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<u32>::new(3, stream.device(), 2)?;
    /// ring.copy_to_gpu(.., &stream)?;
    /// ring.cpu_mut()?[0] = 1; // the same slot, after its upload
    /// ring.advance()?[0] = 2; // another one, without a wait
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_mut(&mut self) -> Result<&mut [T]> {
        self.ring.cpu_mut(self.key)
    }

    /// The current host slot, to read, or `None` if [`cpu`](Self::cpu) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    pub fn try_cpu(&self) -> Result<Option<&[T]>> {
        self.ring.try_cpu(self.key)
    }

    /// The current host slot, to write, or `None` if [`cpu_mut`](Self::cpu_mut) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferRing, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut ring = BufferRing::<u32>::new(4, Device::Cpu, 2)?;
    /// ring.copy_to_cpu(.., &stream)?;
    /// let there = ring.try_cpu()?.is_some() && ring.try_cpu_mut()?.is_some();
    /// assert!(there); // on the CPU nothing is ever in flight
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu_mut(&mut self) -> Result<Option<&mut [T]>> {
        self.ring.try_cpu_mut(self.key)
    }

    /// The host slot that was current `steps` advances ago, to read. Waits for downloads into it.
    ///
    /// # Errors
    ///
    /// As for [`GroupRing::cpu_back`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferRing, Device, Error, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut losses = BufferRing::<f32>::new(1, stream.device(), 2)?;
    /// for _step in 0..10 {
    ///     losses.advance()?;
    ///     // A kernel of the step writes to `losses.gpu_on(&stream)?.as_mut_ptr()` here.
    ///     losses.copy_to_cpu(.., &stream)?;
    ///     println!("the step before: {}", losses.cpu_back(1)?[0]); // this one may still run
    /// }
    /// assert_eq!(losses.cpu_back(2), Err(Error::OutOfRange { start: 2, end: 3, rows: 2, member: None }));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_back(&self, steps: usize) -> Result<&[T]> {
        self.ring.cpu_back(steps, self.key)
    }

    /// Copies rows of the current host slot to the same rows of the device side on `stream`.
    ///
    /// The copy comes after all pending work of the ring on any stream. This returns as soon as the
    /// copy is enqueued.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::copy_to_gpu`](crate::CpuGpuBuffer::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut ring = BufferRing::<u32>::new([3, 2], Device::Cpu, 2)?;
    /// ring.advance()?.fill(1);
    /// ring.copy_to_gpu(.., &stream)?;
    /// ring.advance()?.fill(2);
    /// ring.copy_to_gpu(1..2, &stream)?; // the others stay as the slot before sent them
    /// assert_eq!(ring.gpu_on(&stream)?.as_host_slice(), Some(&[1, 1, 2, 2, 1, 1][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "H2D")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_gpu(&mut self, rows: impl Rows, stream: &Stream) -> Result<()> {
        // Here, so that an error names no member.
        let rows = select(rows.bounds(), self.shape()[0], None)?;
        self.ring.copy_to_gpu(&[self.key.rows(rows)], stream)
    }

    /// Copies rows of the device side to the same rows of the current host slot on `stream`.
    ///
    /// The copy comes after all pending work of the ring on any stream. [`cpu`](Self::cpu) waits
    /// for it, and so does [`cpu_back`](Self::cpu_back) after an advance.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::copy_to_gpu`](crate::CpuGpuBuffer::copy_to_gpu).
    #[doc(alias = "D2H")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_cpu(&mut self, rows: impl Rows, stream: &Stream) -> Result<()> {
        let rows = select(rows.bounds(), self.shape()[0], None)?;
        self.ring.copy_to_cpu(&[self.key.rows(rows)], stream)
    }

    /// The device side, for kernels and libraries on `stream`.
    ///
    /// See [`CpuGpuBuffer::gpu_on`](crate::CpuGpuBuffer::gpu_on).
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::gpu_on`](crate::CpuGpuBuffer::gpu_on).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let (copies, kernels) = (Stream::new(Device::auto())?, Stream::new(Device::auto())?);
    /// let mut ring = BufferRing::<f32>::new(256, copies.device(), 2)?;
    /// ring.advance()?.fill(0.5);
    /// ring.copy_to_gpu(.., &copies)?;
    /// let view = ring.gpu_on(&kernels)?; // after the copy
    /// assert_eq!(view.len(), 256);
    /// // Launch on `kernels.as_raw()` here. The next upload comes after it, on whichever stream.
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GpuView<'_, T>> {
        self.ring.gpu_on(stream)?.member(self.key)
    }

    /// The address of the device side, without any ordering, not even with its first zeroing.
    ///
    /// The address never changes. It is null if there are no bytes.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, BufferRing};
    ///
    /// let mut ring = BufferRing::<f32>::new(256, Device::auto(), 4)?;
    /// let captured = ring.device_ptr();
    /// ring.advance()?;
    /// assert_eq!(ring.device_ptr(), captured); // one graph serves all slots
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device_ptr(&self) -> *mut T {
        self.ring.device_ptr(self.key).expect("the ring's own key")
    }

    /// Returns `true` if no work of this ring is pending.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::is_idle`](crate::CpuGpuBuffer::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<f32>::new(256, stream.device(), 2)?;
    /// ring.copy_to_gpu(.., &stream)?;
    /// println!("copied already: {}", ring.is_idle()?);
    /// stream.synchronize()?;
    /// assert!(ring.is_idle()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_idle(&self) -> Result<bool> {
        self.ring.is_idle()
    }

    /// Waits until no work of this ring is pending, and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, BufferRing};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ring = BufferRing::<f32>::new(256, stream.device(), 2)?;
    /// for _ in 0..4 {
    ///     ring.advance()?;
    ///     ring.copy_to_gpu(.., &stream)?;
    /// }
    /// ring.synchronize()?; // for the uploads of both slots
    /// assert!(ring.is_idle()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        self.ring.synchronize()
    }

    /// The dimensions of each slot.
    ///
    /// ```
    /// let ring = cpu_gpu_buffer::BufferRing::<u8>::new([2, 3], cpu_gpu_buffer::Device::Cpu, 4)?;
    /// assert_eq!(ring.shape(), [2, 3]); // of each slot
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape(&self) -> &[usize] {
        let (_, member) = self.ring.layout().find(self.key).expect("the ring's own key");
        member.shape.dims()
    }

    /// The number of host slots.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, BufferRing};
    ///
    /// let ring = BufferRing::<u8>::new(1 << 20, Device::Cpu, 3)?;
    /// let pinned = ring.depth() << 20; // bytes, and a third of that on the device
    /// assert_eq!(pinned, 3 << 20);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn depth(&self) -> usize {
        self.ring.depth()
    }

    /// The device of the device side.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Error, Stream, BufferRing};
    ///
    /// let mut ring = BufferRing::<u8>::new(16, Device::Cpu, 2)?;
    /// if let Ok(gpu) = Device::cuda(0) {
    ///     let answer = ring.copy_to_gpu(.., &Stream::new(gpu)?);
    ///     assert_eq!(answer, Err(Error::DeviceMismatch { expected: ring.device(), actual: gpu }));
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.ring.device()
    }

    /// Returns `true` if the host slots are pinned.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, BufferRing};
    ///
    /// let ring = BufferRing::<u8>::new(16, Device::Cpu, 2)?;
    /// assert!(!ring.is_pinned()); // the CPU copies at once, whatever the memory
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "page-locked")]
    pub fn is_pinned(&self) -> bool {
        self.ring.is_pinned()
    }
}

impl<T: Pod> fmt::Debug for BufferRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = DType::of::<T>().map_or(type_name::<T>(), DType::name);
        write!(
            f,
            "BufferRing(shape={:?}, dtype={dtype}, depth={}, device={}, pinned={})",
            self.shape(),
            self.depth(),
            self.device(),
            self.is_pinned()
        )
    }
}
