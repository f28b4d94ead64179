//! The CUDA runtime of this process: one that was loaded, or the one that is linked (feature `static`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bindings::{Functions, cudaError};
#[cfg(not(feature = "static"))]
use crate::loader::find;

/// Major versions whose functions have the signatures in the bindings, newest first.
pub(crate) const MAJORS: [i32; 2] = [13, 12];

/// What is said of a runtime of another major version.
pub(crate) const NEED: &str = "need 12 or 13";

/// A version as people write it: `12.8` for 12080.
pub(crate) struct Version(pub(crate) i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

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
    pub(crate) functions: Functions,
    path: PathBuf,
    version: i32,
    passed_over: Vec<String>,
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
            return Err(format!("CUDA {}, {NEED}", Version(version)));
        }
        Ok(Runtime { functions, path, version, passed_over: Vec::new() })
    }

    /// This runtime, for which the search passed over all these.
    #[cfg(not(feature = "static"))]
    pub(crate) fn instead_of(self, passed_over: Vec<String>) -> Runtime {
        Runtime { passed_over, ..self }
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

    /// The places of the search that were passed over for this runtime: one line each, with the
    /// reason.
    ///
    /// A runtime is passed over if the driver is of an older major version, or if the runtime lacks
    /// functions that every supported version has. If no other one is found, the first of those is
    /// taken all the same, since its calls say what is wrong.
    ///
    /// ```
    /// if let Ok(runtime) = cudart_sys::runtime() {
    ///     for line in runtime.passed_over() {
    ///         println!("not {line}"); // CUDA 13.0 is too new for the driver, say
    ///     }
    /// }
    /// ```
    pub fn passed_over(&self) -> &[String] {
        &self.passed_over
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("path", &self.path)
            .field("version", &self.version)
            .field("passed_over", &self.passed_over)
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
