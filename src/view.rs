//! The device half as kernels and libraries see it.

use std::marker::PhantomData;
use std::ops::RangeBounds;
use std::slice;

use crate::device::Device;
use crate::error::Result;
use crate::shape::{Shape, select};

/// The device half of a buffer, for work on the stream that
/// [`gpu_on`](crate::CpuGpuBuffer::gpu_on) was called with.
///
/// Work that uses the addresses must be sent to that stream, and while the view lives: the buffer orders
/// what it does later after everything that the stream was sent by then. There is nothing to drop and
/// nothing to forget.
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
#[derive(Clone, Copy, Debug)]
pub struct GpuView<'a, T> {
    address: *mut T,
    shape: Shape,
    len: usize,
    device: Device,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: a view can be copied, and on the CPU its elements can be read: it is sent as a `&[T]` is.
unsafe impl<T: Sync> Send for GpuView<'_, T> {}
// SAFETY: as for `Send`.
unsafe impl<T: Sync> Sync for GpuView<'_, T> {}

impl<'a, T> GpuView<'a, T> {
    /// `address` is that of `len` elements of the device half, which the buffer borrowed for `'a` owns.
    pub(crate) fn new(address: *mut T, shape: Shape, len: usize, device: Device) -> Self {
        GpuView { address, shape, len, device, buffer: PhantomData }
    }

    /// The first element's device address; null where there are no bytes.
    pub fn as_ptr(&self) -> *const T {
        self.address
    }

    /// The first element's device address, to write to.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.address
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The device whose memory it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The same memory, of these rows only.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`](crate::Error::OutOfRange).
    pub fn rows(self, range: impl RangeBounds<usize>) -> Result<GpuView<'a, T>> {
        let rows = select(&range, self.shape.rows())?;
        let row = self.len.checked_div(self.shape.rows()).unwrap_or(0);
        Ok(GpuView {
            address: self.address.wrapping_add(rows.start * row),
            shape: self.shape.with_rows(rows.len()),
            len: rows.len() * row,
            ..self
        })
    }

    /// The elements, on [`Device::Cpu`]; `None` where they are in a GPU's memory.
    pub fn as_host_slice(&self) -> Option<&'a [T]> {
        if self.device != Device::Cpu {
            return None;
        }
        if self.address.is_null() {
            // No bytes: no elements, or elements of no size.
            // SAFETY: a slice of no bytes may begin at any aligned address but null.
            return Some(unsafe { slice::from_raw_parts(std::ptr::dangling(), self.len) });
        }
        // SAFETY: `len` initialised elements of the device half, which on the CPU is ordinary memory; the
        // buffer is borrowed for `'a`, and writing through `as_mut_ptr` is `unsafe`.
        Some(unsafe { slice::from_raw_parts(self.address, self.len) })
    }
}
