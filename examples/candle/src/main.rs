//! Weights and step inputs for candle, moved by `cpu-gpu-buffer`, beside candle's own ways.
//!
//! ```text
//! cargo run --release -- generate FOLDER [--gigabytes 4] [--shards 2]
//! cargo run --release -- load FILE... [--way ours|load|mmap] [--readers N] [--direct] [--device cpu]
//! cargo run --release -- decode [--steps 2000] [--requests 64] [--device cpu]
//! ```
//!
//! `load` takes all ways after each other if none is named, and compares their tensors.

mod decode;
mod generate;
#[path = "../../load_file/loader.rs"]
mod loader;
mod ours;
#[path = "../../load_file/source.rs"]
mod source;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;

use loader::Failure;

/// What the command line says.
struct Arguments {
    command: String,
    paths: Vec<PathBuf>,
    on_the_cpu: bool,
    weights: weights::Options,
    decode: decode::Options,
    gigabytes: f64,
    shards: usize,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut parser = lexopt::Parser::from_env();
    let mut arguments = Arguments {
        command: String::new(),
        paths: Vec::new(),
        on_the_cpu: cfg!(not(feature = "cuda")),
        weights: Default::default(),
        decode: Default::default(),
        gigabytes: 4.0,
        shards: 2,
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("way") => arguments.weights.way = Some(parser.value()?.parse()?),
            Long("readers") => arguments.weights.readers = at_least_one(parser.value()?.parse()?)?,
            Long("direct") => arguments.weights.direct = true,
            Long("steps") => arguments.decode.steps = at_least_one(parser.value()?.parse()?)?,
            Long("requests") => arguments.decode.requests = at_least_one(parser.value()?.parse()?)?,
            Long("gigabytes") => arguments.gigabytes = parser.value()?.parse()?,
            Long("shards") => arguments.shards = at_least_one(parser.value()?.parse()?)?,
            Long("device") => match parser.value()?.to_str() {
                Some("cpu") => arguments.on_the_cpu = true,
                Some("cuda") => arguments.on_the_cpu = false,
                _ => return Err("--device is cpu or cuda".into()),
            },
            Value(value) if arguments.command.is_empty() => arguments.command = value.string()?,
            Value(value) => arguments.paths.push(value.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(arguments)
}

fn at_least_one(number: usize) -> Result<usize, Failure> {
    if number == 0 {
        return Err("a number is 0, and must be at least 1".into());
    }
    Ok(number)
}

fn run() -> Result<(), Failure> {
    let arguments = arguments()?;
    let device = || match arguments.on_the_cpu {
        true => Ok(candle_core::Device::Cpu),
        // A stream of its own, since the legacy stream waits for all others.
        false => candle_core::Device::new_cuda_with_stream(0),
    };
    match (arguments.command.as_str(), &arguments.paths[..]) {
        ("generate", [folder]) => {
            generate::files(folder, arguments.gigabytes, arguments.shards)?;
        }
        ("load", paths) if !paths.is_empty() => {
            weights::compare(paths, &device()?, &arguments.weights)?;
        }
        ("decode", []) => decode::compare(&device()?, &arguments.decode)?,
        _ => return Err("expected: generate FOLDER, load FILE..., or decode".into()),
    }
    Ok(())
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("candle: {error}");
    ExitCode::FAILURE
}
