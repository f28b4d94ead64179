//! Sides of a buffer as DLPack tensors: what PyTorch, JAX, CuPy, NumPy and others take over without a copy.
//!
//! [`export_gpu`](CpuGpuBuffer::export_gpu) and [`export_cpu`](CpuGpuBuffer::export_cpu) give a [`Tensor`], which becomes
//! one of DLPack's two structs: [`DLManagedTensorVersioned`], or [`DLManagedTensor`] for consumers from before DLPack 1.0.
//! Needs the feature `dlpack`.
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
//!     let tensor = batch.export_gpu(&stream)?; // `stream`: the consumer's, which waits for the copy
//!     let raw = tensor.into_raw(); // a consumer takes it,
//!
//!     // and while it has it, the host side is free and the device side is not.
//!     batch.cpu_mut()?.fill(0.5);
//!     assert_eq!(batch.copy_to_gpu(.., &stream), Err(Error::Exported { side: Side::Device }));
//!
//!     // SAFETY: a tensor that was just made, whose consumer lets go of it, once.
//!     unsafe { (*raw).deleter.expect("ours have one")(raw) };
//! }
//! batch.copy_to_gpu(.., &stream)?; // waits for whatever the last consumer queued
//! # Ok::<(), Error>(())
//! ```
//!
//! # What is guarded
//!
//! A consumer reads and writes its side as it likes, on streams that nobody here knows, and what it queued there may run
//! after it let the tensor go.
//!
//! - While a tensor of a side lives, whatever would look at that side, write it, move it or resize it answers
//!   [`Error::Exported`]: accessors for the host side, `gpu_on` and `fill_gpu` for the device side, copies
//!   between the sides for either. Shapes and addresses are told, the other side is used as ever, and more tensors can be
//!   made. Those are not ordered with each other.
//! - When the last one is gone, the first such operation waits for all work of **every device** on which this process has a
//!   primary context, once. `try_cpu` and `try_cpu_mut` never wait: they answer `None`, and `is_idle` answers `false`, until
//!   something else has waited, as [`synchronize`](CpuGpuBuffer::synchronize) does. On [`Device::Cpu`] nothing waits.
//! - Buffer and tensors may be dropped in either order, in any thread. The memory, or the place in the pool, is kept until
//!   all are gone.
//! - Letting a tensor go calls no CUDA at all, so that it may happen in a callback of CUDA's, during a capture, in
//!   a forked child, or at the end of the process. Dropping a buffer whose consumers were not waited for waits for nothing,
//!   either. Both leave the memory *behind*: [`reclaim`] gives it back, and so does whatever next allocates
//!   for a CUDA device, and [`acquire`](crate::BufferPool::acquire) of an exhausted pool, if buffers of that pool
//!   are among it, or memory to grow is short.
//!   To give it back at once, call [`synchronize`](CpuGpuBuffer::synchronize) between the tensors' end and the buffer's.
//! - A forked child must not use a tensor of a CUDA buffer. Pinned host memory reads as zeroes
//!   there, through a NumPy view, too, and the child's stores reach nobody. `SECURITY.md` has the
//!   exceptions. Pageable memory is the child's own copy.
//! - Waiting for a device **ends every capture** of a stream there, whoever's, as CUDA has no way to do the one
//!   without the other ("CUDA C++ Programming Guide, Prohibited and Unhandled Operations"). The operation then answers
//!   [`Error::StreamCapturing`], or goes on without the memory left behind. While something is being captured, let
//!   buffers and tensors go as you like, but do not use a buffer again whose tensors are gone, nor allocate.
//! - Not waited for: work of a GPU on the memory of a buffer on [`Device::Cpu`], work in contexts other than the devices'
//!   primary ones, and consumers that touch the memory after their tensor's end otherwise than by work that was queued
//!   before it.
//!
//! Buffers that were never exported pay for none of this.
//!
//! A step that exports anew each time waits for the devices each time. Where the consumer's stream is known,
//! [`export_gpu_unguarded`](CpuGpuBuffer::export_gpu_unguarded) gives one tensor for all steps.

use std::ffi::c_void;
use std::fmt;
use std::ptr;

use crate::buffer::buffer::CpuGpuBuffer;
use crate::device::Device;
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::flight::exports::Loan;
use crate::flight::left_behind;
use crate::shape::Shape;
use crate::stream::stream::Stream;

// ---- DLPack's own types, as `dlpack.h` of version 1 has them. That is frozen; the types that a crate has for it, which
// would be in the interface here, are not ----

/// The version of the struct that it stands in.
///
/// ```
/// use cpu_gpu_buffer::dlpack::DLPackVersion;
///
/// assert_eq!(size_of::<DLPackVersion>(), 8);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLPackVersion {
    pub major: u32,
    pub minor: u32,
}

/// A kind of memory.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLDeviceType};
///
/// let mut buffer = CpuGpuBuffer::<f32>::new(4, Device::auto())?;
/// let expected = match buffer.is_pinned() {
///     true => DLDeviceType::kDLCUDAHost,
///     false => DLDeviceType::kDLCPU,
/// };
/// assert_eq!(buffer.export_cpu()?.device().device_type, expected);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct DLDeviceType(pub i32);

#[allow(non_upper_case_globals)]
impl DLDeviceType {
    /// Host memory.
    pub const kDLCPU: DLDeviceType = DLDeviceType(1);
    /// Memory of a CUDA device.
    pub const kDLCUDA: DLDeviceType = DLDeviceType(2);
    /// Host memory that is pinned for CUDA.
    pub const kDLCUDAHost: DLDeviceType = DLDeviceType(3);
}

/// A kind of memory, and of which device.
///
/// ```
/// use cpu_gpu_buffer::dlpack::{DLDevice, DLDeviceType};
///
/// let second = DLDevice { device_type: DLDeviceType::kDLCUDA, device_id: 1 };
/// assert_eq!((second.device_type.0, second.device_id), (2, 1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLDevice {
    pub device_type: DLDeviceType,
    /// The ordinal of a CUDA device; 0 for host memory.
    pub device_id: i32,
}

/// An element type.
///
/// ```
/// use cpu_gpu_buffer::{DType, dlpack::DLDataType};
///
/// assert_eq!(DLDataType::from(DType::BF16), DLDataType { code: 4, bits: 16, lanes: 1 });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLDataType {
    /// 0 signed, 1 unsigned, 2 floating point, 4 bfloat.
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// An array in memory.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new([4, 2], Device::Cpu)?;
/// let raw = buffer.export_cpu()?.into_raw();
/// // SAFETY: it lives until it is let go.
/// let tensor = unsafe { &(*raw).dl_tensor };
/// assert_eq!((tensor.ndim, tensor.byte_offset, tensor.dtype.bits), (2, 0, 32));
/// // SAFETY: as many strides as there are dimensions.
/// assert_eq!(unsafe { *tensor.strides }, 2);
/// // SAFETY: once, and it is not used again.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLTensor {
    /// Null where there are no bytes.
    pub data: *mut c_void,
    pub device: DLDevice,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *mut i64,
    /// In elements. Never null here, as versions since 1.2 ask.
    pub strides: *mut i64,
    pub byte_offset: u64,
}

/// An array and how to let go of it, as before DLPack 1.0: what [`Tensor::into_raw_unversioned`] gives.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLManagedTensor};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new(4, Device::Cpu)?;
/// let raw: *mut DLManagedTensor = buffer.export_cpu()?.into_raw_unversioned();
/// // SAFETY: a tensor that was just made, let go of once.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLManagedTensor {
    pub dl_tensor: DLTensor,
    pub manager_ctx: *mut c_void,
    /// Called once, in any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// An array and how to let go of it: what [`Tensor::into_raw`] gives.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLManagedTensorVersioned};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new(4, Device::Cpu)?;
/// let raw: *mut DLManagedTensorVersioned = buffer.export_cpu()?.into_raw();
/// // SAFETY: it lives until it is let go.
/// assert_eq!(unsafe { (*raw).version.major }, 1);
/// // SAFETY: once, and it is not used again.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLManagedTensorVersioned {
    pub version: DLPackVersion,
    pub manager_ctx: *mut c_void,
    /// Called once, in any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// None is set: the memory may be written, and is no copy.
    pub flags: u64,
    pub dl_tensor: DLTensor,
}

/// The first version of the versioned struct; nothing newer is used.
const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 0 };

impl From<DType> for DLDataType {
    fn from(dtype: DType) -> DLDataType {
        const INT: u8 = 0;
        const UINT: u8 = 1;
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        let (code, bits) = match dtype {
            DType::U8 => (UINT, 8),
            DType::I8 => (INT, 8),
            DType::U16 => (UINT, 16),
            DType::I16 => (INT, 16),
            DType::U32 => (UINT, 32),
            DType::I32 => (INT, 32),
            DType::U64 => (UINT, 64),
            DType::I64 => (INT, 64),
            DType::F16 => (FLOAT, 16),
            DType::BF16 => (BFLOAT, 16),
            DType::F32 => (FLOAT, 32),
            DType::F64 => (FLOAT, 64),
        };
        DLDataType { code, bits, lanes: 1 }
    }
}

// ---- tensors ----

/// A side of a buffer, to be handed to a consumer: see [`dlpack`](self). Dropping it lets it go, as the deleter of what it
/// becomes does.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side, Stream};
///
/// let stream = Stream::new(Device::auto())?;
/// let mut buffer = CpuGpuBuffer::<f32>::new([2, 3], stream.device())?;
/// let tensor = buffer.export_gpu(&stream)?;
/// assert_eq!(buffer.fill_gpu(1.0, &stream), Err(Error::Exported { side: Side::Device }));
/// drop(tensor);
/// buffer.fill_gpu(1.0, &stream)?;
/// # Ok::<(), Error>(())
/// ```
pub struct Tensor {
    data: *mut u8,
    device: DLDevice,
    dtype: DLDataType,
    shape: Vec<i64>,
    /// In elements.
    strides: Vec<i64>,
    /// `None` where there are no bytes.
    _loan: Option<Loan>,
}

// SAFETY: the address is only handed on, and the memory behind it is kept by the loan, which may go in any thread.
unsafe impl Send for Tensor {}
// SAFETY: through a shared reference only what is known is told.
unsafe impl Sync for Tensor {}

// The loan must not rely on the promises above.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<Loan>();
};

/// A struct of DLPack's, and what it refers to.
#[repr(C)]
struct Managed<M> {
    managed: M,
    _tensor: Tensor,
}

impl Tensor {
    fn new(
        shape: &Shape,
        dtype: DType,
        device: DLDevice,
        lend: impl FnOnce() -> Result<(*mut u8, Option<Loan>)>,
    ) -> Result<Tensor> {
        let dims = shape.dims();
        let sizes: std::result::Result<Vec<i64>, _> =
            dims.iter().map(|dim| i64::try_from(*dim)).collect();
        let sizes = sizes.map_err(|_| Error::InvalidShape {
            reason: format!("{dims:?} has a dimension that DLPack cannot express"),
        })?;
        let mut strides = vec![1; sizes.len()];
        for at in (1..sizes.len()).rev() {
            // It overflows only where there are no elements, and then says nothing.
            strides[at - 1] = sizes[at].max(1).saturating_mul(strides[at]);
        }
        let (data, loan) = lend()?;
        Ok(Tensor { data, device, dtype: dtype.into(), shape: sizes, strides, _loan: loan })
    }

    /// Where the memory is.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, dlpack::DLDeviceType};
    ///
    /// let mut buffer = CpuGpuBuffer::<f32>::new(4, Device::Cpu)?;
    /// let tensor = buffer.export_gpu(&Stream::new(Device::Cpu)?)?;
    /// assert_eq!(tensor.device().device_type, DLDeviceType::kDLCPU);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> DLDevice {
        self.device
    }

    /// Says of pinned host memory that it is `kDLCPU`, for consumers that do not know `kDLCUDAHost`, PyTorch for one.
    /// Of any other tensor nothing changes.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLDeviceType};
    ///
    /// let mut buffer = CpuGpuBuffer::<f32>::new(4, Device::auto())?;
    /// let tensor = buffer.export_cpu()?.as_plain_cpu();
    /// assert_eq!(tensor.device().device_type, DLDeviceType::kDLCPU);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[must_use]
    pub fn as_plain_cpu(mut self) -> Tensor {
        if self.device.device_type == DLDeviceType::kDLCUDAHost {
            self.device.device_type = DLDeviceType::kDLCPU;
        }
        self
    }

    /// The tensor for a consumer, whose [`deleter`](DLManagedTensorVersioned::deleter) has to be called, once.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu)?;
    /// let raw = buffer.export_cpu()?.into_raw();
    /// // What a consumer does when it is done:
    /// // SAFETY: once, and it is not used again.
    /// unsafe { (*raw).deleter.expect("ours have one")(raw) };
    /// buffer.fill_cpu(1)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn into_raw(self) -> *mut DLManagedTensorVersioned {
        self.managed(|dl_tensor| DLManagedTensorVersioned {
            version: VERSION,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
            flags: 0,
            dl_tensor,
        })
    }

    /// The tensor for a consumer from before DLPack 1.0, whose [`deleter`](DLManagedTensor::deleter) has to be called,
    /// once.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu)?;
    /// let raw = buffer.export_cpu()?.into_raw_unversioned();
    /// // SAFETY: once, and it is not used again.
    /// unsafe { (*raw).deleter.expect("ours have one")(raw) };
    /// buffer.fill_cpu(1)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn into_raw_unversioned(self) -> *mut DLManagedTensor {
        self.managed(|dl_tensor| DLManagedTensor {
            dl_tensor,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
        })
    }

    fn managed<M>(mut self, make: impl FnOnce(DLTensor) -> M) -> *mut M {
        let dl_tensor = DLTensor {
            data: self.data.cast(),
            device: self.device,
            ndim: self.shape.len() as i32,
            dtype: self.dtype,
            shape: self.shape.as_mut_ptr(),
            strides: self.strides.as_mut_ptr(),
            byte_offset: 0,
        };
        Box::into_raw(Box::new(Managed { managed: make(dl_tensor), _tensor: self })).cast()
    }
}

/// # Safety
///
/// `managed` is one that [`Tensor::managed`] gave, and is not used again.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: the first field of a whole that was boxed, and the caller has no more use for it.
    let whole = unsafe { Box::from_raw(managed.cast::<Managed<M>>()) };
    drop(whole);
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// What a consumer takes the elements for. It trusts that for their size, too, and [`Element`] is a safe trait.
const fn dtype<T: Element>() -> DType {
    const { assert!(size_of::<T>() == T::DTYPE.size(), "the element is not of the size of its DType") };
    T::DTYPE
}

impl<T: Element> CpuGpuBuffer<T> {
    /// The device side as a tensor for a consumer that uses it on `stream`, first: orders the stream
    /// after everything that this buffer has pending, as [`gpu_on`](Self::gpu_on) does. The buffer
    /// [guards](crate::dlpack#what-is-guarded) the side as long as the tensor lives. The stream may be
    /// destroyed when this has returned, also with an error. A refused export leaves the buffer as it was.
    ///
    /// Where the last tensor of the side is gone and its consumer was not waited for, this waits for the devices first. On
    /// [`Device::Cpu`] the tensor is one of host memory. Needs the feature `dlpack`.
    ///
    /// # Errors
    ///
    /// As for [`gpu_on`](Self::gpu_on), and [`Error::InvalidShape`] for a dimension beyond `i64`.
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

    /// The device side as a tensor that is ordered with nothing, for a consumer that asks its producer for no
    /// synchronization: `stream=-1` of the array API's `__dlpack__`. It calls no CUDA and waits for nothing. The buffer
    /// [guards](crate::dlpack#what-is-guarded) the side as long as the tensor lives. Needs the feature `dlpack`.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`], and [`Error::InvalidShape`] as for [`export_gpu`](Self::export_gpu).
    ///
    /// # Safety
    ///
    /// - The consumer's first use comes after everything that this buffer has pending, and after the work of earlier
    ///   consumers: in stream order, or since the host waited.
    /// - The device side was used before: its first use zeroes it, and may come late.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut batch = CpuGpuBuffer::<f32>::new([32, 64], stream.device())?;
    /// batch.copy_to_gpu(.., &stream)?;
    /// stream.synchronize()?;
    /// // SAFETY: the copy used the whole device side, and the host has waited for it.
    /// let tensor = unsafe { batch.export_gpu_unordered() }?;
    /// assert_eq!(batch.fill_gpu(1.0, &stream), Err(Error::Exported { side: Side::Device }));
    /// # Ok::<(), Error>(())
    /// ```
    pub unsafe fn export_gpu_unordered(&mut self) -> Result<Tensor> {
        let (shape, device) = (Shape::from(self.shape()), self.dl_device());
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_gpu_unordered())
    }

    /// The device side as a tensor that the buffer does not guard: its memory is kept as long as the tensor lives, and
    /// that is all. So one tensor serves for all steps of a loop whose consumer's stream is known. Ordered with nothing:
    /// call [`gpu_on`](Self::gpu_on) before each use, as for kernels of your own. Needs the feature `dlpack`.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`], and [`Error::InvalidShape`] as for [`export_gpu`](Self::export_gpu).
    ///
    /// # Safety
    ///
    /// The consumer uses the memory as the addresses of a [`GpuView`](crate::GpuView) are used:
    ///
    /// - **Stream:** each time by work that is sent to a stream after `gpu_on` was called with that
    ///   stream, and before this buffer is used in any other way, given back to its pool or
    ///   dropped.
    /// - **Device:** the stream is one of the buffer's device. On [`Device::Cpu`] the memory is
    ///   host memory, and the consumer uses it between `gpu_on` and the next use of the buffer.
    /// - **Until when:** after a [`resize`](Self::resize) it does not use the memory at all.
    /// - **Initialised:** before the first `gpu_on` the memory holds anything; it is zeroed by that
    ///   call.
    /// - **Aliasing:** while the consumer's work may run, no other work writes the memory, and none
    ///   reads what the consumer writes.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ids = CpuGpuBuffer::<i64>::new(64, stream.device())?;
    /// // SAFETY: what uses the tensor is sent to `stream` in the loop below, and is over before the buffer is dropped.
    /// let tensor = unsafe { ids.export_gpu_unguarded() }?;
    /// for step in 0..10 {
    ///     ids.cpu_mut()?.fill(step);
    ///     ids.copy_to_gpu(.., &stream)?;
    ///     ids.gpu_on(&stream)?;
    ///     // Here the consumer sends to `stream` what uses the tensor.
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub unsafe fn export_gpu_unguarded(&mut self) -> Result<Tensor> {
        let (shape, device) = (Shape::from(self.shape()), self.dl_device());
        Tensor::new(&shape, dtype::<T>(), device, || self.storage_mut().lend_gpu_unguarded())
    }

    /// The host side as a tensor: of pinned memory where it [is pinned](Self::is_pinned). Waits for pending copies into or
    /// out of it, as [`cpu_mut`](Self::cpu_mut) does. The buffer [guards](crate::dlpack#what-is-guarded) the side as long
    /// as the tensor lives. Needs the feature `dlpack`.
    ///
    /// # Errors
    ///
    /// As for [`cpu_mut`](Self::cpu_mut), and [`Error::InvalidShape`] for a dimension beyond `i64`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Side};
    ///
    /// let mut buffer = CpuGpuBuffer::<f32>::new([2, 3], Device::Cpu)?;
    /// let tensor = buffer.export_cpu()?;
    /// assert_eq!(buffer.cpu(), Err(Error::Exported { side: Side::Host }));
    /// drop(tensor); // or a consumer takes it, and lets go of it some day
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

/// Gives back what tensors, and buffers whose consumers were not waited for, [left behind](self#what-is-guarded): memory,
/// and buffers to their pools. Where nothing was, it does nothing; otherwise it first waits for every device, which
/// ends captures there.
///
/// # Errors
///
/// [`Error::StreamCapturing`], or an error of the driver's: nothing is given back then.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, dlpack};
///
/// let stream = Stream::new(Device::auto())?;
/// let mut buffer = CpuGpuBuffer::<u8>::new(1 << 20, stream.device())?;
/// let tensor = buffer.export_gpu(&stream)?;
/// drop(buffer); // the tensor keeps the memory,
/// drop(tensor); // which is left behind,
/// dlpack::reclaim()?; // and given back
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub fn reclaim() -> Result<()> {
    left_behind::reclaim()
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_structs_are_laid_out_as_the_header_says() {
        assert_eq!(
            [size_of::<DLDevice>(), size_of::<DLDataType>(), size_of::<DLTensor>()],
            [8, 4, 48]
        );
        assert_eq!(
            [
                offset_of!(DLTensor, device),
                offset_of!(DLTensor, ndim),
                offset_of!(DLTensor, dtype),
                offset_of!(DLTensor, shape),
                offset_of!(DLTensor, strides),
                offset_of!(DLTensor, byte_offset),
            ],
            [8, 16, 20, 24, 32, 40]
        );
        assert_eq!(
            [
                offset_of!(DLManagedTensor, dl_tensor),
                offset_of!(DLManagedTensor, manager_ctx),
                offset_of!(DLManagedTensor, deleter),
                size_of::<DLManagedTensor>(),
            ],
            [0, 48, 56, 64]
        );
        assert_eq!(
            [
                offset_of!(DLManagedTensorVersioned, manager_ctx),
                offset_of!(DLManagedTensorVersioned, deleter),
                offset_of!(DLManagedTensorVersioned, flags),
                offset_of!(DLManagedTensorVersioned, dl_tensor),
                size_of::<DLManagedTensorVersioned>(),
            ],
            [8, 16, 24, 32, 80]
        );
    }
}
