//! Host sides as arrays of the `ndarray` crate. They are the slices that the accessors return, with
//! the buffer's shape.

use ndarray::{ArrayViewD, ArrayViewMutD, IxDyn, ShapeError};

use bytemuck::Pod;

use crate::buffer::buffer::CpuGpuBuffer;
use crate::error::{Error, Result};
use crate::group::group::BufferGroup;
use crate::group::layout::MemberKey;
use crate::group::ring::GroupRing;
use crate::shape::Shape;

impl<T: Pod> CpuGpuBuffer<T> {
    /// Returns the host side as an array of the buffer's shape. Waits as [`cpu`](Self::cpu) does.
    /// Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// - As for [`cpu`](Self::cpu).
    /// - [`Error::InvalidShape`] for a shape that `ndarray` refuses: it has no elements, and its
    ///   other dimensions overflow `isize`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    /// use ndarray::Axis;
    ///
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut scores = CpuGpuBuffer::<f32>::new([2, 3], Device::Cpu)?;
    /// scores.cpu_array_mut()?.index_axis_mut(Axis(0), 1).fill(0.5);
    /// scores.copy_to_gpu(.., &stream)?;
    /// scores.copy_to_cpu(.., &stream)?;
    /// let array = scores.cpu_array()?; // waits for the copy into it
    /// assert_eq!((array.shape(), array[[1, 2]], array.sum()), (&[2, 3][..], 0.5, 1.5));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array(&self) -> Result<ArrayViewD<'_, T>> {
        shared(self.cpu()?, self.shape())
    }

    /// Returns the host side as a mutable array of the buffer's shape. Waits as
    /// [`cpu_mut`](Self::cpu_mut) does. Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// As for [`cpu_array`](Self::cpu_array).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut table = CpuGpuBuffer::<i32>::new([3, 4], Device::Cpu)?;
    /// table.cpu_array_mut()?[[1, 2]] = 7;
    /// assert_eq!(table.cpu()?[4 + 2], 7);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array_mut(&mut self) -> Result<ArrayViewMutD<'_, T>> {
        let shape = Shape::from(self.shape());
        exclusive(self.cpu_mut()?, shape.dims())
    }
}

impl BufferGroup {
    /// Returns a member's host side as an array of its shape. Waits as [`cpu`](Self::cpu) does.
    /// Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu) and [`CpuGpuBuffer::cpu_array`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// assert_eq!(group.cpu_array(table)?.shape(), [256, 128]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array<T: Pod>(&self, key: MemberKey<T>) -> Result<ArrayViewD<'_, T>> {
        shared(self.cpu(key)?, self.shape(key)?)
    }

    /// Returns a member's host side as a mutable array of its shape. Waits as
    /// [`cpu_mut`](Self::cpu_mut) does. Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// As for [`cpu_array`](Self::cpu_array).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// group.cpu_array_mut(table)?[[3, 0]] = 7;
    /// assert_eq!(group.cpu(table)?[3 * 128], 7);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<ArrayViewMutD<'_, T>> {
        let shape = Shape::from(self.shape(key)?);
        exclusive(self.cpu_mut(key)?, shape.dims())
    }
}

impl GroupRing {
    /// Returns a member's host side as an array of its shape. Waits as [`cpu`](Self::cpu) does.
    /// Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// As for [`cpu`](Self::cpu) and [`CpuGpuBuffer::cpu_array`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// assert_eq!(ring.cpu_array(table)?.shape(), [256, 128]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array<T: Pod>(&self, key: MemberKey<T>) -> Result<ArrayViewD<'_, T>> {
        shared(self.cpu(key)?, self.layout().find(key)?.1.shape.dims())
    }

    /// Returns a member's host side as a mutable array of its shape. Waits as
    /// [`cpu_mut`](Self::cpu_mut) does. Needs the feature `ndarray`.
    ///
    /// # Errors
    ///
    /// As for [`cpu_array`](Self::cpu_array).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let table = builder.add::<i32>([256, 128]);
    /// let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    /// ring.advance()?;
    /// ring.cpu_array_mut(table)?[[3, 0]] = 7;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn cpu_array_mut<T: Pod>(&mut self, key: MemberKey<T>) -> Result<ArrayViewMutD<'_, T>> {
        let shape = self.layout().find(key)?.1.shape;
        exclusive(self.cpu_mut(key)?, shape.dims())
    }
}

fn shared<'a, T>(elements: &'a [T], dims: &[usize]) -> Result<ArrayViewD<'a, T>> {
    ArrayViewD::from_shape(IxDyn(dims), elements).map_err(|error| refused(dims, error))
}

fn exclusive<'a, T>(elements: &'a mut [T], dims: &[usize]) -> Result<ArrayViewMutD<'a, T>> {
    ArrayViewMutD::from_shape(IxDyn(dims), elements).map_err(|error| refused(dims, error))
}

fn refused(dims: &[usize], error: ShapeError) -> Error {
    Error::InvalidShape { reason: format!("ndarray refuses {dims:?}: {error}") }
}
