//! The machine, versions and method of a run.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;

use cpu_gpu_buffer::{Device, sys};

use crate::peer::Peer;
use crate::raw;
use crate::setup::Setup;

type Facts = BTreeMap<String, String>;

/// The output of a program, if it exists and succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn facts(pairs: impl IntoIterator<Item = (&'static str, Option<String>)>) -> Facts {
    let known = pairs.into_iter().filter_map(|(name, value)| Some((name.into(), value?)));
    known.collect()
}

pub fn machine(setup: &Setup) -> Facts {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": ")).map(|(_, model)| model.to_string());
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let mut machine = facts([
        ("device", Some(setup.device.to_string())),
        ("gpu", setup.cudarc.as_ref().and_then(Peer::gpu)),
        ("cpu", model),
        ("cores", Some(cores.to_string())),
        ("kernel", kernel.map(|kernel| kernel.trim().to_string())),
    ]);
    if let Device::Cuda(ordinal) = setup.device {
        machine.extend(gpu(ordinal));
    }
    machine
}

/// The facts of `nvidia-smi` about a card.
///
/// The card is found by its PCI address, since `nvidia-smi` and the runtime number cards
/// differently.
fn gpu(ordinal: u32) -> Facts {
    type A = sys::cudaDeviceAttr;
    let [domain, bus, device] =
        [A::cudaDevAttrPciDomainId, A::cudaDevAttrPciBusId, A::cudaDevAttrPciDeviceId]
            .map(|attribute| raw::attribute(attribute, ordinal));
    let place = format!("{domain:08X}:{bus:02X}:{device:02X}.0");
    let fields = ["name", "driver_version", "pcie.link.gen.max", "pcie.link.width.max"];
    let query = format!("--query-gpu={}", fields.join(","));
    let line = output("nvidia-smi", &[&query, "--format=csv,noheader", "-i", &place]);
    let line = line.unwrap_or_default();
    let mut values = line.split(", ").map(str::trim);
    let names = ["gpu", "driver", "pcie generation", "pcie lanes"];
    facts(
        names.map(|name| (name, values.next().filter(|value| !value.is_empty()).map(String::from))),
    )
}

/// The version of a dependency that the program was built with.
fn locked(name: &str) -> Option<String> {
    let mut lines = include_str!("../../Cargo.lock").lines();
    lines.find(|line| *line == format!("name = \"{name}\""))?;
    Some(lines.next()?.strip_prefix("version = ")?.trim_matches('"').into())
}

pub fn versions(setup: &Setup) -> Facts {
    let mut versions = facts([
        ("cpu-gpu-buffer", Some(env!("CARGO_PKG_VERSION").into())),
        ("rustc", Some(env!("RUSTC_VERSION").into())),
        ("cudarc", setup.cudarc.as_ref().and_then(|_| locked("cudarc"))),
    ]);
    if setup.is_cuda() {
        let [runtime, driver] = raw::versions().map(|v| format!("{}.{}", v / 1000, v % 1000 / 10));
        let library = sys::runtime().ok().map(|runtime| runtime.path().display().to_string());
        versions.extend(facts([
            ("CUDA runtime", Some(runtime)),
            ("CUDA of the driver", Some(driver)),
            ("runtime library", library),
        ]));
    }
    versions
}

pub fn method(setup: &Setup) -> Facts {
    facts([
        ("date", output("date", &["-u", "+%Y-%m-%d"])),
        ("form", Some(if setup.short { "short" } else { "whole" }.into())),
        ("build", Some(if cfg!(debug_assertions) { "debug" } else { "release" }.into())),
        (
            "order",
            Some("contenders take turns in each round, each time beginning with the next".into()),
        ),
        ("figures", Some("median, 10th and 90th percentile".into())),
        ("warm-up", Some("a tenth of the rounds and one more".into())),
        ("data", Some("random; compared after timing".into())),
    ])
}
