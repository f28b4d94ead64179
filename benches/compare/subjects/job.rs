//! Jobs, and the comparisons that they make.

use crate::figures::Run;
use crate::measure::{Named, Spread, seconds, turns};
use crate::setup::Setup;

pub type Job = Box<dyn FnOnce(&Setup, &mut Run)>;

/// The number of calls that are timed together. They fit into the driver's queue without a wait.
pub const BATCH: usize = 64;

/// Lets the contenders take turns, and adds their figures to the run.
pub fn compare(
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

/// A function that makes and drops something. It returns the seconds of both.
pub type Lifecycle<'a> = (&'static str, Box<dyn Fn() -> [f64; 2] + 'a>);

pub fn lifecycle<'a, V>(name: &'static str, make: impl Fn() -> V + 'a) -> Lifecycle<'a> {
    let life = move || {
        let mut made = None;
        let making = seconds(|| made = Some(make()));
        [making, seconds(|| drop(made))]
    };
    (name, Box::new(life))
}

/// Lets the lifecycles take turns. The two cases are making and dropping.
pub fn compare_lifecycles(
    run: &mut Run,
    rounds: usize,
    (subject, cases, at): (&str, [&str; 2], usize),
    lifecycles: &mut [Lifecycle<'_>],
) {
    let mut dropped = vec![Vec::new(); lifecycles.len()];
    let mut numbered: Vec<_> = lifecycles.iter().zip(&mut dropped).collect();
    let made = turns(rounds, &mut numbered, |((_, life), dropped)| {
        let [making, dropping] = life();
        dropped.push(dropping * 1e3);
        Some(making * 1e3)
    });
    for (((name, _), made), dropped) in lifecycles.iter().zip(made).zip(dropped) {
        run.add((subject, cases[0], at), name, "ms", made.expect("each round gives a sample"));
        // The first samples belong to the warm-up.
        let dropped = dropped[dropped.len() - rounds..].to_vec();
        run.add((subject, cases[1], at), name, "ms", Spread::of(dropped));
    }
}
