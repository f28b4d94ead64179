//! The device side as kernels and libraries see it.

use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeBounds;
use std::slice;

use crate::device::Device;
use crate::error::Result;
use crate::shape::{Shape, select};

/// The device side of a buffer, for work on the stream that
/// [`gpu_on`](crate::CpuGpuBuffer::gpu_on) was called with.
///
/// Send work that uses the addresses to that stream, while the view lives. The buffer orders its
/// later operations after everything that the stream was given by then. Nothing happens when a view
/// is dropped.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
///
/// let stream = Stream::new(Device::Cpu)?;
/// let mut buffer = CpuGpuBuffer::<u16>::new([4, 2], Device::Cpu)?;
/// buffer.fill_gpu(7, &stream)?;
/// let view = buffer.gpu_on(&stream)?.rows(1..3)?;
/// assert_eq!(view.shape(), [2, 2]);
/// // On the CPU, device memory can be looked at.
/// assert_eq!(view.as_host_slice(), Some(&[7; 4][..]));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct GpuView<'a, T> {
    address: *mut T,
    shape: Shape,
    len: usize,
    device: Device,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: a view can be copied, and its elements can be read on the CPU, as those of a `&[T]` can.
unsafe impl<T: Sync> Send for GpuView<'_, T> {}
// SAFETY: as for `Send`.
unsafe impl<T: Sync> Sync for GpuView<'_, T> {}

impl<'a, T> GpuView<'a, T> {
    /// A view of `len` elements at `address`, in the device side of the buffer that is borrowed for
    /// `'a`.
    pub(crate) fn new(address: *mut T, shape: Shape, len: usize, device: Device) -> Self {
        GpuView { address, shape, len, device, buffer: PhantomData }
    }

    /// The device address of the first element. Without bytes it may be null, and it is not valid
    /// for reads or writes.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut inputs = CpuGpuBuffer::<f32>::new(64, Device::Cpu)?;
    /// let mut copy = CpuGpuBuffer::<f32>::new(64, Device::Cpu)?;
    /// inputs.fill_gpu(2.0, &stream)?;
    /// let view = inputs.gpu_on(&stream)?;
    /// // SAFETY: 64 numbers lie at the address, and the copy goes to the stream that the view is for.
    /// unsafe { copy.copy_from_device_ptr(.., view.as_ptr(), &stream) }?;
    /// assert_eq!(copy.cpu()?, [2.0; 64]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_ptr(&self) -> *const T {
        self.address
    }

    /// The device address of the first element, to write to.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut outputs = CpuGpuBuffer::<f32>::new(64, stream.device())?;
    /// let view = outputs.gpu_on(&stream)?;
    /// // `cuLaunchKernel` takes the addresses of the arguments.
    /// let (mut address, mut count) = (view.as_mut_ptr(), view.len() as u32);
    /// let arguments = [(&raw mut address).cast::<std::ffi::c_void>(), (&raw mut count).cast()];
    /// assert!(!address.is_null() && arguments.len() == 2);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_mut_ptr(&self) -> *mut T {
        self.address
    }

    /// The number of elements.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new([100, 3], stream.device())?;
    /// let view = buffer.gpu_on(&stream)?;
    /// let blocks = view.len().div_ceil(256); // of a kernel with a thread for each element
    /// assert_eq!((view.len(), blocks), (300, 2));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `true` if there are no elements.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new([8, 3], stream.device())?;
    /// let view = buffer.gpu_on(&stream)?.rows(..0)?;
    /// assert!(view.is_empty()); // CUDA refuses a launch of no blocks
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The dimensions, outermost first.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new([8, 3, 5], stream.device())?;
    /// let view = buffer.gpu_on(&stream)?.rows(2..4)?;
    /// assert_eq!(view.shape(), [2, 3, 5]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The device that has the memory.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, GpuView, Stream};
    ///
    /// /// The device number of array libraries.
    /// fn device_index(view: &GpuView<'_, f32>) -> i64 {
    ///     match view.device() {
    ///         Device::Cpu => -1,
    ///         Device::Cuda(ordinal) => ordinal.into(),
    ///     }
    /// }
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut buffer = CpuGpuBuffer::new(10, Device::Cpu)?;
    /// assert_eq!(device_index(&buffer.gpu_on(&stream)?), -1);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.device
    }

    /// A view of some of the rows.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`](crate::Error::OutOfRange).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new([8, 3], stream.device())?;
    /// let view = buffer.gpu_on(&stream)?;
    /// let second = view.rows(1..2)?; // the view itself can still be used
    /// assert_eq!(second.as_ptr(), view.as_ptr().wrapping_add(3));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn rows(self, range: impl RangeBounds<usize>) -> Result<GpuView<'a, T>> {
        let rows = select(&range, self.shape.rows(), None)?;
        let row = self.len.checked_div(self.shape.rows()).unwrap_or(0);
        Ok(GpuView {
            address: self.address.wrapping_add(rows.start * row),
            shape: self.shape.with_rows(rows.len()),
            len: rows.len() * row,
            ..self
        })
    }

    /// The elements on [`Device::Cpu`], or `None` if they are in the memory of a GPU.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<u32>::new(4, stream.device())?;
    /// buffer.fill_gpu(3, &stream)?;
    /// match buffer.gpu_on(&stream)?.as_host_slice() {
    ///     Some(elements) => assert_eq!(elements, [3; 4]), // a stand-in for the kernel can work on them
    ///     None => println!("in the memory of {}", stream.device()),
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_host_slice(&self) -> Option<&'a [T]> {
        if self.device != Device::Cpu {
            return None;
        }
        if self.address.is_null() {
            // No bytes: no elements, or elements of no size.
            // SAFETY: a slice of no bytes may begin at any aligned address but null.
            return Some(unsafe { slice::from_raw_parts(std::ptr::dangling(), self.len) });
        }
        // SAFETY: these are `len` initialised elements of the device side, which on the CPU is
        // ordinary memory. The buffer is borrowed for `'a`, and writing through `as_mut_ptr` is
        // `unsafe`.
        Some(unsafe { slice::from_raw_parts(self.address, self.len) })
    }
}

impl<T> fmt::Debug for GpuView<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GpuView { address, shape, device, .. } = self;
        write!(f, "GpuView(shape={shape:?}, device={device}, address={address:p})")
    }
}
