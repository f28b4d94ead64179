//! DLPack's own types, as `dlpack.h` of version 1 has them.
//!
//! That layout is frozen. The types are defined here, because those of another crate would be part
//! of the public interface.

use std::ffi::c_void;

use crate::element::DType;

/// The version of DLPack that a struct follows.
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

/// A kind of memory: that of the host, or of a device.
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

/// A kind of memory, and the number of its device.
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

/// An element type, as a code and a size.
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
    /// 0 for signed, 1 for unsigned, 2 for floating point, 4 for bfloat.
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// An array in memory, which the struct does not own.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new([4, 2], Device::Cpu)?;
/// let raw = buffer.export_cpu()?.into_raw();
/// // SAFETY: the tensor lives until its deleter is called.
/// let tensor = unsafe { &(*raw).dl_tensor };
/// assert_eq!((tensor.ndim, tensor.byte_offset, tensor.dtype.bits), (2, 0, 32));
/// // SAFETY: there is one stride for each dimension.
/// assert_eq!(unsafe { *tensor.strides }, 2);
/// // SAFETY: the deleter is called once, and the tensor is not used again.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLTensor {
    /// Null if there are no bytes.
    pub data: *mut c_void,
    pub device: DLDevice,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *mut i64,
    /// In elements. Never null here, as required since version 1.2.
    pub strides: *mut i64,
    pub byte_offset: u64,
}

/// An array with its deleter, as before DLPack 1.0.
///
/// [`Tensor::into_raw_unversioned`](super::Tensor::into_raw_unversioned) returns one.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLManagedTensor};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new(4, Device::Cpu)?;
/// let raw: *mut DLManagedTensor = buffer.export_cpu()?.into_raw_unversioned();
/// // SAFETY: the deleter is called once, and the tensor is not used again.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLManagedTensor {
    pub dl_tensor: DLTensor,
    pub manager_ctx: *mut c_void,
    /// To be called once, on any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// An array with its deleter, since DLPack 1.0.
///
/// [`Tensor::into_raw`](super::Tensor::into_raw) returns one.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, dlpack::DLManagedTensorVersioned};
///
/// let mut buffer = CpuGpuBuffer::<i32>::new(4, Device::Cpu)?;
/// let raw: *mut DLManagedTensorVersioned = buffer.export_cpu()?.into_raw();
/// // SAFETY: the tensor lives until its deleter is called.
/// assert_eq!(unsafe { (*raw).version.major }, 1);
/// // SAFETY: the deleter is called once, and the tensor is not used again.
/// unsafe { (*raw).deleter.expect("ours have one")(raw) };
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct DLManagedTensorVersioned {
    pub version: DLPackVersion,
    pub manager_ctx: *mut c_void,
    /// To be called once, on any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// 0 here: the memory may be written, and is not a copy.
    pub flags: u64,
    pub dl_tensor: DLTensor,
}

/// The first version that has the versioned struct and the code of `dtype`. Nothing newer is used.
pub(super) fn version(dtype: DType) -> DLPackVersion {
    let minor = match dtype {
        DType::F8E4M3 | DType::F8E5M2 => 1,
        _ => 0,
    };
    DLPackVersion { major: 1, minor }
}

impl From<DType> for DLDataType {
    fn from(dtype: DType) -> DLDataType {
        const INT: u8 = 0;
        const UINT: u8 = 1;
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        // Of version 1.1 and later.
        const FLOAT8_E4M3FN: u8 = 10;
        const FLOAT8_E5M2: u8 = 12;
        let (code, bits) = match dtype {
            DType::U8 => (UINT, 8),
            DType::I8 => (INT, 8),
            DType::U16 => (UINT, 16),
            DType::I16 => (INT, 16),
            DType::U32 => (UINT, 32),
            DType::I32 => (INT, 32),
            DType::U64 => (UINT, 64),
            DType::I64 => (INT, 64),
            DType::F8E4M3 => (FLOAT8_E4M3FN, 8),
            DType::F8E5M2 => (FLOAT8_E5M2, 8),
            DType::F16 => (FLOAT, 16),
            DType::BF16 => (BFLOAT, 16),
            DType::F32 => (FLOAT, 32),
            DType::F64 => (FLOAT, 64),
        };
        DLDataType { code, bits, lanes: 1 }
    }
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
