//! Finds the CUDA runtime and loads it, once in a process.
//!
//! The search is a list of candidates, made from the environment before anything is opened; the first
//! that opens, answers `cudaRuntimeGetVersion` and is of a known major version is kept for good. What
//! the others said is kept too, for the text of the error.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use crate::bindings::{Functions, cudaError};

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
    // Never unloaded: addresses in `functions` and texts of errors point into it.
    _library: Library,
}

impl Runtime {
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

    /// The file it was loaded from, or the name that the system's loader resolved.
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

/// Why no runtime could be loaded: every place that was tried, and what it answered.
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
/// // Before the first call of a function, if the answer is wanted in words.
/// if let Err(error) = cudart_sys::runtime() {
///     println!("on the CPU, since {error}");
/// }
/// ```
pub fn runtime() -> Result<&'static Runtime, &'static LoadError> {
    static RUNTIME: OnceLock<Result<Runtime, LoadError>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| load(candidates(|name| env::var_os(name), &loaded_in_process())))
        .as_ref()
}

#[inline]
pub(crate) fn functions() -> Option<&'static Functions> {
    runtime().ok().map(|runtime| &runtime.functions)
}

/// A place to look, before it is known whether anything is there.
#[derive(Debug, PartialEq, Eq)]
enum Candidate {
    /// The value of `CUDART_LIBRARY`.
    Demanded(PathBuf),
    /// A file that this process has already loaded.
    InProcess(PathBuf),
    /// A name for the system's loader.
    System(&'static str),
    /// A file in a place where CUDA is installed.
    File(PathBuf),
    /// A place that is not looked at, and why.
    Refused(String),
}

fn candidates(
    variable: impl Fn(&str) -> Option<OsString>,
    in_process: &[PathBuf],
) -> Vec<Candidate> {
    if let Some(path) = variable("CUDART_LIBRARY") {
        return vec![if path.is_empty() {
            Candidate::Refused("CUDART_LIBRARY is set but empty".into())
        } else {
            Candidate::Demanded(path.into())
        }];
    }
    let mut list: Vec<Candidate> = in_process.iter().cloned().map(Candidate::InProcess).collect();
    list.extend(LIBRARY_NAMES.map(Candidate::System));
    let mut roots = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(value) = variable(name).filter(|value| !value.is_empty()) else {
            continue;
        };
        let root = PathBuf::from(value);
        if root.is_absolute() {
            roots.push((name, root));
        } else {
            list.push(Candidate::Refused(format!(
                "{name}={} is relative to the current directory, which is never searched",
                root.display()
            )));
        }
    }
    let toolkits = roots
        .iter()
        .filter(|(name, _)| name.starts_with("CUDA"))
        .map(|(_, root)| root.clone())
        .chain(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from));
    let mut directories: Vec<PathBuf> =
        toolkits.flat_map(|root| library_directories(&root)).collect();
    for (_, root) in roots.iter().filter(|(name, _)| !name.starts_with("CUDA")) {
        directories.extend(library_directories(root));
        directories.extend(wheel_directories(root));
    }
    for directory in directories {
        for name in LIBRARY_NAMES {
            let file = directory.join(name);
            if file.is_file() && !list.contains(&Candidate::File(file.clone())) {
                list.push(Candidate::File(file));
            }
        }
    }
    list
}

#[cfg(not(windows))]
const LIBRARY_NAMES: [&str; 2] = ["libcudart.so.13", "libcudart.so.12"];
#[cfg(windows)]
const LIBRARY_NAMES: [&str; 2] = ["cudart64_13.dll", "cudart64_12.dll"];

/// Where a toolkit, or a conda prefix, keeps its libraries.
fn library_directories(root: &Path) -> Vec<PathBuf> {
    let target = match (cfg!(windows), cfg!(target_arch = "aarch64")) {
        (true, _) => return vec![root.join("bin"), root.join("bin").join("x64")],
        (false, true) => "targets/sbsa-linux/lib",
        (false, false) => "targets/x86_64-linux/lib",
    };
    ["lib64", "lib", target].map(|sub| root.join(sub)).to_vec()
}

/// Where the CUDA wheels of a Python environment keep theirs: one folder for each major version.
fn wheel_directories(root: &Path) -> Vec<PathBuf> {
    let mut packages = Vec::new();
    if cfg!(windows) {
        packages.push(root.join("Lib").join("site-packages"));
    } else if let Ok(entries) = std::fs::read_dir(root.join("lib")) {
        packages.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_name().to_string_lossy().starts_with("python"))
                .map(|entry| entry.path().join("site-packages")),
        );
        packages.sort();
    }
    let sub = if cfg!(windows) { "bin" } else { "lib" };
    packages
        .iter()
        .flat_map(|site| {
            ["cu13", "cuda_runtime"].map(|wheel| site.join("nvidia").join(wheel).join(sub))
        })
        .collect()
}

fn load(candidates: Vec<Candidate>) -> Result<Runtime, LoadError> {
    let mut tried = Vec::new();
    for candidate in candidates {
        let in_process = matches!(candidate, Candidate::InProcess(_));
        let (label, name) = match candidate {
            Candidate::Demanded(path) => (format!("CUDART_LIBRARY={}", path.display()), path),
            Candidate::InProcess(path) => {
                (format!("already in the process: {}", path.display()), path)
            }
            Candidate::System(name) => (format!("system loader: {name}"), name.into()),
            Candidate::File(path) => (path.display().to_string(), path),
            Candidate::Refused(why) => {
                tried.push(why);
                continue;
            }
        };
        match open(&name, in_process) {
            Ok(runtime) => return Ok(runtime),
            Err(why) => tried.push(format!("{label}: {why}")),
        }
    }
    Err(LoadError { tried })
}

fn open(name: &Path, in_process: bool) -> Result<Runtime, String> {
    let library = open_library(name, in_process).map_err(|error| error.to_string())?;
    let functions = Functions::of(&library);
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
    Ok(Runtime { functions, path: name.to_path_buf(), version, _library: library })
}

/// One that is already in the process is found again, never loaded anew: its name may be relative.
#[cfg(not(windows))]
fn open_library(name: &Path, in_process: bool) -> Result<Library, libloading::Error> {
    use libloading::os::unix::{Library as Native, RTLD_LAZY, RTLD_LOCAL};
    let flags = RTLD_LAZY | RTLD_LOCAL | if in_process { libc::RTLD_NOLOAD } else { 0 };
    // SAFETY: loading a library runs its initialisers; the CUDA runtime's have no preconditions, and
    // whoever sets the variables that are searched chooses what runs in this process.
    unsafe { Native::open(Some(name), flags) }.map(Into::into)
}

/// The default search of Windows includes the current directory; this one does not.
#[cfg(windows)]
fn open_library(name: &Path, _in_process: bool) -> Result<Library, libloading::Error> {
    use libloading::os::windows::{
        LOAD_LIBRARY_SEARCH_DEFAULT_DIRS, LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR, Library as Native,
    };
    let flags = match name.is_absolute() {
        true => LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR,
        false => LOAD_LIBRARY_SEARCH_DEFAULT_DIRS,
    };
    // SAFETY: as for the other systems.
    unsafe { Native::load_with_flags(name, flags) }.map(Into::into)
}

/// Files in this process whose name is that of a CUDA runtime. A wheel may carry it under a hashed
/// name, so names are compared by their beginning; opening one again gives the copy that is there.
#[cfg(target_os = "linux")]
fn loaded_in_process() -> Vec<PathBuf> {
    use std::ffi::{CStr, OsStr, c_int, c_void};
    use std::os::unix::ffi::OsStrExt;

    unsafe extern "C" fn note(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        found: *mut c_void,
    ) -> c_int {
        // SAFETY: `dl_iterate_phdr` passes a record that is valid for the length of the call.
        let info = unsafe { &*info };
        // SAFETY: this is the vector below, which nobody else borrows during the call.
        let found = unsafe { &mut *found.cast::<Vec<PathBuf>>() };
        if !info.dlpi_name.is_null() {
            // SAFETY: not null, and a NUL-terminated string for the length of the call.
            let name = unsafe { CStr::from_ptr(info.dlpi_name) };
            let path = Path::new(OsStr::from_bytes(name.to_bytes()));
            let file = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
            if file.starts_with(b"libcudart") {
                found.push(path.to_path_buf());
            }
        }
        0
    }

    let mut found: Vec<PathBuf> = Vec::new();
    // SAFETY: the callback has the declared type, and the vector outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut found).cast()) };
    found
}

#[cfg(not(target_os = "linux"))]
fn loaded_in_process() -> Vec<PathBuf> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn environment<'a>(set: &'a [(&str, &Path)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        |name| {
            let found = set.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.as_os_str().to_owned())
        }
    }

    /// A folder with empty files at the given places.
    fn folder(test: &str, files: &[&str]) -> PathBuf {
        let root = env::temp_dir().join(format!("cudart-sys-{test}-{}", std::process::id()));
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "not a library").unwrap();
        }
        root
    }

    #[test]
    fn a_demanded_library_is_the_only_candidate() {
        let demanded = Path::new("/some/where/libcudart.so.13");
        let list = candidates(
            environment(&[("CUDART_LIBRARY", demanded), ("CUDA_HOME", Path::new("/x"))]),
            &["/in/process/libcudart.so.13".into()],
        );
        assert_eq!(list, [Candidate::Demanded(demanded.into())]);
    }

    #[test]
    fn an_empty_demand_is_refused_and_nothing_else_is_tried() {
        let list = candidates(environment(&[("CUDART_LIBRARY", Path::new(""))]), &[]);
        let error = load(list).unwrap_err();
        assert_eq!(error.tried(), ["CUDART_LIBRARY is set but empty"]);
    }

    #[test]
    fn a_demanded_library_that_is_absent_or_no_library_is_an_error_that_names_it() {
        let root = folder("demanded", &["libcudart.so.13"]);
        for file in ["nothing-here.so", "libcudart.so.13"] {
            let path = root.join(file);
            let error =
                load(candidates(environment(&[("CUDART_LIBRARY", &path)]), &[])).unwrap_err();
            assert_eq!(error.tried().len(), 1, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_library_that_is_no_runtime_says_so() {
        let error = load(vec![Candidate::Demanded("libc.so.6".into())]).unwrap_err();
        assert!(error.to_string().contains("no CUDA runtime: it has no cuda"), "{error}");
    }

    #[test]
    #[cfg(not(windows))]
    fn the_search_goes_from_the_process_to_the_system_to_toolkits_to_python() {
        let root = folder(
            "order",
            &[
                "home/lib64/libcudart.so.12",
                "path/lib/libcudart.so.13",
                "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcudart.so.13",
                "venv/lib/python3.12/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12",
                "conda/lib/libcudart.so.12",
            ],
        );
        let list = candidates(
            environment(&[
                ("CUDA_HOME", &root.join("home")),
                ("CUDA_PATH", &root.join("path")),
                ("VIRTUAL_ENV", &root.join("venv")),
                ("CONDA_PREFIX", &root.join("conda")),
            ]),
            &["/torch/libcudart-1234.so.12".into()],
        );
        let ours: Vec<&Candidate> = list
            .iter()
            .filter(|candidate| match candidate {
                Candidate::File(path) => path.starts_with(&root),
                _ => true,
            })
            .collect();
        let file = |path: &str| Candidate::File(root.join(path));
        let python = "venv/lib/python3.12/site-packages/nvidia";
        assert_eq!(
            ours,
            [
                &Candidate::InProcess("/torch/libcudart-1234.so.12".into()),
                &Candidate::System("libcudart.so.13"),
                &Candidate::System("libcudart.so.12"),
                &file("home/lib64/libcudart.so.12"),
                &file("path/lib/libcudart.so.13"),
                &file(&format!("{python}/cu13/lib/libcudart.so.13")),
                &file(&format!("{python}/cuda_runtime/lib/libcudart.so.12")),
                &file("conda/lib/libcudart.so.12"),
            ]
        );
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_relative_root_is_refused_by_name() {
        let list = candidates(environment(&[("CUDA_HOME", Path::new("cuda"))]), &[]);
        let refused = list.iter().any(|candidate| {
            matches!(candidate, Candidate::Refused(why) if why.contains("CUDA_HOME=cuda"))
        });
        assert!(refused, "{list:?}");
    }
}
