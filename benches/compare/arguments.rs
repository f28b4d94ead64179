//! The command line of the benchmarks.

use std::env;
use std::path::PathBuf;

use cpu_gpu_buffer::Device;
use lexopt::prelude::*;

use crate::subjects;

/// The command line.
pub struct Arguments {
    pub short: bool,
    pub device: Option<Device>,
    pub only: Vec<String>,
    pub torch: Option<String>,
    pub json: Option<PathBuf>,
    pub out: PathBuf,
    pub check: bool,
    /// `report`, and its files.
    pub positional: Vec<PathBuf>,
}

/// Reads the command line.
pub fn arguments() -> Result<Arguments, lexopt::Error> {
    let mut all = Arguments {
        short: false,
        device: None,
        only: Vec::new(),
        torch: None,
        json: None,
        out: "docs".into(),
        check: false,
        positional: Vec::new(),
    };
    let mut is_bench = false;
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("short") | Long("test") => all.short = true,
            // `cargo bench` passes this flag.
            Long("bench") => is_bench = true,
            Long("device") => all.device = Some(parser.value()?.parse()?),
            Long("only") => all.only.extend(parser.value()?.string()?.split(',').map(String::from)),
            Long("torch") => all.torch = Some(parser.value()?.string()?),
            Long("json") => all.json = Some(parser.value()?.into()),
            Long("out") => all.out = parser.value()?.into(),
            Long("check") => all.check = true,
            Value(word) => all.positional.push(word.into()),
            other => return Err(other.unexpected()),
        }
    }
    // `cargo test` passes no flag. It only checks that the program works.
    all.short |= env::var_os("CARGO_MANIFEST_DIR").is_some() && !is_bench;
    let known = subjects::ALL.map(|(name, _)| name);
    if let Some(unknown) = all.only.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("{unknown} is none of {}", known.join(", ")).into());
    }
    Ok(all)
}
