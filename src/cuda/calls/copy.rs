//! Calls that copy and fill memory.

use crate::cuda::driver::driver;
use crate::cuda::status::{check, check_driver};
use crate::error::Result;
use crate::sys;

/// The direction of a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From host memory to device memory.
    Up,
    /// From device memory to host memory.
    Down,
}

/// Sends a copy to a stream.
///
/// # Safety
///
/// - The conditions of [`refuse_capture`](super::stream::refuse_capture) hold.
/// - Each range is in the memory that `direction` says.
/// - `from` is valid for reads, and `to` is valid for writes.
/// - `from` is initialised in stream order.
/// - The device memory belongs to the stream's device.
/// - Both ranges stay allocated until the copy has finished in stream order.
/// - Until then nothing else writes either range, and nothing reads `to`.
#[inline]
pub(crate) unsafe fn memcpy(
    direction: Direction,
    to: *mut u8,
    from: *const u8,
    bytes: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let driver = driver()?;
    match direction {
        Direction::Up => {
            // SAFETY: the caller vouches for the ranges and the stream.
            let status =
                unsafe { (driver.memcpy_h2d)(to.addr() as u64, from.cast(), bytes, stream) };
            check_driver(status, "cuMemcpyHtoDAsync")
        }
        Direction::Down => {
            // SAFETY: the caller vouches for the ranges and the stream.
            let status =
                unsafe { (driver.memcpy_d2h)(to.cast(), from.addr() as u64, bytes, stream) };
            check_driver(status, "cuMemcpyDtoHAsync")
        }
    }
}

/// Sends a copy between memory of two devices, or of one, to a stream of the destination's device.
///
/// Addresses are unified, so the regular copy function serves ("CUDA C++ Programming Guide,
/// Peer-to-Peer Memory Copy"). The driver stages the copy if there is no peer access.
///
/// # Safety
///
/// As for [`memcpy`], but both ranges are device memory, and `from` may be memory of any device.
pub(crate) unsafe fn memcpy_on_devices(
    to: *mut u8,
    from: *const u8,
    bytes: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let kind = sys::cudaMemcpyKind::cudaMemcpyDeviceToDevice;
    // SAFETY: the caller vouches for the ranges and the stream.
    let status = unsafe { sys::cudaMemcpyAsync(to.cast(), from.cast(), bytes, kind, stream) };
    check(status, "cudaMemcpyAsync")
}

/// Sends a fill of bytes to a stream.
///
/// # Safety
///
/// The conditions of [`memcpy`] hold for `to`.
pub(crate) unsafe fn memset_d8(
    to: *mut u8,
    value: u8,
    bytes: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { sys::cudaMemsetAsync(to.cast(), value.into(), bytes, stream) };
    check(status, "cudaMemsetAsync")
}

/// Sends a fill of values of two bytes to a stream.
///
/// # Safety
///
/// - The conditions of [`memcpy`] hold for `to`.
/// - `to` is a multiple of 2.
pub(crate) unsafe fn memset_d16(
    to: *mut u8,
    value: u16,
    count: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let memset = driver()?.memset_d16;
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { memset(to.addr() as u64, value, count, stream) };
    check_driver(status, "cuMemsetD16Async")
}

/// Sends a fill of values of four bytes to a stream.
///
/// # Safety
///
/// - The conditions of [`memcpy`] hold for `to`.
/// - `to` is a multiple of 4.
pub(crate) unsafe fn memset_d32(
    to: *mut u8,
    value: u32,
    count: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let memset = driver()?.memset_d32;
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { memset(to.addr() as u64, value, count, stream) };
    check_driver(status, "cuMemsetD32Async")
}
