//! Finds the CUDA runtime and loads it.
//!
//! The search is a list of candidates, made from the environment before anything is opened; the first
//! that opens, answers `cudaRuntimeGetVersion` and is of a known major version is kept for good. What
//! the others said is kept too, for the text of the error.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::bindings::Functions;
use crate::places;
use crate::runtime::{LoadError, Runtime};

/// Looks for the runtime in every place, and loads the first that can be used.
pub(crate) fn find() -> Result<Runtime, LoadError> {
    load(candidates(|name| env::var_os(name), &loaded_in_process()))
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
    let target = (env::consts::OS, env::consts::ARCH);
    let (directories, refused) = places::directories(variable, target);
    list.extend(refused.into_iter().map(Candidate::Refused));
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
    Err(LoadError::of(tried))
}

fn open(name: &Path, in_process: bool) -> Result<Runtime, String> {
    let library = open_library(name, in_process).map_err(|error| reason(&error, name))?;
    let runtime = Runtime::of(Functions::of(&library), name.to_path_buf())?;
    // Never unloaded: addresses of its functions and texts of its errors stay in use.
    std::mem::forget(library);
    Ok(runtime)
}

/// What the system says, which is the error's source; it begins with the name, which is said already.
fn reason(error: &libloading::Error, name: &Path) -> String {
    let said = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    match said.strip_prefix(&format!("{}: ", name.display())) {
        Some(rest) => rest.into(),
        None => said,
    }
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
        for (file, why) in [("nothing-here.so", "No such file"), ("libcudart.so.13", "too short")] {
            let path = root.join(file);
            let error =
                load(candidates(environment(&[("CUDART_LIBRARY", &path)]), &[])).unwrap_err();
            assert_eq!(error.tried().len(), 1, "{error}");
            let named = format!("CUDART_LIBRARY={}: ", path.display());
            assert!(error.tried()[0].starts_with(&named), "{error}");
            // In the words of Linux's loader.
            assert!(!cfg!(target_os = "linux") || error.to_string().contains(why), "{error}");
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
    #[test]
    #[cfg(not(windows))]
    fn each_system_has_its_own_folders_of_a_toolkit() {
        for (target, subs) in [
            (("linux", "x86_64"), &["lib64", "lib", "targets/x86_64-linux/lib"][..]),
            (
                ("linux", "aarch64"),
                &["lib64", "lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"],
            ),
            (("windows", "x86_64"), &["bin", "bin/x64"]),
        ] {
            let (home, venv) = (Path::new("/home"), Path::new("/venv"));
            let variables = [("CUDA_HOME", home), ("VIRTUAL_ENV", venv)];
            let (directories, refused) = places::directories(environment(&variables), target);
            let roots = ["/home", "/usr/local/cuda", "/opt/cuda", "/venv"].map(Path::new);
            let mut expected: Vec<PathBuf> =
                roots.iter().flat_map(|root| subs.iter().map(|sub| root.join(sub))).collect();
            if target.0 == "windows" {
                // Elsewhere these depend on the Pythons that are there.
                let packages = Path::new("/venv/Lib/site-packages/nvidia");
                expected
                    .extend(["cu13/bin/x86_64", "cuda_runtime/bin"].map(|sub| packages.join(sub)));
            }
            assert_eq!((directories, refused), (expected, Vec::new()));
        }
    }
}
