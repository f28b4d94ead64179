//! Where CUDA is installed: for the search when a program runs, and for the build script, which has this file too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The directories that are looked through, in this order: those of toolkits, and those of an active virtual
/// environment and conda. And what is not looked through, each with the reason.
pub fn directories(
    variable: impl Fn(&str) -> Option<OsString>,
    (os, architecture): (&str, &str),
) -> (Vec<PathBuf>, Vec<String>) {
    let mut refused = Vec::new();
    let mut root = |name: &str| {
        let root = variable(name).filter(|value| !value.is_empty()).map(PathBuf::from)?;
        if root.is_absolute() {
            return Some(root);
        }
        refused.push(format!(
            "{name}={} is relative to the current directory, which is never searched",
            root.display()
        ));
        None
    };
    let mut toolkits: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| root(name)).collect();
    toolkits.extend(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| root(name));
    let mut directories = Vec::new();
    for root in toolkits {
        directories.extend(of_toolkit(&root, os, architecture));
    }
    for root in environments {
        directories.extend(of_toolkit(&root, os, architecture));
        directories.extend(of_wheels(&root, os));
    }
    (directories, refused)
}

/// Where a toolkit, or a conda prefix, keeps its libraries.
fn of_toolkit(root: &Path, os: &str, architecture: &str) -> Vec<PathBuf> {
    let subs: &[&str] = match (os, architecture) {
        ("windows", _) => &["bin", "bin/x64"],
        // Servers, and boards.
        (_, "aarch64") => &["lib64", "lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"],
        _ => &["lib64", "lib", "targets/x86_64-linux/lib"],
    };
    subs.iter().map(|sub| root.join(sub)).collect()
}

/// Where the CUDA wheels of a Python environment keep theirs: one folder for each major version.
fn of_wheels(root: &Path, os: &str) -> Vec<PathBuf> {
    let (packages, subs) = match os {
        "windows" => {
            (vec![root.join("Lib/site-packages")], ["cu13/bin/x86_64", "cuda_runtime/bin"])
        }
        _ => (pythons(&root.join("lib")), ["cu13/lib", "cuda_runtime/lib"]),
    };
    let of_package = |package: PathBuf| subs.map(|sub| package.join("nvidia").join(sub));
    packages.into_iter().flat_map(of_package).collect()
}

/// The packages of each Python there is.
fn pythons(library: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(library) else { return Vec::new() };
    let pythons = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python"))
        .map(|entry| entry.path().join("site-packages"));
    let mut pythons: Vec<PathBuf> = pythons.collect();
    pythons.sort();
    pythons
}
