//! The error type of this crate.

use std::fmt;

use crate::device::Device;
use crate::sys;

/// The result of this crate's operations.
///
/// ```
/// use cpu_gpu_buffer::CpuGpuBuffer;
///
/// fn largest(scores: &CpuGpuBuffer<u32>) -> cpu_gpu_buffer::Result<Option<u32>> {
///     Ok(scores.cpu()?.iter().copied().max())
/// }
/// # let scores = CpuGpuBuffer::new(3, cpu_gpu_buffer::Device::Cpu)?;
/// assert_eq!(largest(&scores)?, Some(0));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
///
/// On error the value is unchanged, unless the operation's documentation says otherwise.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Stream};
///
/// let stream = Stream::new(Device::Cpu)?;
/// let mut buffer = CpuGpuBuffer::<u8>::new([4, 2], Device::Cpu)?;
/// let error = buffer.copy_to_gpu(2..5, &stream).unwrap_err();
/// assert_eq!(error, Error::OutOfRange { start: 2, end: 5, rows: 4, member: None });
/// assert_eq!(error.to_string(), "rows 2..5 are not within 0..4");
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A CUDA call failed.
    ///
    /// The crate has cleared the runtime's last error, so that other libraries do not find it.
    Cuda {
        /// The status. Its text is CUDA's.
        code: sys::cudaError_t,
        /// The function that returned it.
        call: &'static str,
    },
    /// There is not enough memory. Memory that the call had already allocated was freed.
    OutOfMemory {
        /// The side that could not be allocated.
        side: Side,
        /// The requested size, in bytes.
        bytes: usize,
        /// The device of the buffer.
        device: Device,
    },
    /// Host memory could not be pinned.
    ///
    /// Constructors return it with [`Pinning::Required`](crate::Pinning::Required). Otherwise
    /// [`pinning_error`](crate::CpuGpuBuffer::pinning_error) returns it.
    PinningUnavailable {
        /// The requested size, in bytes.
        bytes: usize,
        /// Why it could not be pinned.
        reason: String,
    },
    /// A CUDA device cannot be used.
    ///
    /// The runtime library, the driver or the device is missing, the driver is too old, or the
    /// device's context cannot be made.
    Unavailable {
        /// The cause, and the libraries that were tried.
        reason: String,
    },
    /// A shape has no dimension or more than 8, or its bytes overflow `isize`.
    InvalidShape {
        /// The cause.
        reason: String,
    },
    /// A range of rows is reversed or ends beyond the first dimension.
    OutOfRange {
        /// The first row asked for.
        start: usize,
        /// One past the last row asked for.
        end: usize,
        /// The number of rows.
        rows: usize,
        /// The member's number in the layout, from 0, for groups and their rings. `None` for
        /// buffers, rings of one array, and views.
        member: Option<usize>,
    },
    /// A stream or an event belongs to another device.
    DeviceMismatch {
        /// The device of the value that was called.
        expected: Device,
        /// The device of the argument.
        actual: Device,
    },
    /// The stream is being captured into a graph, so that work sent to it would not run.
    StreamCapturing,
    /// Kernels cannot use the host side in place. It is pageable, or it was not pinned with
    /// [`HostFlags::MAPPED`](crate::HostFlags::MAPPED).
    NotMapped,
    /// The raw stream cannot be used.
    InvalidStream {
        /// The cause.
        reason: &'static str,
    },
    /// The text names no device.
    InvalidDevice {
        /// The text.
        text: String,
    },
    /// The text names no element type.
    InvalidDType {
        /// The text.
        text: String,
    },
    /// All buffers of a pool are in use, and it may not have more. Also returned for a pool that
    /// was to begin with more buffers than its maximum.
    PoolExhausted {
        /// The most buffers that it may have.
        max_buffers: usize,
    },
    /// A key or rows of another layout than the group's.
    InvalidKey,
    /// A member of a group is named twice where each may be named once.
    DuplicateMember {
        /// Its number in the layout, from 0 on.
        index: usize,
    },
    /// A group or a ring with these members or slots is not possible.
    InvalidGroup {
        /// The cause.
        reason: &'static str,
    },
    /// A tensor of the side still exists, and its consumer may use it. Only with the feature
    /// `dlpack`.
    Exported {
        /// The side.
        side: Side,
    },
    /// The host side is read-only. Also returned if
    /// [`READ_ONLY`](crate::HostFlags::READ_ONLY) is among the flags of memory that is not
    /// [adopted](crate::CpuGpuBuffer::adopt).
    ReadOnly,
    /// The events of a time measurement are in the wrong order.
    EventOrder,
    /// The process was forked after CUDA was used. CUDA does not work in the child.
    Forked,
}

/// Reserves room for `more` elements. Too little memory is an error, since users choose the number.
pub(crate) fn reserve<E>(vector: &mut Vec<E>, more: usize, device: Device) -> Result<()> {
    vector.try_reserve(more).map_err(|_| Error::OutOfMemory {
        side: Side::Host,
        bytes: vector.len().saturating_add(more).saturating_mul(size_of::<E>()),
        device,
    })
}

/// A side of a buffer.
///
/// ```
/// use cpu_gpu_buffer::{Device, Error, Side};
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::OutOfMemory { side: Side::Host, .. } => "fewer or smaller host sides",
///         Error::OutOfMemory { side: Side::Device, .. } => "a smaller batch",
///         _ => "see the text",
///     }
/// }
/// let error = Error::OutOfMemory { side: Side::Device, bytes: 1 << 40, device: Device::Cuda(0) };
/// assert_eq!(advice(&error), "a smaller batch");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The host side.
    Host,
    /// The device side.
    Device,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Host => "host",
            Side::Device => "device",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Cuda { code, call } => {
                write!(f, "{call} failed with {code}")?;
                cure(*code).map_or(Ok(()), |cure| write!(f, "; {cure}"))
            }
            Error::OutOfMemory { side, bytes, device } => {
                write!(
                    f,
                    "out of memory: {bytes} bytes for the {side} side of a buffer on {device}"
                )
            }
            Error::PinningUnavailable { bytes, reason } => {
                write!(f, "{bytes} bytes of host memory cannot be pinned: {reason}")
            }
            Error::Unavailable { reason } => write!(f, "CUDA cannot be used: {reason}"),
            Error::InvalidShape { reason } => write!(f, "invalid shape: {reason}"),
            Error::OutOfRange { start, end, rows, member: None } => {
                write!(f, "rows {start}..{end} are not within 0..{rows}")
            }
            Error::OutOfRange { start, end, rows, member: Some(member) } => {
                write!(f, "rows {start}..{end} of member {member} are not within 0..{rows}")
            }
            Error::DeviceMismatch { expected, actual } => {
                write!(f, "expected something of device {expected}, not of {actual}")
            }
            Error::StreamCapturing => f.write_str("the stream is being captured into a graph"),
            Error::NotMapped => f.write_str("the host side is not mapped for kernels"),
            Error::InvalidStream { reason } => write!(f, "invalid stream: {reason}"),
            Error::InvalidDevice { text } => {
                write!(
                    f,
                    "{text:?} is no device: expected \"cpu\", \"cuda\", \"cuda:N\" or \"auto\""
                )
            }
            Error::InvalidDType { text } => {
                write!(f, "{text:?} is no element type: expected a name like \"f32\" or \"bf16\"")
            }
            Error::PoolExhausted { max_buffers } => {
                write!(f, "the pool may have {max_buffers} buffers, and none is left")
            }
            Error::InvalidKey => f.write_str("the key is one of another layout"),
            Error::DuplicateMember { index } => {
                write!(f, "member {index} of the group is named twice")
            }
            Error::InvalidGroup { reason } => write!(f, "invalid group: {reason}"),
            Error::Exported { side } => write!(f, "a tensor of the {side} side lives"),
            Error::ReadOnly => f.write_str("the host side is read-only"),
            Error::EventOrder => f.write_str("the earlier event was recorded after the later one"),
            Error::Forked => {
                f.write_str("CUDA was used before a fork, and does not work in the child")
            }
        }
    }
}

/// Advice for a machine that is not set up, which CUDA's text does not give.
fn cure(code: sys::cudaError_t) -> Option<&'static str> {
    match code {
        sys::cudaError::cudaErrorSystemNotReady => Some(
            "GPUs that are connected by NVSwitch need the fabric manager: \
             start nvidia-fabricmanager, of the driver's version",
        ),
        sys::cudaError::cudaErrorSystemDriverMismatch => Some(
            "the driver's library and its kernel module are of different versions: \
             reload the module, or reboot",
        ),
        sys::cudaError::cudaErrorCompatNotSupportedOnDevice => Some(
            "the libcuda of a cuda-compat package was loaded, which this GPU or driver does not \
             support: remove the package, or take it from LD_LIBRARY_PATH",
        ),
        // Another library may have used CUDA before the fork.
        sys::cudaError::cudaErrorInitializationError => {
            Some("if this is a forked child, its parent used CUDA before the fork")
        }
        _ => None,
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Cuda { code, .. } => Some(code),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One error of each variant that has a number below.
    fn examples() -> Vec<Error> {
        let (bytes, device) = (1 << 20, Device::Cuda(0));
        vec![
            Error::Cuda { code: sys::cudaError::cudaErrorIllegalAddress, call: "cudaMemcpyAsync" },
            Error::OutOfMemory { side: Side::Device, bytes, device },
            Error::PinningUnavailable { bytes, reason: "the device is the CPU".into() },
            Error::Unavailable { reason: "no usable CUDA runtime; tried: …".into() },
            Error::InvalidShape { reason: "9 dimensions, and 1 to 8 are possible".into() },
            Error::OutOfRange { start: 2, end: 9, rows: 4, member: None },
            Error::DeviceMismatch { expected: device, actual: Device::Cpu },
            Error::StreamCapturing,
            Error::InvalidStream {
                reason: "the per-thread stream is a different stream on each thread",
            },
            Error::InvalidDevice { text: "gpu".into() },
            Error::PoolExhausted { max_buffers: 16 },
            Error::InvalidKey,
            Error::DuplicateMember { index: 3 },
            Error::InvalidGroup { reason: "it has no members" },
            Error::Exported { side: Side::Device },
            Error::EventOrder,
            Error::Forked,
            Error::NotMapped,
            Error::ReadOnly,
            Error::InvalidDType { text: "float".into() },
        ]
    }

    /// A new variant has no number until it is given one, and an example with it.
    fn number(error: &Error) -> usize {
        match error {
            Error::Cuda { .. } => 0,
            Error::OutOfMemory { .. } => 1,
            Error::PinningUnavailable { .. } => 2,
            Error::Unavailable { .. } => 3,
            Error::InvalidShape { .. } => 4,
            Error::OutOfRange { .. } => 5,
            Error::DeviceMismatch { .. } => 6,
            Error::StreamCapturing => 7,
            Error::InvalidStream { .. } => 8,
            Error::InvalidDevice { .. } => 9,
            Error::PoolExhausted { .. } => 10,
            Error::InvalidKey => 11,
            Error::DuplicateMember { .. } => 12,
            Error::InvalidGroup { .. } => 13,
            Error::Exported { .. } => 14,
            Error::EventOrder => 15,
            Error::Forked => 16,
            Error::NotMapped => 17,
            Error::ReadOnly => 18,
            Error::InvalidDType { .. } => 19,
        }
    }

    #[test]
    fn the_guide_has_the_text_of_every_error() {
        let guide = include_str!("../docs/guide.md");
        let headings: Vec<_> =
            guide.lines().filter_map(|line| line.strip_prefix("#### ")).collect();
        let examples = examples();
        assert!(examples.iter().map(number).eq(0..headings.len()), "one heading for each variant");
        for error in examples {
            // What comes behind the call is CUDA's text, which depends on the version.
            let text = match &error {
                Error::Cuda { call, .. } => format!("`{call} failed with "),
                error => format!("`{error}`"),
            };
            let found = headings.iter().any(|heading| heading.starts_with(&text));
            assert!(found, "docs/guide.md has no heading for {text}");
        }
    }
}
