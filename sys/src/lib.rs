//! Raw bindings of the CUDA runtime (`libcudart`), found and loaded at run time.
//!
//! Nothing is linked by default: a program that depends on this crate builds without a CUDA toolkit and
//! starts without a driver. The functions keep their CUDA names and signatures; the first call of any of them
//! looks for the runtime, in this order:
//!
//! 1. the path in `CUDART_LIBRARY`, and nothing else where that is set;
//! 2. a runtime that is already in the process (PyTorch's, say);
//! 3. the system's loader, newest major version first;
//! 4. `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`, `/opt/cuda`;
//! 5. the CUDA wheels of an active virtual environment, and the active conda prefix.
//!
//! A runtime is passed over for the next one if its major version is newer than the driver's, or if
//! it lacks functions that every supported version has. [`Runtime::passed_over`] names each. If
//! there is no other one, the first of them is taken, and its calls say what is wrong.
//!
//! ```
//! use cudart_sys::{cudaError, cudaGetDeviceCount};
//!
//! let mut count = 0;
//! // SAFETY: `count` is a valid place for an int.
//! match unsafe { cudaGetDeviceCount(&mut count) } {
//!     cudaError::cudaSuccess => println!("{count} devices"),
//!     // No runtime, no driver, no device: a status and a text like any other.
//!     status => println!("no CUDA here: {status}"),
//! }
//! ```
//!
//! # What it refuses to do
//!
//! It never panics, never links to `libcuda` or `libcudart.so`, never searches the current directory, and
//! never falls back when `CUDART_LIBRARY` names something that cannot be used. A missing library
//! is the status [`cudaError::LIBRARY_NOT_LOADED`], and a function that the loaded runtime lacks
//! [`cudaError::SYMBOL_NOT_FOUND`]; the text of both says what was tried.
//!
//! # The static runtime
//!
//! With the feature `static`, `libcudart_static.a` becomes part of the program: for machines that have a driver
//! and nothing else. The functions are the same, and so are the statuses; [`runtime()`] answers without a search, and
//! `CUDART_LIBRARY` is not looked at. What matters is the archive that was there at build time, found in
//! `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`, `/opt/cuda`, and in an active virtual environment or conda prefix; a
//! function that it lacks answers [`cudaError::SYMBOL_NOT_FOUND`], and an archive of an unknown major version
//! [`cudaError::LIBRARY_NOT_LOADED`]. It needs glibc's `dl`, `rt` and `pthread`, and no C++ library; Linux only.
//!
//! Other copies of the runtime in the process do no harm: a device's primary context is the driver's, and all
//! of them use it ("CUDA Runtime API, Interactions with the CUDA Driver API"). What is a runtime's own, such as its
//! last error, each has for itself.
//!
//! # Versions
//!
//! The bindings are those of CUDA 13.0, limited to functions whose signature is the same in 12.0 to
//! 13.x. A runtime of another major version is refused. C enums are integer newtypes, since a newer
//! runtime may return codes that these headers do not name.

mod error;
#[cfg(not(feature = "static"))]
mod loader;
#[cfg(not(feature = "static"))]
mod places;
mod runtime;

pub use runtime::{LoadError, Runtime, runtime};

/// `linked!`: a function of the linked archive, or `None` where the archive lacks it.
#[cfg(feature = "static")]
mod linked {
    include!(concat!(env!("OUT_DIR"), "/linked.rs"));
    pub(crate) use linked;
}

/// Turns bindgen's declarations into a table of addresses and one function for each name, which calls
/// through the table. Where there is no table, or no address in it, the status says so.
macro_rules! runtime {
    ($(pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $status:ty;)*) => {
        /// The runtime's functions; `None` where the loaded version lacks one.
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
                        // SAFETY: the type is the one that the runtime's headers declare for this name.
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
            /// As the CUDA runtime's documentation says of this function.
            #[inline]
            pub unsafe fn $name($($arg: $type),*) -> $status {
                match crate::runtime::functions().map(|functions| functions.$name) {
                    Some(Some(function)) => {
                        // SAFETY: the address came from the runtime under this name, and the
                        // caller vouches for the arguments.
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
#[rustfmt::skip] // as bindgen wrote them
#[cfg_attr(feature = "bindgen", path = "generated.rs")]
mod bindings;

pub use bindings::*;

/// The README's program is one of the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
