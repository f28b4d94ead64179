//! The time from the call that enqueues a copy until the bytes may be read, or written again.

use super::job::Job;
use crate::figures::Run;
use crate::lane::{Lane, RAW, RAW_EVENT, verify};
use crate::lanes::Kind;
use crate::measure::{seconds, turns};
use crate::setup::Setup;

pub const SIZES: [usize; 6] = super::enqueue::SIZES;
pub const RAW_STREAM_WAIT: &str = "cudaMemcpyAsync + cudaStreamSynchronize";
pub const RAW_EVENT_WAIT: &str = "cudaMemcpyAsync + cudaEventRecord + cudaEventSynchronize";

pub fn plan(setup: &Setup) -> Vec<Job> {
    let sizes = setup.sizes(&SIZES);
    let cases = sizes.flat_map(|bytes| ["H2D", "D2H"].map(|case| (case, bytes)));
    cases
        .map(|(case, bytes)| -> Job { Box::new(move |setup, run| job(setup, run, case, bytes)) })
        .collect()
}

fn job(setup: &Setup, run: &mut Run, case: &str, bytes: usize) {
    let round = if case == "H2D" { until_written } else { until_read };
    let kinds = [Kind::Ours, Kind::Raw, Kind::RawEvent, Kind::Cudarc, Kind::CudarcUntracked];
    let mut lanes = Kind::lanes(&kinds, setup, bytes);
    let spreads = turns(setup.rounds(2000), &mut lanes, |lane| Some(round(lane.as_mut()) * 1e6));
    for (lane, spread) in lanes.iter_mut().zip(spreads) {
        let name = match lane.name() {
            RAW => RAW_STREAM_WAIT,
            RAW_EVENT => RAW_EVENT_WAIT,
            name => name,
        };
        run.add(("latency", case, bytes), name, "µs", spread.unwrap());
        verify(lane.as_mut());
    }
}

fn until_written(lane: &mut dyn Lane) -> f64 {
    let fresh: [u8; 4] = fastrand::u32(..).to_ne_bytes();
    lane.write()[..4].copy_from_slice(&fresh);
    seconds(|| {
        lane.upload();
        lane.write()[0] = 0;
    })
}

fn until_read(lane: &mut dyn Lane) -> f64 {
    let fresh: [u8; 4] = fastrand::u32(..).to_ne_bytes();
    lane.write()[..4].copy_from_slice(&fresh);
    lane.upload();
    lane.write()[..4].fill(0);
    lane.finish();
    let mut seen = 0;
    let time = seconds(|| {
        lane.download();
        seen = lane.read()[0];
    });
    assert_eq!(seen, fresh[0], "{}: read too early", lane.name());
    time
}
