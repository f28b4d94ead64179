//! The folders in which CUDA may be installed.
//!
//! The loader searches them when a program runs. The build script includes this file, too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A folder in which CUDA may be installed.
#[derive(Debug, PartialEq, Eq)]
pub struct SearchRoot {
    /// The name in error texts: `CUDA_HOME=/opt/cuda-12`, or the path alone.
    pub label: String,
    pub root: PathBuf,
    /// The folders below `root` that may hold libraries, in search order.
    pub folders: Vec<PathBuf>,
}

/// All roots in search order: toolkits, an active virtual environment, conda.
///
/// A variable that names no usable root is an error text.
pub fn search_roots(
    variable: impl Fn(&str) -> Option<OsString>,
    (os, architecture): (&str, &str),
) -> Vec<Result<SearchRoot, String>> {
    let from_variable = |name: &str, has_wheels: bool| {
        let root = PathBuf::from(variable(name).ok_or_else(|| format!("{name} is not set"))?);
        if root.as_os_str().is_empty() {
            return Err(format!("{name} is empty"));
        }
        let label = format!("{name}={}", root.display());
        if !root.is_absolute() {
            return Err(format!(
                "{label} is a relative path; the current directory is never searched"
            ));
        }
        let mut folders = toolkit_folders(os, architecture);
        if has_wheels {
            folders.extend(wheel_folders(&root, os));
        }
        Ok(SearchRoot { label, root, folders })
    };
    let fixed = |root: &str| {
        let folders = toolkit_folders(os, architecture);
        Ok(SearchRoot { label: root.into(), root: root.into(), folders })
    };
    vec![
        from_variable("CUDA_HOME", false),
        from_variable("CUDA_PATH", false),
        fixed("/usr/local/cuda"),
        fixed("/opt/cuda"),
        from_variable("VIRTUAL_ENV", true),
        from_variable("CONDA_PREFIX", true),
    ]
}

/// The library folders of a toolkit or a conda prefix.
fn toolkit_folders(os: &str, architecture: &str) -> Vec<PathBuf> {
    let folders: &[&str] = match (os, architecture) {
        ("windows", _) => &["bin", "bin/x64"],
        // CUDA names the ARM server platform `sbsa` and the embedded one `aarch64`.
        (_, "aarch64") => &["lib64", "lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"],
        _ => &["lib64", "lib", "targets/x86_64-linux/lib"],
    };
    folders.iter().map(PathBuf::from).collect()
}

/// The library folders of the CUDA wheels in a Python environment, one for each major version.
fn wheel_folders(root: &Path, os: &str) -> Vec<PathBuf> {
    let (packages, folders) = match os {
        "windows" => (vec!["Lib/site-packages".into()], ["cu13/bin/x86_64", "cuda_runtime/bin"]),
        _ => (site_packages(root), ["cu13/lib", "cuda_runtime/lib"]),
    };
    let in_package = |package: PathBuf| folders.map(|folder| package.join("nvidia").join(folder));
    packages.into_iter().flat_map(in_package).collect()
}

/// The `site-packages` folder of each Python version in the environment.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let pythons = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python"))
        .map(|entry| Path::new("lib").join(entry.file_name()).join("site-packages"));
    let mut pythons: Vec<PathBuf> = pythons.collect();
    pythons.sort();
    pythons
}
