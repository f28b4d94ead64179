//! The goals of this crate, as ratios between figures of one run.

use crate::figures::{Figure, Run};
use crate::lane::{OURS, OURS_PREFIX, RAW, RAW_EVENT};
use crate::subjects::{access, fill, group, latency, pinned};

pub struct Goal {
    pub what: &'static str,
    pub against: &'static str,
    pub bound: Bound,
    /// The worst ratio of all figures that the goal covers. `None` if the run has none of them.
    pub ratio: Option<f64>,
}

#[derive(Clone, Copy)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// The bound is on the other contender's time divided by this crate's.
    TimesFaster(f64),
}

impl Goal {
    pub fn is_met(&self) -> Option<bool> {
        Some(match self.bound {
            Bound::AtMost(bound) => self.ratio? <= bound,
            Bound::AtLeast(bound) | Bound::TimesFaster(bound) => self.ratio? >= bound,
        })
    }
}

const TORCH_PREFIX: &str = "PyTorch `[:n]`";

/// All goals, in the order of the table.
pub fn goals(run: &Run) -> Vec<Goal> {
    let ratios = Ratios(run);
    [
        enqueueing(ratios),
        bandwidth(ratios),
        idle_access(ratios),
        fills(ratios),
        pinned_memory(ratios),
        threads_and_groups(ratios),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Ratios of this crate's figures to those of others.
#[derive(Clone, Copy)]
struct Ratios<'a>(&'a Run);

impl Ratios<'_> {
    /// One ratio for each figure of `ours` in the wanted cases and sizes.
    fn all(
        self,
        subject: &str,
        wanted: &dyn Fn(&str, usize) -> bool,
        ours: &str,
        theirs: &str,
    ) -> Vec<f64> {
        let figures = self.0.figures.iter().filter(|figure| {
            figure.subject == subject && figure.by == ours && wanted(&figure.case, figure.at)
        });
        let ratio = |figure: &Figure| {
            let other = self.0.find(subject, &figure.case, figure.at, theirs)?;
            Some(figure.median / other.median)
        };
        figures.filter_map(ratio).collect()
    }

    fn one(self, subject: &str, case: &str, at: usize, ours: &str, theirs: &str) -> Option<f64> {
        largest(self.all(subject, &|c, a| c == case && a == at, ours, theirs))
    }

    /// The slowest access to an idle buffer, compared with `cudaEventQuery` in one case.
    fn idle(self, case: &str) -> Option<f64> {
        let cost = |case| self.0.find("access", case, access::BYTES, OURS);
        let costs = access::IDLE.into_iter().filter_map(cost).map(|figure| figure.median);
        let other = self.0.find("access", case, access::BYTES, access::EVENT_QUERY)?;
        costs.map(|cost| cost / other.median).reduce(f64::max)
    }

    /// How many times faster this crate handles 1 GB of pinned memory.
    fn faster(self, case: &str) -> Option<f64> {
        self.one("pinned", case, 1 << 30, OURS, pinned::RAW_BOTH).map(f64::recip)
    }
}

fn largest(ratios: Vec<f64>) -> Option<f64> {
    ratios.into_iter().reduce(f64::max)
}

fn smallest(ratios: Vec<f64>) -> Option<f64> {
    ratios.into_iter().reduce(f64::min)
}

fn goal(what: &'static str, against: &'static str, bound: Bound, ratio: Option<f64>) -> Goal {
    Goal { what, against, bound, ratio }
}

fn enqueueing(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "`copy_to_gpu` of 4 KB, enqueue",
            RAW_EVENT,
            Bound::AtMost(1.10),
            ratios.one("enqueue", "H2D", 4096, OURS, RAW_EVENT),
        ),
        goal(
            "the same",
            "cudarc, events tracked",
            Bound::AtMost(0.40),
            ratios.one("enqueue", "H2D", 4096, OURS, "cudarc"),
        ),
        goal(
            "the same, of a prefix `..n`",
            "PyTorch `[:n].copy_`",
            Bound::AtMost(0.20),
            ratios.one("enqueue", "H2D", 4096, OURS_PREFIX, TORCH_PREFIX),
        ),
        goal(
            "`copy_to_cpu` of 4 KB and `cpu`, until it is read",
            latency::RAW_STREAM_WAIT,
            Bound::AtMost(1.0),
            ratios.one("latency", "D2H", 4096, OURS, latency::RAW_STREAM_WAIT),
        ),
    ]
}

fn bandwidth(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "bandwidth up, 16 MB and more",
            "the raw call, pinned",
            Bound::AtLeast(0.99),
            smallest(ratios.all("bandwidth", &|c, a| c == "H2D" && a >= 16 << 20, OURS, RAW)),
        ),
        goal(
            "bandwidth down, 16 MB and more",
            "the raw call, pinned",
            Bound::AtLeast(0.99),
            smallest(ratios.all("bandwidth", &|c, a| c == "D2H" && a >= 16 << 20, OURS, RAW)),
        ),
    ]
}

fn idle_access(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "`cpu_mut` of an idle buffer",
            "cudaEventQuery, asked again and again",
            Bound::AtMost(0.01),
            ratios.idle(access::IDLE[1]),
        ),
        goal(
            "the same",
            "cudaEventQuery, asked for the first time",
            Bound::AtMost(0.01),
            ratios.idle(access::UNASKED),
        ),
    ]
}

fn fills(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "fill of 1 GB, elements of 1 to 16 bytes",
            fill::MEMSET,
            Bound::AtLeast(0.98),
            smallest(ratios.all(
                "fill",
                &|case, at| case.starts_with("device") && at == 1 << 30,
                OURS,
                fill::MEMSET,
            )),
        ),
        goal(
            "fill of 4 KB of `f32`, enqueue",
            fill::MEMSET,
            Bound::AtMost(1.15),
            ratios.one("fill", "enqueue, 4 bytes", 4096, OURS, fill::MEMSET),
        ),
    ]
}

fn pinned_memory(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "1 GB of zeroed pinned memory and a device side, allocated",
            pinned::RAW_BOTH,
            Bound::TimesFaster(8.0),
            ratios.faster(pinned::ALONE[0]),
        ),
        goal(
            "the same, released",
            "cudaFreeHost + cudaFree",
            Bound::TimesFaster(5.0),
            ratios.faster(pinned::ALONE[1]),
        ),
    ]
}

fn threads_and_groups(ratios: Ratios<'_>) -> Vec<Goal> {
    vec![
        goal(
            "`copy_to_gpu` of 4 KB from 16 threads, each thread",
            RAW_EVENT,
            Bound::AtMost(1.10),
            ratios.one("threads", "H2D of 4 KB", 16, OURS, RAW_EVENT),
        ),
        goal(
            "prefixes of 16 members of a group, 128 KB in all, enqueue",
            group::RAW_EACH,
            Bound::AtMost(0.15),
            ratios.one("group", group::CASES[0], group::BYTES, group::GROUP, group::RAW_EACH),
        ),
        goal(
            "the same",
            "PyTorch, 16 `[:n].copy_`",
            Bound::AtMost(0.025),
            ratios.one("group", group::CASES[0], group::BYTES, group::GROUP, group::TORCH),
        ),
    ]
}
