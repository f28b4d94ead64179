//! The timing of all measurements.
//!
//! Contenders take turns in each round, so that a slow phase of the machine affects all of them.
//! The rounds of a warm-up do not count.

use std::time::Instant;

/// Of many samples, the median and the 10th and 90th percentile.
#[derive(Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub samples: usize,
}

impl Spread {
    pub fn of(mut samples: Vec<f64>) -> Spread {
        assert!(!samples.is_empty(), "nothing was measured");
        samples.sort_by(f64::total_cmp);
        let [low, median, high] =
            [10, 50, 90].map(|percent| samples[samples.len() * percent / 100]);
        Spread { median, low, high, samples: samples.len() }
    }
}

/// Runs all rounds. Each round starts with the next contender.
///
/// `round` returns one sample, or `None` if the round measured something else.
pub fn turns<C>(
    rounds: usize,
    contenders: &mut [C],
    mut round: impl FnMut(&mut C) -> Option<f64>,
) -> Vec<Option<Spread>> {
    let warm_up = rounds / 10 + 1;
    let count = contenders.len();
    let mut samples = vec![Vec::with_capacity(rounds); count];
    for number in 0..warm_up + rounds {
        for turn in 0..count {
            let at = (number + turn) % count;
            let sample = round(&mut contenders[at]);
            if number >= warm_up {
                samples[at].extend(sample);
            }
        }
    }
    samples.into_iter().map(|all| (!all.is_empty()).then(|| Spread::of(all))).collect()
}

/// A contender that is nothing but a name and a round.
pub struct Named<'a> {
    pub name: &'static str,
    round: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Named<'a> {
    pub fn new(name: &'static str, round: impl FnMut() -> f64 + 'a) -> Named<'a> {
        Named { name, round: Box::new(round) }
    }

    pub fn round(&mut self) -> Option<f64> {
        Some((self.round)())
    }
}

/// Nanoseconds of each of several calls, made one after the other.
pub fn each(calls: usize, mut call: impl FnMut()) -> f64 {
    seconds(|| (0..calls).for_each(|_| call())) * 1e9 / calls as f64
}

/// Seconds that something takes.
pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}
