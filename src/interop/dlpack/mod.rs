//! Sides of a buffer as DLPack tensors, which PyTorch, JAX, CuPy, NumPy and others use without a
//! copy.
//!
//! [`export_gpu`](CpuGpuBuffer::export_gpu) and [`export_cpu`](CpuGpuBuffer::export_cpu) return a
//! [`Tensor`]. It converts to one of DLPack's two structs: [`DLManagedTensorVersioned`], or
//! [`DLManagedTensor`] for consumers from before DLPack 1.0. Needs the feature `dlpack`.
//!
//! ```
//! use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side, Stream};
//!
//! let device = Device::auto();
//! let stream = Stream::new(device)?;
//! let mut batch = CpuGpuBuffer::<f32>::new([32, 64], device)?;
//! for step in 0..3 {
//!     batch.cpu_mut()?.fill(step as f32);
//!     batch.copy_to_gpu(.., &stream)?;
//!     let tensor = batch.export_gpu(&stream)?; // the consumer's stream waits for the copy
//!     let raw = tensor.into_raw(); // a consumer takes this
//!
//!     // While it lives, the host side can be used and the device side cannot.
//!     batch.cpu_mut()?.fill(0.5);
//!     assert_eq!(batch.copy_to_gpu(.., &stream), Err(Error::Exported { side: Side::Device }));
//!
//!     // SAFETY: the consumer calls the deleter once, and does not use the tensor again.
//!     unsafe { (*raw).deleter.expect("ours have one")(raw) };
//! }
//! batch.copy_to_gpu(.., &stream)?; // waits for all work that the last consumer queued
//! # Ok::<(), Error>(())
//! ```
//!
//! # What is guarded
//!
//! A consumer reads and writes its side on streams that the buffer does not know. Its work may run
//! after the tensor is gone.
//!
//! **While a tensor of a side lives,** operations that access, move or resize that side return
//! [`Error::Exported`](crate::Error::Exported). For the host side these are the accessors. For the
//! device side they are `gpu_on` and `fill_gpu`. Copies between the sides use both. Shapes,
//! addresses and the other side stay usable. A side can be exported again. Its tensors are not
//! ordered with each other.
//!
//! **When the last tensor is gone,** the next operation on the side waits once for all work of
//! **every device** on which this process has a primary context. `try_cpu` and `try_cpu_mut` never
//! wait. They return `None`, and `is_idle` returns `false`, until another operation has waited, for
//! example [`synchronize`](CpuGpuBuffer::synchronize). On [`Device::Cpu`](crate::Device::Cpu)
//! nothing waits.
//!
//! **Drops** may happen in any order and on any thread. The memory, or the place in the pool, is
//! kept until buffer and tensors are gone. Dropping a tensor calls no CUDA. So it may happen in a
//! CUDA callback, during a capture, in a forked child, or at the end of the process. Dropping a
//! buffer waits for nothing if its consumers were not waited for.
//!
//! Both then leave the memory *behind*. It is given back by:
//!
//! - [`reclaim`],
//! - the next allocation for a CUDA device,
//! - [`acquire`](crate::BufferPool::acquire) of an exhausted pool, if the pool has buffers among
//!   it, or if memory to grow is short.
//!
//! To give it back at once, call [`synchronize`](CpuGpuBuffer::synchronize) after the tensors are
//! gone and before the buffer is dropped.
//!
//! **A forked child** must not use a tensor of a CUDA buffer. Pinned host memory reads as zeroes
//! there, even through a NumPy view, and the child's stores reach nobody. `SECURITY.md` has the
//! exceptions. Pageable memory is the child's own copy.
//!
//! **Captures:** waiting for a device ends every capture of a stream there, even those of other
//! libraries. CUDA has no other way to wait ("CUDA C++ Programming Guide, Prohibited and Unhandled
//! Operations"). The operation then returns
//! [`Error::StreamCapturing`](crate::Error::StreamCapturing), or goes on without the memory that
//! was left behind. During a capture, drop buffers and tensors freely. But do not reuse a buffer
//! after its tensors are gone, and do not allocate.
//!
//! **Not waited for:**
//!
//! - Work of a GPU on the memory of a buffer on `Device::Cpu`.
//! - Work in contexts other than the primary ones.
//! - Consumers that touch the memory after their tensor's end, other than by work that was queued
//!   before it.
//!
//! Buffers that were never exported pay for none of this.
//!
//! A loop that exports at each step waits for the devices at each step. If the consumer's stream is
//! known, [`export_gpu_unguarded`](CpuGpuBuffer::export_gpu_unguarded) gives one tensor for all
//! steps.

mod abi;
mod export;
mod tensor;

#[cfg(doc)]
use crate::buffer::buffer::CpuGpuBuffer;
use crate::error::Result;
use crate::flight::left_behind;
pub use abi::{
    DLDataType, DLDevice, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion,
    DLTensor,
};
pub use tensor::Tensor;

/// Gives back the memory and the pools' buffers that tensors [left behind](self#what-is-guarded).
///
/// Does nothing if nothing was left behind. Otherwise it first waits for every device, which ends
/// captures there.
///
/// # Errors
///
/// [`Error::StreamCapturing`](crate::Error::StreamCapturing), or an error of the driver's. Nothing
/// is given back then.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, dlpack};
///
/// let stream = Stream::new(Device::auto())?;
/// let mut buffer = CpuGpuBuffer::<u8>::new(1 << 20, stream.device())?;
/// let tensor = buffer.export_gpu(&stream)?;
/// drop(buffer); // the tensor keeps the memory,
/// drop(tensor); // the memory is left behind,
/// dlpack::reclaim()?; // and given back
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub fn reclaim() -> Result<()> {
    left_behind::reclaim()
}
