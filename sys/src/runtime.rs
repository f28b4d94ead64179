//! A usable CUDA runtime, and the error if there is none.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::bindings::{Functions, cudaError};

/// Major versions whose functions have the signatures in the bindings, newest first.
pub(crate) const MAJORS: [i32; 2] = [13, 12];

/// The end of the error text for another major version.
pub(crate) const NEED: &str = "need 12 or 13";

/// A version in CUDA's encoding. Displays 12080 as `12.8`.
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
    /// Checks that these functions are those of a supported runtime.
    pub(crate) fn of(functions: Functions, path: PathBuf) -> Result<Runtime, String> {
        let get_version = functions
            .cudaRuntimeGetVersion
            .ok_or("not a CUDA runtime: cudaRuntimeGetVersion is missing")?;
        let mut version = 0;
        // SAFETY: `version` is valid for a write of an int. The function needs no driver and no
        // device.
        let status = unsafe { get_version(&mut version) };
        if status != cudaError::cudaSuccess {
            return Err(format!("cudaRuntimeGetVersion returned {}", status.0));
        }
        if !MAJORS.contains(&(version / 1000)) {
            return Err(format!("CUDA {}, {NEED}", Version(version)));
        }
        Ok(Runtime { functions, path, version, passed_over: Vec::new() })
    }

    /// Adds the lines for [`passed_over`](Runtime::passed_over).
    #[cfg(not(feature = "static"))]
    pub(crate) fn instead_of(self, passed_over: Vec<String>) -> Runtime {
        Runtime { passed_over, ..self }
    }

    /// The version in CUDA's encoding: 13000 is 13.0, and 12080 is 12.8.
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

    /// The file that the runtime was loaded from.
    ///
    /// This is a bare file name if the system's loader resolved it. A linked runtime has the path
    /// `libcudart_static.a`.
    ///
    /// ```
    /// // A machine may have several runtimes. Print the one in use.
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

    /// The candidates that the search passed over, one line each with the reason.
    ///
    /// A runtime is passed over for one of two reasons:
    ///
    /// - Its major version is newer than the driver's.
    /// - It lacks functions that every supported version has.
    ///
    /// If the search finds no better one, it takes the first of these. Their calls then return the
    /// error that explains the problem.
    ///
    /// ```
    /// if let Ok(runtime) = cudart_sys::runtime() {
    ///     for line in runtime.passed_over() {
    ///         println!("not {line}"); // for example: CUDA 13.0 is too new for the driver
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
            .field("version", &format_args!("{}", Version(self.version)))
            .field("absent", &self.absent())
            .field("passed_over", &self.passed_over)
            .finish()
    }
}

/// The error of a process without a CUDA runtime. Lists every candidate with its error.
///
/// ```
/// if let Err(error) = cudart_sys::runtime() {
///     // The text has a part for each candidate. It tells an administrator what to fix.
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

    /// One line for each candidate, in search order.
    ///
    /// ```
    /// if let Err(error) = cudart_sys::runtime() {
    ///     let missing = error.tried().iter().filter(|line| line.contains("No such file")).count();
    ///     println!("{missing} of {} candidates do not exist", error.tried().len());
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
