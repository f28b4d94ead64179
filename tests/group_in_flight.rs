//! Each member of a group is guarded by itself. No safe program can race with a copy of several
//! members.
//!
//! A gate on the stream holds each race open, as for single buffers.

mod common;

use std::thread;
use std::time::Duration;

use common::{Gate, all, device_words, test_name};
use cpu_gpu_buffer::{
    BufferGroup, Device, GroupLayoutBuilder, MemberKey, MemberRows, Result, Stream,
};

const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;
/// One kernel moves several of the small ones, copies the large ones. On hardware the copies of those take a while; the
/// simulation copies late whatever the size.
fn sizes() -> [usize; 2] {
    [1001, if common::is_simulated() { (1 << 15) + 1 } else { (1 << 20) + 1 }]
}

const MEMBERS: usize = 9;
/// With others between them, so that they do not go as one copy.
const NAMED: [usize; 4] = [1, 3, 4, 7];
const UNNAMED: [usize; 5] = [0, 2, 5, 6, 8];

struct Fixture {
    group: BufferGroup,
    keys: Vec<MemberKey<u32>>,
    stream: Stream,
    other: Stream,
}

impl Fixture {
    /// A group whose host side is `host` and whose device side is `gpu`, and two streams.
    fn new(words: usize, device: Device, host: u32, gpu: u32) -> Fixture {
        let mut builder = GroupLayoutBuilder::new();
        let keys = (0..MEMBERS).map(|_| builder.add(words)).collect();
        let group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut fixture = Fixture { group, keys, stream, other };
        fixture.write(0..MEMBERS, gpu);
        let rows: Vec<_> = fixture.keys.iter().map(|key| key.rows(..)).collect();
        fixture.group.copy_to_gpu(&rows, &fixture.stream).unwrap();
        fixture.write(0..MEMBERS, host);
        fixture.group.synchronize().unwrap();
        fixture
    }

    fn write(&mut self, members: impl IntoIterator<Item = usize>, value: u32) {
        for member in members {
            self.group.cpu_mut(self.keys[member]).unwrap().fill(value);
        }
    }

    fn read(&self, member: usize) -> Vec<u32> {
        self.group.cpu(self.keys[member]).unwrap().to_vec()
    }

    /// All but the first and the last row, so that not even the neighbours among the named go as one.
    fn rows(&self, members: &[usize]) -> Vec<MemberRows> {
        let rows = |member: &usize| {
            let key = self.keys[*member];
            let len = self.group.cpu(key).unwrap().len();
            key.rows(1..len - 1)
        };
        members.iter().map(rows).collect()
    }

    /// What a member's device side holds once everything is done, in the rows that are copied.
    fn gpu(&self, member: usize) -> Vec<u32> {
        self.group.synchronize().unwrap();
        let key = self.keys[member];
        let len = self.group.cpu(key).unwrap().len();
        let words = device_words(self.group.device(), self.group.device_ptr(key).unwrap(), len);
        words[1..len - 1].to_vec()
    }

    /// Sends a kernel that writes a member.
    fn store(&mut self, member: usize, value: u32, on: fn(&Fixture) -> &Stream) {
        let stream = on(self).clone();
        let view = self.group.gpu_on(&stream).unwrap().member(self.keys[member]).unwrap();
        common::store(view.as_mut_ptr(), view.len(), value, &stream);
    }
}

/// The rows that are copied.
fn middle(words: &[u32]) -> &[u32] {
    &words[1..words.len() - 1]
}

/// For each size, with a CUDA device.
fn each(test: &str, run: impl Fn(usize, Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    for words in sizes() {
        run(words, device);
    }
}

type Copy = fn(&mut BufferGroup, &[MemberRows], &Stream) -> Result<()>;
const COPIES: [Copy; 2] = [BufferGroup::copy_to_gpu, BufferGroup::copy_to_cpu];

// ---- what the host waits for ----

#[test]
fn writing_a_member_waits_for_its_upload() {
    each(test_name!(), |words, device| {
        for member in NAMED {
            let mut it = Fixture::new(words, device, OLD, 0);
            let rows = it.rows(&NAMED);
            let gate = Gate::close(&it.stream);
            it.group.copy_to_gpu(&rows, &it.stream).unwrap();
            gate.waits(|| it.write([member], NEW));
            all(&it.gpu(member), OLD);
            all(&it.read(member), NEW);
        }
    });
}

#[test]
fn writing_a_member_waits_for_its_download() {
    each(test_name!(), |words, device| {
        for member in NAMED {
            let mut it = Fixture::new(words, device, 0, OLD);
            let rows = it.rows(&NAMED);
            let gate = Gate::close(&it.stream);
            it.group.copy_to_cpu(&rows, &it.stream).unwrap();
            gate.waits(|| it.write([member], NEW));
            it.stream.synchronize().unwrap();
            all(&it.read(member), NEW);
        }
    });
}

#[test]
fn reading_a_member_waits_for_its_download() {
    each(test_name!(), |words, device| {
        for member in NAMED {
            let mut it = Fixture::new(words, device, 0, NEW);
            let rows = it.rows(&NAMED);
            let gate = Gate::close(&it.stream);
            it.group.copy_to_cpu(&rows, &it.stream).unwrap();
            let seen = gate.waits(|| it.read(member));
            all(middle(&seen), NEW);
        }
    });
}

#[test]
fn reading_a_member_does_not_wait_for_its_upload() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, 0);
        let rows = it.rows(&NAMED);
        let gate = Gate::close(&it.stream);
        it.group.copy_to_gpu(&rows, &it.stream).unwrap();
        gate.passes(|| NAMED.iter().for_each(|member| all(&it.read(*member), OLD)));
    });
}

#[test]
fn members_that_a_copy_did_not_name_do_not_wait_for_it() {
    each(test_name!(), |words, device| {
        for copy in COPIES {
            let mut it = Fixture::new(words, device, OLD, 0);
            let rows = it.rows(&NAMED);
            let gate = Gate::close(&it.stream);
            copy(&mut it.group, &rows, &it.stream).unwrap();
            gate.passes(|| {
                assert!(!it.group.is_idle().unwrap());
                UNNAMED.iter().for_each(|member| all(&it.read(*member), OLD));
                it.write(UNNAMED, NEW);
                let mut members = it.group.members_mut();
                for member in UNNAMED {
                    members.cpu_mut(it.keys[member]).unwrap().fill(OLD);
                }
            });
            it.group.synchronize().unwrap();
            assert!(it.group.is_idle().unwrap());
        }
    });
}

#[test]
fn several_members_at_once_wait_for_their_copies_and_for_no_others() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, 0);
        let rows = it.rows(&NAMED);
        let gate = Gate::close(&it.stream);
        it.group.copy_to_gpu(&rows, &it.stream).unwrap();
        let mut members = it.group.members_mut();
        let free = members.cpu_mut(it.keys[0]).unwrap();
        free.fill(NEW);
        assert!(!gate.is_open());
        let moved = gate.waits(|| members.cpu_mut(it.keys[3]).unwrap());
        moved.fill(NEW);
        all(free, NEW);
        all(&it.gpu(3), OLD);
        all(&it.read(3), NEW);

        // Into the host side, too.
        let mut it = Fixture::new(words, device, 0, OLD);
        let down = it.rows(&[3]);
        let gate = Gate::close(&it.stream);
        it.group.copy_to_cpu(&down, &it.stream).unwrap();
        gate.waits(|| it.group.members_mut().cpu_mut(it.keys[3]).unwrap().fill(NEW));
        it.stream.synchronize().unwrap();
        all(&it.read(3), NEW);
    });
}

#[test]
fn a_member_waits_for_its_own_copy_while_that_of_another_is_held() {
    each(test_name!(), |words, device| {
        for copy in COPIES {
            let mut it = Fixture::new(words, device, OLD, OLD);
            let (one, two) = (it.rows(&[0]), it.rows(&[1]));
            let gate = Gate::close(&it.stream);
            copy(&mut it.group, &one, &it.stream).unwrap();
            gate.passes(|| {
                // Again and again: the record of the held one is not taken for these.
                for step in 0..20 {
                    copy(&mut it.group, &two, &it.other).unwrap();
                    it.write([1], step);
                }
                it.other.synchronize().unwrap();
                assert!(!it.group.is_idle().unwrap());
            });
            it.group.synchronize().unwrap();

            let gate = Gate::close(&it.stream);
            it.write([0], OLD);
            copy(&mut it.group, &one, &it.stream).unwrap();
            copy(&mut it.group, &two, &it.other).unwrap();
            it.other.synchronize().unwrap();
            copy(&mut it.group, &two, &it.other).unwrap();
            assert!(!gate.is_open());
            gate.waits(|| it.write([0], NEW));
            all(&it.gpu(0), OLD);
            all(&it.read(0), NEW);
        }
    });
}

#[test]
fn the_first_copy_of_one_member_does_not_make_another_wait_for_all_of_its_stream() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    for copy in COPIES {
        let mut builder = GroupLayoutBuilder::new();
        let (one, two) = (builder.add::<u32>(100), builder.add::<u32>(100));
        let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
        copy(&mut group, &[one.rows(..)], &stream).unwrap();
        // Its first zeroing is not behind this.
        let gate = Gate::close(&stream);
        gate.passes(|| {
            copy(&mut group, &[two.rows(..)], &other).unwrap();
            group.cpu_mut(two).unwrap().fill(NEW);
        });
    }
}

#[test]
fn a_member_that_is_carried_along_is_so_after_its_download() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let mut builder = GroupLayoutBuilder::new();
    let [first, carried, third] = [(); 3].map(|()| builder.add_mirrored::<u32>(1001));
    let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
    group.cpu_mut(carried).unwrap().fill(1);
    group.copy_to_gpu(&[carried.rows(..)], &stream).unwrap();
    group.cpu_mut(carried).unwrap().fill(2);
    stream.synchronize().unwrap();
    let gate = Gate::close(&stream);
    group.copy_to_cpu(&[carried.rows(..)], &stream).unwrap();
    gate.waits(|| {
        group.copy_to_gpu(&[first.rows(..), third.rows(..)], &other).unwrap();
        other.synchronize().unwrap();
    });
    stream.synchronize().unwrap();
    all(&device_words(device, group.device_ptr(carried).unwrap(), 1001), 1);
}

#[test]
fn what_the_stream_of_gpu_on_is_sent_after_the_next_copy_is_not_waited_for() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let mut builder = GroupLayoutBuilder::new();
    let (one, two) = (builder.add::<u32>(64), builder.add::<u32>(64));
    let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
    group.gpu_on(&stream).unwrap();
    group.copy_to_gpu(&[one.rows(..)], &stream).unwrap();
    stream.synchronize().unwrap();
    let gate = Gate::close(&stream);
    gate.passes(|| group.synchronize().unwrap());
    stream.synchronize().unwrap();
    group.gpu_on(&stream).unwrap();
    group.copy_to_gpu(&[one.rows(..)], &stream).unwrap();
    stream.synchronize().unwrap();
    let gate = Gate::close(&stream);
    group.copy_to_gpu(&[two.rows(..)], &other).unwrap();
    gate.passes(|| group.cpu_mut(two).unwrap().fill(1));
}

#[test]
fn a_stream_that_is_captured_after_the_last_copy_leaves_the_group_idle_and_nothing_behind() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let mut builder = GroupLayoutBuilder::new();
    let one = builder.add::<u32>(64);
    let layout = builder.build().unwrap();
    #[cfg(target_os = "linux")]
    let live = || common::is_simulated().then(common::sim::live);
    #[cfg(not(target_os = "linux"))]
    let live = || ();
    let before = live();
    let mut group = BufferGroup::new(&layout, device).unwrap();
    group.gpu_on(&stream).unwrap();
    group.copy_to_gpu(&[one.rows(..)], &stream).unwrap();
    stream.synchronize().unwrap();
    common::begin_capture(&stream);
    let idle = group.is_idle();
    drop(group);
    common::end_capture(&stream);
    assert_eq!(idle, Ok(true));
    assert_eq!(live(), before);
}

#[test]
fn a_kernel_in_flight_does_not_make_a_member_wait() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, 0);
        it.group.gpu_on(&it.stream).unwrap();
        let gate = Gate::close(&it.stream);
        it.store(2, NEW, |it| &it.stream);
        gate.passes(|| {
            all(&it.read(2), OLD);
            it.write([2], NEW);
            assert!(!it.group.is_idle().unwrap());
        });
        all(&it.gpu(2), NEW);
    });
}

#[test]
fn synchronize_waits_for_copies_and_kernels_of_every_member() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, 0);
        let up: fn(&mut Fixture) = |it| it.group.copy_to_gpu(&it.rows(&[1]), &it.stream).unwrap();
        let down: fn(&mut Fixture) = |it| it.group.copy_to_cpu(&it.rows(&[1]), &it.stream).unwrap();
        let kernel: fn(&mut Fixture) = |it| it.store(1, NEW, |it| &it.stream);
        for use_it in [up, down, kernel] {
            let gate = Gate::close(&it.stream);
            use_it(&mut it);
            let (_, early) =
                gate.during(Duration::from_millis(50), || it.group.synchronize().unwrap());
            assert!(!early, "it did not wait");
            assert!(it.group.is_idle().unwrap());
        }
    });
}

// ---- the order of streams ----

#[test]
fn a_download_on_another_stream_comes_after_the_upload() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, NEW, OLD);
        let (up, down) = (it.rows(&NAMED), it.rows(&[3, 6]));
        let gate = Gate::close(&it.stream);
        it.group.copy_to_gpu(&up, &it.stream).unwrap();
        gate.waits(|| {
            it.group.copy_to_cpu(&down, &it.other).unwrap();
            all(middle(&it.read(3)), NEW);
            all(middle(&it.read(6)), OLD);
        });
    });
}

#[test]
fn an_upload_on_another_stream_comes_after_the_download() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, NEW);
        let (down, up) = (it.rows(&NAMED), it.rows(&[0, 7]));
        let gate = Gate::close(&it.stream);
        it.group.copy_to_cpu(&down, &it.stream).unwrap();
        gate.waits(|| {
            it.group.copy_to_gpu(&up, &it.other).unwrap();
            it.other.synchronize().unwrap();
        });
        // What had come down went up again.
        all(&it.gpu(7), NEW);
        all(&it.gpu(0), OLD);
    });
}

#[test]
fn copies_on_another_stream_come_after_a_kernel_whatever_member_it_writes() {
    let test = test_name!();
    each(test, |words, device| {
        for member in [0, 3, 8] {
            let mut it = Fixture::new(words, device, OLD, 0);
            let rows = it.rows(&[member]);
            it.group.gpu_on(&it.stream).unwrap();
            let gate = Gate::close(&it.stream);
            it.store(member, NEW, |it| &it.stream);
            gate.waits(|| {
                it.group.copy_to_gpu(&rows, &it.other).unwrap();
                it.other.synchronize().unwrap();
            });
            all(&it.gpu(member), OLD);

            let gate = Gate::close(&it.stream);
            it.store(member, NEW, |it| &it.stream);
            gate.waits(|| {
                it.group.copy_to_cpu(&rows, &it.other).unwrap();
                all(middle(&it.read(member)), NEW);
            });
        }
    });
}

#[test]
fn a_kernel_on_another_stream_comes_after_copies_of_every_member_and_after_a_kernel() {
    let test = test_name!();
    each(test, |words, device| {
        for member in [0, 3, 8] {
            let mut it = Fixture::new(words, device, OLD, 0);
            let (rows, others) = (it.rows(&[member]), it.rows(&[1, 2]));
            let gate = Gate::close(&it.stream);
            it.group.copy_to_gpu(&rows, &it.stream).unwrap();
            it.group.copy_to_gpu(&others, &it.other).unwrap();
            gate.waits(|| {
                it.store(member, NEW, |it| &it.other);
                it.other.synchronize().unwrap();
            });
            all(&it.gpu(member), NEW);

            let gate = Gate::close(&it.stream);
            it.group.copy_to_cpu(&rows, &it.stream).unwrap();
            gate.waits(|| {
                it.store(member, 5, |it| &it.other);
                it.other.synchronize().unwrap();
            });
            all(middle(&it.read(member)), NEW);

            let gate = Gate::close(&it.stream);
            it.store(member, 6, |it| &it.stream);
            gate.waits(|| {
                it.store(member, 7, |it| &it.other);
                it.other.synchronize().unwrap();
            });
            all(&it.gpu(member), 7);
        }
    });
}

#[test]
fn the_first_zeroing_comes_before_everything_on_every_stream() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    type First = fn(&mut BufferGroup, MemberKey<u32>, &Stream);
    let firsts: [First; 3] = [
        |group, key, stream| group.copy_to_gpu(&[key.rows(..)], stream).unwrap(),
        |group, key, stream| group.copy_to_cpu(&[key.rows(..)], stream).unwrap(),
        |group, _, stream| {
            group.gpu_on(stream).unwrap();
        },
    ];
    for first in firsts {
        let mut builder = GroupLayoutBuilder::new();
        let [one, two, three] = [(); 3].map(|()| builder.add::<u32>(100_000));
        let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
        group.cpu_mut(two).unwrap().fill(OLD);
        group.cpu_mut(three).unwrap().fill(OLD);
        let gate = Gate::close(&stream);
        first(&mut group, one, &stream);
        gate.waits(|| {
            group.copy_to_gpu(&[two.rows(..)], &other).unwrap();
            group.copy_to_cpu(&[three.rows(..)], &other).unwrap();
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        let gpu = |key| device_words(device, group.device_ptr(key).unwrap(), 100_000);
        all(&gpu(one), 0);
        all(&gpu(two), OLD);
        all(&gpu(three), 0);
        all(group.cpu(three).unwrap(), 0);
    }
}

// ---- what goes before its time ----

#[test]
fn dropping_waits_for_copies_and_kernels() {
    each(test_name!(), |words, device| {
        let up: fn(&mut Fixture) = |it| it.group.copy_to_gpu(&it.rows(&NAMED), &it.stream).unwrap();
        let down: fn(&mut Fixture) =
            |it| it.group.copy_to_cpu(&it.rows(&NAMED), &it.stream).unwrap();
        let kernel: fn(&mut Fixture) = |it| it.store(1, NEW, |it| &it.stream);
        for use_it in [up, down, kernel] {
            let mut it = Fixture::new(words, device, OLD, 0);
            let gate = Gate::close(&it.stream);
            use_it(&mut it);
            let Fixture { group, stream, .. } = it;
            let (_, early) = gate.during(Duration::from_millis(50), || drop(group));
            assert!(!early, "memory was given back that is in use");
            stream.synchronize().unwrap();
        }
    });
}

#[test]
fn forgetting_leaves_queued_copies_their_memory() {
    each(test_name!(), |words, device| {
        for copy in COPIES {
            let mut it = Fixture::new(words, device, OLD, OLD);
            let rows = it.rows(&NAMED);
            let gate = Gate::close(&it.stream);
            copy(&mut it.group, &rows, &it.stream).unwrap();
            let addresses = it.keys.iter().map(|key| it.group.device_ptr(*key).unwrap());
            let addresses: Vec<_> = addresses.collect();
            let Fixture { group, stream, .. } = it;
            common::forget(group);
            // Whatever memory comes next, it is not the forgotten group's.
            let mut builder = GroupLayoutBuilder::new();
            let next = builder.add::<u32>(MEMBERS * words.next_multiple_of(64));
            let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
            assert_ne!(group.device_ptr(next).unwrap(), addresses[0]);
            gate.passes(|| group.cpu_mut(next).unwrap().fill(NEW));
            stream.synchronize().unwrap();
            for member in NAMED {
                all(middle(&device_words(device, addresses[member], words)), OLD);
            }
            all(group.cpu(next).unwrap(), NEW);
        }
    });
}

#[test]
fn memory_whose_use_cannot_be_known_is_leaked_and_not_given_back() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let mut it = Fixture::new(sizes()[1], device, OLD, OLD);
    let bytes = MEMBERS * sizes()[1] * 4;
    it.group.gpu_on(&it.stream).unwrap();
    let Fixture { group, stream, .. } = it;
    // Whether the stream still uses the memory cannot be asked while it is in capture.
    common::begin_capture(&stream);
    let before = device.memory().unwrap().free;
    drop(group);
    let after = device.memory().unwrap().free;
    common::end_capture(&stream);
    assert!(after < before + bytes, "memory was given back that may be in use");
}

#[test]
fn a_group_that_is_sent_elsewhere_takes_its_records_along() {
    each(test_name!(), |words, device| {
        let mut it = Fixture::new(words, device, OLD, 0);
        let rows = it.rows(&NAMED);
        let gate = Gate::close(&it.stream);
        it.group.copy_to_gpu(&rows, &it.stream).unwrap();
        // Nor does it matter that the stream is let go.
        it.stream = it.other.clone();
        let it = gate.waits(move || {
            let mut it = Box::new(it);
            let elsewhere = thread::spawn(move || {
                it.write([3], NEW);
                it
            });
            elsewhere.join().unwrap()
        });
        all(&it.gpu(3), OLD);
        all(&it.read(3), NEW);
    });
}

/// Makes one function fail for the time of an action, where that can be done.
#[cfg(target_os = "linux")]
fn failing<R>(function: &std::ffi::CStr, number: u64, action: impl FnOnce() -> R) -> R {
    common::sim::reset();
    // cudaErrorInvalidValue.
    common::sim::fail_call(function, number, 1, true, false);
    let result = action();
    assert_eq!(common::sim::injected(), 1);
    common::sim::heal();
    result
}

#[test]
#[cfg(target_os = "linux")]
fn a_copy_that_was_refused_leaves_the_members_guarded_by_the_one_before() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let mut it = Fixture::new(sizes()[0], device, OLD, 0);
    let (one, both) = (it.rows(&[1]), it.rows(&[1, 3]));
    let (first, others) = (it.rows(&[0]), it.rows(&[0, 2, 3, 4, 5, 6, 7, 8]));
    it.group.copy_to_gpu(&others, &it.stream).unwrap();
    let gate = Gate::close(&it.stream);
    it.group.copy_to_gpu(&one, &it.stream).unwrap();
    // Some member refers to each call by now, so that the next needs an event that there is not.
    it.group.copy_to_gpu(&first, &it.stream).unwrap();
    let sent = failing(c"cudaEventCreateWithFlags", 1, || it.group.copy_to_gpu(&both, &it.other));
    assert!(matches!(sent, Err(cpu_gpu_buffer::Error::Cuda { .. })), "{sent:?}");
    gate.waits(|| it.write([1], NEW));
    all(&it.gpu(1), OLD);
    all(&it.read(1), NEW);
}

#[test]
#[cfg(target_os = "linux")]
fn a_copy_of_which_a_part_was_refused_counts_as_in_flight() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    // By copies.
    let mut it = Fixture::new(sizes()[1], device, OLD, 0);
    let rows = it.rows(&[1, 3]);
    let gate = Gate::close(&it.stream);
    let sent = failing(c"cuMemcpyHtoDAsync", 2, || it.group.copy_to_gpu(&rows, &it.stream));
    assert!(matches!(sent, Err(cpu_gpu_buffer::Error::Cuda { .. })), "{sent:?}");
    gate.waits(|| it.write([1, 3], NEW));
    all(&it.gpu(1), OLD);
    all(&it.gpu(3), 0);
    all(&it.read(1), NEW);
}

#[test]
#[cfg(target_os = "linux")]
fn records_of_copies_serve_again() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "events are counted by the simulated runtime");
    }
    let mut it = Fixture::new(100, device, OLD, 0);
    let before = common::sim::live()[3];
    for step in 0..1000 {
        let members = [step % MEMBERS, (step + 1 + step % 5) % MEMBERS];
        let rows = it.rows(&members);
        let stream = if step % 3 == 0 { &it.stream } else { &it.other };
        COPIES[step % 2](&mut it.group, &rows, stream).unwrap();
    }
    // Each member refers to the calls of three kinds.
    let more = common::sim::live()[3] - before;
    assert!((1..=3 * MEMBERS as i64).contains(&more), "{more} more events");
}

#[test]
fn groups_and_what_belongs_to_them_can_be_sent_and_shared() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<BufferGroup>();
    send_and_sync::<cpu_gpu_buffer::GroupRing>();
    send_and_sync::<cpu_gpu_buffer::BufferRing<u32>>();
    send_and_sync::<GroupLayoutBuilder>();
    send_and_sync::<cpu_gpu_buffer::GroupLayout>();
    send_and_sync::<cpu_gpu_buffer::GroupView<'_>>();
    send_and_sync::<cpu_gpu_buffer::MembersMut<'_>>();
    send_and_sync::<MemberRows>();
    // A key holds nothing of what it names.
    send_and_sync::<MemberKey<*const u8>>();
}
