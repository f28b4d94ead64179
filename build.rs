//! Compiles `kernels/kernels.cu` into the image that the library embeds.
//!
//! The image has machine code for each listed architecture that this nvcc knows, and PTX for later
//! architectures. If there is no nvcc, or it fails, the committed image of the same source is
//! embedded.
//!
//! `CPU_GPU_BUFFER_NVCC=never` keeps nvcc out of the build. The build then depends on no other
//! variable. `PATH` often differs between an editor and a shell, and each would rebuild the crate.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "kernels/kernels.cu";
const COMMITTED: &str = "kernels/kernels.fatbin";
const ARCHITECTURES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    let image =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.fatbin");
    let compiled = match find_nvcc() {
        None => false,
        Some(nvcc) => match compile(&nvcc, &image) {
            Ok(()) => true,
            Err(why) => {
                println!("cargo::warning={SOURCE}: {why}; the committed image is embedded instead");
                false
            }
        },
    };
    if !compiled {
        // `fs::copy` would copy the permissions of a read-only source as well.
        let committed = std::fs::read(COMMITTED).expect("the committed image is in the package");
        std::fs::write(&image, committed).expect("OUT_DIR is writable");
    }
}

/// The value of an environment variable. The build then depends on it.
fn variable(name: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var_os(name)
}

/// Finds nvcc: `NVCC`, or `nvcc` on the path, or in the usual folders of a toolkit.
///
/// docs.rs never compiles kernels.
fn find_nvcc() -> Option<PathBuf> {
    if variable("DOCS_RS").is_some() {
        return None;
    }
    match variable("CPU_GPU_BUFFER_NVCC") {
        None => {}
        Some(value) if value == "never" => return None,
        Some(value) => {
            println!("cargo::error=CPU_GPU_BUFFER_NVCC is {value:?}, and can only be \"never\"");
            return None;
        }
    }
    if let Some(nvcc) = variable("NVCC") {
        return Some(nvcc.into());
    }
    let path = variable("PATH").unwrap_or_default();
    let homes: Vec<_> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).collect();
    env::split_paths(&path)
        .chain(homes.iter().map(|home| Path::new(home).join("bin")))
        .chain(["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from))
        .map(|directory| directory.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))
        .find(|nvcc| nvcc.is_absolute() && nvcc.is_file())
}

/// Compiles the kernels into `image`.
fn compile(nvcc: &Path, image: &Path) -> Result<(), String> {
    let known = run(Command::new(nvcc).arg("--list-gpu-code"))?;
    let mut build = cc::Build::new();
    // `cc` finds nvcc's host compiler and its flags. Its default flags are for object files.
    build.cuda(true).cudart("none").no_default_flags(true).warnings(false).compiler(nvcc);
    let tool = build.try_get_compiler().map_err(|error| error.to_string())?;
    let mut command = tool.to_command();
    command.args(["-fatbin", "-std=c++17", SOURCE, "-o"]).arg(image);
    for architecture in ARCHITECTURES {
        if known.split_whitespace().any(|code| code == format!("sm_{architecture}")) {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
    }
    command.arg(format!("-gencode=arch=compute_{0},code=compute_{0}", ARCHITECTURES[0]));
    run(&mut command).map(drop)
}

/// Runs a command and returns its output, or the first line of its error.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{} did not start: {error}", command.get_program().display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(format!("{} failed: {line}", command.get_program().display()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
