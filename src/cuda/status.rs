//! Turns statuses of CUDA into results.
//!
//! A status other than success also clears the runtime's last error. Otherwise another library in
//! this process would report it at its next check.

use crate::error::{Error, Result};
use crate::sys;
use crate::sys::cudaError as Status;

/// Turns a status of the runtime into a result.
#[inline]
pub(crate) fn check(status: sys::cudaError_t, call: &'static str) -> Result<()> {
    match status {
        Status::cudaSuccess => Ok(()),
        code => {
            // Its result is `code` or the status of an earlier call, so it is ignored.
            // SAFETY: the call takes no arguments.
            let _ = unsafe { sys::cudaGetLastError() };
            Err(failed(code, call))
        }
    }
}

/// Makes the error of a call that failed.
#[cold]
pub(crate) fn failed(code: sys::cudaError_t, call: &'static str) -> Error {
    match code {
        Status::LIBRARY_NOT_LOADED => Error::Unavailable { reason: code.text().into_owned() },
        code => Error::Cuda { code, call },
    }
}

/// Returns `true` for success and `false` for "not ready".
pub(crate) fn ready(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Cuda { code: Status::cudaErrorNotReady, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Turns a status of the driver into a result.
///
/// Since CUDA 10.1 the runtime uses the same numbers. The driver does not set the runtime's last
/// error.
#[inline]
pub(crate) fn check_driver(status: sys::CUresult, call: &'static str) -> Result<()> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(failed(sys::cudaError(code.0), call)),
    }
}
