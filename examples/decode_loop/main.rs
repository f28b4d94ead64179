//! The input of a language model's steps, as a serving engine prepares it.
//!
//! The input is sixteen arrays: tokens, lengths, blocks and sampling parameters. Their lengths
//! change in every step, because requests begin and end. The example keeps them in three ways,
//! which do the same work and must sample the same:
//!
//! - a buffer for each array
//! - a group of all arrays
//! - a group with several host slots: the next input is written while the last upload is queued
//!
//! ```text
//! cargo run --release --example decode_loop [--device cpu|cuda:N] [--requests N] [--steps N]
//!                                           [--kernel-us N] [--depth N] [--mirrored]
//!                                           [--torch python3]
//! ```
//!
//! A kernel stands in for the model. It takes `--kernel-us` and then reads every uploaded word. If
//! one word is wrong, late or too early, its samples change. Every step is compared with a run on
//! the CPU that writes the whole input in each step. Finally, `--torch` runs the same loop in
//! PyTorch.

mod engine;
mod inputs;
mod model;

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{Device, Stream};

use engine::{Engine, MAX_REQUESTS};
use inputs::{Group, Ring, Single, Stalls, Way};
use model::Model;

type Failure = Box<dyn std::error::Error>;

/// The PyTorch program, which is part of this executable.
const TORCH: &str = include_str!("decode_loop.py");

struct Arguments {
    device: Device,
    requests: usize,
    steps: usize,
    kernel: Duration,
    depth: usize,
    mirrored: bool,
    torch: Option<String>,
}

/// The results of a run. Its figures leave out the first tenth of the steps, while the batch grows.
struct Outcome {
    /// The samples of all steps, and the offset of each step.
    sampled: Vec<u32>,
    starts: Vec<usize>,
    tokens: usize,
    /// The microseconds in each step that the host writes and uploads the input.
    prepare: Vec<f64>,
    /// The microseconds of the host in each step, without the wait for samples.
    host: Vec<f64>,
    stalls: Stalls,
    seconds: f64,
}

/// Runs the loop. `all` writes the whole input in every step.
fn decode(
    way: &mut impl Way,
    all: bool,
    model: &Model,
    device: Device,
    arguments: &Arguments,
) -> Result<Outcome, Failure> {
    let Arguments { requests, steps, .. } = *arguments;
    let stream = Stream::new(device)?;
    let mut engine = Engine::new(requests);
    let mut outcome = Outcome {
        sampled: Vec::with_capacity(steps * requests),
        starts: Vec::with_capacity(steps + 1),
        tokens: 0,
        prepare: Vec::with_capacity(steps),
        host: Vec::with_capacity(steps),
        stalls: Stalls::default(),
        seconds: 0.0,
    };
    // The requests of the step before, and the offset of its samples, which the next step reads.
    let (mut before, mut last) = (0, 0);
    let start = Instant::now();
    for step in 0..steps {
        if step == steps / 10 {
            outcome.stalls = Stalls::default();
        }
        let begin = Instant::now();
        engine.schedule();
        let rows = way.write(&engine, &outcome.sampled[last..], all, &mut outcome.stalls)?;
        way.upload(rows, &stream)?;
        let prepared = begin.elapsed();
        model.run(rows.requests, way, &stream)?;
        way.download(rows.requests, &stream)?;
        if step >= steps / 10 {
            outcome.prepare.push(prepared.as_secs_f64() * 1e6);
            outcome.host.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        outcome.tokens += rows.tokens;
        // The samples of the step before, while the model works on this one.
        last = outcome.sampled.len();
        if step > 0 {
            outcome.keep(&way.samples(1)?[..before]);
        }
        before = rows.requests;
    }
    outcome.keep(&way.samples(0)?[..before]);
    outcome.seconds = start.elapsed().as_secs_f64();
    Ok(outcome)
}

impl Outcome {
    fn keep(&mut self, sampled: &[u32]) {
        self.starts.push(self.sampled.len());
        self.sampled.extend_from_slice(sampled);
    }

    /// Compares the samples with the expected ones.
    fn compare(&self, expected: &Outcome) -> Result<(), Failure> {
        if self.sampled == expected.sampled && self.starts == expected.starts {
            return Ok(());
        }
        let pairs = self.sampled.iter().zip(&expected.sampled);
        let at = pairs.take_while(|(sampled, expected)| sampled == expected).count();
        let step = expected.starts.partition_point(|start| *start <= at) - 1;
        let row = at - expected.starts[step];
        Err(format!("step {step} sampled something else in row {row}").into())
    }
}

/// The median and the 99th percentile.
fn spread(all: &[f64]) -> [f64; 2] {
    let mut all = all.to_vec();
    all.sort_by(f64::total_cmp);
    [50, 99].map(|percent| all[all.len() * percent / 100])
}

fn line(name: &str, prepare: [f64; 2], host: [f64; 2], stalls: (usize, f64)) {
    println!(
        "{name:26} {:9.1} {:9.1} {:9.1} {:9.1} {:8} {:10.0}",
        prepare[0], prepare[1], host[0], host[1], stalls.0, stalls.1
    );
}

fn run() -> Result<(), Failure> {
    let arguments = arguments()?;
    let Arguments { device, requests, steps, kernel, depth, mirrored, .. } = arguments;
    let model = Model::load(device, kernel)?;
    let expected =
        decode(&mut Group::new(Device::Cpu, false)?, true, &Model::Host, Device::Cpu, &arguments)?;
    println!("device   {device}, {requests} requests at the most, {steps} steps");
    println!("moved    {} tokens, {} sampled", expected.tokens, expected.sampled.len());
    match model {
        Model::Kernel { .. } => println!("model    a kernel of {} us", kernel.as_micros()),
        Model::Host => println!(
            "model    left out: no kernel can run here, the host samples from what the device holds, \
             step by step, and the times below say nothing of a GPU"
        ),
    }
    println!();
    println!("{:26} {:>19} {:>19} {:>19}", "", "prepare, us", "all of host, us", "stalls");
    println!(
        "{:26} {:>9} {:>9} {:>9} {:>9} {:>8} {:>10}",
        "", "median", "p99", "median", "p99", "times", "us in all"
    );
    let report = |name: &str, outcome: Outcome| -> Result<[f64; 2], Failure> {
        outcome.compare(&expected).map_err(|error| format!("{name}: {error}"))?;
        let (prepare, host) = (spread(&outcome.prepare), spread(&outcome.host));
        let Stalls { count, time } = outcome.stalls;
        line(name, prepare, host, (count, time.as_secs_f64() * 1e6));
        Ok([prepare[0], host[0]])
    };
    let one = decode(&mut Single::new(device)?, false, &model, device, &arguments)?;
    report("16 buffers", one)?;
    let one = decode(&mut Group::new(device, mirrored)?, false, &model, device, &arguments)?;
    report("a group", one)?;
    let mut ring = Ring::new(device, depth, mirrored)?;
    let one = decode(&mut ring, false, &model, device, &arguments)?;
    let seconds = one.seconds;
    let ours = report(&format!("a ring of {depth} host slots"), one)?;
    if let Some(python) = &arguments.torch {
        let theirs = torch(python, &arguments, &expected)?;
        println!();
        for (what, at) in [("prepare", 0), ("all of host", 1)] {
            println!("{what}: the ring takes {:.3} of PyTorch's time", ours[at] / theirs[at]);
        }
    }
    println!();
    println!("{:.0} steps a second with the ring", steps as f64 / seconds);
    println!("every step of every way sampled what it must");
    Ok(())
}

/// Runs the same loop in PyTorch. Returns the medians of preparing and of all host work.
fn torch(python: &str, arguments: &Arguments, expected: &Outcome) -> Result<[f64; 2], Failure> {
    let [requests, steps] = [arguments.requests, arguments.steps].map(|count| count.to_string());
    let output = Command::new(python)
        .args(["-c", TORCH, "--requests", &requests, "--steps", &steps])
        .args(["--kernel-us", &arguments.kernel.as_micros().to_string()])
        .args(["--device", &arguments.device.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("{python}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers = |name: &str| -> Result<Vec<f64>, Failure> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let line = line.ok_or_else(|| format!("{python} says nothing of {name}: {text}"))?;
        Ok(line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    };
    if !output.status.success() {
        return Err(format!("{python}: {}", output.status).into());
    }
    let work = [expected.tokens as f64, expected.sampled.len() as f64];
    if numbers("work ")? != work {
        return Err(format!("PyTorch did something else: {text}").into());
    }
    let (prepare, host, stalls) = (numbers("prepare ")?, numbers("host ")?, numbers("stalls ")?);
    let pair = |numbers: &[f64]| [numbers[0], numbers[1]];
    line("PyTorch", pair(&prepare), pair(&host), (stalls[0] as usize, stalls[1]));
    Ok([prepare[0], host[0]])
}

fn arguments() -> Result<Arguments, Failure> {
    let (mut device, mut requests, mut steps, mut kernel) = (None, 256, 2000, 200);
    let (mut depth, mut mirrored, mut torch) = (2, false, None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("device") => {
                let name = parser.value()?;
                let name = name.to_string_lossy();
                device = if name == "auto" { None } else { Some(name.parse::<Device>()?) };
            }
            lexopt::Arg::Long("requests") => {
                requests = parser.value()?.to_string_lossy().parse()?
            }
            lexopt::Arg::Long("steps") => steps = parser.value()?.to_string_lossy().parse()?,
            lexopt::Arg::Long("kernel-us") => kernel = parser.value()?.to_string_lossy().parse()?,
            lexopt::Arg::Long("depth") => depth = parser.value()?.to_string_lossy().parse()?,
            lexopt::Arg::Long("mirrored") => mirrored = true,
            lexopt::Arg::Long("torch") => {
                torch = Some(parser.value()?.to_string_lossy().into_owned())
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if !(1..=MAX_REQUESTS).contains(&requests) || steps == 0 {
        return Err(format!("there are 1 to {MAX_REQUESTS} requests, and steps").into());
    }
    if depth < 2 {
        return Err(
            "there are two host slots or more: the one before is read beside the current".into()
        );
    }
    let device = match device {
        None => Device::auto(),
        Some(Device::Cuda(ordinal)) => Device::cuda(ordinal)?,
        Some(Device::Cpu) => Device::Cpu,
    };
    let kernel = Duration::from_micros(kernel);
    Ok(Arguments { device, requests, steps, kernel, depth, mirrored, torch })
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("decode_loop: {error}");
            ExitCode::FAILURE
        }
    }
}
