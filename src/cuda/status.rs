//! Statuses of CUDA as results.
//!
//! A status that is not success clears the runtime's last error. Otherwise the next check of another
//! library in this process would report it.

use crate::error::{Error, Result};
use crate::sys;
use crate::sys::cudaError as Status;

/// Turns a status of the runtime's into a result.
#[inline]
pub(crate) fn check(status: sys::cudaError_t, call: &'static str) -> Result<()> {
    match status {
        Status::cudaSuccess => Ok(()),
        code => {
            // SAFETY: it has no arguments. Its status is the one in hand, or that of an earlier call.
            let _ = unsafe { sys::cudaGetLastError() };
            Err(failed(code, call))
        }
    }
}

#[cold]
pub(crate) fn failed(code: sys::cudaError_t, call: &'static str) -> Error {
    match code {
        Status::LIBRARY_NOT_LOADED => Error::Unavailable { reason: code.text().into_owned() },
        code => Error::Cuda { code, call },
    }
}

/// Turns a result that may say "not ready" into whether it was success.
pub(crate) fn ready(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Cuda { code: Status::cudaErrorNotReady, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Turns a status of the driver's into a result. They have the numbers of the runtime's (since CUDA 10.1),
/// and leave the runtime's last error alone.
#[inline]
pub(crate) fn check_driver(status: sys::CUresult, call: &'static str) -> Result<()> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(failed(sys::cudaError(code.0), call)),
    }
}
