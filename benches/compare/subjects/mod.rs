//! What is measured. Each subject plans its jobs, which are then done one after the other.

pub mod access;
mod bandwidth;
mod enqueue;
pub mod fill;
pub mod group;
pub mod latency;
pub mod pinned;
pub mod pool;
mod threads;

use crate::figures::Run;
use crate::measure::{Named, Spread, seconds, turns};
use crate::setup::Setup;

pub type Job = Box<dyn FnOnce(&Setup, &mut Run)>;

type Plan = fn(&Setup) -> Vec<Job>;

pub const ALL: [(&str, Plan); 9] = [
    ("enqueue", enqueue::plan),
    ("latency", latency::plan),
    ("bandwidth", bandwidth::plan),
    ("fill", fill::plan),
    ("pinned", pinned::plan),
    ("access", access::plan),
    ("pool", pool::plan),
    ("threads", threads::plan),
    ("group", group::plan),
];

/// Calls that are timed together: few enough for the driver's queue to take them without a wait.
const BATCH: usize = 64;

/// Lets contenders take turns, and keeps what comes of it.
fn compare(
    run: &mut Run,
    rounds: usize,
    what: (&str, &str, usize),
    unit: &str,
    mut contenders: Vec<Named<'_>>,
) {
    let spreads = turns(rounds, &mut contenders, Named::round);
    for (contender, spread) in contenders.iter().zip(spreads) {
        run.add(what, contender.name, unit, spread.expect("each round gives a sample"));
    }
}

/// One way to make something; the answer is the seconds that making it took, and dropping it.
type Way<'a> = (&'static str, Box<dyn Fn() -> [f64; 2] + 'a>);

fn way<'a, V>(name: &'static str, make: impl Fn() -> V + 'a) -> Way<'a> {
    let life = move || {
        let mut made = None;
        let making = seconds(|| made = Some(make()));
        [making, seconds(|| drop(made))]
    };
    (name, Box::new(life))
}

/// Lets the ways take turns; the two cases are making and dropping.
fn lives(
    run: &mut Run,
    rounds: usize,
    (subject, cases, at): (&str, [&str; 2], usize),
    ways: &mut [Way<'_>],
) {
    let mut dropped = vec![Vec::new(); ways.len()];
    let mut numbered: Vec<_> = ways.iter().zip(&mut dropped).collect();
    let made = turns(rounds, &mut numbered, |((_, life), dropped)| {
        let [making, dropping] = life();
        dropped.push(dropping * 1e3);
        Some(making * 1e3)
    });
    for (((name, _), made), dropped) in ways.iter().zip(made).zip(dropped) {
        run.add((subject, cases[0], at), name, "ms", made.expect("each round gives a sample"));
        // Those of the warm-up came first.
        let dropped = dropped[dropped.len() - rounds..].to_vec();
        run.add((subject, cases[1], at), name, "ms", Spread::of(dropped));
    }
}
