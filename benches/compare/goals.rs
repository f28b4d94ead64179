//! What this crate promises of its figures, as ratios within one run.

use crate::figures::Run;
use crate::lanes::{OURS, OURS_PREFIX, RAW, RAW_EVENT};
use crate::subjects::{access, fill, group, latency, pinned};

pub struct Goal {
    pub what: &'static str,
    pub against: &'static str,
    pub bound: Bound,
    /// The worst of those that it is about; none where the run has not measured it.
    pub ratio: Option<f64>,
}

#[derive(Clone, Copy)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// The ratio is that of the other to this crate.
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

pub fn goals(run: &Run) -> Vec<Goal> {
    // This crate's figure over the other's, for each size of each case that is wanted.
    let ratios = |subject, wanted: &dyn Fn(&str, usize) -> bool, ours, theirs| -> Vec<f64> {
        let figures = run.figures.iter().filter(|figure| {
            figure.subject == subject && figure.by == ours && wanted(&figure.case, figure.at)
        });
        let ratio = |figure: &crate::figures::Figure| {
            let other = run.find(subject, &figure.case, figure.at, theirs)?;
            Some(figure.median / other.median)
        };
        figures.filter_map(ratio).collect()
    };
    let largest = |all: Vec<f64>| all.into_iter().reduce(f64::max);
    let smallest = |all: Vec<f64>| all.into_iter().reduce(f64::min);
    let one = |subject, case: &str, at, ours, theirs| {
        largest(ratios(subject, &|c, a| c == case && a == at, ours, theirs))
    };
    let idle = |of: &str| {
        let costs = access::IDLE.map(|case| run.find("access", case, access::BYTES, OURS));
        let costs = costs.into_iter().flatten().map(|figure| figure.median);
        let other = run.find("access", of, access::BYTES, access::EVENT_QUERY)?;
        costs.map(|cost| cost / other.median).reduce(f64::max)
    };
    let faster = |case| one("pinned", case, 1 << 30, OURS, pinned::RAW_BOTH).map(f64::recip);
    let goal = |what, against, bound, ratio| Goal { what, against, bound, ratio };
    vec![
        goal(
            "`copy_to_gpu` of 4 KB, enqueue",
            RAW_EVENT,
            Bound::AtMost(1.10),
            one("enqueue", "H2D", 4096, OURS, RAW_EVENT),
        ),
        goal(
            "the same",
            "cudarc, events tracked",
            Bound::AtMost(0.40),
            one("enqueue", "H2D", 4096, OURS, "cudarc"),
        ),
        goal(
            "the same, of a prefix `..n`",
            "PyTorch `[:n].copy_`",
            Bound::AtMost(0.20),
            one("enqueue", "H2D", 4096, OURS_PREFIX, TORCH_PREFIX),
        ),
        goal(
            "`copy_to_cpu` of 4 KB and `cpu`, until it is read",
            latency::RAW_STREAM_WAIT,
            Bound::AtMost(1.0),
            one("latency", "D2H", 4096, OURS, latency::RAW_STREAM_WAIT),
        ),
        goal(
            "bandwidth up, 16 MB and more",
            "the raw call, pinned",
            Bound::AtLeast(0.99),
            smallest(ratios("bandwidth", &|c, a| c == "H2D" && a >= 16 << 20, OURS, RAW)),
        ),
        goal(
            "bandwidth down, 16 MB and more",
            "the raw call, pinned",
            Bound::AtLeast(0.99),
            smallest(ratios("bandwidth", &|c, a| c == "D2H" && a >= 16 << 20, OURS, RAW)),
        ),
        goal(
            "`cpu_mut` of an idle buffer",
            "cudaEventQuery, asked again and again",
            Bound::AtMost(0.01),
            idle(access::IDLE[1]),
        ),
        goal(
            "the same",
            "cudaEventQuery, asked for the first time",
            Bound::AtMost(0.01),
            idle(access::UNASKED),
        ),
        goal(
            "fill of 1 GB, elements of 1 to 16 bytes",
            fill::MEMSET,
            Bound::AtLeast(0.98),
            smallest(ratios(
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
            one("fill", "enqueue, 4 bytes", 4096, OURS, fill::MEMSET),
        ),
        goal(
            "1 GB of zeroed pinned memory and a device half, allocated",
            pinned::RAW_BOTH,
            Bound::TimesFaster(8.0),
            faster(pinned::ALONE[0]),
        ),
        goal(
            "the same, released",
            "cudaFreeHost + cudaFree",
            Bound::TimesFaster(5.0),
            faster(pinned::ALONE[1]),
        ),
        goal(
            "`copy_to_gpu` of 4 KB from 16 threads, each thread",
            RAW_EVENT,
            Bound::AtMost(1.10),
            one("threads", "H2D of 4 KB", 16, OURS, RAW_EVENT),
        ),
        goal(
            "prefixes of 16 members of a group, 128 KB in all, enqueue",
            group::RAW_EACH,
            Bound::AtMost(0.15),
            one("group", group::CASES[0], group::BYTES, group::GROUP, group::RAW_EACH),
        ),
        goal(
            "the same",
            "PyTorch, 16 `[:n].copy_`",
            Bound::AtMost(0.025),
            one("group", group::CASES[0], group::BYTES, group::GROUP, group::TORCH),
        ),
    ]
}
