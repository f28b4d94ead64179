//! Keeps calls from ending the stream captures of other threads.

use crate::cuda::driver::driver;
use crate::cuda::status::check_driver;
use crate::sys;

/// While this lives, calls of this thread do not end another thread's capture.
pub(crate) struct RelaxedCapture(sys::CUstreamCaptureMode);

const RELAXED: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

impl RelaxedCapture {
    pub(crate) fn begin() -> RelaxedCapture {
        RelaxedCapture(exchange_capture_mode(RELAXED))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        if self.0 != RELAXED {
            exchange_capture_mode(self.0);
        }
    }
}

/// Sets this thread's capture mode and returns the one before.
///
/// If the driver refuses, the mode is unchanged and nothing must be restored. This then returns the
/// requested mode.
fn exchange_capture_mode(mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    if let Ok(driver) = driver() {
        // SAFETY: `mode` holds a valid mode and is a valid place for the previous one.
        let status = unsafe { (driver.exchange_capture_mode)(&mut mode) };
        let _ = check_driver(status, "cuThreadExchangeStreamCaptureMode");
    }
    mode
}
