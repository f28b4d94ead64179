//! Calls that leave the captures of other threads alone.

use crate::cuda::driver::driver;
use crate::cuda::status::check_driver;
use crate::sys;

/// This thread's calls do not end another thread's capture while this lives.
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

/// Sets this thread's mode and gives back the one before. Should that fail, which leaves the mode as it is, the
/// answer is the mode that was asked for: there is nothing to put back.
fn exchange_capture_mode(mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    if let Ok(driver) = driver() {
        // SAFETY: `mode` is a valid mode, and a place for the previous one.
        let status = unsafe { (driver.exchange_capture_mode)(&mut mode) };
        let _ = check_driver(status, "cuThreadExchangeStreamCaptureMode");
    }
    mode
}
