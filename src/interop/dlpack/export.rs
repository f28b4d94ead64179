//! The methods of a buffer that export its sides.

use super::abi::{DLDevice, DLDeviceType};
use super::tensor::Tensor;
use crate::buffer::buffer::CpuGpuBuffer;
use crate::device::Device;
use crate::element::{DType, Element};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::shape::Shape;
use crate::stream::stream::Stream;

/// The element type that the consumer reads. The consumer trusts its size, and [`Element`] is a
/// safe trait, so the size is checked here.
const fn dtype<T: Element>() -> DType {
    const {
        assert!(size_of::<T>() == T::DTYPE.size_of(), "the element is not of the size of its DType")
    };
    T::DTYPE
}

impl<T: Element> CpuGpuBuffer<T> {
    /// Exports the device side as a tensor, for a consumer that uses it first on `stream`.
    ///
    /// The stream waits for all pending work of this buffer, as for [`gpu_on`](Self::gpu_on). The
    /// buffer [guards](crate::dlpack#what-is-guarded) the side while the tensor lives. The stream
    /// may be destroyed once this has returned, even with an error. On error the buffer is
    /// unchanged.
    ///
    /// If earlier tensors of the side are gone and their consumers were not waited for, this waits
    /// for the devices. On [`Device::Cpu`] the tensor is one of host memory. Needs the feature
    /// `dlpack`.
    ///
    /// # Errors
    ///
    /// - As for [`gpu_on`](Self::gpu_on).
    /// - [`Error::InvalidShape`] for a dimension beyond `i64`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let (ours, theirs) = (Stream::new(Device::auto())?, Stream::new(Device::auto())?);
    /// let mut batch = CpuGpuBuffer::<f32>::new([32, 64], ours.device())?;
    /// batch.cpu_mut()?.fill(0.5);
    /// batch.copy_to_gpu(.., &ours)?;
    /// let tensor = batch.export_gpu(&theirs)?; // `theirs` waits for the copy
    /// batch.cpu_mut()?.fill(0.75); // while a consumer uses the device side
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn export_gpu(&mut self, stream: &Stream) -> Result<Tensor> {
        let (shape, device) = (Shape::from(self.shape()), self.dl_device());
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_gpu(stream))
    }

    /// Exports the device side as a tensor that is ordered with nothing.
    ///
    /// This is for a consumer that asks its producer for no synchronization: `stream=-1` of the
    /// array API's `__dlpack__`. It calls no CUDA and waits for nothing. The buffer
    /// [guards](crate::dlpack#what-is-guarded) the side while the tensor lives. Needs the feature
    /// `dlpack`.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`], and [`Error::InvalidShape`] as for [`export_gpu`](Self::export_gpu).
    ///
    /// # Safety
    ///
    /// - The device side was used before. Its first use zeroes it, and may come late.
    /// - The consumer's first use comes after all pending work of this buffer: in stream order, or
    ///   because the host waited.
    /// - It comes after the work of earlier consumers in the same way.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut batch = CpuGpuBuffer::<f32>::new([32, 64], stream.device())?;
    /// batch.copy_to_gpu(.., &stream)?;
    /// stream.synchronize()?;
    /// // SAFETY: the host has waited for the copy, and there was no earlier consumer.
    /// let tensor = unsafe { batch.export_gpu_unordered() }?;
    /// assert_eq!(batch.fill_gpu(1.0, &stream), Err(Error::Exported { side: Side::Device }));
    /// # Ok::<(), Error>(())
    /// ```
    pub unsafe fn export_gpu_unordered(&mut self) -> Result<Tensor> {
        let (shape, device) = (Shape::from(self.shape()), self.dl_device());
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_gpu_unordered())
    }

    /// Exports the device side as a tensor that the buffer does not guard.
    ///
    /// The memory lives as long as the tensor, and nothing else is promised. One tensor serves all
    /// steps of a loop if the consumer's stream is known. It is ordered with nothing: call
    /// [`gpu_on`](Self::gpu_on) before each use, as for your own kernels. Needs the feature
    /// `dlpack`.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`], and [`Error::InvalidShape`] as for [`export_gpu`](Self::export_gpu).
    ///
    /// # Safety
    ///
    /// The consumer uses the memory as the addresses of a [`GpuView`](crate::GpuView) are used:
    ///
    /// - **Stream:** each use is work that is sent to a stream after `gpu_on` was called with that
    ///   stream. It is sent before this buffer is used in any other way, returned to its pool or
    ///   dropped.
    /// - **Device:** the stream is one of the buffer's device. On [`Device::Cpu`] the memory is
    ///   host memory, and the consumer uses it between `gpu_on` and the next use of the buffer.
    /// - **Until when:** after a [`resize`](Self::resize) the consumer does not use the memory.
    /// - **Initialised:** before the first `gpu_on` the consumer does not rely on the contents.
    ///   That call zeroes the memory.
    /// - **Aliasing:** while the consumer's work may run, no other work writes the memory, and none
    ///   reads bytes that the consumer writes.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ids = CpuGpuBuffer::<i64>::new(64, stream.device())?;
    /// // SAFETY: all work that uses the tensor is sent to `stream` after `gpu_on`, in the loop.
    /// let tensor = unsafe { ids.export_gpu_unguarded() }?;
    /// for step in 0..10 {
    ///     ids.cpu_mut()?.fill(step);
    ///     ids.copy_to_gpu(.., &stream)?;
    ///     ids.gpu_on(&stream)?;
    ///     // Here the consumer sends work that uses the tensor to `stream`.
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub unsafe fn export_gpu_unguarded(&mut self) -> Result<Tensor> {
        let (shape, device) = (Shape::from(self.shape()), self.dl_device());
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_gpu_unguarded())
    }

    /// Exports the host side as a tensor, of pinned memory if it [is pinned](Self::is_pinned).
    ///
    /// Waits for pending copies of the host side, as [`cpu_mut`](Self::cpu_mut) does. The buffer
    /// [guards](crate::dlpack#what-is-guarded) the side while the tensor lives. Needs the feature
    /// `dlpack`.
    ///
    /// # Errors
    ///
    /// - As for [`cpu_mut`](Self::cpu_mut).
    /// - [`Error::InvalidShape`] for a dimension beyond `i64`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side};
    ///
    /// let mut buffer = CpuGpuBuffer::<f32>::new([2, 3], Device::Cpu)?;
    /// let tensor = buffer.export_cpu()?;
    /// assert_eq!(buffer.cpu(), Err(Error::Exported { side: Side::Host }));
    /// drop(tensor); // or a consumer takes it, and calls its deleter later
    /// assert_eq!(buffer.cpu()?, [0.0; 6]);
    /// # Ok::<(), Error>(())
    /// ```
    pub fn export_cpu(&mut self) -> Result<Tensor> {
        let device_type = match self.is_pinned() {
            true => DLDeviceType::kDLCUDAHost,
            false => DLDeviceType::kDLCPU,
        };
        let (shape, device) = (Shape::from(self.shape()), DLDevice { device_type, device_id: 0 });
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_cpu())
    }

    fn dl_device(&self) -> DLDevice {
        match self.device() {
            Device::Cpu => DLDevice { device_type: DLDeviceType::kDLCPU, device_id: 0 },
            Device::Cuda(ordinal) => {
                DLDevice { device_type: DLDeviceType::kDLCUDA, device_id: ordinal as i32 }
            }
        }
    }
}
