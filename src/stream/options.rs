//! Options of a new stream.

use std::fmt;

use bitflags::bitflags;

use crate::sys;

bitflags! {
    /// Flags of a new stream, for `cudaStreamCreateWithPriority`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, StreamFlags, StreamOptions};
    ///
    /// // This stream stays in order with work on the legacy stream, which some libraries use.
    /// let options = StreamOptions { flags: StreamFlags::empty(), ..Default::default() };
    /// let stream = Stream::with_options(Device::auto(), options)?;
    /// assert_eq!(StreamOptions::default().flags, StreamFlags::NON_BLOCKING);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[cfg_attr(feature = "serde", serde(transparent))]
    pub struct StreamFlags: u32 {
        /// The stream does not wait for the legacy stream, nor the legacy stream for it.
        const NON_BLOCKING = sys::cudaStreamNonBlocking;
    }
}

/// How a thread waits for a stream, an event or a transfer.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, StreamOptions, WaitPolicy};
///
/// // The waiting thread leaves its core to others.
/// let options = StreamOptions { wait: WaitPolicy::Block, ..Default::default() };
/// Stream::with_options(Device::auto(), options)?.synchronize()?;
/// assert_eq!(StreamOptions::default().wait, WaitPolicy::DeviceDefault);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[doc(alias = "cudaDeviceScheduleSpin")]
#[doc(alias = "cudaDeviceScheduleBlockingSync")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum WaitPolicy {
    /// Waits as the device's flags say. Unless they were changed, the thread spins.
    ///
    /// Spinning notices the end soonest.
    #[default]
    DeviceDefault,
    /// Sleeps until the driver wakes the thread. Meanwhile other threads can use the core.
    Block,
}

/// Options of a new stream, for [`Stream::with_options`](crate::Stream::with_options).
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, StreamOptions, WaitPolicy};
///
/// let options = StreamOptions { wait: WaitPolicy::Block, ..Default::default() };
/// let stream = Stream::with_options(Device::Cpu, options)?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct StreamOptions {
    /// The priority, 0 by default. Streams with lower numbers go first. CUDA clamps the number to
    /// the device's range.
    pub priority: i32,
    /// The flags, [`StreamFlags::NON_BLOCKING`] by default.
    pub flags: StreamFlags,
    /// The wait policy, [`WaitPolicy::DeviceDefault`] by default.
    pub wait: WaitPolicy,
}

impl Default for StreamOptions {
    fn default() -> StreamOptions {
        StreamOptions {
            priority: 0,
            flags: StreamFlags::NON_BLOCKING,
            wait: WaitPolicy::DeviceDefault,
        }
    }
}

impl fmt::Debug for StreamOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StreamOptions { priority, flags, wait } = self;
        write!(f, "StreamOptions(priority={priority}, flags={flags:?}, wait={wait:?})")
    }
}
