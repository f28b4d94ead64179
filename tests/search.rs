//! The runtime is looked for in the places that the documentation names, in their order, and nowhere else.
//!
//! What is to be found are links to the simulated runtime, in places of the tests' own. Each search has a process of its
//! own, which is only asked what it found: this holds on machines with CUDA as well. With the feature `static` nothing
//! is searched.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::left_out;
use cpu_gpu_buffer::sys;

/// Says which runtime this process has, or why none. Everything else here asks it in processes of its own.
#[test]
fn a_runtime_says_what_it_is() {
    let mut driver = 0;
    // SAFETY: a valid place.
    let status = unsafe { sys::cudaDriverGetVersion(&mut driver) };
    match sys::runtime() {
        Ok(runtime) => {
            let lacking = runtime.absent();
            println!("runtime: {}", runtime.path().display());
            println!("version: {}, driver: {driver}, lacking: {lacking:?}", runtime.version());
            assert!([12, 13].contains(&(runtime.version() / 1000)));
            assert_eq!(status, sys::cudaError::cudaSuccess);
        }
        Err(error) => {
            println!("runtime: {error}");
            assert_eq!(status, sys::cudaError::LIBRARY_NOT_LOADED);
        }
    }
}

/// What a process answers that has these variables, and no others that name places.
fn found(sealed: &[String], directory: &Path, variables: &[(&str, PathBuf)]) -> String {
    let asked = common::own_process("a_runtime_says_what_it_is", &[]);
    let mut words = sealed.iter().map(AsRef::as_ref).chain([asked.get_program()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(asked.get_args());
    for name in ["CUDART_LIBRARY", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        command.env_remove(name);
    }
    // It has to look for itself.
    command.env("CPU_GPU_BUFFER_TEST_RUNTIME", "real").envs(variables.iter().cloned());
    let output = command.current_dir(directory).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines().find_map(|line| line.strip_prefix("runtime: ")).expect("it says so").into()
}

/// A folder of a test's own; `None` where no runtime is loaded, and with that nothing to test.
struct Folder(PathBuf);

impl Folder {
    fn of(test: &str) -> Option<Folder> {
        if common::is_linked() {
            left_out(test, "the runtime is part of this program");
            return None;
        }
        let root = std::env::temp_dir().join(format!("cgb-{test}-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let folder = Folder(root);
        // For the system's loader, which so ends its search before it comes to one of the machine's.
        folder.spoil("system/libcudart.so.13");
        folder.spoil("system/libcudart.so.12");
        Some(folder)
    }

    fn path(&self, place: &str) -> PathBuf {
        self.0.join(place)
    }

    /// Puts a runtime there.
    fn put(&self, place: &str) -> PathBuf {
        let path = self.path(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(common::simulated(), &path).unwrap();
        path
    }

    /// Puts something there that is no library.
    fn spoil(&self, place: &str) {
        let path = self.put(place);
        fs::remove_file(&path).unwrap();
        fs::write(path, "no library").unwrap();
    }

    fn system(&self) -> (&'static str, PathBuf) {
        ("LD_LIBRARY_PATH", self.path("system"))
    }

    /// What a command begins with that sees `local` and `opt` of this folder as `/usr/local` and `/opt`; `None`
    /// where this machine does not allow it.
    fn sealed(&self) -> Option<Vec<String>> {
        let [local, opt] = ["local", "opt"].map(|name| self.path(name));
        for place in [&local, &opt] {
            fs::create_dir_all(place).unwrap();
        }
        let program = std::env::current_exe().unwrap();
        if program.starts_with("/usr/local") || program.starts_with("/opt") {
            return None;
        }
        let mount = format!(
            "mount --bind {local:?} /usr/local && mount --bind {opt:?} /opt && exec \"$@\""
        );
        let command = ["unshare", "--map-root-user", "--mount", "sh", "-c", &mount, "sh"];
        let tried = Command::new(command[0]).args(&command[1..]).arg("true").output();
        let allowed = tried.is_ok_and(|output| output.status.success());
        allowed.then(|| command.map(String::from).to_vec())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_named_library_is_taken_whatever_else_there_is() {
    let Some(folder) = Folder::of("a_named_library_is_taken_whatever_else_there_is") else {
        return;
    };
    let named = folder.put("named/some-runtime.so");
    folder.put("system/libcudart.so.13");
    folder.put("home/lib64/libcudart.so.13");
    let preloaded = folder.put("process/libcudart.so.13");
    let variables = [
        ("CUDART_LIBRARY", named.clone()),
        ("LD_PRELOAD", preloaded),
        ("CUDA_HOME", folder.path("home")),
        folder.system(),
    ];
    assert_eq!(found(&[], &folder.0, &variables), named.to_str().unwrap());
}

#[test]
fn a_runtime_that_is_in_the_process_is_taken_before_any_other() {
    let test = "a_runtime_that_is_in_the_process_is_taken_before_any_other";
    let Some(folder) = Folder::of(test) else { return };
    folder.put("system/libcudart.so.13");
    folder.put("home/lib64/libcudart.so.13");
    // As wheels carry it.
    let preloaded = folder.put("process/libcudart-1a2b3c.so.12");
    let variables =
        [("LD_PRELOAD", preloaded.clone()), ("CUDA_HOME", folder.path("home")), folder.system()];
    assert_eq!(found(&[], &folder.0, &variables), preloaded.to_str().unwrap());
}

#[test]
fn every_place_has_its_turn_where_those_before_it_have_no_runtime() {
    let test = "every_place_has_its_turn_where_those_before_it_have_no_runtime";
    let Some(folder) = Folder::of(test) else { return };
    let target = format!(
        "home/targets/{}-linux/lib/libcudart.so.12",
        match std::env::consts::ARCH {
            "aarch64" => "sbsa",
            other => other,
        }
    );
    let python = "lib/python3.12/site-packages/nvidia";
    let mut places = vec![
        "system/libcudart.so.13".into(),
        "system/libcudart.so.12".into(),
        "home/lib64/libcudart.so.13".into(),
        "home/lib64/libcudart.so.12".into(),
        "home/lib/libcudart.so.13".into(),
        target,
        "path/lib64/libcudart.so.12".into(),
        "local/cuda/lib64/libcudart.so.13".into(),
        "opt/cuda/lib64/libcudart.so.12".into(),
        format!("venv/{python}/cu13/lib/libcudart.so.13"),
        format!("venv/{python}/cuda_runtime/lib/libcudart.so.12"),
        "conda/lib/libcudart.so.13".into(),
        format!("conda/{python}/cu13/lib/libcudart.so.13"),
    ];
    let sealed = folder.sealed();
    if sealed.is_none() {
        left_out(test, "/usr/local/cuda and /opt/cuda, since mounts of its own are not allowed");
        if ["/usr/local/cuda", "/opt/cuda"].iter().any(|home| Path::new(home).exists()) {
            return left_out(test, "all others, since there is a toolkit");
        }
        places.retain(|place| !place.starts_with("local") && !place.starts_with("opt"));
    }
    let sealed = sealed.unwrap_or_default();
    for place in &places {
        folder.put(place);
    }
    // Not one of the places.
    folder.put("current/libcudart.so.13");
    let variables = [
        folder.system(),
        ("CUDA_HOME", folder.path("home")),
        ("CUDA_PATH", folder.path("path")),
        ("VIRTUAL_ENV", folder.path("venv")),
        ("CONDA_PREFIX", folder.path("conda")),
    ];
    let found = || found(&sealed, &folder.path("current"), &variables);
    for place in &places {
        let expected = match place.split_once('/').unwrap() {
            // As the loader was asked for it.
            ("system", name) => name.into(),
            ("local", rest) => format!("/usr/local/{rest}"),
            ("opt", rest) => format!("/opt/{rest}"),
            _ => folder.path(place).display().to_string(),
        };
        assert_eq!(found(), expected);
        match place.starts_with("system") {
            true => folder.spoil(place),
            false => fs::remove_file(folder.path(place)).unwrap(),
        }
    }
    let nothing = found();
    assert!(nothing.starts_with("no usable CUDA runtime; tried: system loader: "), "{nothing}");
}

#[test]
fn the_current_directory_is_never_searched() {
    let Some(folder) = Folder::of("the_current_directory_is_never_searched") else { return };
    for place in
        ["", "lib/", "lib64/", "cuda/lib64/", "lib/python3.12/site-packages/nvidia/cu13/lib/"]
    {
        folder.put(&format!("current/{place}libcudart.so.13"));
    }
    let directory = folder.path("current");
    for root in ["", ".", "cuda"].map(PathBuf::from) {
        let names = ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"];
        let mut variables = names.map(|name| (name, root.clone())).to_vec();
        variables.push(folder.system());
        let found = found(&folder.sealed().unwrap_or_default(), &directory, &variables);
        // Another one only where the machine has a toolkit and that could not be put aside.
        let elsewhere = ["/usr/local/cuda", "/opt/cuda"].iter().any(|home| found.starts_with(home));
        let refused = names.iter().all(|name| {
            root.as_os_str().is_empty()
                || found.contains(&format!("{name}={} is relative", root.display()))
        });
        assert!(elsewhere || found.starts_with("no usable CUDA runtime") && refused, "{found}");
    }
}

#[test]
#[cfg(feature = "static")]
fn a_linked_runtime_is_the_one_whatever_is_named() {
    use cpu_gpu_buffer::{Device, Error};
    let test = "a_linked_runtime_is_the_one_whatever_is_named";
    if !common::is_own_process() {
        let named = [("CUDART_LIBRARY", "/nothing-here/libcudart.so.13")];
        let output = common::in_own_process(test, &named);
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let runtime = sys::runtime().unwrap();
    assert_eq!(runtime.path().as_os_str(), "libcudart_static.a");
    let mut driver = 0;
    // SAFETY: a valid place. It answers without a driver, too ("CUDA Runtime API, Version Management").
    let status = unsafe { sys::cudaDriverGetVersion(&mut driver) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
    if driver != 0 {
        return left_out(test, "what it says without a driver, since there is one");
    }
    assert_eq!(Device::auto(), Device::Cpu);
    let Err(Error::Unavailable { reason }) = Device::cuda(0) else { panic!("there is no driver") };
    let expected = "there is no CUDA driver on this machine; libcudart_static.a is CUDA 1";
    assert!(reason.starts_with(expected), "{reason}");
}
