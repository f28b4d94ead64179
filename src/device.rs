//! The names of devices, and plain facts about them.

use std::fmt;

/// A device: the CPU, or a CUDA device by its ordinal.
///
/// A value names a device that need not exist. Functions that use the device check it.
///
/// ```
/// use cpu_gpu_buffer::Device;
///
/// assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
/// assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
/// assert_eq!("auto".parse(), Ok(Device::auto()));
/// assert_eq!(Device::Cpu.to_string(), "cpu");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Device {
    /// The CPU. Operations mean the same as on a GPU, and are done when they return.
    Cpu,
    /// The CUDA device with this ordinal, in the order that `CUDA_VISIBLE_DEVICES` leaves.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Memory of a device, in bytes.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// let memory = cpu_gpu_buffer::Device::Cpu.memory()?;
/// println!("{} of {} GiB are free", memory.free >> 30, memory.total >> 30);
/// # }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[doc(alias = "cudaMemGetInfo")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryInfo {
    /// Bytes that can be allocated now.
    pub free: usize,
    /// All bytes of the device.
    pub total: usize,
}

impl fmt::Debug for MemoryInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryInfo(free={}, total={})", self.free, self.total)
    }
}
