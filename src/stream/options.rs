//! How streams are made.

use bitflags::bitflags;

use crate::sys;

bitflags! {
    /// How a stream is made: `cudaStreamCreateWithPriority`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, StreamFlags, StreamOptions};
    ///
    /// // One that stays in order with work on the legacy stream: of a library that knows no other, say.
    /// let options = StreamOptions { flags: StreamFlags::empty(), ..Default::default() };
    /// let stream = Stream::with_options(Device::auto(), options)?;
    /// assert_eq!(StreamOptions::default().flags, StreamFlags::NON_BLOCKING);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct StreamFlags: u32 {
        /// The stream does not wait for the legacy stream, nor the legacy stream for it.
        const NON_BLOCKING = sys::cudaStreamNonBlocking;
    }
}

/// What a thread does that waits for a stream, or for a transfer on it.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, StreamOptions, WaitPolicy};
///
/// let of_a_thread_with_its_own_core = StreamOptions { wait: WaitPolicy::DeviceDefault, ..Default::default() };
/// let of_one_among_many = StreamOptions { wait: WaitPolicy::Block, ..Default::default() };
/// for options in [of_a_thread_with_its_own_core, of_one_among_many] {
///     Stream::with_options(Device::auto(), options)?.synchronize()?;
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum WaitPolicy {
    /// As the device is set to, which is to spin unless it was changed: quickest to notice.
    #[default]
    DeviceDefault,
    /// Sleeps until the driver wakes it: leaves the core to others.
    Block,
}

/// How a stream is made.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream, StreamOptions, WaitPolicy};
///
/// let options = StreamOptions { wait: WaitPolicy::Block, ..Default::default() };
/// let stream = Stream::with_options(Device::Cpu, options)?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamOptions {
    /// Lower numbers go first; CUDA brings the number into the device's range. 0 unless given.
    pub priority: i32,
    /// [`StreamFlags::NON_BLOCKING`] unless given.
    pub flags: StreamFlags,
    /// [`WaitPolicy::DeviceDefault`] unless given.
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
