//! Rows of the host side, and copies of rows between two buffers.

use std::ops::Range;

use bytemuck::Pod;

use crate::buffer::buffer::CpuGpuBuffer;
use crate::error::{Error, Result};
use crate::shape::{Rows, select};
use crate::stream::stream::Stream;

impl<T: Pod> CpuGpuBuffer<T> {
    /// Rows of the host side, one after another, to read. Waits as [`cpu`](Self::cpu) does.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], or as for [`cpu`](Self::cpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut logits = CpuGpuBuffer::<f32>::new([4, 3], Device::Cpu)?;
    /// logits.fill_gpu(0.5, &stream)?;
    /// logits.copy_to_cpu(2.., &stream)?;
    /// for row in logits.cpu_rows(2..)?.chunks(3) {
    ///     assert_eq!(row, [0.5; 3]);
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_rows(&self, rows: impl Rows) -> Result<&[T]> {
        let range = self.elements_of(&rows)?;
        Ok(&self.cpu()?[range])
    }

    /// Rows of the host side, one after another, to write. Waits as [`cpu_mut`](Self::cpu_mut)
    /// does: for copies of any row.
    ///
    /// # Errors
    ///
    /// As for [`cpu_rows`](Self::cpu_rows).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut positions = CpuGpuBuffer::<i64>::new([32, 2], Device::Cpu)?;
    /// positions.cpu_rows_mut(5..6)?.copy_from_slice(&[7, 8]);
    /// assert_eq!(positions.cpu()?[10..12], [7, 8]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_rows_mut(&mut self, rows: impl Rows) -> Result<&mut [T]> {
        let range = self.elements_of(&rows)?;
        Ok(&mut self.cpu_mut()?[range])
    }

    /// Writes rows of the host side, and copies them to the device side on `stream`.
    ///
    /// It waits for pending copies of any row, as [`cpu_mut`](Self::cpu_mut) does. The copy is
    /// enqueued as by [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidShape`] if `values` are not as many elements as the rows have. Nothing has
    ///   changed.
    /// - Otherwise as for [`copy_to_gpu`](Self::copy_to_gpu).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut table = CpuGpuBuffer::<i32>::new([256, 4], stream.device())?;
    /// table.write_rows(17..18, &[1, 2, 3, 4], &stream)?;
    /// assert_eq!(table.cpu_rows(17..18)?, [1, 2, 3, 4]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn write_rows(&mut self, rows: impl Rows, values: &[T], stream: &Stream) -> Result<()> {
        let range = self.elements_of(&rows)?;
        if values.len() != range.len() {
            return Err(Error::InvalidShape {
                reason: format!("{} values for rows of {} elements", values.len(), range.len()),
            });
        }
        self.storage.write(range.start * size_of::<T>(), bytemuck::cast_slice(values), stream)
    }

    // ---- copies between two buffers ----

    /// Copies rows of the host side of `from` to the rows of this device side that begin at `at`.
    ///
    /// `stream` is of this buffer's device. `from` may belong to another CUDA device, so one
    /// staging buffer serves several GPUs. Rows of `from` that were never written arrive as zeroes.
    ///
    /// The copy comes after all pending work of this buffer, and after pending work that writes the
    /// host side of `from`. Both buffers track it: [`cpu_mut`](Self::cpu_mut) of `from` waits for
    /// it, and so does later work of this buffer. Uploads from one host side on several streams run
    /// side by side.
    ///
    /// # Errors
    ///
    /// On these errors neither buffer has changed:
    ///
    /// - [`Error::OutOfRange`]: the rows end beyond `from`, or beyond this buffer.
    /// - [`Error::InvalidShape`]: the rows of the two differ in length.
    /// - [`Error::DeviceMismatch`]: the stream is of another device, or one of the buffers is on
    ///   the CPU and the other is not.
    /// - [`Error::StreamCapturing`].
    ///
    /// After an error of the driver the copy counts as in flight until the driver says otherwise.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut staging = CpuGpuBuffer::<f32>::new([2, 3], Device::Cpu)?;
    /// let mut weights = CpuGpuBuffer::<f32>::new([100, 3], Device::Cpu)?;
    /// staging.cpu_mut()?.fill(0.5);
    /// weights.copy_to_gpu_from(40, &mut staging, .., &stream)?; // to the rows 40 and 41
    /// weights.copy_to_cpu(40..42, &stream)?;
    /// assert_eq!(weights.cpu_rows(40..42)?, [0.5; 6]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "H2D")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_gpu_from(
        &mut self,
        at: usize,
        from: &mut CpuGpuBuffer<T>,
        rows: impl Rows,
        stream: &Stream,
    ) -> Result<()> {
        let (at, range) = self.bytes_between(at, from, &rows)?;
        // SAFETY: the range and the bytes at `at` lie in the buffers.
        unsafe { self.storage.copy_to_gpu_from(at, &mut from.storage, range, stream) }
    }

    /// Copies rows of the device side of `from` to the rows of this host side that begin at `at`.
    ///
    /// `stream` is of the device of `from`. This buffer may belong to another CUDA device. Rows of
    /// `from` that were never written arrive as zeroes.
    ///
    /// The copy comes after all pending work of both buffers. Both track it: [`cpu`](Self::cpu) of
    /// this buffer waits for it, and so does later work of `from`.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu_from`](Self::copy_to_gpu_from).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut logits = CpuGpuBuffer::<f32>::new([8, 2], Device::Cpu)?;
    /// let mut received = CpuGpuBuffer::<f32>::new([2, 2], Device::Cpu)?;
    /// logits.fill_gpu(1.5, &stream)?;
    /// received.copy_to_cpu_from(1, &mut logits, 7.., &stream)?; // the last row
    /// assert_eq!(received.cpu()?, [0.0, 0.0, 1.5, 1.5]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "D2H")]
    #[doc(alias = "memcpy")]
    pub fn copy_to_cpu_from(
        &mut self,
        at: usize,
        from: &mut CpuGpuBuffer<T>,
        rows: impl Rows,
        stream: &Stream,
    ) -> Result<()> {
        let (at, range) = self.bytes_between(at, from, &rows)?;
        // SAFETY: the range and the bytes at `at` lie in the buffers.
        unsafe { self.storage.copy_to_cpu_from(at, &mut from.storage, range, stream) }
    }

    /// Copies rows of the device side of `from` to the rows of this device side that begin at `at`.
    ///
    /// `stream` is of this buffer's device. `from` may belong to another CUDA device. The first
    /// copy between two devices switches peer access on, if the hardware has it. Otherwise the
    /// driver stages the copy in host memory. Rows of `from` that were never written arrive as
    /// zeroes.
    ///
    /// The copy comes after all pending work of both buffers, and their later work comes after it.
    ///
    /// # Errors
    ///
    /// As for [`copy_to_gpu_from`](Self::copy_to_gpu_from).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut old = CpuGpuBuffer::<u32>::new(10, stream.device())?;
    /// let mut larger = CpuGpuBuffer::<u32>::new(20, stream.device())?;
    /// old.fill_gpu(9, &stream)?;
    /// larger.copy_gpu_from(5, &mut old, .., &stream)?;
    /// larger.copy_to_cpu(.., &stream)?;
    /// assert_eq!(larger.cpu()?[4..16], [[0].as_slice(), &[9; 10], &[0]].concat());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "D2D")]
    #[doc(alias = "peer")]
    #[doc(alias = "memcpy")]
    pub fn copy_gpu_from(
        &mut self,
        at: usize,
        from: &mut CpuGpuBuffer<T>,
        rows: impl Rows,
        stream: &Stream,
    ) -> Result<()> {
        let (at, range) = self.bytes_between(at, from, &rows)?;
        // SAFETY: the range and the bytes at `at` lie in the buffers.
        unsafe { self.storage.copy_gpu_from(at, &mut from.storage, range, stream) }
    }

    /// The elements of a range of rows.
    fn elements_of(&self, rows: &impl Rows) -> Result<Range<usize>> {
        let shape = self.storage.shape();
        let rows = select(rows.bounds(), shape.rows(), None)?;
        // No overflow: these are elements of the shape, if it has rows.
        let row = shape.row_len();
        Ok(rows.start * row..rows.end * row)
    }

    /// The first byte of row `at` of this buffer, and the bytes of rows of `from`.
    fn bytes_between(
        &self,
        at: usize,
        from: &CpuGpuBuffer<T>,
        rows: &impl Rows,
    ) -> Result<(usize, Range<usize>)> {
        let (shape, from_shape) = (self.storage.shape(), from.storage.shape());
        let row = shape.row_len();
        if row != from_shape.row_len() {
            return Err(Error::InvalidShape {
                reason: format!("rows of {row} elements, and of {}", from_shape.row_len()),
            });
        }
        let rows = select(rows.bounds(), from_shape.rows(), None)?;
        let beyond =
            Error::OutOfRange { start: at, end: usize::MAX, rows: shape.rows(), member: None };
        let end = at.checked_add(rows.len()).ok_or(beyond)?;
        select((at..end).bounds(), shape.rows(), None)?;
        // Only a shape without rows has rows of so many bytes, and its ranges are empty.
        let bytes = row.saturating_mul(size_of::<T>());
        Ok((at * bytes, rows.start * bytes..rows.end * bytes))
    }
}
