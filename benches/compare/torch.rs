//! PyTorch's part of a run. `compare.py` runs in a process of its own, one subject at a time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::figures::Run;

/// The script is part of the program.
const SCRIPT: &str = include_str!("../compare.py");

const SUBJECTS: [&str; 7] =
    ["enqueue", "latency", "bandwidth", "fill", "pinned", "access", "group"];

/// True if `compare.py` measures the subject, too.
pub fn has_subject(name: &str) -> bool {
    SUBJECTS.contains(&name)
}

pub struct Torch {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Torch {
    /// Starts an interpreter that has PyTorch.
    pub fn start(python: &str, device: &str, short: bool) -> Result<Torch, String> {
        let mut command = Command::new(python);
        command.args(["-c", SCRIPT, "--serve", "--device", device]);
        if short {
            command.arg("--short");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{python}: {error}"))?;
        let ask = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut torch = Torch { child, ask, answers };
        // Waits for the imports, which would disturb measurements.
        torch.line()?;
        Ok(torch)
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err("the interpreter ended; what it said stands above".into()),
            Ok(_) => Ok(line),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Runs one subject and waits for its figures.
    pub fn run(&mut self, subject: &str) -> Result<Run, String> {
        writeln!(self.ask, "{subject}").map_err(|error| error.to_string())?;
        serde_json::from_str(&self.line()?).map_err(|error| error.to_string())
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // The script also ends with its input, but only after the current subject.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
