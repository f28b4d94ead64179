//! The subjects of the benchmarks. Each plans jobs, which run one after another.

pub mod access;
mod bandwidth;
mod enqueue;
pub mod fill;
pub mod group;
mod job;
pub mod latency;
pub mod pinned;
pub mod pool;
mod scattered;
mod threads;

use crate::setup::Setup;
pub use job::Job;

type Plan = fn(&Setup) -> Vec<Job>;

pub const ALL: [(&str, Plan); 10] = [
    ("enqueue", enqueue::plan),
    ("latency", latency::plan),
    ("bandwidth", bandwidth::plan),
    ("fill", fill::plan),
    ("pinned", pinned::plan),
    ("access", access::plan),
    ("pool", pool::plan),
    ("threads", threads::plan),
    ("group", group::plan),
    ("scattered", scattered::plan),
];
