//! The bandwidth of copies in one direction and in both, by the clock of the device.

use std::hint::black_box;

use super::job::Job;
use crate::figures::Run;
use crate::lane::{Lane, verify};
use crate::lanes::Kind;
use crate::measure::{seconds, turns};
use crate::raw::Timer;
use crate::setup::Setup;

const SIZES: [usize; 10] = [
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
    16 << 20,
    64 << 20,
    256 << 20,
    1 << 30,
];
const KINDS: [Kind; 3] = [Kind::Ours, Kind::Raw, Kind::Cudarc];

pub fn plan(setup: &Setup) -> Vec<Job> {
    setup
        .sizes(&SIZES)
        .map(|bytes| -> Job { Box::new(move |setup, run| job(setup, run, bytes)) })
        .collect()
}

fn job(setup: &Setup, run: &mut Run, bytes: usize) {
    if let Err(why) = setup.room(2 * KINDS.len() * bytes, 2 * KINDS.len() * bytes) {
        return run.leave_out(format!("bandwidth of {bytes} bytes: {why}"));
    }
    // About as long for each size, as far as single copies allow.
    let copies = (256_usize << 20).div_ceil(bytes).min(64);
    let rounds = setup.rounds(if bytes >= 64 << 20 { 15 } else { 30 });
    let mut pairs: Vec<_> = Kind::lanes(&KINDS, setup, bytes)
        .into_iter()
        .zip(Kind::lanes(&KINDS, setup, bytes))
        .collect();
    if setup.is_cuda() {
        displace();
    }
    let timer = setup.is_cuda().then(Timer::new);
    let rate = |seconds: f64, bytes: usize| Some(bytes as f64 / seconds * 1e-9);
    for case in ["H2D", "D2H", "both at once"] {
        let spreads = turns(rounds, &mut pairs, |(up, down)| match case {
            "H2D" => {
                rate(one_way(&timer, up.as_mut(), |lane| lane.upload(), copies), copies * bytes)
            }
            "D2H" => {
                rate(one_way(&timer, up.as_mut(), |lane| lane.download(), copies), copies * bytes)
            }
            // Two streams have no clock in common but the thread's.
            _ => rate(
                seconds(|| {
                    for _ in 0..copies {
                        up.upload();
                        down.download();
                    }
                    up.finish();
                    down.finish();
                }),
                2 * copies * bytes,
            ),
        });
        for ((lane, _), spread) in pairs.iter().zip(spreads) {
            run.add(("bandwidth", case, bytes), lane.name(), "GB/s", spread.unwrap());
        }
    }
    for (up, down) in &mut pairs {
        verify(up.as_mut());
        verify(down.as_mut());
    }
}

/// Evicts recently written data from the caches of the processor.
///
/// Cached data is slower to copy, and some contenders would have more of it than others.
fn displace() {
    let mut other = vec![0u8; 512 << 20];
    fastrand::fill(&mut other);
    black_box(&other);
}

/// Seconds that the copies take on the device, or on the CPU.
fn one_way(
    timer: &Option<Timer>,
    lane: &mut dyn Lane,
    copy: fn(&mut dyn Lane),
    copies: usize,
) -> f64 {
    let stream = lane.stream();
    let send = || (0..copies).for_each(|_| copy(lane));
    match timer {
        Some(timer) => timer.seconds(stream, send),
        None => seconds(send),
    }
}
