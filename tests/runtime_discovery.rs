//! The loader searches for the runtime in the documented places and order, and nowhere else.
//!
//! The runtimes of these tests are links to the simulated one. Each search runs in a subprocess
//! that prints its result, so the tests also hold on machines with CUDA. With the feature `static`
//! there is no search.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{left_out, test_name};
use cpu_gpu_buffer::sys;

/// Prints the runtime of this process, or the reason why there is none. All other tests run this
/// one in subprocesses.
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
            println!("passed over: {}", runtime.passed_over().join("; "));
            println!("device: {:?}", cpu_gpu_buffer::Device::cuda(0));
            assert!([12, 13].contains(&(runtime.version() / 1000)));
            assert_eq!(status, sys::cudaError::cudaSuccess);
        }
        Err(error) => {
            println!("runtime: {error}");
            assert_eq!(status, sys::cudaError::LIBRARY_NOT_LOADED);
        }
    }
}

/// The runtime that a process finds, or why none, with these variables and no others that name
/// places.
fn found(sealed: &[String], directory: &Path, variables: &[(&str, PathBuf)]) -> String {
    said(sealed, directory, variables, "runtime: ")
}

/// What such a process says after a word.
fn said(sealed: &[String], directory: &Path, variables: &[(&str, PathBuf)], word: &str) -> String {
    let asked = common::subprocess(test_name!(a_runtime_says_what_it_is), &[]);
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
    text.lines().find_map(|line| line.strip_prefix(word)).expect("it says so").into()
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

    /// Puts a runtime there that says it is of a version, for a driver of another, and has these
    /// functions of one argument besides; `None` where there is no compiler.
    fn put_stub(
        &self,
        place: &str,
        version: i32,
        driver: i32,
        functions: &[&str],
    ) -> Option<PathBuf> {
        let path = self.path(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        let answers = [("cudaRuntimeGetVersion", version), ("cudaDriverGetVersion", driver)];
        let mut text = String::new();
        for (name, value) in answers {
            text += &format!(
                "#[unsafe(no_mangle)] unsafe extern \"C\" fn {name}(v: *mut i32) -> u32 \
                 {{ unsafe {{ *v = {value} }}; 0 }}\n"
            );
        }
        for name in functions {
            text += &format!(
                "#[unsafe(no_mangle)] unsafe extern \"C\" fn {name}(_: *mut i32) -> u32 {{ 35 }}\n"
            );
        }
        let source = self.path("stub.rs");
        fs::write(&source, text).unwrap();
        let arguments = ["--edition", "2024", "--crate-type", "cdylib", "-o"];
        let built = Command::new("rustc").args(arguments).args([&path, &source]).output().ok()?;
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Some(path)
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

    /// The beginning of a command that sees `local` and `opt` of this folder as `/usr/local` and
    /// `/opt`.
    ///
    /// Returns `None` if the machine does not allow it.
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
    let Some(folder) = Folder::of(test_name!()) else {
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
    let test = test_name!();
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
    let test = test_name!();
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
    let expected = "no usable CUDA runtime; tried: CUDART_LIBRARY is not set; system loader: ";
    assert!(nothing.starts_with(expected), "{nothing}");
}

/// The simulated runtime as CUDA 12.8, for a driver of 12.4, in the second of the places.
fn settings(folder: &Folder) -> Vec<(&'static str, PathBuf)> {
    vec![
        folder.system(),
        ("CUDART_SIM_VERSION", "12080".into()),
        ("CUDART_SIM_DRIVER", "12040".into()),
    ]
}

#[test]
fn a_runtime_that_is_too_new_for_the_driver_is_passed_over() {
    let test = test_name!();
    let Some(folder) = Folder::of(test) else { return };
    let Some(newer) = folder.put_stub("system/libcudart.so.13", 13000, 12040, &[]) else {
        return left_out(test, "no rustc");
    };
    folder.put("system/libcudart.so.12");
    let why = "CUDA 13.0 is too new for the driver, which supports CUDA 12.4";
    let said = |variables: &[_], word| said(&[], &folder.0, variables, word);
    let mut variables = settings(&folder);
    // A newer minor version than the driver's is not too new.
    assert_eq!(said(&variables, "runtime: "), "libcudart.so.12");
    assert_eq!(said(&variables, "device: "), "Ok(Cuda(0))");
    let line = format!("CUDART_LIBRARY is not set; system loader: libcudart.so.13: {why}");
    assert_eq!(said(&variables, "passed over: "), line);
    // So is one that is in the process already.
    variables.push(("LD_PRELOAD", newer.clone()));
    assert_eq!(said(&variables, "runtime: "), "libcudart.so.12");
    let line = format!("already in the process: {}: {why}; system", newer.display());
    assert!(said(&variables, "passed over: ").contains(&line));
    // One that is named is not.
    variables.push(("CUDART_LIBRARY", newer.clone()));
    assert_eq!(said(&variables, "runtime: "), newer.to_str().unwrap());
    assert_eq!(said(&variables, "passed over: "), "");
}

#[test]
fn a_runtime_that_lacks_functions_is_passed_over() {
    let test = test_name!();
    let Some(folder) = Folder::of(test) else { return };
    let place = "system/libcudart.so.13";
    let Some(stub) = folder.put_stub(place, 12000, 12040, &[]) else {
        return left_out(test, "no rustc");
    };
    let variables = [folder.system(), ("CUDART_LIBRARY", stub)];
    let lacking = said(&[], &folder.0, &variables, "version: 12000, driver: 12040, lacking: ");
    let lacking: Vec<&str> = lacking.split('"').filter(|part| part.starts_with("cuda")).collect();
    folder.put("system/libcudart.so.12");
    let variables = settings(&folder);
    let answers =
        || ["runtime: ", "passed over: "].map(|word| said(&[], &folder.0, &variables, word));
    let line = "CUDART_LIBRARY is not set; system loader: libcudart.so.13:";
    let many =
        format!("{line} {} functions are missing, for example {}", lacking.len() - 1, lacking[0]);
    assert_eq!(answers(), ["libcudart.so.12", &many]);
    // One that came with 12.5 may be absent, and no other one.
    let newer = "cudaGetDriverEntryPointByVersion";
    let mut all = lacking.clone();
    all.retain(|name| *name != newer && *name != "cudaMalloc");
    folder.put_stub(place, 12000, 12040, &all).unwrap();
    assert_eq!(answers(), ["libcudart.so.12", &format!("{line} function cudaMalloc is missing")]);
    all.push("cudaMalloc");
    folder.put_stub(place, 12000, 12040, &all).unwrap();
    assert_eq!(answers(), ["libcudart.so.13", "CUDART_LIBRARY is not set"]);
}

#[test]
fn where_every_runtime_is_too_new_the_error_names_each() {
    let test = test_name!();
    let Some(folder) = Folder::of(test) else { return };
    // 35 is cudaErrorInsufficientDriver.
    let functions = ["cudaGetDeviceCount", "cudaGetLastError"];
    let Some(first) = folder.put_stub("system/libcudart.so.13", 13000, 12040, &functions) else {
        return left_out(test, "no rustc");
    };
    let second = folder.path("home/lib64/libcudart.so.13");
    fs::create_dir_all(second.parent().unwrap()).unwrap();
    fs::copy(first, &second).unwrap();
    let variables = [folder.system(), ("CUDA_HOME", folder.path("home"))];
    assert_eq!(found(&[], &folder.0, &variables), "libcudart.so.13");
    let device = said(&[], &folder.0, &variables, "device: ");
    for expected in [
        "the driver is one of CUDA 12.4, too old for the runtime: libcudart.so.13 is CUDA 13.0; \
         CUDART_LIBRARY may name an older one; also tried: CUDART_LIBRARY is not set; \
         system loader: libcudart.so.12: ",
        &format!(
            "{}: CUDA 13.0 is too new for the driver, which supports CUDA 12.4",
            second.display()
        ),
        "CUDA_PATH is not set",
    ] {
        assert!(device.contains(expected), "{device}");
    }
    // The one that was taken is not one of the others.
    assert!(!device.contains("system loader: libcudart.so.13"), "{device}");
}

#[test]
fn without_a_driver_the_first_runtime_that_is_whole_says_so() {
    let test = test_name!();
    let Some(folder) = Folder::of(test) else { return };
    let functions = ["cudaGetDeviceCount", "cudaGetLastError"];
    if folder.put_stub("system/libcudart.so.13", 13000, 0, &functions).is_none() {
        return left_out(test, "no rustc");
    }
    folder.put("system/libcudart.so.12");
    let mut variables = settings(&folder);
    variables.push(("CUDART_SIM_DRIVER", "0".into()));
    // None is too new for a driver that is not there.
    let said = || ["runtime: ", "device: "].map(|word| said(&[], &folder.0, &variables, word));
    let [runtime, device] = said();
    assert_eq!(runtime, "libcudart.so.12");
    let text = "there is no CUDA driver on this machine; libcudart.so.12 is CUDA 12.8";
    assert!(device.contains(text), "{device}");
    // Where there is no better one, the other says the same.
    folder.spoil("system/libcudart.so.12");
    let [runtime, device] = said();
    assert_eq!(runtime, "libcudart.so.13");
    let text = "there is no CUDA driver on this machine; libcudart.so.13 is CUDA 13.0";
    assert!(device.contains(text), "{device}");
}

#[test]
fn the_current_directory_is_never_searched() {
    let Some(folder) = Folder::of(test_name!()) else { return };
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
                || found.contains(&format!("{name}={} is a relative path", root.display()))
        });
        assert!(elsewhere || found.starts_with("no usable CUDA runtime") && refused, "{found}");
    }
}

#[test]
#[cfg(feature = "static")]
fn a_linked_runtime_is_the_one_whatever_is_named() {
    use cpu_gpu_buffer::{Device, Error};
    let test = test_name!();
    if !common::is_subprocess() {
        let named = [("CUDART_LIBRARY", "/nothing-here/libcudart.so.13")];
        let output = common::in_subprocess(test, &named);
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
