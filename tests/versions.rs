//! Other test programs pass on older versions of the simulated runtime: CUDA 12.0 and 12.8.
//!
//! Real runtimes of those versions need tests on hardware.

#![cfg(target_os = "linux")]

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::test_name;
use cpu_gpu_buffer::{Device, sys};

/// The newest of a test program's builds, beside this program; where the tests are packed, there is but one.
fn program(name: &str) -> Option<PathBuf> {
    let this = std::env::current_exe().unwrap();
    let entries = std::fs::read_dir(this.parent().unwrap()).unwrap();
    let built = entries.map(|entry| entry.unwrap().path()).filter(|path| {
        let file = path.file_name().unwrap().to_str().unwrap_or_default();
        let rest = file.strip_prefix(name).map(|rest| rest.strip_prefix('-').unwrap_or(rest));
        rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
    });
    built.max_by_key(|path| path.metadata().unwrap().modified().unwrap())
}

/// Programs, and those of their tests that are run again; all of them where none is named. The others of
/// `in_flight` go the same ways with more memory.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("round_trip", &[]),
    ("streams", &[]),
    ("bad_use", &[]),
    ("fill", &[]),
    ("out_of_memory", &[]),
    ("group", &["any_number", "neighbours", "long_ranges"]),
    ("ring", &[]),
    #[cfg(feature = "dlpack")]
    ("exports", &[]),
    ("random_operations", &[]),
    (
        "in_flight",
        &[
            "writing_the",
            "reading_the",
            "trying",
            "the_watermark",
            "a_transfer_that",
            "memory_whose",
        ],
    ),
];

fn again_on(version: i32, test: &str, lacks: bool) {
    if !common::is_simulated() {
        return common::left_out(test, "the runtime is of the version that it is");
    }
    if common::is_subprocess() {
        return says_what_it_is(version, lacks);
    }
    let version = version.to_string();
    let output = common::in_subprocess(test, &[("CUDART_SIM_VERSION", &version)]);
    assert!(output.status.success(), "{output:?}");
    for (name, tests) in PROGRAMS {
        let Some(program) = program(name) else {
            common::left_out(test, &format!("the program {name} is not built"));
            continue;
        };
        let mut command = Command::new(program);
        command.args(*tests).env("CUDART_SIM_VERSION", &version).env("PROPTEST_CASES", "30");
        let output = command.output().unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name}: {out}\n{err}");
        assert!(!out.contains(" 0 passed"), "{name} ran no test: {out}");
        // Nothing is left out for want of a device.
        assert!(!err.contains("no CUDA device"), "{name}: {err}");
    }
}

/// The runtime in this process is of the version, and lacks or has what came between the two.
fn says_what_it_is(version: i32, lacks: bool) {
    let (mut address, mut found) = (std::ptr::null_mut(), sys::cudaDriverEntryPointQueryResult(0));
    // SAFETY: a name that ends with a NUL, and valid places.
    let status = unsafe {
        let name = c"cuCtxGetCurrent".as_ptr();
        sys::cudaGetDriverEntryPointByVersion(name, &mut address, 4000, 0, &mut found)
    };
    assert_eq!(status == sys::cudaError::SYMBOL_NOT_FOUND, lacks, "{status}");
    assert_eq!(address.is_null(), lacks);
    // SAFETY: no arguments. What is not there leaves no error.
    assert_eq!(unsafe { sys::cudaGetLastError() }, sys::cudaError::cudaSuccess);
    assert_eq!(sys::runtime().unwrap().version(), version);
    assert_eq!(Device::auto(), Device::Cuda(0));
}

#[test]
fn on_cuda_12_0() {
    again_on(12000, test_name!(), true);
}

#[test]
fn on_cuda_12_8() {
    again_on(12080, test_name!(), false);
}
