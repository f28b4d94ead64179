//! Calls on streams.

use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::driver::driver;
use crate::cuda::status::{check, check_driver, ready};
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::cudaError as Status;

/// Makes a stream of the current device.
pub(crate) fn create(flags: u32, priority: i32) -> Result<sys::cudaStream_t> {
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is a valid place.
    let status = unsafe { sys::cudaStreamCreateWithPriority(&mut stream, flags, priority) };
    check(status, "cudaStreamCreateWithPriority")?;
    Ok(stream)
}

/// Destroys a stream.
///
/// # Safety
///
/// - `stream` came from [`create`].
/// - It is not used again.
pub(crate) unsafe fn destroy(stream: sys::cudaStream_t) -> Result<()> {
    // SAFETY: the caller vouches for the stream.
    check(unsafe { sys::cudaStreamDestroy(stream) }, "cudaStreamDestroy")
}

/// Returns an error if work sent to the stream would be captured into a graph.
///
/// # Safety
///
/// - `stream` is live.
/// - If it is a legacy stream, the context of its device is current.
#[inline]
pub(crate) unsafe fn refuse_capture(stream: sys::cudaStream_t) -> Result<()> {
    const NONE: sys::CUstreamCaptureStatus =
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut capture = NONE;
    let is_capturing = driver()?.is_capturing;
    // SAFETY: the caller vouches for the stream. `capture` is a valid place.
    let status = unsafe { is_capturing(stream, &mut capture) };
    match check_driver(status, "cuStreamIsCapturing") {
        Ok(()) if capture == NONE => Ok(()),
        Ok(()) => Err(Error::StreamCapturing),
        // This is the legacy stream, and it would wait for a stream that is in capture.
        Err(Error::Cuda { code: Status::cudaErrorStreamCaptureImplicit, .. }) => {
            Err(Error::StreamCapturing)
        }
        Err(error) => Err(error),
    }
}

/// Waits for all work of a stream.
///
/// # Safety
///
/// The conditions of [`refuse_capture`] hold.
pub(crate) unsafe fn synchronize(stream: sys::cudaStream_t) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the stream.
    check(unsafe { sys::cudaStreamSynchronize(stream) }, "cudaStreamSynchronize")
}

/// Returns `true` if all work of a stream has finished.
///
/// # Safety
///
/// The conditions of [`refuse_capture`] hold.
pub(crate) unsafe fn query(stream: sys::cudaStream_t) -> Result<bool> {
    let _relaxed = RelaxedCapture::begin();
    let query = driver()?.stream_query;
    // SAFETY: the caller vouches for the stream.
    ready(check_driver(unsafe { query(stream) }, "cuStreamQuery"))
}

/// Makes a stream wait for an event.
///
/// # Safety
///
/// - The conditions of [`refuse_capture`] hold.
/// - `event` is live.
pub(crate) unsafe fn wait(stream: sys::cudaStream_t, event: sys::cudaEvent_t) -> Result<()> {
    // SAFETY: the caller vouches for both.
    let status = unsafe { sys::cudaStreamWaitEvent(stream, event, 0) };
    check(status, "cudaStreamWaitEvent")
}
