//! The two statuses of this crate, and the names and texts of all statuses.

use std::borrow::Cow;
use std::ffi::{CStr, c_char};
use std::fmt;

use crate::bindings::{cudaError, cudaGetErrorName, cudaGetErrorString};
use crate::loaded::runtime;
use crate::runtime::Version;

impl cudaError {
    /// No CUDA runtime could be loaded. The text lists every candidate that was tried.
    ///
    /// ```
    /// use cudart_sys::{cudaDeviceSynchronize, cudaError};
    ///
    /// // SAFETY: the function has no arguments and only waits.
    /// let status = unsafe { cudaDeviceSynchronize() };
    /// assert_eq!(status == cudaError::LIBRARY_NOT_LOADED, cudart_sys::runtime().is_err());
    /// ```
    pub const LIBRARY_NOT_LOADED: cudaError = cudaError(0x00c0_da01);

    /// The loaded runtime lacks the called function.
    ///
    /// The text names the library, its version and every function that it lacks.
    ///
    /// ```
    /// use cudart_sys::cudaError;
    ///
    /// /// Whether another installation of CUDA would help.
    /// fn is_absent(status: cudaError) -> bool {
    ///     matches!(status, cudaError::LIBRARY_NOT_LOADED | cudaError::SYMBOL_NOT_FOUND)
    /// }
    /// assert!(!is_absent(cudaError::cudaErrorInvalidValue));
    /// ```
    pub const SYMBOL_NOT_FOUND: cudaError = cudaError(0x00c0_da02);

    /// The name of the status in CUDA's headers, for example `cudaErrorMemoryAllocation`.
    ///
    /// ```
    /// use cudart_sys::cudaError;
    ///
    /// assert_eq!(cudaError::cudaSuccess.name(), "cudaSuccess");
    /// assert_eq!(cudaError::SYMBOL_NOT_FOUND.name(), "cudartSymbolNotFound");
    /// ```
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Self::LIBRARY_NOT_LOADED => "cudartLibraryNotLoaded".into(),
            Self::SYMBOL_NOT_FOUND => "cudartSymbolNotFound".into(),
            // Success has a name without a runtime, too.
            Self::cudaSuccess => "cudaSuccess".into(),
            _ => {
                // SAFETY: every integer is a valid argument.
                let name = unsafe { cudaGetErrorName(self) };
                known(name).unwrap_or("unknown CUDA status").into()
            }
        }
    }

    /// The meaning of the status. CUDA's statuses have CUDA's own text.
    ///
    /// ```
    /// use cudart_sys::cudaError;
    ///
    /// if let Err(error) = cudart_sys::runtime() {
    ///     assert_eq!(cudaError::LIBRARY_NOT_LOADED.text(), error.to_string());
    /// }
    /// println!("{}", cudaError::cudaErrorMemoryAllocation.text()); // "out of memory"
    /// ```
    pub fn text(self) -> Cow<'static, str> {
        match self {
            Self::LIBRARY_NOT_LOADED => match runtime() {
                Err(error) => error.to_string().into(),
                Ok(_) => "no CUDA runtime is loaded".into(),
            },
            Self::SYMBOL_NOT_FOUND => match runtime() {
                Ok(runtime) => {
                    let mut text = format!(
                        "{} is CUDA {} and lacks {}",
                        runtime.path().display(),
                        Version(runtime.version()),
                        runtime.absent().join(", "),
                    );
                    if !runtime.passed_over().is_empty() {
                        text += &format!("; also tried: {}", runtime.passed_over().join("; "));
                    }
                    text.into()
                }
                Err(error) => error.to_string().into(),
            },
            _ => {
                // SAFETY: every integer is a valid argument.
                let text = unsafe { cudaGetErrorString(self) };
                known(text).unwrap_or("no text for this status").into()
            }
        }
    }
}

impl fmt::Display for cudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.name(), self.0, self.text())
    }
}

impl std::error::Error for cudaError {}

/// Reads a constant text of the runtime. The library is never unloaded, so the text is static.
fn known(text: *const c_char) -> Option<&'static str> {
    if text.is_null() {
        return None;
    }
    // SAFETY: `text` is not null. `cudaGetErrorName` and `cudaGetErrorString` return null or a
    // constant, NUL-terminated string ("CUDA Runtime API, Error Handling").
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().ok()
}

/// The values that functions return if they cannot be called.
pub(crate) trait Absent {
    const LIBRARY: Self;
    const SYMBOL: Self;
}

impl Absent for cudaError {
    const LIBRARY: Self = Self::LIBRARY_NOT_LOADED;
    const SYMBOL: Self = Self::SYMBOL_NOT_FOUND;
}

impl Absent for *const c_char {
    const LIBRARY: Self = std::ptr::null();
    const SYMBOL: Self = std::ptr::null();
}
