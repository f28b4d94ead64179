//! Gathers are launched as graphs, one for each stream, with the same behaviour as kernels.

mod common;

#[cfg(target_os = "linux")]
use std::thread;
#[cfg(target_os = "linux")]
use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use common::sim::{self, Held};
use common::{Gate, test_name};
use cpu_gpu_buffer::{
    BufferGroup, Device, GroupLayoutBuilder, MemberKey, MemberRows, Stream, StreamOptions,
};

const MEMBERS: usize = 12;
const ROWS: usize = 700;

/// A group of words, whose device side holds zeroes.
struct Fixture {
    group: BufferGroup,
    keys: Vec<MemberKey<u32>>,
}

impl Fixture {
    fn new(device: Device) -> Fixture {
        let mut builder = GroupLayoutBuilder::new();
        let keys: Vec<_> = (0..MEMBERS).map(|_| builder.add(ROWS)).collect();
        let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
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

    /// The device side holds the uploaded rows of the members whose copies were sent, and zeroes elsewhere.
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
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    // SAFETY: the legacy stream is always there.
    let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), device, None) };
    for stream in [Stream::new(device), legacy] {
        let stream = stream.unwrap();
        // By a kernel and the graph that the second gather makes, and by the graph alone.
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
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [held, free] = [(); 2].map(|()| Stream::new(device).unwrap());
    let mut warm = Fixture::new(device);
    for stream in [&held, &free, &held, &free] {
        warm.upload(0, stream);
    }
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
fn making_a_streams_graph_waits_for_nothing_and_leaves_captures_alone() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [held, captured] = [(); 2].map(|()| Stream::new(device).unwrap());
    let mut it = Fixture::new(device);
    // The second gather makes it.
    it.upload(0, &held);
    it.group.synchronize().unwrap();
    let gate = Gate::close(&held);
    common::begin_capture(&captured);
    gate.passes(|| it.upload(1, &held));
    common::end_capture(&captured);
    it.verify(&[0, 1]);

    // Nor does its end.
    common::begin_capture(&captured);
    drop((it, held));
    common::end_capture(&captured);
}

#[test]
fn a_stream_may_go_with_its_graph_while_that_is_queued() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let [holding, going, staying] = [(); 3].map(|()| Stream::new(device).unwrap());
    let mut it = Fixture::new(device);
    let rows = |members: [usize; 2]| members.map(|member| it.keys[member].rows(1..ROWS - 1));
    let (same, other, last) = (rows([0, 3]), rows([1, 4]), rows([1, 7]));
    it.group.gpu_on(&staying).unwrap();
    for (rows, stream) in [(&same, &going), (&other, &staying), (&same, &going), (&other, &staying)]
    {
        it.group.copy_to_gpu(rows, stream).unwrap();
    }
    it.group.synchronize().unwrap();
    let gate = Gate::close(&holding);
    going.wait(&holding.record().unwrap()).unwrap();
    it.group.copy_to_gpu(&same, &going).unwrap();
    #[cfg(target_os = "linux")]
    let before = common::is_simulated().then(sim::live);
    drop(going);
    gate.passes(|| {
        // The first takes the place of the queued one, whose record, which names the stream, serves again for another.
        for rows in [&same, &other, &last] {
            it.group.copy_to_gpu(rows, &staying).unwrap();
        }
        #[cfg(target_os = "linux")]
        if let Some(before) = before {
            let [.., streams, _, graphs] = sim::live();
            assert_eq!([streams, graphs], [before[2] - 1, before[4] - 2], "they are still there");
        }
    });
    it.group.synchronize().unwrap();
    for member in [0, 1, 3, 4, 7] {
        let at = it.group.device_ptr(it.keys[member]).unwrap();
        let words = common::device_words(device, at, ROWS);
        common::all(&words[1 + member..ROWS - 1], word(member));
    }
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
fn gathers_are_launched_as_graphs_from_a_streams_second_one_on() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are counted by the simulated runtime");
    }
    for priority in [0, -1] {
        let options = StreamOptions { priority, ..Default::default() };
        let stream = Stream::with_options(device, options).unwrap();
        let mut it = Fixture::new(device);
        for (from, made, expected) in [(0, 0, [0, 1]), (1, 1, [1, 0]), (2, 0, [1, 0])] {
            assert_eq!(launches(|| it.upload(from, &stream)), expected, "{from}");
            assert_eq!(sim::calls_of(c"cuGraphInstantiateWithFlags"), made, "{from}");
        }
        it.verify(&[0, 1, 2]);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn where_no_graph_can_be_had_gathers_are_launched_as_kernels() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let calls = [
        c"cuGraphCreate",
        c"cuGraphAddKernelNode",
        c"cuGraphInstantiateWithFlags",
        c"cuGraphExecKernelNodeSetParams",
    ];
    common::make_what_stays(device);
    for (made, call) in calls.into_iter().enumerate() {
        let before = sim::live();
        let stream = Stream::new(device).unwrap();
        let mut it = Fixture::new(device);
        it.upload(0, &stream);
        sim::reset();
        sim::fail_function(call, 2);
        it.upload(1, &stream);
        sim::heal();
        it.upload(2, &stream);
        // One that was made serves when it can be set again.
        let expected = if made < 3 { [0, 2] } else { [1, 1] };
        assert_eq!([c"cuGraphLaunch", c"cuLaunchKernel"].map(sim::calls_of), expected, "{call:?}");
        it.verify(&[0, 1, 2]);
        drop((it, stream));
        assert_eq!(sim::live(), before, "{call:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_gather_does_not_wait_for_a_thread_that_is_at_the_streams_graph() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back by the simulated runtime");
    }
    // Which makes it, or sets it.
    for (call, before) in
        [(c"cuGraphInstantiateWithFlags", 1), (c"cuGraphExecKernelNodeSetParams", 2)]
    {
        let stream = Stream::new(device).unwrap();
        let (mut one, mut two) = (Fixture::new(device), Fixture::new(device));
        (0..before).for_each(|_| one.upload(0, &stream));
        sim::reset();
        thread::scope(|scope| {
            let held = Held::next(call);
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
}

#[test]
fn a_streams_graph_goes_with_it_also_where_a_broken_device_is_current() {
    let test = test_name!();
    // The context stays broken.
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let Some((device, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "one CUDA device");
    }
    let stream = Stream::new(device).unwrap();
    let mut it = Fixture::new(device);
    (0..3).for_each(|from| it.upload(from, &stream));
    it.verify(&[0, 1, 2]);
    drop(it);
    #[cfg(target_os = "linux")]
    let graphs = common::is_simulated().then(|| sim::live()[4]);
    common::break_device(1);
    drop(stream);
    #[cfg(target_os = "linux")]
    if let Some(graphs) = graphs {
        assert_eq!((graphs, sim::live()[4]), (2, 0));
    }
}
