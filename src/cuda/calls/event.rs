//! Calls on events.

use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::driver::driver;
use crate::cuda::status::{check, check_driver, ready};
use crate::error::Result;
use crate::sys;

/// Makes an event of the current device.
pub(crate) fn create(flags: u32) -> Result<sys::cudaEvent_t> {
    let mut event = ptr::null_mut();
    // SAFETY: `event` is a valid place.
    let status = unsafe { sys::cudaEventCreateWithFlags(&mut event, flags) };
    check(status, "cudaEventCreateWithFlags")?;
    Ok(event)
}

/// Destroys an event.
///
/// # Safety
///
/// - `event` came from [`create`].
/// - It is not used again.
pub(crate) unsafe fn destroy(event: sys::cudaEvent_t) -> Result<()> {
    // SAFETY: the caller vouches for the event.
    check(unsafe { sys::cudaEventDestroy(event) }, "cudaEventDestroy")
}

/// Records an event on a stream.
///
/// # Safety
///
/// - The conditions of [`wait`](super::stream::wait) hold.
/// - The event and the stream belong to one device.
#[inline]
pub(crate) unsafe fn record(event: sys::cudaEvent_t, stream: sys::cudaStream_t) -> Result<()> {
    let record = driver()?.event_record;
    // SAFETY: the caller vouches for both.
    check_driver(unsafe { record(event, stream) }, "cuEventRecord")
}

/// Returns `true` if an event is complete.
///
/// # Safety
///
/// `event` is live.
pub(crate) unsafe fn query(event: sys::cudaEvent_t) -> Result<bool> {
    let _relaxed = RelaxedCapture::begin();
    let query = driver()?.event_query;
    // SAFETY: the caller vouches for the event.
    ready(check_driver(unsafe { query(event) }, "cuEventQuery"))
}

/// Waits for an event.
///
/// # Safety
///
/// `event` is live.
pub(crate) unsafe fn synchronize(event: sys::cudaEvent_t) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    let synchronize = driver()?.event_synchronize;
    // SAFETY: the caller vouches for the event.
    check_driver(unsafe { synchronize(event) }, "cuEventSynchronize")
}

/// Returns the milliseconds from one event to another.
///
/// # Safety
///
/// - Both events are live.
/// - Both belong to one device.
pub(crate) unsafe fn elapsed(from: sys::cudaEvent_t, to: sys::cudaEvent_t) -> Result<f32> {
    let _relaxed = RelaxedCapture::begin();
    let mut milliseconds = 0.0;
    // SAFETY: the caller vouches for both, and `milliseconds` is a valid place.
    let status = unsafe { sys::cudaEventElapsedTime(&mut milliseconds, from, to) };
    check(status, "cudaEventElapsedTime")?;
    Ok(milliseconds)
}
