//! Where CUDA is installed: for the search when a program runs, and for the build script, which has this file too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A place where CUDA may be installed.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// As an error names it: `CUDA_HOME=/opt/cuda-12`, or the path alone.
    pub name: String,
    pub root: PathBuf,
    /// The folders of the root that are looked through, in this order.
    pub folders: Vec<PathBuf>,
}

/// The places that are looked through, in this order: toolkits, an active virtual environment,
/// conda. A variable that gives no place is an error, with the reason.
pub fn places(
    variable: impl Fn(&str) -> Option<OsString>,
    (os, architecture): (&str, &str),
) -> Vec<Result<Place, String>> {
    let of_variable = |name: &str, wheels: bool| {
        let root = PathBuf::from(variable(name).ok_or_else(|| format!("{name} is not set"))?);
        if root.as_os_str().is_empty() {
            return Err(format!("{name} is empty"));
        }
        let named = format!("{name}={}", root.display());
        if !root.is_absolute() {
            return Err(format!(
                "{named} is relative to the current directory, which is never searched"
            ));
        }
        let mut folders = of_toolkit(os, architecture);
        if wheels {
            folders.extend(of_wheels(&root, os));
        }
        Ok(Place { name: named, root, folders })
    };
    let fixed = |root: &str| {
        let folders = of_toolkit(os, architecture);
        Ok(Place { name: root.into(), root: root.into(), folders })
    };
    vec![
        of_variable("CUDA_HOME", false),
        of_variable("CUDA_PATH", false),
        fixed("/usr/local/cuda"),
        fixed("/opt/cuda"),
        of_variable("VIRTUAL_ENV", true),
        of_variable("CONDA_PREFIX", true),
    ]
}

/// Where a toolkit, or a conda prefix, keeps its libraries.
fn of_toolkit(os: &str, architecture: &str) -> Vec<PathBuf> {
    let subs: &[&str] = match (os, architecture) {
        ("windows", _) => &["bin", "bin/x64"],
        // Servers, and boards.
        (_, "aarch64") => &["lib64", "lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"],
        _ => &["lib64", "lib", "targets/x86_64-linux/lib"],
    };
    subs.iter().map(PathBuf::from).collect()
}

/// Where the CUDA wheels of a Python environment keep theirs: one folder for each major version.
fn of_wheels(root: &Path, os: &str) -> Vec<PathBuf> {
    let (packages, subs) = match os {
        "windows" => (vec!["Lib/site-packages".into()], ["cu13/bin/x86_64", "cuda_runtime/bin"]),
        _ => (pythons(root), ["cu13/lib", "cuda_runtime/lib"]),
    };
    let of_package = |package: PathBuf| subs.map(|sub| package.join("nvidia").join(sub));
    packages.into_iter().flat_map(of_package).collect()
}

/// The packages of each Python there is.
fn pythons(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let pythons = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python"))
        .map(|entry| Path::new("lib").join(entry.file_name()).join("site-packages"));
    let mut pythons: Vec<PathBuf> = pythons.collect();
    pythons.sort();
    pythons
}
