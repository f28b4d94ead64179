//! The CUDA runtime of this process.

use std::sync::OnceLock;

use crate::bindings::Functions;
#[cfg(not(feature = "static"))]
use crate::loader::find;
use crate::runtime::{LoadError, Runtime};

/// Returns the CUDA runtime of this process, which the first call loads.
///
/// The result never changes, whether it is a success or a failure.
///
/// ```
/// match cudart_sys::runtime() {
///     Ok(runtime) => println!("{}: CUDA {}", runtime.path().display(), runtime.version()),
///     Err(error) => println!("{error}"),
/// }
/// ```
pub fn runtime() -> Result<&'static Runtime, &'static LoadError> {
    static RUNTIME: OnceLock<Result<Runtime, LoadError>> = OnceLock::new();
    RUNTIME.get_or_init(find).as_ref()
}

/// The runtime that is linked into this program.
#[cfg(feature = "static")]
fn find() -> Result<Runtime, LoadError> {
    let archive = "libcudart_static.a";
    Runtime::of(Functions::linked(), archive.into())
        .map_err(|why| LoadError::of(vec![format!("linked: {archive}: {why}")]))
}

#[inline]
pub(crate) fn functions() -> Option<&'static Functions> {
    runtime().ok().map(|runtime| &runtime.functions)
}
