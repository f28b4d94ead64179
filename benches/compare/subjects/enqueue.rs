//! The cost of enqueueing a copy, for the calling thread.

use super::job::{BATCH, Job};
use crate::figures::Run;
use crate::lane::{Lane, verify};
use crate::lanes::Kind;
use crate::measure::{each, turns};
use crate::setup::Setup;

pub const SIZES: [usize; 6] = [4, 64, 1 << 10, 4 << 10, 16 << 10, 64 << 10];

pub fn plan(setup: &Setup) -> Vec<Job> {
    let sizes = setup.sizes(&SIZES);
    let cases = sizes.flat_map(|bytes| ["H2D", "D2H"].map(|case| (case, bytes)));
    cases
        .map(|(case, bytes)| -> Job { Box::new(move |setup, run| job(setup, run, case, bytes)) })
        .collect()
}

fn job(setup: &Setup, run: &mut Run, case: &str, bytes: usize) {
    let copy: fn(&mut dyn Lane) =
        if case == "H2D" { |lane| lane.upload() } else { |lane| lane.download() };
    let kinds = [Kind::Ours, Kind::OursPrefix, Kind::OursBetween, Kind::Raw, Kind::RawEvent];
    let kinds = [&kinds[..], &[Kind::Cudarc, Kind::CudarcUntracked]].concat();
    let mut lanes = Kind::lanes(&kinds, setup, bytes);
    let spreads = turns(setup.rounds(300), &mut lanes, |lane| {
        let cost = each(BATCH, || copy(lane.as_mut()));
        lane.finish();
        Some(cost)
    });
    for (lane, spread) in lanes.iter_mut().zip(spreads) {
        run.add(("enqueue", case, bytes), lane.name(), "ns", spread.unwrap());
        verify(lane.as_mut());
    }
}
