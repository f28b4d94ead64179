//! The search for the CUDA runtime.
//!
//! The search first makes a list of candidates from the environment. Then it opens them in order
//! and keeps the first one that meets all conditions:
//!
//! - The library opens and returns its version.
//! - The crate supports its major version.
//! - It is not too new for the driver.
//! - It has every function.
//!
//! The errors of the other candidates become part of the error text.
//!
//! A runtime is too new if its major version is newer than the driver's. A newer minor version
//! works on an older driver ("CUDA Compatibility, Minor Version Compatibility").

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::bindings::{Functions, cudaError};
use crate::runtime::{LoadError, MAJORS, NEED, Runtime, Version};
use crate::search_paths::{SearchRoot, search_roots};

/// Loads the first usable runtime.
pub(crate) fn find() -> Result<Runtime, LoadError> {
    load(candidates(|name| env::var_os(name), &loaded_in_process()))
}

/// One entry of the search.
#[derive(Debug, PartialEq, Eq)]
enum Candidate {
    /// The path in `CUDART_LIBRARY`.
    Named(PathBuf),
    /// A file that this process has already loaded.
    InProcess(PathBuf),
    /// A name for the system's loader.
    System(&'static str),
    /// A file below a folder in which CUDA is installed.
    File(PathBuf),
    /// A root or file that the search skips, with the reason.
    Skipped(String),
}

fn candidates(
    variable: impl Fn(&str) -> Option<OsString>,
    in_process: &[PathBuf],
) -> Vec<Candidate> {
    if let Some(path) = variable("CUDART_LIBRARY") {
        return vec![if path.is_empty() {
            Candidate::Skipped("CUDART_LIBRARY is set but empty".into())
        } else {
            Candidate::Named(path.into())
        }];
    }
    let mut list = vec![Candidate::Skipped("CUDART_LIBRARY is not set".into())];
    list.extend(in_process.iter().cloned().map(Candidate::InProcess));
    list.extend(LIBRARY_NAMES.map(Candidate::System));
    for root in search_roots(variable, (env::consts::OS, env::consts::ARCH)) {
        match root {
            Ok(root) => add_files(&root, &mut list),
            Err(why) => list.push(Candidate::Skipped(why)),
        }
    }
    list
}

/// Adds the runtimes below a root, the skipped files there, and the folders without either.
fn add_files(root: &SearchRoot, list: &mut Vec<Candidate>) {
    if !root.root.is_dir() {
        return list.push(Candidate::Skipped(format!("{}: no such folder", root.label)));
    }
    let mut empty = Vec::new();
    for folder in &root.folders {
        let directory = root.root.join(folder);
        let files = LIBRARY_NAMES.map(|name| directory.join(name));
        let files: Vec<PathBuf> = files.into_iter().filter(|file| file.is_file()).collect();
        let skipped = skipped_files(&directory, !files.is_empty());
        if files.is_empty() && skipped.is_empty() {
            empty.push(folder.display().to_string());
        }
        for file in files.into_iter().map(Candidate::File) {
            if !list.contains(&file) {
                list.push(file);
            }
        }
        list.extend(skipped.into_iter().map(Candidate::Skipped));
    }
    if !empty.is_empty() {
        let empty = empty.join(", ");
        list.push(Candidate::Skipped(format!("{}: no {FILE_PREFIX} in {empty}", root.label)));
    }
}

/// The files of a directory that look like a runtime but are not opened, each with the reason.
///
/// If the directory has a usable name, other names of supported versions are links to the same
/// library. They are not listed.
fn skipped_files(directory: &Path, has_runtime: bool) -> Vec<String> {
    let Ok(entries) = directory.read_dir() else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(FILE_PREFIX)).collect();
    names.sort();
    let mut reasons: Vec<String> = Vec::new();
    for name in names {
        let why = match major_version(&name) {
            Some(major) if !MAJORS.contains(&major) => format!("CUDA {major}, {NEED}"),
            _ if has_runtime => continue,
            Some(_) if LIBRARY_NAMES.contains(&name.as_str()) => "a broken link".into(),
            Some(_) => format!("not named {}", LIBRARY_NAMES.join(" or ")),
            None if name == FILE_PREFIX => {
                reasons.push(format!("{}: {FILE_PREFIX} without a version", directory.display()));
                continue;
            }
            None => continue,
        };
        // One line for each major version: `libcudart.so.11.0` links to `libcudart.so.11.8.89`.
        if !reasons.iter().any(|reason| reason.ends_with(&why)) {
            reasons.push(format!("{}: {why}", directory.join(name).display()));
        }
    }
    reasons
}

/// The major version in a file name.
#[cfg(not(windows))]
fn major_version(name: &str) -> Option<i32> {
    name.strip_prefix(FILE_PREFIX)?.strip_prefix('.')?.split('.').next()?.parse().ok()
}

/// The major version in a file name: 12 in `cudart64_12.dll`, and 11 in `cudart64_110.dll`.
#[cfg(windows)]
fn major_version(name: &str) -> Option<i32> {
    let number: i32 =
        name.strip_prefix(FILE_PREFIX)?.strip_prefix('_')?.split('.').next()?.parse().ok()?;
    Some(if number < 100 { number } else { number / 10 })
}

/// The beginning of every runtime's file name.
#[cfg(not(windows))]
const FILE_PREFIX: &str = "libcudart.so";
#[cfg(windows)]
const FILE_PREFIX: &str = "cudart64";

#[cfg(not(windows))]
const LIBRARY_NAMES: [&str; 2] = ["libcudart.so.13", "libcudart.so.12"];
#[cfg(windows)]
const LIBRARY_NAMES: [&str; 2] = ["cudart64_13.dll", "cudart64_12.dll"];

fn load(candidates: Vec<Candidate>) -> Result<Runtime, LoadError> {
    let mut tried = Vec::new();
    // The first runtime that was passed over, and the index of its line in `tried`. A runtime that
    // `CUDART_LIBRARY` names is the only candidate, so it is used in any case.
    let mut spare: Option<(Runtime, usize)> = None;
    for candidate in candidates {
        let in_process = matches!(candidate, Candidate::InProcess(_));
        let (label, name) = match candidate {
            Candidate::Named(path) => (format!("CUDART_LIBRARY={}", path.display()), path),
            Candidate::InProcess(path) => {
                (format!("already in the process: {}", path.display()), path)
            }
            Candidate::System(name) => (format!("system loader: {name}"), name.into()),
            Candidate::File(path) => (path.display().to_string(), path),
            Candidate::Skipped(why) => {
                tried.push(why);
                continue;
            }
        };
        let runtime = match open(&name, in_process) {
            Ok(runtime) => runtime,
            Err(why) => {
                tried.push(format!("{label}: {why}"));
                continue;
            }
        };
        let Some(why) = shortcoming(&runtime) else {
            return Ok(runtime.instead_of(tried));
        };
        spare.get_or_insert((runtime, tried.len()));
        tried.push(format!("{label}: {why}"));
    }
    match spare {
        Some((runtime, line)) => {
            tried.remove(line);
            Ok(runtime.instead_of(tried))
        }
        None => Err(LoadError::of(tried)),
    }
}

/// Functions that callers can do without. The oldest supported versions lack them.
const NEWER: [&str; 1] = ["cudaGetDriverEntryPointByVersion"];

/// The reason to pass over a runtime that was loaded.
///
/// Without a driver the version does not matter. Every runtime then returns the same error.
fn shortcoming(runtime: &Runtime) -> Option<String> {
    let driver = driver_version(runtime).unwrap_or(0);
    if driver != 0 && runtime.version() / 1000 > driver / 1000 {
        let (runtime, driver) = (Version(runtime.version()), Version(driver));
        return Some(format!(
            "CUDA {runtime} is too new for the driver, which supports CUDA {driver}"
        ));
    }
    let mut lacking = runtime.absent();
    lacking.retain(|name| !NEWER.contains(name));
    match lacking[..] {
        [] => None,
        [name] => Some(format!("function {name} is missing")),
        [name, ..] => Some(format!("{} functions are missing, for example {name}", lacking.len())),
    }
}

fn driver_version(runtime: &Runtime) -> Option<i32> {
    let get_version = runtime.functions.cudaDriverGetVersion?;
    let mut version = 0;
    // SAFETY: `version` is valid for a write of an int. The function may be called before any other
    // and needs no device ("CUDA Runtime API, Version Management").
    let status = unsafe { get_version(&mut version) };
    (status == cudaError::cudaSuccess).then_some(version)
}

fn open(name: &Path, in_process: bool) -> Result<Runtime, String> {
    let library = open_library(name, in_process).map_err(|error| system_text(&error, name))?;
    let runtime = Runtime::of(Functions::of(&library), name.to_path_buf())?;
    // The library is never unloaded. Its function addresses and error texts stay in use.
    std::mem::forget(library);
    Ok(runtime)
}

/// The system's error text without the file name, which the caller already has.
fn system_text(error: &libloading::Error, name: &Path) -> String {
    let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    match text.strip_prefix(&format!("{}: ", name.display())) {
        Some(rest) => rest.into(),
        None => text,
    }
}

/// Opens a library. One that is already in the process is only looked up, as its name may be
/// relative to the current directory.
#[cfg(not(windows))]
fn open_library(name: &Path, in_process: bool) -> Result<Library, libloading::Error> {
    use libloading::os::unix::{Library as Native, RTLD_LAZY, RTLD_LOCAL};
    let flags = RTLD_LAZY | RTLD_LOCAL | if in_process { libc::RTLD_NOLOAD } else { 0 };
    // SAFETY: loading a library runs its initialisers. Those of the CUDA runtime have no
    // preconditions. The environment variables that name other files are trusted input.
    unsafe { Native::open(Some(name), flags) }.map(Into::into)
}

/// Opens a library without a search of the current directory, which is part of the default search
/// of Windows.
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

/// The CUDA runtimes that this process has already loaded.
///
/// A wheel may contain a runtime under a hashed name, so only the beginning of the name counts.
#[cfg(target_os = "linux")]
fn loaded_in_process() -> Vec<PathBuf> {
    use std::ffi::{CStr, OsStr, c_int, c_void};
    use std::os::unix::ffi::OsStrExt;

    unsafe extern "C" fn note(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        found: *mut c_void,
    ) -> c_int {
        // SAFETY: `dl_iterate_phdr` passes a record that is valid during the callback.
        let info = unsafe { &*info };
        // SAFETY: `found` is the vector below, and nothing else borrows it during the call.
        let found = unsafe { &mut *found.cast::<Vec<PathBuf>>() };
        if !info.dlpi_name.is_null() {
            // SAFETY: the name is not null, and is NUL-terminated and valid during the callback.
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

    /// A new folder with files at the given paths. None of them is a library.
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
    fn a_named_library_is_the_only_candidate() {
        let named = Path::new("/some/where/libcudart.so.13");
        let list = candidates(
            environment(&[("CUDART_LIBRARY", named), ("CUDA_HOME", Path::new("/x"))]),
            &["/in/process/libcudart.so.13".into()],
        );
        assert_eq!(list, [Candidate::Named(named.into())]);
    }

    #[test]
    fn an_empty_variable_is_an_error_and_ends_the_search() {
        let list = candidates(environment(&[("CUDART_LIBRARY", Path::new(""))]), &[]);
        let error = load(list).unwrap_err();
        assert_eq!(error.tried(), ["CUDART_LIBRARY is set but empty"]);
    }

    #[test]
    fn a_named_library_that_is_missing_or_invalid_is_an_error_that_names_it() {
        let root = folder("named", &["libcudart.so.13"]);
        for (file, why) in [("nothing-here.so", "No such file"), ("libcudart.so.13", "too short")] {
            let path = root.join(file);
            let error =
                load(candidates(environment(&[("CUDART_LIBRARY", &path)]), &[])).unwrap_err();
            assert_eq!(error.tried().len(), 1, "{error}");
            let named = format!("CUDART_LIBRARY={}: ", path.display());
            assert!(error.tried()[0].starts_with(&named), "{error}");
            // The texts are those of Linux's loader.
            assert!(!cfg!(target_os = "linux") || error.to_string().contains(why), "{error}");
        }
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_library_that_is_no_runtime_says_so() {
        let error = load(vec![Candidate::Named("libc.so.6".into())]).unwrap_err();
        assert!(error.to_string().contains("not a CUDA runtime: cuda"), "{error}");
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
                Candidate::Skipped(_) => false,
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

    /// The skipped entries of a search, limited to variables and to files below `root`.
    fn skipped(root: &Path, variables: &[(&str, &Path)]) -> Vec<String> {
        let list = candidates(environment(variables), &[]).into_iter();
        let skipped = list.filter_map(|candidate| match candidate {
            Candidate::Skipped(why) => Some(why),
            _ => None,
        });
        // The machine may have toolkits of its own.
        let ours =
            skipped.filter(|why| why.contains(" is ") || why.contains(root.to_str().unwrap()));
        ours.map(|why| why.replace(root.to_str().unwrap(), "ROOT")).collect()
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn every_variable_and_every_folder_without_a_runtime_is_listed() {
        let root = folder(
            "nothing",
            &["path/lib/README", "venv/lib/python3.12/site-packages/nvidia/cu13/lib/README"],
        );
        assert_eq!(
            skipped(
                &root,
                &[
                    ("CUDA_HOME", Path::new("")),
                    ("CUDA_PATH", &root.join("path")),
                    ("VIRTUAL_ENV", &root.join("venv")),
                    ("CONDA_PREFIX", &root.join("absent")),
                ]
            ),
            [
                "CUDART_LIBRARY is not set",
                "CUDA_HOME is empty",
                "CUDA_PATH=ROOT/path: no libcudart.so in lib64, lib, targets/x86_64-linux/lib",
                "VIRTUAL_ENV=ROOT/venv: no libcudart.so in lib64, lib, targets/x86_64-linux/lib, \
                 lib/python3.12/site-packages/nvidia/cu13/lib, \
                 lib/python3.12/site-packages/nvidia/cuda_runtime/lib",
                "CONDA_PREFIX=ROOT/absent: no such folder",
            ]
        );
        fs::remove_dir_all(&root).unwrap();
        let unset = ["CUDART_LIBRARY", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"];
        assert_eq!(skipped(&root, &[]), unset.map(|name| format!("{name} is not set")));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn every_skipped_file_is_listed_with_the_reason() {
        let root = folder(
            "skipped",
            &[
                "home/lib64/libcudart.so.11.0",
                "home/lib64/libcudart.so.11.8.89",
                "home/lib64/libcudart.so.10.2",
                "home/lib64/libcudart_static.a",
                "home/lib/libcudart.so",
                "path/lib64/libcudart.so.12.4.127",
                // A folder with a usable name. Only other major versions are listed.
                "venv/lib/libcudart.so",
                "venv/lib/libcudart.so.12",
                "venv/lib/libcudart.so.12.4.127",
                "venv/lib/libcudart.so.11.0",
            ],
        );
        std::os::unix::fs::symlink("nowhere", root.join("path/lib64/libcudart.so.13")).unwrap();
        let named = skipped(
            &root,
            &[
                ("CUDA_HOME", &root.join("home")),
                ("CUDA_PATH", &root.join("path")),
                ("VIRTUAL_ENV", &root.join("venv")),
            ],
        );
        let files: Vec<&String> =
            named.iter().filter(|why| !why.contains(" set") && !why.contains(": no ")).collect();
        assert_eq!(
            files,
            [
                "ROOT/home/lib64/libcudart.so.10.2: CUDA 10, need 12 or 13",
                "ROOT/home/lib64/libcudart.so.11.0: CUDA 11, need 12 or 13",
                "ROOT/home/lib: libcudart.so without a version",
                "ROOT/path/lib64/libcudart.so.12.4.127: not named libcudart.so.13 or libcudart.so.12",
                "ROOT/path/lib64/libcudart.so.13: a broken link",
                "ROOT/venv/lib/libcudart.so.11.0: CUDA 11, need 12 or 13",
            ]
        );
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_relative_root_is_skipped_by_name() {
        let list = candidates(environment(&[("CUDA_HOME", Path::new("cuda"))]), &[]);
        let skipped = list.iter().any(|candidate| {
            matches!(candidate, Candidate::Skipped(why) if why.contains("CUDA_HOME=cuda"))
        });
        assert!(skipped, "{list:?}");
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
            let found: Vec<SearchRoot> =
                search_roots(environment(&variables), target).into_iter().flatten().collect();
            let directories: Vec<PathBuf> = found
                .iter()
                .flat_map(|root| root.folders.iter().map(|folder| root.root.join(folder)))
                .collect();
            let roots = ["/home", "/usr/local/cuda", "/opt/cuda", "/venv"].map(Path::new);
            let mut expected: Vec<PathBuf> =
                roots.iter().flat_map(|root| subs.iter().map(|sub| root.join(sub))).collect();
            if target.0 == "windows" {
                // On other systems these folders depend on the installed Pythons.
                let packages = Path::new("/venv/Lib/site-packages/nvidia");
                expected
                    .extend(["cu13/bin/x86_64", "cuda_runtime/bin"].map(|sub| packages.join(sub)));
            }
            assert_eq!(directories, expected);
        }
    }
}
