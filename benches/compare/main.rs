//! This crate beside the raw runtime API, cudarc and PyTorch, in one run.
//!
//! ```sh
//! cargo bench -p cpu-gpu-buffer-bench -- [--short] [--device cpu|cuda:0] [--only enqueue,fill,...]
//!                                        [--torch python3] [--json FILE]
//! cargo bench -p cpu-gpu-buffer-bench -- report [FILE.json [TORCH.json]] [--out docs] [--check]
//! ```
//!
//! A run prints its figures and whether the goals are met, and writes all to FILE. The report renders a file into
//! `docs/benchmarks.md`, charts, and README; `--check` only says whether they are what the file gives. Paths are those
//! from the root of the repository where cargo runs the program.

mod charts;
mod figures;
mod goals;
mod lanes;
mod machine;
mod measure;
mod peer;
mod raw;
mod report;
mod setup;
mod subjects;
mod torch;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use cpu_gpu_buffer::Device;
use indicatif::{ProgressBar, ProgressStyle};
use lexopt::prelude::*;

use figures::Run;
use setup::Setup;
use torch::Torch;

struct Arguments {
    short: bool,
    device: Option<Device>,
    only: Vec<String>,
    torch: Option<String>,
    json: Option<PathBuf>,
    out: PathBuf,
    check: bool,
    /// `report`, and its files.
    free: Vec<PathBuf>,
}

fn arguments() -> Result<Arguments, lexopt::Error> {
    let mut all = Arguments {
        short: false,
        device: None,
        only: Vec::new(),
        torch: None,
        json: None,
        out: "docs".into(),
        check: false,
        free: Vec::new(),
    };
    let mut benched = false;
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("short") | Long("test") => all.short = true,
            // `cargo bench` says so.
            Long("bench") => benched = true,
            Long("device") => all.device = Some(parser.value()?.parse()?),
            Long("only") => all.only.extend(parser.value()?.string()?.split(',').map(String::from)),
            Long("torch") => all.torch = Some(parser.value()?.string()?),
            Long("json") => all.json = Some(parser.value()?.into()),
            Long("out") => all.out = parser.value()?.into(),
            Long("check") => all.check = true,
            Value(word) => all.free.push(word.into()),
            other => return Err(other.unexpected()),
        }
    }
    // `cargo test` says nothing, and wants to know no more than whether the program works.
    all.short |= env::var_os("CARGO_MANIFEST_DIR").is_some() && !benched;
    let known = subjects::ALL.map(|(name, _)| name);
    if let Some(unknown) = all.only.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("{unknown} is none of {}", known.join(", ")).into());
    }
    Ok(all)
}

fn main() -> ExitCode {
    // Cargo runs a benchmark in its package's directory.
    if let Some(root) =
        env::var_os("CARGO_MANIFEST_DIR").as_deref().and_then(|own| Path::new(own).parent())
    {
        env::set_current_dir(root).unwrap();
    }
    let done = match arguments() {
        Ok(all) => match all.free.split_first() {
            None => run(&all),
            Some((word, files)) if word.as_os_str() == "report" => {
                report::report(files, &all.out, all.check)
            }
            Some((word, _)) => Err(format!("{}: not a command", word.display())),
        },
        Err(error) => Err(error.to_string()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(all: &Arguments) -> Result<(), String> {
    let start = Instant::now();
    let device = match all.device {
        Some(Device::Cuda(ordinal)) => Device::cuda(ordinal).map_err(|error| error.to_string())?,
        Some(Device::Cpu) => Device::Cpu,
        None => Device::auto(),
    };
    let (setup, left_out) = Setup::new(device, all.short);
    let mut run = Run {
        machine: machine::machine(&setup),
        versions: machine::versions(&setup),
        method: machine::method(&setup),
        left_out,
        ..Default::default()
    };
    let device = setup.device.to_string();
    let start_torch = |python: &String| {
        Torch::start(python, &device, setup.short).map_err(|why| format!("PyTorch: {why}"))
    };
    let mut torch = match all.torch.as_ref().map(start_torch) {
        Some(Ok(torch)) => Some(torch),
        Some(Err(why)) => return Err(why),
        None => {
            run.leave_out("PyTorch: not asked for");
            None
        }
    };

    let keep = |run: &Run| match &all.json {
        Some(file) => report::write(file, &report::json(run)),
        None => Ok(()),
    };
    let wanted = |name: &str| all.only.is_empty() || all.only.iter().any(|only| only == name);
    let plans: Vec<_> = subjects::ALL
        .into_iter()
        .filter(|(name, _)| wanted(name))
        .map(|(name, plan)| (name, plan(&setup)))
        .collect();
    let asked = |name: &str| torch::SUBJECTS.contains(&name);
    let of_torch = plans.iter().filter(|(name, _)| torch.is_some() && asked(name)).count();
    let jobs: usize = plans.iter().map(|(_, jobs)| jobs.len()).sum();
    let bar = ProgressBar::new((jobs + of_torch) as u64);
    let style = "{prefix:10} {wide_bar} {pos}/{len} {elapsed} ({eta} left)";
    bar.set_style(ProgressStyle::with_template(style).expect("it is a template"));
    for (name, jobs) in plans {
        bar.set_prefix(name);
        let begun = Instant::now();
        for job in jobs {
            job(&setup, &mut run);
            bar.inc(1);
        }
        let took = begun.elapsed().as_secs_f64();
        if let Some(torch) = torch.as_mut().filter(|_| asked(name)) {
            bar.set_prefix("PyTorch");
            match torch.run(name) {
                Ok(part) => run.merge(part),
                // The rest of the run is still worth something.
                Err(why) => run.leave_out(format!("PyTorch, {name}: {why}")),
            }
            bar.inc(1);
        }
        let whole = begun.elapsed().as_secs_f64();
        bar.suspend(|| eprintln!("{name}: {took:.1} s, PyTorch {:.1} s", whole - took));
        // What is there, should a later subject fail.
        run.method.insert("seconds".into(), start.elapsed().as_secs().to_string());
        keep(&run)?;
    }
    bar.finish_and_clear();

    // The goals last, where they are seen.
    println!("{}", report::details(&run));
    println!("{}", report::summary(&run));
    println!("{} figures in {:.1} s", run.figures.len(), start.elapsed().as_secs_f64());
    Ok(())
}
