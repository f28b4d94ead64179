//! A side of a buffer as a tensor, and its conversion to DLPack's structs.

use std::fmt;
use std::ptr;

use super::abi::{
    DLDataType, DLDevice, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned, DLTensor,
    version,
};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::flight::exports::Loan;
use crate::shape::Shape;

/// A side of a buffer, for a consumer to take. See [`dlpack`](crate::dlpack).
///
/// Dropping the tensor ends its use of the side. The deleter of DLPack's struct does the same.
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
    dtype: DType,
    shape: Vec<i64>,
    /// In elements.
    strides: Vec<i64>,
    /// `None` if there are no bytes.
    _loan: Option<Loan>,
}

// SAFETY: the tensor passes its address on, and never reads the memory. The loan keeps the memory,
// and may be dropped on any thread.
unsafe impl Send for Tensor {}
// SAFETY: a shared reference gives copies of plain fields.
unsafe impl Sync for Tensor {}

// The promises above say nothing about the loan.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<Loan>();
};

/// A struct of DLPack's, with the tensor that it points into.
#[repr(C)]
struct Managed<M> {
    managed: M,
    _tensor: Tensor,
}

impl Tensor {
    /// A tensor of the memory that `lend` returns.
    pub(super) fn new(
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
            // It overflows only if there are no elements. The strides mean nothing then.
            strides[at - 1] = sizes[at].max(1).saturating_mul(strides[at]);
        }
        let (data, loan) = lend()?;
        Ok(Tensor { data, device, dtype, shape: sizes, strides, _loan: loan })
    }

    /// The kind of the memory, and the number of its device.
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

    /// Describes pinned host memory as `kDLCPU`, for consumers that do not know `kDLCUDAHost`.
    ///
    /// PyTorch is one of them. Other tensors stay as they are.
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

    /// Converts the tensor for a consumer.
    ///
    /// The [`deleter`](DLManagedTensorVersioned::deleter) has to be called once. Otherwise the
    /// memory leaks.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu)?;
    /// let raw = buffer.export_cpu()?.into_raw();
    /// // A consumer does this when it is done.
    /// // SAFETY: the deleter is called once, and the tensor is not used again.
    /// unsafe { (*raw).deleter.expect("ours have one")(raw) };
    /// buffer.fill_cpu(1)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn into_raw(self) -> *mut DLManagedTensorVersioned {
        let version = version(self.dtype);
        self.managed(|dl_tensor| DLManagedTensorVersioned {
            version,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
            flags: 0,
            dl_tensor,
        })
    }

    /// Converts the tensor for a consumer from before DLPack 1.0.
    ///
    /// The [`deleter`](DLManagedTensor::deleter) has to be called once. Otherwise the memory leaks.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
    ///
    /// let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu)?;
    /// let raw = buffer.export_cpu()?.into_raw_unversioned();
    /// // SAFETY: the deleter is called once, and the tensor is not used again.
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

    /// Boxes the tensor behind the struct that `make` returns.
    fn managed<M>(mut self, make: impl FnOnce(DLTensor) -> M) -> *mut M {
        let dl_tensor = DLTensor {
            data: self.data.cast(),
            device: self.device,
            ndim: self.shape.len() as i32,
            dtype: DLDataType::from(self.dtype),
            shape: self.shape.as_mut_ptr(),
            strides: self.strides.as_mut_ptr(),
            byte_offset: 0,
        };
        Box::into_raw(Box::new(Managed { managed: make(dl_tensor), _tensor: self })).cast()
    }
}

/// The deleter of every tensor.
///
/// # Safety
///
/// - [`Tensor::managed`] returned `managed`.
/// - The caller calls this once, and does not use `managed` again.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: `managed` is the first field of a boxed `Managed`, and `repr(C)` puts it at the same
    // address. The caller does not use it again.
    let whole = unsafe { Box::from_raw(managed.cast::<Managed<M>>()) };
    drop(whole);
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.device.device_id;
        write!(f, "Tensor(shape={:?}, dtype={}, device=", self.shape, self.dtype)?;
        match self.device.device_type {
            DLDeviceType::kDLCUDA => write!(f, "cuda:{id})"),
            DLDeviceType::kDLCUDAHost => write!(f, "cpu, pinned=true)"),
            _ => write!(f, "cpu)"),
        }
    }
}
