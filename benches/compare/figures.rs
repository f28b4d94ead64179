//! The figures of a run, in the format of its file.
//!
//! A figure names the operation, its size and the contender.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::measure::Spread;

#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Figure {
    pub subject: String,
    /// A direction, a state or a kind of element.
    pub case: String,
    /// Bytes. In the subjects about threads this is the number of threads.
    pub at: usize,
    pub by: String,
    pub unit: String,
    pub median: f64,
    /// The 10th percentile of the samples, and the 90th.
    pub low: f64,
    pub high: f64,
    pub samples: usize,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default)]
pub struct Run {
    pub machine: BTreeMap<String, String>,
    pub versions: BTreeMap<String, String>,
    pub method: BTreeMap<String, String>,
    pub left_out: Vec<String>,
    pub figures: Vec<Figure>,
}

impl Run {
    pub fn add(
        &mut self,
        (subject, case, at): (&str, &str, usize),
        by: &str,
        unit: &str,
        spread: Spread,
    ) {
        self.figures.push(Figure {
            subject: subject.into(),
            case: case.into(),
            at,
            by: by.into(),
            unit: unit.into(),
            median: short(spread.median),
            low: short(spread.low),
            high: short(spread.high),
            samples: spread.samples,
        });
    }

    pub fn leave_out(&mut self, what: impl Into<String>) {
        self.left_out.push(what.into());
    }

    /// Takes over another run of the same machine.
    pub fn merge(&mut self, other: Run) {
        self.versions.extend(other.versions);
        self.left_out.extend(other.left_out);
        self.figures.extend(other.figures);
    }

    pub fn find(&self, subject: &str, case: &str, at: usize, by: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| {
            figure.subject == subject && figure.case == case && figure.at == at && figure.by == by
        })
    }
}

/// Four digits that count.
fn short(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap()
}
