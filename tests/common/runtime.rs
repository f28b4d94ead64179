//! The choice of the runtime, and other code that needs no CUDA.
//!
//! Unit tests and programs over the raw bindings include only this file.

#![allow(dead_code)]

use std::io::Write;

/// Chooses the runtime before `main`.
///
/// `CPU_GPU_BUFFER_TEST_RUNTIME` is `sim`, `real` or `cpu`. The default is the real runtime if
/// there is a driver, and else the simulated one. The choice becomes the loader's `CUDART_LIBRARY`,
/// which is safe to set while there is one thread. With the feature `static` the linked runtime is
/// the only one.
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
        // SAFETY: the name is NUL-terminated. The driver's library may be loaded at any time.
        Err(_) if !unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY) }.is_null() => {
            return;
        }
        Err(_) => simulated(),
    };
    // SAFETY: before `main` there is one thread.
    unsafe { std::env::set_var("CUDART_LIBRARY", runtime) };
}

/// The library of the simulated runtime. It is next to this program, or in `lib` of packed tests.
pub fn simulated() -> std::path::PathBuf {
    let program = std::env::current_exe().unwrap();
    let directory = program.parent().unwrap();
    let name = "libcudart_sim.so";
    let places = [directory.join(name), directory.join("../lib").join(name)];
    let found = places.iter().find(|place| place.is_file());
    found.unwrap_or_else(|| panic!("the simulated runtime is not in {places:?}")).clone()
}

/// True if the runtime is part of this program, so that no other one can be loaded.
pub fn is_linked() -> bool {
    cfg!(feature = "static")
}

/// True if this program runs on the simulated runtime.
pub fn is_simulated() -> bool {
    let named = std::env::var("CUDART_LIBRARY");
    !is_linked() && named.is_ok_and(|library| library.contains("cudart_sim"))
}

/// The name of the surrounding test, or of the given one, in the form that `--exact` takes.
///
/// The name comes from the type of a function, so it is always the test's own. Thread names do not
/// work with one test thread, since all tests then run on the main thread.
#[allow(unused_macros)]
macro_rules! test_name {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here).strip_suffix("::here");
        let path = path.expect("a path that ends with the function's name");
        test_name!(@ path.trim_end_matches("::{{closure}}"))
    }};
    (@ $path:expr) => {{
        let (_, name) = $path.split_once("::").expect("a path that begins with the crate's name");
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        assert!(name.chars().all(is_name), "{name} is not the name of a test");
        name
    }};
    ($test:ident) => {
        test_name!(@ std::any::type_name_of_val(&$test))
    };
}
#[allow(unused_imports)]
pub(crate) use test_name;

/// Prints that a test is left out, bypassing the capture of the test runner.
pub fn left_out(test: &str, why: &str) {
    let line = format!("{test}: left out, {why}\n");
    // One write, since other tests print at the same time.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The command for a subprocess that runs one test of this program with some variables set.
pub fn subprocess(test: &str, variables: &[(&str, &str)]) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--include-ignored"]);
    command.env(SUBPROCESS, "1").envs(variables.iter().copied());
    command
}

/// Runs one test of this program in a subprocess with some variables set.
pub fn in_subprocess(test: &str, variables: &[(&str, &str)]) -> std::process::Output {
    subprocess(test, variables).output().unwrap()
}

const SUBPROCESS: &str = "CPU_GPU_BUFFER_SUBPROCESS";

/// True if this is the process that [`subprocess`] describes.
pub fn is_subprocess() -> bool {
    std::env::var_os(SUBPROCESS).is_some()
}
