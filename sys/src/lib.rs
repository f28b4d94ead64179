//! Raw bindings of the CUDA runtime (`libcudart`), found and loaded at run time.
//!
//! Nothing is linked by default. A program that depends on this crate builds without a CUDA toolkit
//! and starts without a driver. The functions keep their CUDA names and signatures. The first call
//! searches for the runtime in this order:
//!
//! 1. The path in `CUDART_LIBRARY`. If this variable is set, the search ends here.
//! 2. A runtime that is already in the process, for example PyTorch's.
//! 3. The system's loader, newest major version first.
//! 4. `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`, `/opt/cuda`.
//! 5. The CUDA wheels of an active virtual environment, and the active conda prefix.
//!
//! The search passes over a runtime whose major version is newer than the driver's. It also passes
//! over a runtime that lacks functions of every supported version. [`Runtime::passed_over`] lists
//! them. If there is no better one, the first of them is used. Its calls return the error that
//! explains the problem.
//!
//! ```
//! use cudart_sys::{cudaError, cudaGetDeviceCount};
//!
//! let mut count = 0;
//! // SAFETY: `count` is valid for a write of an int.
//! match unsafe { cudaGetDeviceCount(&mut count) } {
//!     cudaError::cudaSuccess => println!("{count} devices"),
//!     // A missing runtime, driver or device is a status with a text.
//!     status => println!("no CUDA here: {status}"),
//! }
//! ```
//!
//! # Guarantees
//!
//! - The crate never panics.
//! - It never links to `libcuda` or `libcudart.so`.
//! - It never searches the current directory.
//! - It never falls back to another runtime if `CUDART_LIBRARY` names an unusable one.
//!
//! A missing library is the status [`cudaError::LIBRARY_NOT_LOADED`]. A function that the loaded
//! runtime lacks is [`cudaError::SYMBOL_NOT_FOUND`]. The text of both lists the candidates that the
//! search tried.
//!
//! # The static runtime
//!
//! The feature `static` links `libcudart_static.a` into the program, for machines that have only a
//! driver. The functions and statuses stay the same. [`runtime()`] then searches nothing and
//! ignores `CUDART_LIBRARY`. The feature is limited to Linux. It needs glibc's `dl`, `rt` and
//! `pthread`, and no C++ library.
//!
//! The build script takes the archive from `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`, `/opt/cuda`,
//! an active virtual environment or a conda prefix. A function that the archive lacks returns
//! [`cudaError::SYMBOL_NOT_FOUND`]. With an archive of an unknown major version every function
//! returns [`cudaError::LIBRARY_NOT_LOADED`].
//!
//! A process may contain several copies of the runtime. The primary context of a device belongs to
//! the driver, and all copies share it ("CUDA Runtime API, Interactions with the CUDA Driver API").
//! State of a runtime itself, like the last error, exists once for each copy.
//!
//! # Versions
//!
//! The bindings are those of CUDA 13.0. They contain the functions whose signature is the same in
//! 12.0 to 13.x. The loader refuses runtimes of other major versions. C enums are integer newtypes,
//! since a newer runtime may return codes that these headers do not name.

mod error;
mod loaded;
#[cfg(not(feature = "static"))]
mod loader;
mod runtime;
#[cfg(not(feature = "static"))]
mod search_paths;

pub use loaded::runtime;
pub use runtime::{LoadError, Runtime};

/// The macro `linked!`: a function of the linked archive, or `None` if the archive lacks it.
#[cfg(feature = "static")]
mod linked {
    include!(concat!(env!("OUT_DIR"), "/linked.rs"));
    pub(crate) use linked;
}

/// Turns bindgen's declarations into a table of addresses and one public function for each name.
///
/// The public functions call through the table. They return a status of this crate if there is no
/// table, or no address for the function.
macro_rules! runtime {
    ($(pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $status:ty;)*) => {
        /// The functions of the runtime. A function that the loaded version lacks is `None`.
        pub(crate) struct Functions {
            $(pub(crate) $name: Option<unsafe extern "C" fn($($arg: $type),*) -> $status>,)*
        }

        impl Functions {
            #[cfg(feature = "static")]
            pub(crate) fn linked() -> Functions {
                Functions {
                    $($name: crate::linked::linked!($name($($arg: $type),*) -> $status),)*
                }
            }

            #[cfg(not(feature = "static"))]
            pub(crate) fn of(library: &libloading::Library) -> Functions {
                Functions {
                    $($name: {
                        // SAFETY: the headers of the runtime declare this type for this name.
                        let symbol = unsafe { library.get(stringify!($name)) };
                        symbol.ok().map(|symbol| *symbol)
                    },)*
                }
            }

            /// The names that the loaded version lacks.
            pub(crate) fn absent(&self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$name.is_none() {
                    names.push(stringify!($name));
                })*
                names
            }
        }

        $(
            #[doc = concat!("`", stringify!($name), "` of the CUDA runtime API.")]
            ///
            /// # Safety
            ///
            /// The requirements of this function in the CUDA runtime's documentation hold.
            #[inline]
            pub unsafe fn $name($($arg: $type),*) -> $status {
                match crate::loaded::functions().map(|functions| functions.$name) {
                    Some(Some(function)) => {
                        // SAFETY: the address came from the runtime under this name. The caller
                        // guarantees that the arguments are valid.
                        unsafe { function($($arg),*) }
                    }
                    Some(None) => crate::error::Absent::SYMBOL,
                    None => crate::error::Absent::LIBRARY,
                }
            }
        )*
    };
}

#[allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[rustfmt::skip] // bindgen formats its own output
#[cfg_attr(feature = "bindgen", path = "generated.rs")]
mod bindings;

pub use bindings::*;

/// Runs the README's program as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
