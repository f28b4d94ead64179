//! The devices and streams of candle as those of `cpu-gpu-buffer`, and memory that both know.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use cpu_gpu_buffer as cgb;

use crate::loader::Failure;

/// candle's device and stream. Work that either library sends runs in one order.
pub fn stream(device: &Device) -> Result<cgb::Stream, Failure> {
    match device {
        Device::Cpu => Ok(cgb::Stream::new(cgb::Device::Cpu)?),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let stream = cuda.cuda_stream();
            let ours = cgb::Device::cuda(stream.context().ordinal() as u32)?;
            let raw = stream.cu_stream().cast();
            // SAFETY: the handle is that of a live stream of this device. The owner keeps it.
            Ok(unsafe { cgb::Stream::from_raw(raw, ours, Some(stream)) }?)
        }
        other => Err(format!("{other:?}: neither the CPU nor CUDA").into()),
    }
}

macro_rules! uninitialized {
    ($dtype:ident, $len:ident, $device:ident, $($name:ident $type:ty,)*) => {
        match ($dtype, $device) {
            $((DType::$name, Device::Cpu) => {
                let mut elements = vec![<$type>::default(); $len];
                let to = elements.as_mut_ptr().cast::<u8>();
                Ok((Storage::Cpu(CpuStorage::$name(elements)), to))
            })*
            $(#[cfg(feature = "cuda")]
            (DType::$name, Device::Cuda(cuda)) => {
                use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
                let stream = cuda.cuda_stream();
                // SAFETY: the callers write all elements before anything reads them.
                let mut slice = unsafe { cuda.alloc::<$type>($len) }?;
                let to = slice.device_ptr_mut(&stream).0 as *mut u8;
                let storage = candle_core::CudaStorage::wrap_cuda_slice(slice, cuda.clone());
                Ok((Storage::Cuda(storage), to))
            })*
            (other, _) => Err(format!("tensors of {other:?} are not loaded here").into()),
        }
    };
}

/// Memory for a tensor, and its address. On CUDA the elements are not initialized.
pub fn uninitialized(
    dtype: DType,
    len: usize,
    device: &Device,
) -> Result<(Storage, *mut u8), Failure> {
    uninitialized!(
        dtype, len, device,
        U8 u8, U32 u32, I64 i64, F16 half::f16, BF16 half::bf16, F32 f32, F64 f64,
    )
}

macro_rules! borrowed {
    ($address:ident, $dtype:ident, $shape:ident, $device:ident, $($name:ident $type:ty,)*) => {
        match ($dtype, $device) {
            $(#[cfg(feature = "cuda")]
            (DType::$name, Device::Cuda(cuda)) => {
                let len = $shape.iter().product();
                // SAFETY: the caller vouches for the memory, and never drops the tensor.
                let slice = unsafe {
                    cuda.cuda_stream().upgrade_device_ptr::<$type>($address as u64, len)
                };
                let storage = candle_core::CudaStorage::wrap_cuda_slice(slice, cuda.clone());
                let none = candle_core::op::BackpropOp::none();
                Ok(Tensor::from_storage(Storage::Cuda(storage), $shape, none, false))
            })*
            (other, _) => {
                let _ = ($address, $shape);
                Err(format!("tensors of {other:?} are not borrowed here").into())
            }
        }
    };
}

/// A tensor over memory of somebody else.
///
/// candle has none: each of its tensors frees its memory. So the caller must not drop this one or
/// the last of its clones.
///
/// # Safety
///
/// - The memory is the device's, has the elements of the shape, and outlives the tensor.
/// - All work on it is sent to candle's stream, or ordered with it.
/// - The tensor is never dropped.
pub unsafe fn borrowed(
    address: *mut u8,
    dtype: DType,
    shape: &[usize],
    device: &Device,
) -> Result<Tensor, Failure> {
    borrowed!(address, dtype, shape, device, U32 u32, F32 f32,)
}
