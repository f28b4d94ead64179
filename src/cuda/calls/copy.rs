//! Copies and memsets.

use crate::cuda::driver::driver;
use crate::cuda::status::{check, check_driver};
use crate::error::Result;
use crate::sys;

/// Which way a copy goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From host memory to device memory.
    Up,
    /// From device memory to host memory.
    Down,
}

/// # Safety
///
/// - As for [`refuse_capture`](super::stream::refuse_capture).
/// - Both ranges are valid, in the memory that `direction` says, `from` for reads and `to` for
///   writes; `from` is initialised in stream order. The device memory is of the stream's device.
/// - Until the copy has finished in stream order, both stay allocated, nothing else writes either,
///   and nothing reads `to`.
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

/// # Safety
///
/// As for [`memcpy`].
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

/// # Safety
///
/// As for [`memcpy`], and `to` is a multiple of 2.
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

/// # Safety
///
/// As for [`memcpy`], and `to` is a multiple of 4.
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
