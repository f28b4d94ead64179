//! A side as kernels and libraries see it.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::slice;

use crate::device::Device;
use crate::error::Result;
use crate::shape::{Rows, Shape, select};

/// The device side of a buffer, for work on the stream that
/// [`gpu_on`](crate::CpuGpuBuffer::gpu_on) was called with.
///
/// Send work that uses the addresses to that stream, while the view lives. The buffer orders its
/// later operations after everything that the stream was given by then. Nothing happens when a view
/// is dropped. A view is the only one of its memory, so it is neither `Copy` nor `Clone`.
///
/// [`cpu_on`](crate::CpuGpuBuffer::cpu_on) gives a view of the host side under its device address.
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
pub struct GpuView<'a, T> {
    address: *mut T,
    shape: Shape,
    len: usize,
    device: Device,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: on the CPU, a view gives its elements as a `&mut [T]` does.
unsafe impl<T: Send> Send for GpuView<'_, T> {}
// SAFETY: on the CPU, a shared view gives its elements as a `&[T]` does.
unsafe impl<T: Sync> Sync for GpuView<'_, T> {}

impl<'a, T> GpuView<'a, T> {
    /// A view of `len` elements at `address`, in a side of the buffer that is borrowed for `'a`. No
    /// other view of these elements lives.
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

    /// Narrows the view to some of its rows.
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
    /// let second = buffer.gpu_on(&stream)?.rows(1..2)?.as_ptr();
    /// assert_eq!(second, buffer.device_ptr().wrapping_add(3));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn rows(self, range: impl Rows) -> Result<GpuView<'a, T>> {
        let rows = select(range.bounds(), self.shape.rows(), None)?;
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
    pub fn as_host_slice(&self) -> Option<&[T]> {
        let address = self.host_address()?;
        // SAFETY: these are `len` initialised elements, which on the CPU lie in ordinary memory.
        // The buffer is borrowed for longer, and this is the only view of them. Writing through
        // `as_mut_ptr` is `unsafe`.
        Some(unsafe { slice::from_raw_parts(address, self.len) })
    }

    /// The elements on [`Device::Cpu`], to write, or `None` if they are in the memory of a GPU.
    ///
    /// A stand-in for a kernel needs no `unsafe` so.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, GpuView, Stream};
    ///
    /// fn double(mut view: GpuView<'_, f32>, stream: &Stream) {
    ///     match view.as_host_slice_mut() {
    ///         Some(elements) => elements.iter_mut().for_each(|element| *element *= 2.0),
    ///         None => { /* launch the kernel on `stream.as_raw()` */ }
    ///     }
    /// }
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut values = CpuGpuBuffer::<f32>::new(4, Device::Cpu)?;
    /// values.fill_gpu(1.5, &stream)?;
    /// double(values.gpu_on(&stream)?, &stream);
    /// values.copy_to_cpu(.., &stream)?;
    /// assert_eq!(values.cpu()?, [3.0; 4]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_host_slice_mut(&mut self) -> Option<&mut [T]> {
        let address = self.host_address()?;
        // SAFETY: as in `as_host_slice`, and the view is borrowed exclusively.
        Some(unsafe { slice::from_raw_parts_mut(address, self.len) })
    }

    /// The elements on [`Device::Cpu`], to write, for as long as the buffer is borrowed. `None` if
    /// they are in the memory of a GPU.
    ///
    /// It needs no variable for the view: `view.member(key)?.into_host_slice()`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Result, Stream};
    ///
    /// /// The device side, for tests on the CPU.
    /// fn device_side<'b>(buffer: &'b mut CpuGpuBuffer<u8>, stream: &Stream) -> Result<&'b mut [u8]> {
    ///     Ok(buffer.gpu_on(stream)?.into_host_slice().expect("the CPU"))
    /// }
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut buffer = CpuGpuBuffer::new(3, Device::Cpu)?;
    /// device_side(&mut buffer, &stream)?.fill(7);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn into_host_slice(self) -> Option<&'a mut [T]> {
        let address = self.host_address()?;
        // SAFETY: as in `as_host_slice`. The only view of the elements ends here.
        Some(unsafe { slice::from_raw_parts_mut(address, self.len) })
    }

    /// The address of the elements on the CPU. It is aligned and not null.
    fn host_address(&self) -> Option<*mut T> {
        match self.device {
            // No bytes: no elements, or elements of no size.
            Device::Cpu if self.address.is_null() => Some(ptr::dangling_mut()),
            Device::Cpu => Some(self.address),
            Device::Cuda(_) => None,
        }
    }
}

impl<T> fmt::Debug for GpuView<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GpuView { address, shape, device, .. } = self;
        write!(f, "GpuView(shape={shape:?}, device={device}, address={address:p})")
    }
}
