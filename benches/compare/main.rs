//! Compares this crate with the raw runtime API, cudarc and PyTorch in one run.
//!
//! ```sh
//! cargo bench -p cpu-gpu-buffer-bench -- [--short] [--device cpu|cuda:0] [--only enqueue,fill,...]
//!                                        [--torch python3] [--json FILE]
//! cargo bench -p cpu-gpu-buffer-bench -- report [FILE.json [TORCH.json]] [--out docs] [--check]
//! ```
//!
//! A run prints its figures and goals, and writes them to FILE. The report renders a file into
//! `docs/benchmarks.md`, the charts and README. With `--check` it only compares these files with
//! the figures. Paths start at the root of the repository.

mod arguments;
mod charts;
mod figures;
mod format;
mod goals;
mod lane;
mod lanes;
mod machine;
mod measure;
mod peer;
mod raw;
mod report;
mod session;
mod setup;
mod subjects;
mod torch;

use std::env;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Cargo runs a benchmark in its package's directory.
    if let Some(root) =
        env::var_os("CARGO_MANIFEST_DIR").as_deref().and_then(|own| Path::new(own).parent())
    {
        env::set_current_dir(root).unwrap();
    }
    let done = match arguments::arguments() {
        Ok(all) => match all.positional.split_first() {
            None => session::run(&all),
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
