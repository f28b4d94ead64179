//! The typed buffer: host and device memory of one shape.
//!
//! [`storage`](crate::buffer::storage) has the bytes and the in-flight rule. This file turns shapes,
//! rows and elements into bytes.

use std::any::{Any, type_name};
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::ops::Range;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use bytemuck::Pod;

use crate::buffer::handle::StorageHandle;
use crate::buffer::side_layout::SideLayout;
use crate::buffer::storage::BOTH;
#[cfg(feature = "dlpack")]
use crate::buffer::storage::Storage;
use crate::buffer::transfers::Peer;
use crate::buffer::view::GpuView;
use crate::cuda::calls::copy::Direction;
use crate::device::Device;
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::memory::options::BufferOptions;
use crate::shape::{Rows, Shape, select};
use crate::stream::stream::Stream;

/// Pinned host memory and device memory of one shape, with asynchronous copies between them.
///
/// No safe program can race with a copy. A copy is enqueued on a stream and runs beside the
/// program. The buffer tracks it. An accessor of the host side waits for the copies that make the
/// access unsafe, and for nothing else. The buffer may be moved, sent to another thread, swapped,
/// dropped or forgotten while a copy runs.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let mut tokens = CpuGpuBuffer::<i32>::new([32, 8], device)?;
///
/// tokens.cpu_mut()?[..16].fill(7);
/// tokens.copy_to_gpu(..2, &stream)?; // returns at once
/// tokens.copy_to_cpu(.., &stream)?; // so does this
/// assert_eq!(tokens.cpu()?[..17], [vec![7; 16], vec![0]].concat()); // waits for the second
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
///
/// # Dropping
///
/// Drop waits for the pending work of the buffer. Releasing CUDA memory then waits for the whole
/// device, as `cudaFree` and `cudaHostUnregister` do, so keep buffers and reuse them. If the driver
/// cannot confirm that the memory is unused, it is leaked. This happens if the driver returns an
/// error, and if a stream that was given to [`gpu_on`](Self::gpu_on) is being captured into a
/// graph.
///
/// # Tensors of other libraries
///
/// With the feature `dlpack`, either side can be lent to a tensor of PyTorch, JAX and others. While
/// the tensor lives, operations on that side return [`Error::Exported`]. The module `dlpack` has
/// the rules.
#[doc(alias = "double buffer")]
#[doc(alias = "page-locked")]
#[doc(alias = "pinned")]
pub struct CpuGpuBuffer<T: Pod> {
    pub(super) storage: StorageHandle,
    elements: PhantomData<T>,
}

// SAFETY: the buffer owns elements of `T` in its host side, as a `Vec<T>` does. Its other fields
// are `Send` and `Sync`.
unsafe impl<T: Pod + Send> Send for CpuGpuBuffer<T> {}
// SAFETY: a shared reference can read elements, as one of a `Vec<T>` can.
unsafe impl<T: Pod + Sync> Sync for CpuGpuBuffer<T> {}

// A panic leaves a buffer as an error does: an operation sets its record before it enqueues. So no
// broken value can be seen through it.
impl<T: Pod> UnwindSafe for CpuGpuBuffer<T> {}
impl<T: Pod> RefUnwindSafe for CpuGpuBuffer<T> {}

// The other fields must not rely on these promises.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<StorageHandle>();
};

impl<T: Pod> CpuGpuBuffer<T> {
    /// A buffer with both sides zeroed. The host side is pinned if that works.
    ///
    /// A buffer without bytes uses no device, so this succeeds even if the device does not exist.
    /// [`resize`](Self::resize) returns the error then.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidShape`].
    /// - [`Error::Unavailable`] if the device cannot be used.
    /// - [`Error::OutOfMemory`].
    /// - An error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let buffer = CpuGpuBuffer::<f32>::new([32, 768], Device::Cpu)?;
    /// assert_eq!(buffer.cpu()?, [0.0; 32 * 768]);
    ///
    /// let mut none = CpuGpuBuffer::<f32>::new(0, Device::Cuda(77))?;
    /// assert!(none.cpu()?.is_empty() && none.resize(1).is_err());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(shape: impl Into<Shape>, device: Device) -> Result<Self> {
        Self::with_options(shape, device, BufferOptions::default())
    }

    /// A buffer with both sides zeroed, with options.
    ///
    /// # Errors
    ///
    /// - As for [`new`](Self::new).
    /// - [`Error::PinningUnavailable`] if pinning is required and fails.
    /// - [`Error::ReadOnly`] if the flags have [`READ_ONLY`](crate::HostFlags::READ_ONLY).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Error, Pinning};
    ///
    /// // Fail rather than get a buffer whose copies are staged.
    /// let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
    /// match CpuGpuBuffer::<f32>::with_options(1024, Device::auto(), options) {
    ///     Ok(buffer) => assert!(buffer.is_pinned()),
    ///     Err(Error::PinningUnavailable { bytes, .. }) => assert_eq!(bytes, 4096), // e.g. on the CPU
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(
        shape: impl Into<Shape>,
        device: Device,
        options: BufferOptions,
    ) -> Result<Self> {
        Ok(Self::stored(StorageHandle::allocate(
            SideLayout::of::<T>(shape.into())?,
            device,
            options,
        )?))
    }

    /// A buffer whose host side holds `values`, on the stream's device. Its upload is enqueued on
    /// `stream`.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidShape`] if `values` are not as many elements as the shape has.
    /// - Otherwise as for [`new`](Self::new) and [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ids = CpuGpuBuffer::from_slice([2, 3], &[1, 2, 3, 4, 5, 6], &stream)?;
    /// let view = ids.gpu_on(&stream)?; // after the upload
    /// assert_eq!(view.shape(), [2, 3]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn from_slice(shape: impl Into<Shape>, values: &[T], stream: &Stream) -> Result<Self> {
        let side_layout = SideLayout::of::<T>(shape.into())?;
        if values.len() != side_layout.numel {
            let (given, numel) = (values.len(), side_layout.numel);
            return Err(Error::InvalidShape {
                reason: format!("{given} values for a shape of {numel} elements"),
            });
        }
        let options = BufferOptions::default();
        let storage = StorageHandle::allocate(side_layout, stream.device(), options)?;
        let mut buffer = Self::stored(storage);
        buffer.storage.write(0, bytemuck::cast_slice(values), stream)?;
        Ok(buffer)
    }

    /// A buffer whose host side is memory that exists already: a mapped file, shared memory, a
    /// buffer of another library.
    ///
    /// The host side keeps its content. The device side is zeroed. The memory is registered with
    /// CUDA as `options` say, and never freed. `owner` keeps it. It is let go when the buffer is
    /// dropped, after pending work has finished and the memory is unregistered. Like any value of
    /// an [`Arc`], it is dropped once no clone is left.
    ///
    /// - **Pinning:** pinning reads every page of a mapped file. Memory that is
    ///   registered already counts as pinned, and stays registered. If a part is registered, the
    ///   rest cannot be: the buffer is pageable, and [`pinning_error`](Self::pinning_error) has the
    ///   reason. On Linux the driver may refuse to pin a shared mapping of a file on disk that can
    ///   be written. Private and read-only mappings can be pinned.
    /// - **Several buffers:** buffers that adopt the same memory, for example one for each device,
    ///   share the registration of the first. Its `owner` is let go when the last of them is
    ///   dropped.
    /// - **Read-only:** with [`HostFlags::READ_ONLY`](crate::HostFlags::READ_ONLY) nothing writes
    ///   the host side. [`cpu_mut`](Self::cpu_mut), [`try_cpu_mut`](Self::try_cpu_mut), fills of
    ///   the host side, [`resize`](Self::resize) and downloads return [`Error::ReadOnly`] and
    ///   change nothing. They return errors of the shape and the rows first, and errors of the
    ///   stream afterwards.
    /// - **Size:** [`resize`](Self::resize) within the memory zeroes it. Beyond it, the buffer
    ///   moves to memory of its own and lets `owner` go.
    /// - **Leaks:** `owner` is forgotten, and never dropped, if the memory may still be registered
    ///   or in use, and in a forked child if the buffer is of a CUDA device. The memory gets no
    ///   advice about `fork`: a child sees what it would see without CUDA.
    ///
    /// # Errors
    ///
    /// As for [`with_options`](Self::with_options), but the flags may have
    /// [`READ_ONLY`](crate::HostFlags::READ_ONLY). On error `owner` is let go.
    ///
    /// # Safety
    ///
    /// Until `owner` is let go, for as many elements at `host` as the shape has:
    ///
    /// - **Valid:** they are valid for reads and, unless `options` have
    ///   [`READ_ONLY`](crate::HostFlags::READ_ONLY), for writes.
    /// - **Initialised:** all their bytes are.
    /// - **Alignment:** `host` is aligned for `T`. Kernels that read the memory in place cannot
    ///   rely on more.
    /// - **Aliasing:** nothing else writes them, in this or in another process. With `READ_ONLY`,
    ///   others may read them. Without it, nothing else uses them, not even by a reference.
    /// - **Mapping:** their pages stay mapped. A file below them is not truncated: see
    ///   [below](#truncated-files).
    /// - **Registration:** nothing else registers or unregisters any of them. Memory that other code
    ///   has registered already stays registered.
    /// - **Sharing:** if two buffers adopt some of the same bytes, both are
    ///   [pinned](Self::is_pinned), or both are made with
    ///   [`Pinning::Never`](crate::Pinning::Never). Otherwise the registration of the one may begin
    ///   or end under a copy of the other, which then fails or races.
    ///
    /// # Truncated files
    ///
    /// Truncating a file takes pages out of all its mappings. The program's next access to one of
    /// them raises `SIGBUS`, which ends the process, even if the page is pinned. The crate cannot
    /// prevent this. Adopt files that no other process truncates, for example unlinked or sealed
    /// files.
    ///
    /// ```
    /// use std::ptr::NonNull;
    /// use std::sync::Arc;
    ///
    /// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Error, HostFlags, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let weights: Arc<Vec<f32>> = Arc::new(vec![0.5; 1024]);
    /// let host = NonNull::from(weights.as_slice()).cast::<f32>();
    /// let host_flags = HostFlags::READ_ONLY | HostFlags::PORTABLE;
    /// let options = BufferOptions { host_flags, ..Default::default() };
    /// let owner = weights.clone();
    /// // SAFETY: the vector has 1024 numbers, and `owner` keeps it. Nothing writes it.
    /// let mut buffer =
    ///     unsafe { CpuGpuBuffer::adopt(host, [32, 32], stream.device(), owner, options) }?;
    /// buffer.copy_to_gpu(.., &stream)?;
    /// assert_eq!(buffer.cpu()?, *weights); // the same memory, never copied
    /// assert_eq!(buffer.fill_cpu(1.0), Err(Error::ReadOnly));
    /// drop(buffer);
    /// assert_eq!(Arc::strong_count(&weights), 1);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaHostRegister")]
    #[doc(alias = "mmap")]
    pub unsafe fn adopt(
        host: NonNull<T>,
        shape: impl Into<Shape>,
        device: Device,
        owner: Arc<dyn Any + Send + Sync>,
        options: BufferOptions,
    ) -> Result<Self> {
        let side_layout = SideLayout::of::<T>(shape.into())?;
        // SAFETY: the caller vouches for the elements, which are these bytes.
        let storage =
            unsafe { StorageHandle::adopt(host.cast(), side_layout, device, owner, options) };
        Ok(Self::stored(storage?))
    }

    pub(crate) fn stored(storage: StorageHandle) -> Self {
        CpuGpuBuffer { storage, elements: PhantomData }
    }

    #[cfg(feature = "dlpack")]
    pub(crate) fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    // ---- the host side ----

    /// The host side, to read. Waits for a pending copy *into* it.
    ///
    /// It does not wait for uploads, kernels or fills of the device side.
    ///
    /// # Errors
    ///
    /// An error of the driver. It may belong to earlier work on the stream.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut sampled = CpuGpuBuffer::<u32>::new(4, Device::Cpu)?;
    /// sampled.fill_gpu(9, &stream)?;
    /// sampled.copy_to_cpu(..3, &stream)?;
    /// assert_eq!(sampled.cpu()?, [9, 9, 9, 0]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[inline]
    pub fn cpu(&self) -> Result<&[T]> {
        self.storage.wait_to_read()?;
        // SAFETY: no copy writes the host side, and none can be enqueued while this borrow lives.
        Ok(unsafe { self.host_slice() })
    }

    /// The host side, to write. Waits for pending copies into and out of it, and for nothing else.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu), and [`Error::ReadOnly`] if the host side is
    /// [adopted](Self::adopt) as read-only.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(3, Device::Cpu)?;
    /// buffer.cpu_mut()?.copy_from_slice(b"abc");
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[inline]
    pub fn cpu_mut(&mut self) -> Result<&mut [T]> {
        self.storage.wait_to_write()?;
        // SAFETY: no copy touches the host side, and none can be enqueued while this borrow lives.
        Ok(unsafe { self.host_slice_mut() })
    }

    /// The host side, to read, or `None` if [`cpu`](Self::cpu) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let buffer = CpuGpuBuffer::<u8>::new(3, Device::Cpu)?;
    /// if let Some(host) = buffer.try_cpu()? {
    ///     assert_eq!(host, [0, 0, 0]);
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu(&self) -> Result<Option<&[T]>> {
        Ok(match self.storage.may_read()? {
            // SAFETY: as in `cpu`.
            true => Some(unsafe { self.host_slice() }),
            false => None,
        })
    }

    /// The host side, to write, or `None` if [`cpu_mut`](Self::cpu_mut) would wait.
    ///
    /// # Errors
    ///
    /// As for [`cpu_mut`](Self::cpu_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(3, Device::Cpu)?;
    /// match buffer.try_cpu_mut()? {
    ///     Some(host) => host.fill(1),
    ///     None => println!("still in flight"),
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_cpu_mut(&mut self) -> Result<Option<&mut [T]>> {
        Ok(match self.storage.may_write()? {
            // SAFETY: as in `cpu_mut`.
            true => Some(unsafe { self.host_slice_mut() }),
            false => None,
        })
    }

    // ---- transfers ----

    /// Copies rows of the host side to the same rows of the device side.
    ///
    /// `rows` selects the first dimension: `..`, `..n` or `a..b`. The copy runs on `stream`, after
    /// all pending work of this buffer on any stream. This returns once the copy is enqueued. If
    /// the host side is not pinned, the driver may stage the copy and block.
    ///
    /// # Errors
    ///
    /// - [`Error::OutOfRange`], [`Error::DeviceMismatch`] and [`Error::StreamCapturing`]: nothing
    ///   has changed.
    /// - An error of the driver: the copy counts as in flight until the driver says otherwise.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut ids = CpuGpuBuffer::<i64>::new([64, 2], Device::Cpu)?;
    /// ids.cpu_mut()?[..6].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
    /// ids.copy_to_gpu(..3, &stream)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "H2D")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_gpu(&mut self, rows: impl Rows, stream: &Stream) -> Result<()> {
        let range = self.bytes_of(&rows)?;
        // SAFETY: no memory of others takes part.
        unsafe { self.storage.copy(Direction::Up, range, Peer::DeviceSide, stream) }
    }

    /// Copies rows of the device side to the same rows of the host side.
    ///
    /// The copy runs on `stream`, after all pending work of this buffer on any stream. This returns
    /// once the copy is enqueued. If the host side is not pinned, it may block until the copy is
    /// done.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu), and [`Error::ReadOnly`] if the host side is
    /// [adopted](Self::adopt) as read-only.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut logits = CpuGpuBuffer::<f32>::new([4, 2], Device::Cpu)?;
    /// logits.fill_gpu(0.5, &stream)?;
    /// logits.copy_to_cpu(1..3, &stream)?;
    /// assert_eq!(logits.cpu()?, [0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "D2H")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_cpu(&mut self, rows: impl Rows, stream: &Stream) -> Result<()> {
        let range = self.bytes_of(&rows)?;
        // SAFETY: no memory of others takes part.
        unsafe { self.storage.copy(Direction::Down, range, Peer::DeviceSide, stream) }
    }

    /// Copies rows of the host side into device memory that somebody else owns.
    ///
    /// As [`copy_to_gpu`](Self::copy_to_gpu) otherwise. `to` is the address of row 0, and row `i`
    /// goes to row `i`. Only the selected rows need exist there.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// # Safety
    ///
    /// From the call until the copy has finished, for the selected rows of `to`:
    ///
    /// - **Valid:** they are valid for writes, and lie in one allocation. A pointer made from a
    ///   `&[T]` is not valid for writes.
    /// - **Until when:** they stay allocated. Do not free them, or return them to a caching
    ///   allocator, before the copy has finished, which may be long after this call.
    /// - **Device:** they are memory of `stream`'s device; on [`Device::Cpu`], memory of the
    ///   program, outside of this buffer.
    /// - **Aliasing:** the host neither reads nor writes them, and no reference to them is used.
    /// - **Stream:** other work on them is sent to `stream`, or ordered before or after the copy by
    ///   events. The buffer does not order it.
    ///
    /// They need not be initialised or aligned. The copy has finished once
    /// [`cpu_mut`](Self::cpu_mut), [`synchronize`](Self::synchronize) or [`Stream::synchronize`]
    /// returns `Ok` after it. On the CPU it has finished when this returns. After an error of the
    /// driver it may still run, so keep the memory until one of these returns `Ok`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut theirs = vec![0u32; 8];
    /// let mut ours = CpuGpuBuffer::<u32>::new([4, 2], Device::Cpu)?;
    /// ours.fill_cpu(3)?;
    /// // SAFETY: `theirs` has 4 rows of 2 words, and nothing else looks at it.
    /// unsafe { ours.copy_to_device_ptr(1..2, theirs.as_mut_ptr(), &stream) }?;
    /// assert_eq!(theirs, [0, 0, 3, 3, 0, 0, 0, 0]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub unsafe fn copy_to_device_ptr(
        &mut self,
        rows: impl Rows,
        to: *mut T,
        stream: &Stream,
    ) -> Result<()> {
        let range = self.bytes_of(&rows)?;
        let peer = Peer::Foreign(to.cast::<u8>().wrapping_add(range.start));
        // SAFETY: the caller vouches for the selected rows of `to`, which are these bytes.
        unsafe { self.storage.copy(Direction::Up, range, peer, stream) }
    }

    /// Copies rows of device memory that somebody else owns into the host side.
    ///
    /// As [`copy_to_cpu`](Self::copy_to_cpu) otherwise. `from` is the address of row 0, and row `i`
    /// goes to row `i`. Only the selected rows need exist there.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_cpu`](Self::copy_to_cpu).
    ///
    /// # Safety
    ///
    /// From the call until the copy has finished, for the selected rows of `from`:
    ///
    /// - **Valid:** they are valid for reads, and lie in one allocation.
    /// - **Until when:** they stay allocated. Do not free them, or return them to a caching
    ///   allocator, before the copy has finished, which may be long after this call.
    /// - **Initialised:** all their bytes are, by work that is ordered before the copy.
    /// - **Device:** they are memory of `stream`'s device; on [`Device::Cpu`], memory of the
    ///   program, outside of this buffer.
    /// - **Aliasing:** nothing writes them, and no exclusive reference to them is used.
    /// - **Stream:** work that writes them is sent to `stream`, or ordered before or after the copy
    ///   by events. The buffer does not order it.
    ///
    /// They need not be aligned. The copy has finished once [`cpu`](Self::cpu),
    /// [`synchronize`](Self::synchronize) or [`Stream::synchronize`] returns `Ok` after it. On the
    /// CPU it has finished when this returns. After an error of the driver it may still run.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let theirs = [0.5f32, 1.5, 2.5, 3.5];
    /// let mut ours = CpuGpuBuffer::<f32>::new([2, 2], Device::Cpu)?;
    /// // SAFETY: `theirs` has 2 rows of 2 numbers, and nobody writes it.
    /// unsafe { ours.copy_from_device_ptr(1.., theirs.as_ptr(), &stream) }?;
    /// assert_eq!(ours.cpu()?, [0.0, 0.0, 2.5, 3.5]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub unsafe fn copy_from_device_ptr(
        &mut self,
        rows: impl Rows,
        from: *const T,
        stream: &Stream,
    ) -> Result<()> {
        let range = self.bytes_of(&rows)?;
        // Only read: the direction says so.
        let peer = Peer::Foreign(from.cast_mut().cast::<u8>().wrapping_add(range.start));
        // SAFETY: the caller vouches for the selected rows of `from`, which are these bytes.
        unsafe { self.storage.copy(Direction::Down, range, peer, stream) }
    }

    /// Returns `true` if no work of this buffer is pending.
    ///
    /// This covers copies, fills, and everything that the streams given to [`gpu_on`](Self::gpu_on)
    /// were given until now.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu), and [`Error::StreamCapturing`] if a stream that was given to
    /// `gpu_on` is being captured.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let buffer = CpuGpuBuffer::<u8>::new(3, Device::Cpu)?;
    /// assert!(buffer.is_idle()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_idle(&self) -> Result<bool> {
        self.storage.is_idle()
    }

    /// Waits for the pending work of this buffer, and for nothing else. See
    /// [`is_idle`](Self::is_idle).
    ///
    /// # Errors
    ///
    /// As for [`is_idle`](Self::is_idle).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut weights = CpuGpuBuffer::<f32>::new([1024, 64], stream.device())?;
    /// weights.copy_to_gpu(.., &stream)?;
    /// weights.synchronize()?;
    /// assert!(weights.is_idle()? && weights.try_cpu_mut()?.is_some());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        self.storage.wait_for_all()
    }

    // ---- both sides ----

    /// Sets every element of both sides.
    ///
    /// The host side is set before this returns, after a wait for pending copies as in
    /// [`cpu_mut`](Self::cpu_mut). The device side is set on `stream`.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu) and [`cpu_mut`](Self::cpu_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut buffer = CpuGpuBuffer::<f64>::new(5, Device::Cpu)?;
    /// buffer.fill(-1.0, &stream)?;
    /// assert_eq!(buffer.cpu()?, [-1.0; 5]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn fill(&mut self, value: T, stream: &Stream) -> Result<()> {
        let element = bytemuck::bytes_of(&value);
        self.storage.fill_gpu_and_wait_to_write(element, stream)?;
        // SAFETY: no copy uses the host side since the wait: a fill enqueues none.
        set(unsafe { self.host_slice_mut() }, value);
        Ok(())
    }

    /// Sets every element of the host side, after pending copies into or out of it.
    ///
    /// # Errors
    ///
    /// As for [`cpu_mut`](Self::cpu_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut slots = CpuGpuBuffer::<i64>::new([4, 2], Device::Cpu)?;
    /// slots.fill_cpu(-1)?; // the kernels' padding
    /// slots.cpu_mut()?[..2].copy_from_slice(&[8, 9]);
    /// slots.copy_to_gpu(.., &stream)?;
    /// assert_eq!(slots.cpu()?[..4], [8, 9, -1, -1]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn fill_cpu(&mut self, value: T) -> Result<()> {
        set(self.cpu_mut()?, value);
        Ok(())
    }

    /// Sets every element of the device side on `stream`.
    ///
    /// The fill runs after all pending work of this buffer on any stream. This returns once it is
    /// enqueued. The fill is a memset of the driver if it has less than 64 KB and the bytes of
    /// `value` repeat every 1, 2 or 4 bytes. Otherwise it is a kernel.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut buffer = CpuGpuBuffer::<[u8; 3]>::new(2, Device::Cpu)?;
    /// buffer.fill_gpu([1, 2, 3], &stream)?;
    /// assert_eq!(buffer.cpu()?, [[0; 3]; 2]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn fill_gpu(&mut self, value: T, stream: &Stream) -> Result<()> {
        self.storage.fill_gpu(bytemuck::bytes_of(&value), stream)
    }

    /// Sets every byte of both sides to zero, in the order of [`fill`](Self::fill).
    ///
    /// No element is built on the stack, so elements may be of any size.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu) and [`cpu_mut`](Self::cpu_mut).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut counts = CpuGpuBuffer::<u32>::new(8, Device::Cpu)?;
    /// counts.fill(5, &stream)?;
    /// counts.zero(&stream)?;
    /// assert_eq!(counts.cpu()?, [0; 8]);
    /// assert_eq!(counts.gpu_on(&stream)?.as_host_slice(), Some(&[0; 8][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn zero(&mut self, stream: &Stream) -> Result<()> {
        self.storage.zero(stream)
    }

    /// Gives the buffer another shape, and zeroes both sides.
    ///
    /// If the new shape fits into the memory, this waits for pending copies of the host side only,
    /// and the device address stays. Otherwise this waits for all pending work, and allocates both
    /// sides again.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new) and [`cpu_mut`](Self::cpu_mut). On error the buffer is unchanged.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new([4, 4], Device::Cpu)?;
    /// buffer.resize([2, 3, 5])?;
    /// assert_eq!(buffer.shape(), [2, 3, 5]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn resize(&mut self, shape: impl Into<Shape>) -> Result<()> {
        let side_layout = SideLayout::of::<T>(shape.into())?;
        if side_layout.layout.size() <= self.storage.capacity() {
            return self.storage.reshape_zeroed(side_layout);
        }
        self.storage.wait_for_consumers(&BOTH)?;
        // This refuses the options of a read-only host side.
        let larger = StorageHandle::allocate(side_layout, self.device(), self.storage.options())?;
        self.storage.wait_for_all()?;
        // With it may go the owner of a foreign stream, which may panic.
        drop(mem::replace(&mut self.storage, larger));
        Ok(())
    }

    // ---- the device side ----

    /// The device side, for kernels and libraries on `stream`.
    ///
    /// This orders `stream` after all pending work of the buffer. From then on `stream` may use the
    /// device side. The next operation of the buffer, on any stream, comes after the work that
    /// `stream` was given until then.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new([16, 16], stream.device())?;
    /// let view = buffer.gpu_on(&stream)?;
    /// // Launch kernels on `stream.as_raw()` with `view.as_mut_ptr()` here, while the view lives.
    /// assert_eq!(view.len(), 256);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn gpu_on(&mut self, stream: &Stream) -> Result<GpuView<'_, T>> {
        self.storage.use_on(stream)?;
        Ok(GpuView::new(self.device_ptr(), *self.storage.shape(), self.numel(), self.device()))
    }

    /// The host side under its device address, for kernels on `stream` that use it in place.
    ///
    /// A few bytes reach a kernel sooner so than by a copy. This orders `stream` after all pending
    /// work of the buffer. From then on kernels of `stream` may read and write the host side.
    /// [`cpu`](Self::cpu), [`cpu_mut`](Self::cpu_mut), fills and copies then wait for the work that
    /// `stream` was given until then.
    ///
    /// # Errors
    ///
    /// - [`Error::NotMapped`]: the host side is pageable, or was not pinned with
    ///   [`HostFlags::MAPPED`](crate::HostFlags::MAPPED).
    /// - Otherwise as for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut lengths = CpuGpuBuffer::<i32>::new(64, stream.device())?;
    /// lengths.cpu_mut()?.fill(3);
    /// match lengths.cpu_on(&stream) {
    ///     Ok(view) => {
    ///         // Launch kernels on `stream.as_raw()` with `view.as_ptr()` here, while the view lives.
    ///         assert_eq!(view.len(), 64);
    ///     }
    ///     Err(Error::NotMapped) => lengths.copy_to_gpu(.., &stream)?,
    ///     Err(error) => return Err(error),
    /// }
    /// assert_eq!(lengths.cpu()?, [3; 64]); // waits for these kernels
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "zero-copy")]
    #[doc(alias = "cudaHostGetDevicePointer")]
    pub fn cpu_on(&mut self, stream: &Stream) -> Result<GpuView<'_, T>> {
        let address = self.storage.use_host_on(stream)?.cast();
        Ok(GpuView::new(address, *self.storage.shape(), self.numel(), self.device()))
    }

    /// The address of the device side, ordered after nothing, not even its first zeroing.
    ///
    /// It is for logging, and for graph capture after a call of [`gpu_on`](Self::gpu_on). It is a
    /// multiple of 256, and of the alignment of `T`. It changes only if [`resize`](Self::resize) exceeds all earlier sizes. It is null if the buffer
    /// never had bytes. A buffer that was resized to no bytes keeps its memory and the address.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<f32>::new(256, Device::auto())?;
    /// let captured = buffer.device_ptr();
    /// buffer.resize(64)?;
    /// buffer.resize([16, 16])?; // as large as it was
    /// assert_eq!(buffer.device_ptr(), captured); // a graph that was captured with it is still good
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device_ptr(&self) -> *mut T {
        self.storage.gpu_ptr().cast()
    }

    // ---- properties ----

    /// The dimensions, outermost first.
    ///
    /// ```
    /// let mut buffer = cpu_gpu_buffer::CpuGpuBuffer::<u8>::new([2, 3], cpu_gpu_buffer::Device::Cpu)?;
    /// assert_eq!(buffer.shape(), [2, 3]);
    /// buffer.resize(7)?;
    /// assert_eq!(buffer.shape(), [7]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape(&self) -> &[usize] {
        self.storage.shape().dims()
    }

    /// The number of elements of one side.
    ///
    /// ```
    /// let buffer = cpu_gpu_buffer::CpuGpuBuffer::<[f32; 2]>::new([4, 5], cpu_gpu_buffer::Device::Cpu)?;
    /// assert_eq!(buffer.numel(), 20); // of two numbers each
    /// assert_eq!(buffer.cpu()?.len(), buffer.numel());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn numel(&self) -> usize {
        self.storage.numel()
    }

    /// The bytes of one side.
    ///
    /// ```
    /// let buffer = cpu_gpu_buffer::CpuGpuBuffer::<f64>::new([4, 5], cpu_gpu_buffer::Device::Cpu)?;
    /// assert_eq!(buffer.nbytes(), 4 * 5 * 8); // pinned, and as many on the device
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn nbytes(&self) -> usize {
        self.storage.bytes()
    }

    /// The device of the device side.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let buffer = CpuGpuBuffer::<u8>::new(16, Device::auto())?;
    /// let stream = Stream::new(buffer.device())?; // one that the buffer takes
    /// assert_eq!(stream.device(), buffer.device());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.storage.device()
    }

    /// Returns `true` if the host side is pinned.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let buffer = CpuGpuBuffer::<u8>::new(1 << 20, Device::auto())?;
    /// if buffer.device() != Device::Cpu && !buffer.is_pinned() {
    ///     eprintln!("copies go by way of the driver's own pinned memory, and may make the caller wait");
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_pinned(&self) -> bool {
        self.storage.is_pinned()
    }

    /// The reason why the host side is pageable although
    /// [`Pinning::Preferred`](crate::Pinning::Preferred) asked for pinned memory.
    ///
    /// `None` if the host side is pinned or has no bytes, with
    /// [`Pinning::Never`](crate::Pinning::Never), and on [`Device::Cpu`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let buffer = CpuGpuBuffer::<u8>::new(1 << 20, Device::auto())?;
    /// if let Some(reason) = buffer.pinning_error() {
    ///     eprintln!("copies may make the caller wait: {reason}");
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn pinning_error(&self) -> Option<&Error> {
        self.storage.pinning_error()
    }

    /// The element type.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, DType, Device};
    ///
    /// let buffer = CpuGpuBuffer::<i64>::new(16, Device::Cpu)?;
    /// assert_eq!(buffer.dtype(), DType::I64);
    /// assert_eq!(format!("{buffer:?}"), "CpuGpuBuffer(shape=[16], dtype=i64, device=cpu, pinned=false)");
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn dtype(&self) -> DType
    where
        T: Element,
    {
        T::DTYPE
    }

    /// The bytes of a range of rows.
    #[inline]
    fn bytes_of(&self, rows: &impl Rows) -> Result<Range<usize>> {
        let all = self.storage.shape().rows();
        let rows = select(rows.bounds(), all, None)?;
        let row = self.nbytes().checked_div(all).unwrap_or(0);
        Ok(rows.start * row..rows.end * row)
    }

    /// # Safety
    ///
    /// No copy writes the host side while the slice lives.
    #[inline]
    unsafe fn host_slice(&self) -> &[T] {
        // SAFETY: the host side holds `numel` elements, aligned and initialised: it began as
        // zeroes, or its adopter vouched for them, and any bytes are valid for a `Pod` type. The
        // slice borrows `self`.
        unsafe { slice::from_raw_parts(self.storage.host_ptr().cast(), self.numel()) }
    }

    /// # Safety
    ///
    /// No copy reads or writes the host side while the slice lives.
    #[inline]
    unsafe fn host_slice_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `host_slice`, and borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.storage.host_ptr().cast(), self.numel()) }
    }
}

/// Sets every element. There may be `usize::MAX` elements of no size, which need no work.
fn set<T: Pod>(elements: &mut [T], value: T) {
    if size_of::<T>() > 0 {
        elements.fill(value);
    }
}

impl<T: Pod> fmt::Debug for CpuGpuBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = DType::of::<T>().map_or(type_name::<T>(), DType::name);
        write!(
            f,
            "CpuGpuBuffer(shape={:?}, dtype={dtype}, device={}, pinned={})",
            self.storage.shape(),
            self.device(),
            self.is_pinned()
        )
    }
}
