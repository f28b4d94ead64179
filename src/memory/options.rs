//! Options for allocating memory: pinning and its flags.

use bitflags::bitflags;

use crate::error::{Error, Result};
use crate::sys;

bitflags! {
    /// Flags of pinned host memory, as of `cudaHostRegister` and `cudaHostAlloc`.
    ///
    /// There is no flag for write-combined memory. Reading it is slow, and copies from it are no
    /// faster on current hardware.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, HostFlags};
    ///
    /// // Pinned, without further properties.
    /// let options = BufferOptions { host_flags: HostFlags::empty(), ..Default::default() };
    /// let buffer = CpuGpuBuffer::<u8>::with_options(100, Device::auto(), options)?;
    /// assert_eq!(BufferOptions::default().host_flags, HostFlags::PORTABLE | HostFlags::MAPPED);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias("portable", "mapped"))]
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[cfg_attr(feature = "serde", serde(transparent))]
    pub struct HostFlags: u32 {
        /// The memory is pinned for every device, not only the buffer's.
        const PORTABLE = sys::cudaHostAllocPortable;
        /// Kernels can read and write the memory.
        const MAPPED = sys::cudaHostAllocMapped;
        /// Neither the program nor the device writes the memory. For
        /// [adopted](crate::CpuGpuBuffer::adopt) memory alone.
        ///
        /// Operations that would write the host side return
        /// [`Error::ReadOnly`](crate::Error::ReadOnly). CUDA needs the flag to pin memory that is
        /// mapped as read-only.
        const READ_ONLY = sys::cudaHostRegisterReadOnly;
    }
}

impl HostFlags {
    /// The flags that memory of our own can have. They are the default.
    pub(crate) const OWN: HostFlags = HostFlags::PORTABLE.union(HostFlags::MAPPED);

    /// Returns [`Error::ReadOnly`] for flags that only adopted memory can have.
    #[inline]
    pub(crate) fn refuse_read_only(self) -> Result<()> {
        match self.contains(HostFlags::READ_ONLY) {
            true => Err(Error::ReadOnly),
            false => Ok(()),
        }
    }
}

// `cudaHostAlloc` gives no meaning to READ_ONLY. The other flags have one value for both functions.
const _: () = assert!(
    sys::cudaHostAllocPortable == sys::cudaHostRegisterPortable
        && sys::cudaHostAllocMapped == sys::cudaHostRegisterMapped
);

/// Pinning of host memory, which lets copies run asynchronously.
///
/// ```
/// use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, Pinning};
///
/// for pinning in [Pinning::Never, Pinning::Preferred, Pinning::Required] {
///     let options = BufferOptions { pinning, ..Default::default() };
///     match CpuGpuBuffer::<u8>::with_options(100, Device::Cpu, options) {
///         Ok(buffer) => assert!(!buffer.is_pinned()),
///         Err(error) => {
///             assert_eq!(pinning, Pinning::Required);
///             assert!(error.to_string().contains("the CPU"));
///         }
///     }
/// }
/// ```
#[doc(alias("pinned", "page-locked"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Pinning {
    /// Pinned, or an error.
    ///
    /// A buffer without bytes has nothing to pin. It is created, and its
    /// [`is_pinned`](crate::CpuGpuBuffer::is_pinned) is `false`.
    Required,
    /// Pinned if possible, otherwise pageable.
    ///
    /// Memory is always pageable on [`Device::Cpu`](crate::Device::Cpu). On a
    /// CUDA device, [`pinning_error`](crate::CpuGpuBuffer::pinning_error) has the reason.
    #[default]
    Preferred,
    /// Pageable. The driver stages copies of pageable memory, and the caller may have to wait.
    Never,
}

/// Options for creating a buffer or a group.
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
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct BufferOptions {
    /// The pinning of the host side. The default is [`Pinning::Preferred`].
    pub pinning: Pinning,
    /// The flags of a pinned host side. The default is [`PORTABLE`](HostFlags::PORTABLE) and
    /// [`MAPPED`](HostFlags::MAPPED).
    pub host_flags: HostFlags,
}

impl Default for BufferOptions {
    fn default() -> BufferOptions {
        BufferOptions { pinning: Pinning::Preferred, host_flags: HostFlags::OWN }
    }
}
