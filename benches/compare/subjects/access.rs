//! The cost of accessing the host side.
//!
//! The buffer is idle, or its copy has finished unnoticed, or its copy is in flight. The contenders
//! are the queries that other programs make instead.

use std::hint::black_box;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

use super::job::{BATCH, Job, compare};
use crate::figures::Run;
use crate::lane::OURS;
use crate::lanes::Kind;
use crate::measure::{Named, each, turns};
use crate::raw::{self, Event};
use crate::setup::Setup;

pub const BYTES: usize = 4096;
pub const EVENT_QUERY: &str = "cudaEventQuery";
const STREAM_QUERY: &str = "cudaStreamQuery";
const CUDARC: &str = "cudarc as_mut_slice";
pub const IDLE: [&str; 2] = ["idle, new", "idle, stream synchronized"];
pub const UNASKED: &str = "finished, first asked";

pub fn plan(setup: &Setup) -> Vec<Job> {
    let idle = IDLE.map(|case| -> Job { Box::new(move |setup, run| idle(setup, run, case)) });
    let mut jobs = Vec::from(idle);
    if setup.is_cuda() {
        jobs.push(Box::new(unasked));
        jobs.push(Box::new(in_flight));
    }
    jobs
}

fn buffer(device: Device) -> CpuGpuBuffer<u8> {
    CpuGpuBuffer::new(BYTES, device).unwrap()
}

fn idle(setup: &Setup, run: &mut Run, case: &str) {
    let calls = if setup.short { 100 } else { 5000 };
    let stream = Stream::new(setup.device).unwrap();
    let mut buffer = buffer(setup.device);
    if case == IDLE[1] {
        fastrand::fill(buffer.cpu_mut().unwrap());
        buffer.copy_to_gpu(.., &stream).unwrap();
    }
    stream.synchronize().unwrap();
    let mut contenders = vec![Named::new(OURS, || {
        each(calls, || {
            black_box(black_box(&mut buffer).cpu_mut().unwrap());
        })
    })];
    if setup.is_cuda() {
        let (event, stream) = (Event::new(false), raw::Stream::new());
        event.record(stream.as_raw());
        stream.synchronize();
        contenders.push(Named::new(EVENT_QUERY, move || {
            each(calls, || assert!(black_box(&event).query()))
        }));
        contenders.push(Named::new(STREAM_QUERY, move || {
            each(calls, || assert!(raw::stream_query(black_box(&stream).as_raw())))
        }));
    }
    if let Some(mut pinned) = setup.cudarc.as_ref().map(|peer| peer.pinned(BYTES)) {
        contenders.push(Named::new(CUDARC, move || {
            each(calls, || {
                black_box(black_box(&mut pinned).as_mut_slice().unwrap());
            })
        }));
    }
    compare(run, setup.rounds(100), ("access", case, BYTES), "ns", contenders);
}

/// Accesses many buffers once each, after their copies have finished.
fn unasked(setup: &Setup, run: &mut Run) {
    let stream = Stream::new(setup.device).unwrap();
    let mut buffers: Vec<_> = (0..BATCH).map(|_| buffer(setup.device)).collect();
    for buffer in &mut buffers {
        fastrand::fill(buffer.cpu_mut().unwrap());
    }
    let mut contenders = vec![Named::new(OURS, || {
        buffers.iter_mut().for_each(|buffer| buffer.copy_to_gpu(.., &stream).unwrap());
        // The raw call, since the crate's own would update the buffers' state.
        raw::synchronize(stream.as_raw());
        let mut buffers = buffers.iter_mut();
        each(BATCH, || {
            black_box(buffers.next().unwrap().cpu_mut().unwrap());
        })
    })];
    let others = raw::Stream::new();
    let events: Vec<_> = (0..BATCH).map(|_| Event::new(false)).collect();
    contenders.push(Named::new(EVENT_QUERY, move || {
        events.iter().for_each(|event| event.record(others.as_raw()));
        others.synchronize();
        let mut events = events.iter();
        each(BATCH, || assert!(events.next().unwrap().query()))
    }));
    let mut lanes: Vec<_> = (0..BATCH).filter_map(|_| Kind::Cudarc.lane(setup, BYTES)).collect();
    if !lanes.is_empty() {
        contenders.push(Named::new(CUDARC, move || {
            lanes.iter_mut().for_each(|lane| lane.upload());
            raw::synchronize_device();
            let mut lanes = lanes.iter_mut();
            each(BATCH, || {
                black_box(lanes.next().unwrap().write());
            })
        }));
    }
    compare(run, setup.rounds(200), ("access", UNASKED, BYTES), "ns", contenders);
}

/// The buffer's copy is in flight behind a long copy.
fn in_flight(setup: &Setup, run: &mut Run) {
    const CASE: &str = "in flight";
    let long = if setup.short { 16 << 20 } else { 256 << 20 };
    if let Err(why) = setup.room(2 * long, 2 * long) {
        return run.leave_out(format!("access to what is in flight: {why}"));
    }
    let stream = Stream::new(setup.device).unwrap();
    let mut first = CpuGpuBuffer::<u8>::new(long, setup.device).unwrap();
    let mut buffer = buffer(setup.device);
    let event = Event::new(false);
    type Asked<'a> = (&'a str, &'a dyn Fn(&mut CpuGpuBuffer<u8>) -> bool);
    let mut contenders: [Asked<'_>; 3] = [
        (OURS, &|buffer| buffer.try_cpu_mut().unwrap().is_some()),
        (EVENT_QUERY, &|_| event.query()),
        (STREAM_QUERY, &|_| raw::stream_query(stream.as_raw())),
    ];
    let spreads = turns(setup.rounds(100), &mut contenders, |(_, finished)| {
        first.copy_to_gpu(.., &stream).unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        event.record(stream.as_raw());
        let mut all_in_flight = true;
        let cost = each(BATCH, || all_in_flight &= !finished(&mut buffer));
        stream.synchronize().unwrap();
        // A round counts only if the long copy outlasted it.
        all_in_flight.then_some(cost)
    });
    for ((name, _), spread) in contenders.iter().zip(spreads) {
        match spread {
            Some(spread) => run.add(("access", CASE, BYTES), name, "ns", spread),
            None => run.leave_out(format!("access in flight by {name}: no copy took long enough")),
        }
    }
}
