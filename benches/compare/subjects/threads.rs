//! The cost of enqueueing an upload in each of several threads. Each thread has its own stream and
//! buffer.

use std::sync::Barrier;
use std::thread;

use super::job::Job;
use crate::figures::Run;
use crate::lane::{Lane, verify};
use crate::lanes::Kind;
use crate::measure::{each, turns};
use crate::setup::Setup;

pub const THREADS: [usize; 5] = [1, 2, 4, 8, 16];
const BYTES: usize = 4096;
const CALLS: usize = 128;

pub fn plan(setup: &Setup) -> Vec<Job> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads =
        THREADS.into_iter().filter(|threads| *threads <= cores && !(setup.short && *threads > 2));
    threads.map(|threads| -> Job { Box::new(move |setup, run| job(setup, run, threads)) }).collect()
}

fn job(setup: &Setup, run: &mut Run, threads: usize) {
    let kinds = [Kind::Ours, Kind::OursInContext, Kind::Raw, Kind::RawEvent];
    let kinds = [&kinds[..], &[Kind::Cudarc, Kind::CudarcUntracked]].concat();
    let lanes = |kind: Kind| (0..threads).map(|_| kind.lane(setup, BYTES)).collect();
    let mut contenders: Vec<Vec<_>> = kinds.into_iter().filter_map(lanes).collect();
    let spreads = turns(setup.rounds(60), &mut contenders, |lanes| Some(round(lanes)));
    for (lanes, spread) in contenders.iter_mut().zip(spreads) {
        run.add(("threads", "H2D of 4 KB", threads), lanes[0].name(), "ns", spread.unwrap());
        lanes.iter_mut().for_each(|lane| verify(lane.as_mut()));
    }
}

/// Nanoseconds of a call, on average over the threads.
fn round(lanes: &mut [Box<dyn Lane>]) -> f64 {
    let start = Barrier::new(lanes.len());
    let one = |lane: &mut dyn Lane| {
        lane.enter();
        // The first calls of a thread cost more, so they are not timed.
        (0..8).for_each(|_| lane.upload());
        lane.finish();
        start.wait();
        let cost = each(CALLS, || lane.upload());
        lane.finish();
        cost
    };
    let one = &one;
    let count = lanes.len();
    let sum: f64 = thread::scope(|scope| {
        let running: Vec<_> =
            lanes.iter_mut().map(|lane| scope.spawn(move || one(lane.as_mut()))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    sum / count as f64
}
