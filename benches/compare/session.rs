//! One run of all wanted subjects.

use std::time::Instant;

use cpu_gpu_buffer::Device;
use indicatif::{ProgressBar, ProgressStyle};

use crate::arguments::Arguments;
use crate::figures::Run;
use crate::setup::Setup;
use crate::subjects::{self, Job};
use crate::torch::{self, Torch};
use crate::{machine, report};

/// Measures the wanted subjects and prints their figures and the goals.
pub fn run(arguments: &Arguments) -> Result<(), String> {
    let start = Instant::now();
    let device = match arguments.device {
        Some(Device::Cuda(ordinal)) => Device::cuda(ordinal).map_err(|error| error.to_string())?,
        Some(Device::Cpu) => Device::Cpu,
        None => Device::auto(),
    };
    let (setup, left_out) = Setup::new(device, arguments.short);
    let mut run = Run {
        machine: machine::machine(&setup),
        versions: machine::versions(&setup),
        method: machine::method(&setup),
        left_out,
        ..Default::default()
    };
    let mut torch = start_torch(arguments, &setup, &mut run)?;
    let plans = plans(arguments, &setup);
    let bar = progress_bar(&plans, torch.is_some());
    for (name, jobs) in plans {
        let timing = measure(name, jobs, &setup, torch.as_mut(), &mut run, &bar);
        bar.suspend(|| eprintln!("{name}: {timing}"));
        // The file is complete up to here if a later subject fails.
        run.method.insert("seconds".into(), start.elapsed().as_secs().to_string());
        if let Some(file) = &arguments.json {
            report::write(file, &report::json(&run))?;
        }
    }
    bar.finish_and_clear();

    // The goals come last, next to the prompt.
    println!("{}", report::details(&run));
    println!("{}", report::summary(&run));
    println!("{} figures in {:.1} s", run.figures.len(), start.elapsed().as_secs_f64());
    Ok(())
}

fn start_torch(
    arguments: &Arguments,
    setup: &Setup,
    run: &mut Run,
) -> Result<Option<Torch>, String> {
    let Some(python) = &arguments.torch else {
        run.leave_out("PyTorch: not asked for");
        return Ok(None);
    };
    let torch = Torch::start(python, &setup.device.to_string(), setup.short);
    torch.map(Some).map_err(|error| format!("PyTorch: {error}"))
}

type Plans = Vec<(&'static str, Vec<Job>)>;

/// The jobs of each wanted subject.
fn plans(arguments: &Arguments, setup: &Setup) -> Plans {
    let only = &arguments.only;
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| only == name);
    let subjects = subjects::ALL.into_iter().filter(|(name, _)| wanted(name));
    subjects.map(|(name, plan)| (name, plan(setup))).collect()
}

fn progress_bar(plans: &Plans, has_torch: bool) -> ProgressBar {
    let jobs: usize = plans.iter().map(|(_, jobs)| jobs.len()).sum();
    let of_torch = plans.iter().filter(|(name, _)| has_torch && torch::has_subject(name)).count();
    let bar = ProgressBar::new((jobs + of_torch) as u64);
    let style = "{prefix:10} {wide_bar} {pos}/{len} {elapsed} ({eta} left)";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar
}

/// Runs the jobs of one subject and PyTorch's part of it. Returns how long both took.
fn measure(
    name: &str,
    jobs: Vec<Job>,
    setup: &Setup,
    torch: Option<&mut Torch>,
    run: &mut Run,
    bar: &ProgressBar,
) -> String {
    bar.set_prefix(name.to_string());
    let start = Instant::now();
    for job in jobs {
        job(setup, run);
        bar.inc(1);
    }
    let ours = start.elapsed().as_secs_f64();
    if let Some(torch) = torch.filter(|_| torch::has_subject(name)) {
        bar.set_prefix("PyTorch");
        match torch.run(name) {
            Ok(part) => run.merge(part),
            // The other figures stay valid.
            Err(error) => run.leave_out(format!("PyTorch, {name}: {error}")),
        }
        bar.inc(1);
    }
    format!("{ours:.1} s, PyTorch {:.1} s", start.elapsed().as_secs_f64() - ours)
}
