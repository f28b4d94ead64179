//! Which runtime the tests run on, and what else needs no CUDA. The unit tests and the programs over the raw
//! bindings share this file alone.

#![allow(dead_code)]

use std::io::Write;

/// `CPU_GPU_BUFFER_TEST_RUNTIME` says `sim`, `real` or `cpu`; unsaid, it is the real one where there is a driver,
/// and the simulated one elsewhere. Chosen before `main`, while there is one thread, by naming it to the loader.
/// With the feature `static` there is no choice: the runtime is part of this program, and the real one.
#[cfg(target_os = "linux")]
#[used]
#[unsafe(link_section = ".init_array")]
static CHOOSE: extern "C" fn() = choose;

#[cfg(target_os = "linux")]
extern "C" fn choose() {
    if std::env::var_os("CUDART_LIBRARY").is_some() {
        return;
    }
    let runtime = match std::env::var("CPU_GPU_BUFFER_TEST_RUNTIME").as_deref() {
        Ok("real") => return,
        Ok(other) if is_linked() => panic!("{other} cannot be chosen with the feature `static`"),
        Err(_) if is_linked() => return,
        Ok("cpu") => "/left/out/by/CPU_GPU_BUFFER_TEST_RUNTIME".into(),
        Ok("sim") => simulated(),
        Ok(other) => panic!("CPU_GPU_BUFFER_TEST_RUNTIME={other} is none of sim, real, cpu"),
        // SAFETY: a NUL-terminated name; the driver's library may be loaded at any time.
        Err(_) if !unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY) }.is_null() => {
            return;
        }
        Err(_) => simulated(),
    };
    // SAFETY: before `main` there is one thread.
    unsafe { std::env::set_var("CUDART_LIBRARY", runtime) };
}

/// The simulated runtime's library: beside this program in a build, in `lib` where the tests are packed.
pub fn simulated() -> std::path::PathBuf {
    let program = std::env::current_exe().unwrap();
    let directory = program.parent().unwrap();
    let name = "libcudart_sim.so";
    let places = [directory.join(name), directory.join("../lib").join(name)];
    let found = places.iter().find(|place| place.is_file());
    found.unwrap_or_else(|| panic!("the simulated runtime is not in {places:?}")).clone()
}

/// Whether the runtime is part of this program, so that no other one can be loaded.
pub fn is_linked() -> bool {
    cfg!(feature = "static")
}

/// Whether this program runs on the simulated runtime.
pub fn is_simulated() -> bool {
    let named = std::env::var("CUDART_LIBRARY");
    !is_linked() && named.is_ok_and(|library| library.contains("cudart_sim"))
}

/// Said past the test runner's capture: a test that leaves something out must be seen to.
pub fn left_out(test: &str, why: &str) {
    let line = format!("{test}: left out, {why}\n");
    // In one piece: other tests write at the same time.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// One test of this program, to be run in a process of its own with some variables set.
pub fn subprocess(test: &str, variables: &[(&str, &str)]) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--include-ignored"]);
    command.env(SUBPROCESS, "1").envs(variables.iter().copied());
    command
}

/// Runs one test of this program in a process of its own, with some variables set.
pub fn in_subprocess(test: &str, variables: &[(&str, &str)]) -> std::process::Output {
    subprocess(test, variables).output().unwrap()
}

const SUBPROCESS: &str = "CPU_GPU_BUFFER_SUBPROCESS";

/// Whether this is the process that [`subprocess`] describes.
pub fn is_subprocess() -> bool {
    std::env::var_os(SUBPROCESS).is_some()
}
