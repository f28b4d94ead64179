//! How memory is made: pinned or not, and for whom.

use bitflags::bitflags;

use crate::sys;

bitflags! {
    /// How pinned host memory is made: `cudaHostRegister`, `cudaHostAlloc`. Write-combined memory is not
    /// to be had: reading it is slow, and on current hardware copies from it are no faster.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, HostFlags};
    ///
    /// // Pinned, and nothing more asked for.
    /// let options = BufferOptions { host_flags: HostFlags::empty(), ..Default::default() };
    /// let buffer = CpuGpuBuffer::<u8>::with_options(100, Device::auto(), options)?;
    /// assert_eq!(BufferOptions::default().host_flags, HostFlags::PORTABLE | HostFlags::MAPPED);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct HostFlags: u32 {
        /// Pinned for every device, not only the buffer's.
        const PORTABLE = sys::cudaHostAllocPortable;
        /// Kernels can read and write it.
        const MAPPED = sys::cudaHostAllocMapped;
    }
}

// The flags serve both functions.
const _: () = assert!(
    sys::cudaHostAllocPortable == sys::cudaHostRegisterPortable
        && sys::cudaHostAllocMapped == sys::cudaHostRegisterMapped
);

/// Whether host memory is pinned, which is what lets a copy run beside the program.
///
/// ```
/// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning};
///
/// for pinning in [Pinning::Never, Pinning::Preferred, Pinning::Required] {
///     let options = BufferOptions { pinning, ..Default::default() };
///     match CpuGpuBuffer::<u8>::with_options(100, Device::Cpu, options) {
///         Ok(buffer) => assert!(!buffer.is_pinned()),
///         Err(error) => assert_eq!((pinning, error.to_string().contains("the CPU")), (Pinning::Required, true)),
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Pinning {
    /// Pinned, or an error. A buffer without bytes has nothing to pin: it is made, and
    /// [`is_pinned`](crate::CpuGpuBuffer::is_pinned) is `false`.
    Required,
    /// Pinned if that works, otherwise pageable. Always pageable on [`Device::Cpu`]. On a CUDA
    /// device [`pinning_error`](crate::CpuGpuBuffer::pinning_error) says why.
    #[default]
    Preferred,
    /// Pageable. Copies of pageable memory are staged by the driver and may make the caller wait.
    Never,
}

/// How a buffer is made.
///
/// ```
/// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning};
///
/// let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
/// let buffer = CpuGpuBuffer::<f32>::with_options([8, 4], Device::auto(), options)?;
/// assert!(!buffer.is_pinned());
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferOptions {
    /// Whether the host side is pinned: [`Pinning::Preferred`] unless given.
    pub pinning: Pinning,
    /// How it is pinned: all flags unless given.
    pub host_flags: HostFlags,
}

impl Default for BufferOptions {
    fn default() -> BufferOptions {
        BufferOptions { pinning: Pinning::Preferred, host_flags: HostFlags::all() }
    }
}
