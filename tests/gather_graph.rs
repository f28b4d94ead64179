//! Gathers are launched as graphs, one to a stream: what that must not change.

mod common;

#[cfg(target_os = "linux")]
use std::thread;
#[cfg(target_os = "linux")]
use std::time::{Duration, Instant};

use common::Gate;
#[cfg(target_os = "linux")]
use common::sim::{self, Held};
use cpu_gpu_buffer::{
    BufferGroup, Device, GroupLayoutBuilder, Key, MemberRows, Stream, StreamOptions,
};

const MEMBERS: usize = 12;
const ROWS: usize = 700;

/// A group of words, whose device half holds zeroes.
struct Fixture {
    group: BufferGroup,
    keys: Vec<Key<u32>>,
}

impl Fixture {
    fn new(device: Device) -> Fixture {
        let mut builder = GroupLayoutBuilder::new();
        let keys: Vec<_> = (0..MEMBERS).map(|_| builder.add(ROWS)).collect();
        let mut group = BufferGroup::new(&builder.finish(), device).unwrap();
        for (member, key) in keys.iter().enumerate() {
            group.cpu_mut(*key).unwrap().fill(word(member));
        }
        Fixture { group, keys }
    }

    /// Rows of some members, as one kernel moves them.
    fn rows(&self, from: usize) -> Vec<MemberRows> {
        let rows = |member: usize| self.keys[member].rows(1 + member..ROWS - 1);
        (from..MEMBERS).step_by(3).map(rows).collect()
    }

    fn upload(&mut self, from: usize, stream: &Stream) {
        let rows = self.rows(from);
        self.group.copy_to_gpu(&rows, stream).unwrap();
    }

    /// The device half holds the uploaded rows of the members whose copies were sent, and zeroes elsewhere.
    fn verify(&self, sent: &[usize]) {
        self.group.synchronize().unwrap();
        for (member, key) in self.keys.iter().enumerate() {
            let at = self.group.device_ptr(*key).unwrap();
            let words = common::device_words(self.group.device(), at, ROWS);
            let arrived = sent.contains(&(member % 3));
            for (row, seen) in words.iter().enumerate() {
                let named = arrived && (1 + member..ROWS - 1).contains(&row);
                let expected = if named { word(member) } else { 0 };
                assert_eq!(*seen, expected, "member {member}, row {row}");
            }
        }
    }
}

fn word(member: usize) -> u32 {
    0x0101_0101 * (member as u32 + 1)
}

#[test]
fn a_queued_gather_moves_what_it_was_sent_for_whatever_is_sent_after_it() {
    let test = "a_queued_gather_moves_what_it_was_sent_for_whatever_is_sent_after_it";
    let Some((device, _turn)) = common::cuda(test) else { return };
    // SAFETY: the legacy stream is always there.
    let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), device, None) };
    for stream in [Stream::new(device), legacy] {
        let stream = stream.unwrap();
        // By the graph that the first gather makes, and by one that is there.
        for _ in 0..2 {
            let mut it = Fixture::new(device);
            let gate = Gate::close(&stream);
            (0..3).for_each(|from| it.upload(from, &stream));
            gate.open();
            it.verify(&[0, 1, 2]);
        }
    }
}

#[test]
fn a_gather_does_not_wait_for_one_of_another_stream() {
    let test = "a_gather_does_not_wait_for_one_of_another_stream";
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [held, free] = [(); 2].map(|()| Stream::new(device).unwrap());
    let mut warm = Fixture::new(device);
    [&held, &free].into_iter().for_each(|stream| warm.upload(0, stream));
    warm.group.synchronize().unwrap();

    // Of one group, and of two.
    let (mut one, mut two) = (Fixture::new(device), Fixture::new(device));
    one.upload(0, &free);
    one.group.synchronize().unwrap();
    let gate = Gate::close(&held);
    one.upload(1, &held);
    gate.passes(|| {
        one.upload(2, &free);
        two.upload(0, &free);
        free.synchronize().unwrap();
    });
    two.verify(&[0]);
    one.verify(&[0, 1, 2]);
}

#[test]
fn the_first_gather_of_a_stream_waits_for_nothing_and_leaves_captures_alone() {
    let test = "the_first_gather_of_a_stream_waits_for_nothing_and_leaves_captures_alone";
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [held, captured] = [(); 2].map(|()| Stream::new(device).unwrap());
    let mut it = Fixture::new(device);
    // The first use of the device half.
    it.group.gpu_on(&held).unwrap();
    it.group.synchronize().unwrap();
    let gate = Gate::close(&held);
    common::begin_capture(&captured);
    gate.passes(|| it.upload(0, &held));
    common::end_capture(&captured);
    it.verify(&[0]);

    // Nor does the end of a stream end one.
    common::begin_capture(&captured);
    drop((it, held));
    common::end_capture(&captured);
}

#[test]
fn a_stream_may_go_while_its_gather_is_queued() {
    let test = "a_stream_may_go_while_its_gather_is_queued";
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [holding, stream] = [(); 2].map(|()| Stream::new(device).unwrap());
    let mut it = Fixture::new(device);
    it.upload(0, &stream);
    it.group.synchronize().unwrap();
    let gate = Gate::close(&holding);
    stream.wait(&holding.record().unwrap()).unwrap();
    it.upload(1, &stream);
    // Another one takes its place in the records of the members, but not that of the copy itself.
    let mut other = Fixture::new(device);
    other.upload(0, &stream);
    drop(stream);
    gate.waits(|| drop(other));
    it.verify(&[0, 1]);
}

/// How often something was launched as a graph, and as a kernel.
#[cfg(target_os = "linux")]
fn launches(action: impl FnOnce()) -> [u64; 2] {
    sim::reset();
    action();
    [c"cuGraphLaunch", c"cuLaunchKernel"].map(sim::calls_of)
}

#[test]
#[cfg(target_os = "linux")]
fn gathers_are_launched_as_graphs_where_that_keeps_the_streams_priority() {
    let test = "gathers_are_launched_as_graphs_where_that_keeps_the_streams_priority";
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are counted by the simulated runtime");
    }
    for (priority, expected) in [(0, [1, 0]), (-1, [0, 1]), (-5, [0, 1])] {
        let options = StreamOptions { priority, ..Default::default() };
        let stream = Stream::with_options(device, options).unwrap();
        let mut it = Fixture::new(device);
        for from in 0..3 {
            assert_eq!(launches(|| it.upload(from, &stream)), expected, "{priority}");
            // It is made once.
            let made = u64::from(expected[0] == 1 && from == 0);
            assert_eq!(sim::calls_of(c"cuGraphInstantiateWithFlags"), made, "{priority}");
        }
        it.verify(&[0, 1, 2]);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn where_no_graph_can_be_made_gathers_are_launched_as_kernels() {
    let test = "where_no_graph_can_be_made_gathers_are_launched_as_kernels";
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let calls = [
        c"cudaStreamGetPriority",
        c"cuGraphCreate",
        c"cuGraphAddKernelNode",
        c"cuGraphInstantiateWithFlags",
    ];
    for call in calls {
        let before = sim::live();
        let stream = Stream::new(device).unwrap();
        let mut it = Fixture::new(device);
        sim::reset();
        sim::fail_function(call, 2);
        it.upload(0, &stream);
        sim::heal();
        it.upload(1, &stream);
        assert_eq!([c"cuGraphLaunch", c"cuLaunchKernel"].map(sim::calls_of), [0, 2]);
        it.verify(&[0, 1]);
        drop((it, stream));
        assert_eq!(sim::live(), before, "{call:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_gather_does_not_wait_for_a_thread_that_is_at_the_streams_graph() {
    let test = "a_gather_does_not_wait_for_a_thread_that_is_at_the_streams_graph";
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back by the simulated runtime");
    }
    let stream = Stream::new(device).unwrap();
    let (mut one, mut two) = (Fixture::new(device), Fixture::new(device));
    one.upload(0, &stream);
    sim::reset();
    thread::scope(|scope| {
        let held = Held::next(c"cuGraphExecKernelNodeSetParams");
        scope.spawn(|| one.upload(1, &stream));
        held.wait();
        let second = scope.spawn(|| two.upload(0, &stream));
        let start = Instant::now();
        while !second.is_finished() && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(1));
        }
        let went_on = second.is_finished();
        drop(held);
        second.join().unwrap();
        assert!(went_on, "it waited for the other thread");
    });
    assert_eq!([c"cuGraphLaunch", c"cuLaunchKernel"].map(sim::calls_of), [1, 1]);
    one.verify(&[0, 1]);
    two.verify(&[0]);
}
