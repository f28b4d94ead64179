//! The CUDA runtime of this process: one that was loaded, or the one that is linked (feature `static`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bindings::{Functions, cudaError};
#[cfg(not(feature = "static"))]
use crate::loader::find;

/// Major versions whose functions have the signatures in the bindings, newest first.
const MAJORS: [i32; 2] = [13, 12];

/// The CUDA runtime of this process.
///
/// ```
/// match cudart_sys::runtime() {
///     Ok(runtime) => {
///         assert!((12_000..14_000).contains(&runtime.version()));
///         println!("{runtime:?}");
///     }
///     Err(error) => println!("{error}"),
/// }
/// ```
pub struct Runtime {
    functions: Functions,
    path: PathBuf,
    version: i32,
}

impl Runtime {
    /// The runtime of these functions, or why it cannot be used.
    pub(crate) fn of(functions: Functions, path: PathBuf) -> Result<Runtime, String> {
        let get_version = functions
            .cudaRuntimeGetVersion
            .ok_or("it is no CUDA runtime: it has no cudaRuntimeGetVersion")?;
        let mut version = 0;
        // SAFETY: `version` is a valid place for an int, and the function needs neither driver nor device.
        let status = unsafe { get_version(&mut version) };
        if status != cudaError::cudaSuccess {
            return Err(format!("cudaRuntimeGetVersion returned {}", status.0));
        }
        if !MAJORS.contains(&(version / 1000)) {
            return Err(format!(
                "it is CUDA {}.{}, and these bindings know 12.x and 13.x",
                version / 1000,
                version % 1000 / 10
            ));
        }
        Ok(Runtime { functions, path, version })
    }

    /// The version as CUDA writes it: 13000 for 13.0, 12080 for 12.8.
    ///
    /// ```
    /// if let Ok(runtime) = cudart_sys::runtime() {
    ///     let (major, minor) = (runtime.version() / 1000, runtime.version() % 1000 / 10);
    ///     println!("CUDA {major}.{minor}");
    /// }
    /// ```
    pub fn version(&self) -> i32 {
        self.version
    }

    /// The file it was loaded from, or the name that the system's loader resolved; `libcudart_static.a`
    /// where it is linked.
    ///
    /// ```
    /// // Which of several runtimes on the machine it is.
    /// if let Ok(runtime) = cudart_sys::runtime() {
    ///     println!("{}", runtime.path().display());
    /// }
    /// ```
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bound functions that this version lacks.
    ///
    /// ```
    /// if let Ok(runtime) = cudart_sys::runtime() {
    ///     let by_version = "cudaGetDriverEntryPointByVersion"; // new in 12.5
    ///     assert_eq!(runtime.absent().contains(&by_version), runtime.version() < 12050);
    /// }
    /// ```
    pub fn absent(&self) -> Vec<&'static str> {
        self.functions.absent()
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Why there is no runtime: every place that was tried, and what it answered.
///
/// ```
/// if let Err(error) = cudart_sys::runtime() {
///     // As many lines as places: for a message to whoever set the machine up.
///     eprintln!("{error}");
///     assert!(!error.tried().is_empty());
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    tried: Vec<String>,
}

impl LoadError {
    pub(crate) fn of(tried: Vec<String>) -> LoadError {
        LoadError { tried }
    }

    /// One line for each place, in the order of the search.
    ///
    /// ```
    /// if let Err(error) = cudart_sys::runtime() {
    ///     let missing = error.tried().iter().filter(|line| line.contains("No such file")).count();
    ///     println!("{missing} of {} places have no such file", error.tried().len());
    /// }
    /// ```
    pub fn tried(&self) -> &[String] {
        &self.tried
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no usable CUDA runtime; tried: {}", self.tried.join("; "))
    }
}

impl std::error::Error for LoadError {}

/// The process's CUDA runtime, loaded by the first call. Success and failure are both final.
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

/// The runtime that is part of this program.
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
