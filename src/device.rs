//! The names of devices, and plain facts about them.

use std::fmt;

/// A device: the CPU, or a CUDA device by its ordinal.
///
/// A value names a device, which need not exist: that is checked where it is used.
///
/// ```
/// use cpu_gpu_buffer::Device;
///
/// assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
/// assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
/// assert_eq!(Device::Cpu.to_string(), "cpu");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Device {
    /// Ordinary memory: every operation has the meaning it has on a GPU, and is done when it returns.
    Cpu,
    /// The CUDA device of this ordinal, in the order that `CUDA_VISIBLE_DEVICES` leaves.
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
/// let pieces = memory.free / 2 / (64 << 20);
/// println!("half of what is free: {pieces} pieces of 64 MB, of {} GB in all", memory.total >> 30);
/// # }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MemoryInfo {
    /// What could be allocated now.
    pub free: usize,
    /// All there is.
    pub total: usize,
}
