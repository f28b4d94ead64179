//! The host slots of a ring are written strictly in turn, while others are copied.
//!
//! A slot that a queued upload reads is never written, and a slot that a queued download writes is
//! never read. The device holds the last upload.

mod common;

use std::ops::Range;
use std::time::Duration;

use common::{Gate, all, device_words, test_name};
use cpu_gpu_buffer::{
    BufferOptions, BufferRing, Device, Error, GroupLayout, GroupLayoutBuilder, GroupRing,
    MemberKey, Pinning, Stream, sys,
};

const SIZES: [usize; 2] = [1001, (1 << 20) + 1];

/// For each size, with a CUDA device.
fn each(test: &str, run: impl Fn(usize, Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    for words in SIZES {
        run(words, device);
    }
}

/// For each device.
fn devices(run: impl Fn(Device, &Stream)) {
    let _turn = common::turn();
    for device in common::devices() {
        run(device, &Stream::new(device).unwrap());
    }
}

/// Writes the current slot and sends it.
fn send(ring: &mut BufferRing<u32>, value: u32, stream: &Stream) {
    ring.cpu_mut().unwrap().fill(value);
    ring.copy_to_gpu(.., stream).unwrap();
}

fn gpu(ring: &BufferRing<u32>) -> Vec<u32> {
    ring.synchronize().unwrap();
    device_words(ring.device(), ring.device_ptr(), ring.shape()[0])
}

/// A ring whose device side is `value`, with a stream that a gate can hold.
fn downloading(
    words: usize,
    device: Device,
    depth: usize,
    value: u32,
) -> (BufferRing<u32>, Stream) {
    let stream = Stream::new(device).unwrap();
    let mut ring = BufferRing::<u32>::new(words, device, depth).unwrap();
    send(&mut ring, value, &stream);
    ring.synchronize().unwrap();
    ring.cpu_mut().unwrap().fill(0);
    (ring, stream)
}

// ---- downloads ----

#[test]
fn a_download_goes_into_the_current_slot_and_no_other() {
    devices(|device, stream| {
        let mut ring = BufferRing::<u32>::new([10, 2], device, 3).unwrap();
        for slot in 1..=3 {
            send(&mut ring, slot, stream);
            ring.advance().unwrap();
        }
        ring.advance().unwrap();
        ring.copy_to_cpu(4..6, stream).unwrap();
        let mut expected = [2; 20];
        expected[8..12].fill(3);
        assert_eq!(ring.cpu().unwrap(), expected);
        assert_eq!(ring.cpu_back(1).unwrap(), [1; 20]);
        assert_eq!(ring.cpu_back(2).unwrap(), [3; 20]);
        let beyond = ring.copy_to_cpu(9..11, stream);
        assert_eq!(beyond, Err(Error::OutOfRange { start: 9, end: 11, rows: 10, member: None }));
    });
}

#[test]
fn the_current_slot_waits_for_a_download_into_it() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 2, 7);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        gate.passes(|| {
            assert!(ring.try_cpu().unwrap().is_none());
            assert!(ring.try_cpu_mut().unwrap().is_none());
        });
        stream.synchronize().unwrap();
        all(ring.try_cpu().unwrap().unwrap(), 7);
        assert!(ring.try_cpu_mut().unwrap().is_some());

        let (mut ring, stream) = downloading(words, device, 2, 7);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        let seen = gate.waits(|| ring.cpu().unwrap().to_vec());
        all(&seen, 7);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        gate.waits(|| ring.cpu_mut().unwrap().fill(1));
        stream.synchronize().unwrap();
        all(ring.cpu().unwrap(), 1);
    });
}

#[test]
fn trying_to_write_is_none_while_the_slot_is_uploaded_and_trying_to_read_is_not() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut ring = BufferRing::<u32>::new(words, device, 2).unwrap();
        let gate = Gate::close(&stream);
        send(&mut ring, 3, &stream);
        gate.passes(|| {
            all(ring.try_cpu().unwrap().unwrap(), 3);
            assert!(ring.try_cpu_mut().unwrap().is_none());
            ring.advance().unwrap();
            assert!(ring.try_cpu_mut().unwrap().is_some());
        });
    });
}

#[test]
fn a_slot_of_the_step_before_is_read_while_copies_of_the_current_one_are_in_flight() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 2, 7);
        ring.copy_to_cpu(.., &stream).unwrap();
        stream.synchronize().unwrap();
        let gate = Gate::close(&stream);
        ring.advance().unwrap();
        send(&mut ring, 8, &stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        let seen = gate.passes(|| ring.cpu_back(1).unwrap().to_vec());
        all(&seen, 7);
    });
}

#[test]
fn a_slot_of_the_step_before_waits_for_the_download_into_it() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 3, 7);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        ring.advance().unwrap();
        ring.advance().unwrap();
        let seen = gate.waits(|| ring.cpu_back(2).unwrap().to_vec());
        all(&seen, 7);
    });
}

#[test]
fn advancing_waits_for_a_download_into_the_slot_that_it_takes() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 2, 7);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        ring.advance().unwrap();
        gate.passes(|| assert!(ring.try_advance().unwrap().is_none()));
        stream.synchronize().unwrap();

        ring.copy_to_cpu(.., &stream).unwrap();
        ring.advance().unwrap();
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        ring.advance().unwrap();
        gate.waits(|| ring.advance().unwrap().fill(5));
        stream.synchronize().unwrap();
        all(ring.cpu().unwrap(), 5);
    });
}

#[test]
fn a_download_on_another_stream_comes_after_the_upload_from_another_slot() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 2, 7);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        send(&mut ring, 8, &stream);
        ring.advance().unwrap();
        ring.copy_to_cpu(.., &other).unwrap();
        let seen = gate.waits(|| ring.cpu().unwrap().to_vec());
        all(&seen, 8);
    });
}

#[test]
fn an_upload_on_another_stream_comes_after_the_download_into_another_slot() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 2, 7);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(.., &stream).unwrap();
        ring.advance().unwrap();
        send(&mut ring, 8, &other);
        gate.waits(|| ring.synchronize().unwrap());
        all(ring.cpu_back(1).unwrap(), 7);
        all(&gpu(&ring), 8);
    });
}

#[test]
fn an_older_slot_is_read_beside_writes_of_the_current_one() {
    devices(|device, stream| {
        let (keys, layout) = members(8, false);
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        ring.cpu_mut(keys[0]).unwrap().fill(3);
        ring.copy_to_gpu(&[keys[0].into()], stream).unwrap();
        ring.copy_to_cpu(&[keys[0].into()], stream).unwrap();
        ring.advance().unwrap();
        let mut members = ring.members_mut();
        let before = members.cpu_back(1, keys[0]).unwrap();
        let (now, other) = (members.cpu_mut(keys[0]).unwrap(), members.cpu_mut(keys[1]).unwrap());
        now.copy_from_slice(before);
        other.fill(before[0] + 1);
        assert_eq!(members.cpu_back(1, keys[0]).unwrap(), before);
        assert_eq!(ring.try_cpu(keys[1]).unwrap(), Some(&[4; 8][..]));
        assert_eq!(ring.try_cpu_mut(keys[0]).unwrap().unwrap(), [3; 8]);
        assert_eq!(ring.cpu_back(1, keys[1]).unwrap(), [0; 8]);
        assert_eq!(ring.shape(keys[1]).unwrap(), [8]);
    });
}

#[test]
fn an_older_slot_beside_writes_waits_for_the_download_into_it() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (keys, layout) = members(words, false);
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        ring.cpu_mut(keys[0]).unwrap().fill(3);
        ring.copy_to_gpu(&[keys[0].into()], &stream).unwrap();
        ring.cpu_mut(keys[0]).unwrap().fill(0);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(&[keys[0].into()], &stream).unwrap();
        ring.advance().unwrap();
        let seen = gate.waits(|| ring.members_mut().cpu_back(1, keys[0]).unwrap().to_vec());
        all(&seen, 3);
    });
}

#[test]
fn an_older_slot_beside_writes_does_not_wait_for_copies_of_the_current_one() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (keys, layout) = members(words, false);
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        ring.cpu_mut(keys[0]).unwrap().fill(3);
        ring.copy_to_gpu(&[keys[0].into()], &stream).unwrap();
        ring.copy_to_cpu(&[keys[0].into()], &stream).unwrap();
        ring.synchronize().unwrap();
        ring.advance().unwrap();
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(&[keys[0].into(), keys[2].into()], &stream).unwrap();
        gate.passes(|| {
            let mut members = ring.members_mut();
            all(members.cpu_back(1, keys[0]).unwrap(), 3);
            members.cpu_mut(keys[1]).unwrap().fill(4);
        });
    });
}

#[test]
fn the_current_slot_beside_writes_waits_for_its_download_and_not_for_its_upload() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (keys, layout) = members(words, false);
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        let gate = Gate::close(&stream);
        ring.cpu_mut(keys[0]).unwrap().fill(3);
        ring.copy_to_gpu(&[keys[0].into()], &stream).unwrap();
        gate.passes(|| all(ring.members_mut().cpu_back(0, keys[0]).unwrap(), 3));
        ring.cpu_mut(keys[0]).unwrap().fill(0);
        let gate = Gate::close(&stream);
        ring.copy_to_cpu(&[keys[0].into()], &stream).unwrap();
        let seen = gate.waits(|| ring.members_mut().cpu_back(0, keys[0]).unwrap().to_vec());
        all(&seen, 3);
    });
}

#[test]
fn an_older_slot_waits_neither_for_its_upload_nor_for_a_download_of_another_member() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (keys, layout) = members(words, false);
        let mut ring = GroupRing::new(&layout, device, 3).unwrap();
        ring.gpu_on(&stream).unwrap();
        ring.synchronize().unwrap();
        let gate = Gate::close(&stream);
        ring.cpu_mut(keys[0]).unwrap().fill(3);
        ring.copy_to_gpu(&[keys[0].into()], &stream).unwrap();
        ring.copy_to_cpu(&[keys[2].into()], &stream).unwrap();
        ring.advance().unwrap();
        ring.advance().unwrap();
        gate.passes(|| {
            all(ring.cpu_back(2, keys[0]).unwrap(), 3);
            all(ring.members_mut().cpu_back(2, keys[0]).unwrap(), 3);
        });
    });
}

#[test]
fn each_of_several_downloads_in_flight_is_waited_for_alone() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 3, 1);
        // A kernel and a download in each slot, with a gate before each.
        let mut gates = Vec::new();
        for step in 2..5 {
            gates.push(Gate::close(&stream));
            ring.advance().unwrap();
            let view = ring.gpu_on(&stream).unwrap();
            common::store(view.as_mut_ptr(), view.len(), step, &stream);
            ring.copy_to_cpu(.., &stream).unwrap();
        }
        for (steps, gate) in (0..3).rev().zip(&gates) {
            let seen = gate.waits(|| ring.cpu_back(steps).unwrap().to_vec());
            all(&seen, 4 - steps as u32);
        }
    });
}

#[test]
fn a_slot_that_was_not_taken_is_no_advance() {
    each(test_name!(), |words, device| {
        let (mut ring, stream) = downloading(words, device, 3, 7);
        // Made here, since an allocation may wait for the gate.
        let mut ring_of_one = BufferRing::<u32>::new(words, device, 1).unwrap();
        ring_of_one.gpu_on(&stream).unwrap();
        ring_of_one.synchronize().unwrap();
        let gate = Gate::close(&stream);
        ring.advance().unwrap();
        send(&mut ring, 8, &stream);
        ring.advance().unwrap();
        ring.advance().unwrap();
        ring_of_one.copy_to_cpu(.., &stream).unwrap();
        gate.passes(|| {
            all(ring.cpu_back(2).unwrap(), 8);
            assert!(ring.try_advance().unwrap().is_none());
            all(ring.cpu_back(2).unwrap(), 8);
            assert!(ring_of_one.try_advance().unwrap().is_none());
            let error = Error::OutOfRange { start: 1, end: 2, rows: 1, member: None };
            assert_eq!(ring_of_one.cpu_back(1), Err(error));
        });
    });
}

// ---- any operations ----

/// A small generator: xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) as usize) % below
    }

    /// Up to `most` rows of members, in any order, which may repeat and overlap.
    fn rows(&mut self, most: usize, rows: usize) -> Vec<(usize, Range<usize>)> {
        let range = |_| {
            let (one, other) = (self.next(rows + 1), self.next(rows + 1));
            (self.next(5), one.min(other)..one.max(other))
        };
        (0..most).map(range).collect()
    }
}

/// A ring, and what each of its slots and its device side must hold.
struct Model {
    ring: GroupRing,
    keys: [MemberKey<u32>; 5],
    slots: Vec<[Vec<u32>; 5]>,
    gpu: [Vec<u32>; 5],
    current: usize,
    advances: usize,
}

impl Model {
    fn new(words: usize, device: Device, depth: usize, mirrored: bool) -> Model {
        let (keys, layout) = members(words, mirrored);
        let ring = GroupRing::new(&layout, device, depth).unwrap();
        let zeroes = [(); 5].map(|()| vec![0; words]);
        Model {
            ring,
            keys,
            slots: vec![zeroes.clone(); depth],
            gpu: zeroes,
            current: 0,
            advances: 0,
        }
    }

    fn copy(&mut self, up: bool, rows: &[(usize, Range<usize>)], stream: &Stream) {
        let named = rows.iter().map(|(member, rows)| self.keys[*member].rows(rows.clone()));
        let named: Vec<_> = named.collect();
        match up {
            true => self.ring.copy_to_gpu(&named, stream).unwrap(),
            false => self.ring.copy_to_cpu(&named, stream).unwrap(),
        }
        for (member, rows) in rows {
            let host = &mut self.slots[self.current][*member][rows.clone()];
            let gpu = &mut self.gpu[*member][rows.clone()];
            match up {
                true => gpu.copy_from_slice(host),
                false => host.copy_from_slice(gpu),
            }
        }
    }

    fn advance(&mut self, trying: bool) {
        let advanced = match trying {
            true => self.ring.try_advance().unwrap(),
            false => self.ring.advance().map(|()| true).unwrap(),
        };
        if advanced {
            self.current = (self.current + 1) % self.slots.len();
            self.advances += 1;
        }
    }

    /// The steps back that can be read.
    fn readable(&self) -> usize {
        self.slots.len().min(self.advances + 1)
    }

    fn slot(&self, steps: usize) -> &[Vec<u32>; 5] {
        &self.slots[(self.current + self.slots.len() - steps) % self.slots.len()]
    }

    fn store(&mut self, member: usize, value: u32, stream: &Stream) {
        let mut view = self.ring.gpu_on(stream).unwrap().member(self.keys[member]).unwrap();
        match view.as_host_slice_mut() {
            Some(words) => words.fill(value),
            None => common::store(view.as_mut_ptr(), view.len(), value, stream),
        }
        self.gpu[member].fill(value);
    }

    fn step(&mut self, random: &mut Random, streams: &[Stream]) {
        let stream = &streams[random.next(streams.len())];
        let (member, value) = (random.next(5), random.next(1 << 20) as u32);
        let words = self.gpu[0].len();
        match random.next(12) {
            0 | 1 => {
                self.ring.cpu_mut(self.keys[member]).unwrap().fill(value);
                self.slots[self.current][member].fill(value);
            }
            2 | 3 => {
                let rows = random.rows(8, words);
                self.copy(true, &rows, stream);
            }
            4 | 5 => {
                let rows = random.rows(8, words);
                self.copy(false, &rows, stream);
            }
            6 => self.advance(false),
            7 => self.advance(true),
            8 => self.store(member, value, stream),
            9 => {
                // An older slot is read beside a write of the current one.
                let steps = random.next(self.readable());
                let other = (member + 1) % 5;
                let expected = self.slot(steps)[member].clone();
                let mut members = self.ring.members_mut();
                let before = members.cpu_back(steps, self.keys[member]).unwrap();
                let now = members.cpu_mut(self.keys[other]).unwrap();
                assert!(before == expected, "{steps} steps ago, beside writes");
                now.copy_from_slice(before);
                self.slots[self.current][other] = expected;
            }
            10 => {
                if let Some(seen) = self.ring.try_cpu(self.keys[member]).unwrap() {
                    assert!(seen == self.slot(0)[member], "tried");
                }
                let tried = self.ring.try_cpu_mut(self.keys[member]).unwrap();
                if let Some(now) = tried {
                    now[0] = value;
                    self.slots[self.current][member][0] = value;
                }
            }
            _ => {
                let steps = random.next(self.readable());
                let seen = self.ring.cpu_back(steps, self.keys[member]).unwrap();
                assert!(seen == self.slot(steps)[member], "{steps} steps ago");
            }
        }
    }

    fn look(&mut self) {
        for steps in 0..self.readable() {
            for (key, expected) in self.keys.into_iter().zip(self.slot(steps)) {
                assert!(self.ring.cpu_back(steps, key).unwrap() == expected, "{steps} steps ago");
            }
        }
        for member in 0..5 {
            let seen = words_of(&mut self.ring, self.keys[member]);
            assert!(seen == self.gpu[member], "the device side of member {member}");
        }
    }
}

#[test]
fn any_operations_do_what_they_would_do_one_by_one() {
    devices(|device, _| {
        for seed in 1..=80 {
            let mut random = Random(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
            let streams = [(); 3].map(|()| Stream::new(device).unwrap());
            let (depth, words) = (1 + random.next(4), [7, 1001, 70_000][random.next(3)]);
            // A ring of one slot carries rows of mirrored members.
            let mut model = Model::new(words, device, depth, depth > 1 && random.next(2) == 0);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                (0..60).for_each(|_| model.step(&mut random, &streams));
                model.look();
            }));
            assert!(outcome.is_ok(), "{device}, seed {seed}, {depth} slots of {words} words");
        }
    });
}

// ---- what waits ----

#[test]
fn advancing_does_not_wait_while_the_next_slot_is_not_in_flight() {
    let test = test_name!();
    each(test, |words, device| {
        for depth in 2..=4 {
            let stream = Stream::new(device).unwrap();
            let mut ring = BufferRing::<u32>::new(words, device, depth).unwrap();
            let gate = Gate::close(&stream);
            gate.passes(|| {
                for step in 1..=depth as u32 {
                    ring.advance().unwrap().fill(step);
                    ring.copy_to_gpu(.., &stream).unwrap();
                }
                // All are in flight.
                assert!(ring.try_advance().unwrap().is_none());
                all(ring.cpu().unwrap(), depth as u32);
                assert!(!ring.is_idle().unwrap());
            });
            all(&gpu(&ring), depth as u32);
            assert!(ring.is_idle().unwrap());
            assert!(ring.try_advance().unwrap().is_some());
        }
    });
}

#[test]
fn advancing_waits_for_the_slot_that_was_sent_first_if_all_are_in_flight() {
    let test = test_name!();
    each(test, |words, device| {
        for depth in 1..=4 {
            let stream = Stream::new(device).unwrap();
            let mut ring = BufferRing::<u32>::new(words, device, depth).unwrap();
            let first = Gate::close(&stream);
            send(&mut ring, 1, &stream);
            // What is sent after the first upload is held by a gate of its own.
            let later = Gate::close(&stream);
            for slot in 2..=depth as u32 {
                ring.advance().unwrap();
                send(&mut ring, slot, &stream);
            }
            let slot = first.waits(|| {
                assert!(ring.try_advance().unwrap().is_none());
                let slot = ring.advance().unwrap();
                slot.iter_mut().for_each(|word| *word = !*word);
                slot[0]
            });
            // It was the first, and it alone has arrived.
            assert_eq!(slot, !1);
            assert!(!later.is_open());
            all(&device_words_of(&ring), 1);
            drop(later);
            all(&gpu(&ring), depth as u32);
        }
    });
}

/// What the device side holds now, while others wait.
fn device_words_of(ring: &BufferRing<u32>) -> Vec<u32> {
    device_words(ring.device(), ring.device_ptr(), ring.shape()[0])
}

#[test]
fn writing_the_current_slot_waits_for_its_upload_and_reading_does_not() {
    let test = test_name!();
    each(test, |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut ring = BufferRing::<u32>::new(words, device, 2).unwrap();
        let gate = Gate::close(&stream);
        send(&mut ring, 1, &stream);
        all(ring.cpu().unwrap(), 1);
        assert!(!gate.is_open());
        gate.waits(|| ring.cpu_mut().unwrap().fill(2));
        all(&gpu(&ring), 1);
        all(ring.cpu().unwrap(), 2);
    });
}

#[test]
fn a_slot_is_taken_only_when_none_of_its_members_is_being_uploaded() {
    let test = test_name!();
    each(test, |words, device| {
        let (keys, layout) = members(words, false);
        let streams = [(); 2].map(|()| Stream::new(device).unwrap());
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        ring.gpu_on(&streams[0]).unwrap();
        ring.synchronize().unwrap();
        // One member of the slot has arrived, and another has not.
        let gate = Gate::close(&streams[0]);
        ring.cpu_mut(keys[2]).unwrap().fill(1);
        ring.copy_to_gpu(&[keys[2].rows(..)], &streams[0]).unwrap();
        for step in 0..2 {
            ring.copy_to_gpu(&[keys[0].rows(..)], &streams[1]).unwrap();
            streams[1].synchronize().unwrap();
            if step == 0 {
                ring.advance().unwrap();
                ring.cpu_mut(keys[2]).unwrap().fill(2);
                ring.copy_to_gpu(&[keys[2].rows(..)], &streams[0]).unwrap();
            }
        }
        assert!(!ring.try_advance().unwrap());
        assert!(!gate.is_open());
        gate.waits(|| {
            ring.advance().unwrap();
            assert!(gate.is_open(), "it did not wait");
            let mut members = ring.members_mut();
            members.cpu_mut(keys[2]).unwrap().fill(3);
            // Free since long.
            members.cpu_mut(keys[0]).unwrap().fill(3);
        });
        all(&words_of(&mut ring, keys[2]), 2);
    });
}

#[test]
fn a_slot_that_the_driver_says_is_done_is_taken() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut ring = BufferRing::<u32>::new(words, device, 2).unwrap();
        send(&mut ring, 1, &stream);
        ring.advance().unwrap();
        // The upload finishes, and the ring's own bookkeeping does not come to know.
        // SAFETY: the stream is live.
        let status = unsafe { sys::cudaStreamSynchronize(stream.as_raw()) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        all(ring.try_advance().unwrap().unwrap(), 1);
    });
}

#[test]
fn slots_are_taken_in_turn_also_if_an_older_one_is_done_later() {
    let test = test_name!();
    each(test, |words, device| {
        for slots in 2..=4 {
            let streams = [(); 2].map(|()| Stream::new(device).unwrap());
            let mut ring = BufferRing::<u32>::new(words, device, slots).unwrap();
            // The first zeroing is not to put the streams in order.
            ring.gpu_on(&streams[1]).unwrap();
            ring.synchronize().unwrap();
            // The first slot is held, and those after it are done.
            let gate = Gate::close(&streams[0]);
            ring.advance().unwrap().fill(1);
            ring.copy_to_gpu(.., &streams[0]).unwrap();
            for step in 2..=slots as u32 {
                ring.advance().unwrap().fill(step);
            }
            assert!(ring.try_advance().unwrap().is_none());
            all(ring.cpu().unwrap(), slots as u32);
            assert!(!gate.is_open());
            gate.waits(|| all(ring.advance().unwrap(), 1));
            for step in 2..=3 * slots as u32 {
                let before = if step <= slots as u32 { step } else { step - slots as u32 };
                let slot = ring.advance().unwrap();
                all(slot, before);
                slot.fill(step);
                ring.copy_to_gpu(.., &streams[step as usize % 2]).unwrap();
            }
        }
    });
}

// ---- the order of streams ----

/// Members with others between them, that the host owns or not.
fn members(words: usize, mirrored: bool) -> ([MemberKey<u32>; 5], GroupLayout) {
    let mut builder = GroupLayoutBuilder::new();
    let keys = [(); 5].map(|()| match mirrored {
        true => builder.add_mirrored(words),
        false => builder.add(words),
    });
    (keys, builder.build().unwrap())
}

fn words_of(ring: &mut GroupRing, key: MemberKey<u32>) -> Vec<u32> {
    let stream = Stream::new(ring.device()).unwrap();
    let view = ring.gpu_on(&stream).unwrap().member(key).unwrap();
    stream.synchronize().unwrap();
    device_words(view.device(), view.as_ptr(), view.len())
}

#[test]
fn uploads_from_different_slots_on_different_streams_arrive_in_the_order_of_the_calls() {
    let test = test_name!();
    each(test, |words, device| {
        let streams = [(); 3].map(|()| Stream::new(device).unwrap());
        let mut ring = BufferRing::<u32>::new(words, device, 3).unwrap();
        // The first zeroing is not to put the streams in order.
        ring.gpu_on(&streams[0]).unwrap();
        ring.synchronize().unwrap();
        let gate = Gate::close(&streams[0]);
        gate.waits(|| {
            for (step, stream) in streams.iter().enumerate() {
                ring.advance().unwrap().fill(step as u32);
                ring.copy_to_gpu(.., stream).unwrap();
            }
            streams[2].synchronize().unwrap();
        });
        all(&gpu(&ring), 2);
        for stream in &streams {
            stream.synchronize().unwrap();
        }
        all(&gpu(&ring), 2);
    });
}

#[test]
fn members_are_uploaded_from_different_slots_in_the_order_of_the_calls() {
    let test = test_name!();
    each(test, |words, device| {
        let (keys, layout) = members(words, false);
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        let named = [keys[0], keys[2], keys[4]];
        // The first zeroing is not to put the streams in order.
        ring.gpu_on(&stream).unwrap();
        ring.synchronize().unwrap();
        let gate = Gate::close(&stream);
        named.iter().for_each(|key| ring.cpu_mut(*key).unwrap().fill(1));
        ring.copy_to_gpu(&named.map(|key| key.rows(..)), &stream).unwrap();
        gate.waits(|| {
            ring.advance().unwrap();
            ring.cpu_mut(keys[2]).unwrap().fill(2);
            ring.copy_to_gpu(&[keys[1].rows(..), keys[2].rows(..)], &other).unwrap();
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        assert_eq!(keys.map(|key| words_of(&mut ring, key)[words - 1]), [1, 0, 2, 0, 1]);
    });
}

#[test]
fn a_kernel_and_an_upload_on_another_stream_come_one_after_the_other() {
    let test = test_name!();
    each(test, |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut ring = BufferRing::<u32>::new(words, device, 2).unwrap();
        let view = ring.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), 5, &stream);
        gate.waits(|| {
            send(&mut ring, 1, &other);
            other.synchronize().unwrap();
        });
        all(&gpu(&ring), 1);
        let gate = Gate::close(&stream);
        send(&mut ring, 2, &stream);
        gate.waits(|| {
            let view = ring.gpu_on(&other).unwrap();
            common::store(view.as_mut_ptr(), view.len(), 6, &other);
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&ring), 6);
    });
}

// ---- members that are carried along ----

#[test]
fn writing_a_member_that_is_carried_along_waits_for_the_copy() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (keys, layout) = members(1001, true);
    let stream = Stream::new(device).unwrap();
    let mut ring = GroupRing::new(&layout, device, 1).unwrap();
    ring.cpu_mut(keys[2]).unwrap().fill(1);
    let gate = Gate::close(&stream);
    ring.copy_to_gpu(&[keys[1].rows(..), keys[3].rows(..)], &stream).unwrap();
    // Not one that lies beside the two.
    ring.cpu_mut(keys[0]).unwrap().fill(7);
    ring.cpu_mut(keys[4]).unwrap().fill(7);
    assert!(!gate.is_open());
    gate.waits(|| ring.cpu_mut(keys[2]).unwrap().fill(2));
    all(&words_of(&mut ring, keys[2]), 1);
}

#[test]
fn a_ring_carries_nothing_along_from_a_slot_that_may_be_old() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let (keys, layout) = members(1001, true);
    let mut ring = GroupRing::new(&layout, device, 2).unwrap();
    for key in &keys[1..4] {
        ring.cpu_mut(*key).unwrap().fill(7);
    }
    ring.copy_to_gpu(&[keys[1].rows(..), keys[2].rows(..), keys[3].rows(..)], &stream).unwrap();
    // The other slot has zeroes.
    ring.advance().unwrap();
    ring.cpu_mut(keys[1]).unwrap()[0] = 1;
    ring.copy_to_gpu(&[keys[1].rows(..1), keys[3].rows(1..)], &stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(words_of(&mut ring, keys[1])[..2], [1, 7]);
    all(&words_of(&mut ring, keys[2]), 7);
    assert_eq!(words_of(&mut ring, keys[3])[..2], [7, 0]);
}

// ---- what it is ----

#[test]
fn the_device_address_never_changes_and_every_step_arrives() {
    devices(|device, stream| {
        for pinning in [Pinning::Preferred, Pinning::Never] {
            let options = BufferOptions { pinning, ..Default::default() };
            let mut ring = BufferRing::<u64>::with_options([100, 3], device, 3, options).unwrap();
            let (address, mut seen) = (ring.device_ptr(), Vec::new());
            for step in 0..500 {
                let host = ring.advance().unwrap();
                assert!(host.as_ptr().addr().is_multiple_of(256));
                seen.push(host.as_ptr());
                host.fill(step);
                ring.copy_to_gpu(..10, stream).unwrap();
                assert_eq!(ring.gpu_on(stream).unwrap().as_mut_ptr(), address);
                assert_eq!(ring.device_ptr(), address);
            }
            stream.synchronize().unwrap();
            let words = common::device_bytes(device, address.cast(), 2400);
            let words: Vec<_> =
                words.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
            assert!(words[..30].iter().all(|word| *word == 499), "{words:?}");
            assert!(words[30..].iter().all(|word| *word == 0), "{words:?}");
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), ring.depth());
        }
    });
}

#[test]
fn steps_that_differ_in_their_members_all_arrive() {
    devices(|device, stream| {
        let (keys, layout) = members(300, false);
        let other = Stream::new(device).unwrap();
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        let mut expected = [0; 5];
        let addresses = |ring: &mut GroupRing| {
            let mut view = ring.gpu_on(stream).unwrap();
            keys.map(|key| view.member(key).unwrap().as_ptr())
        };
        let before = addresses(&mut ring);
        for step in 1..200 {
            ring.advance().unwrap();
            let named: Vec<_> = (0..5).filter(|member| (step * 7) >> member & 1 == 1).collect();
            for member in &named {
                ring.cpu_mut(keys[*member]).unwrap().fill(step);
                expected[*member] = step;
            }
            let rows: Vec<_> = named.iter().map(|member| keys[*member].rows(..)).collect();
            if !rows.is_empty() {
                let stream = if step % 3 == 0 { &other } else { stream };
                ring.copy_to_gpu(&rows, stream).unwrap();
            }
        }
        for (key, value) in keys.into_iter().zip(expected) {
            all(&words_of(&mut ring, key), value);
        }
        assert_eq!(addresses(&mut ring), before);
    });
}

#[test]
fn what_was_written_to_a_slot_is_still_there_when_it_comes_again() {
    devices(|device, stream| {
        let mut ring = BufferRing::<u32>::new(9, device, 3).unwrap();
        for step in 0..20 {
            let host = ring.advance().unwrap();
            let before = u32::saturating_sub(step, 3);
            all(host, before);
            host.fill(step);
            ring.copy_to_gpu(.., stream).unwrap();
        }
    });
}

#[test]
fn a_ring_of_one_slot_works_and_a_ring_of_none_is_an_error() {
    devices(|device, stream| {
        let mut ring = BufferRing::<u32>::new(100, device, 1).unwrap();
        for step in 0..50 {
            ring.advance().unwrap().fill(step);
            ring.copy_to_gpu(.., stream).unwrap();
        }
        all(&gpu(&ring), 49);
        let none = BufferRing::<u32>::new(100, device, 0).map(drop);
        assert!(matches!(none, Err(Error::InvalidGroup { .. })), "{none:?}");
        let (_, layout) = members(100, false);
        let none = GroupRing::new(&layout, device, 0).map(drop);
        assert!(matches!(none, Err(Error::InvalidGroup { .. })), "{none:?}");
        let many = BufferRing::<u32>::new(0, device, usize::MAX).map(drop);
        assert!(matches!(many, Err(Error::InvalidGroup { .. })), "{many:?}");
        let large = BufferRing::<u32>::new(1 << 50, device, 1 << 16).map(drop);
        assert!(matches!(large, Err(Error::InvalidShape { .. })), "{large:?}");
    });
}

#[test]
fn a_ring_without_bytes_works() {
    devices(|device, stream| {
        let mut ring = BufferRing::<u32>::new([0, 3], device, 2).unwrap();
        for _ in 0..5 {
            assert!(ring.advance().unwrap().is_empty());
            ring.copy_to_gpu(.., stream).unwrap();
            assert!(ring.gpu_on(stream).unwrap().is_empty());
        }
        assert!(ring.device_ptr().is_null() && ring.is_idle().unwrap());
    });
}

#[test]
fn a_ring_tells_what_it_is() {
    devices(|device, _| {
        let options = BufferOptions { pinning: Pinning::Never, ..Default::default() };
        let ring = BufferRing::<u16>::with_options([4, 3], device, 3, options).unwrap();
        assert_eq!((ring.shape(), ring.depth(), ring.device()), (&[4, 3][..], 3, device));
        assert!(!ring.is_pinned() && format!("{ring:?}").contains("[4, 3]"), "{ring:?}");
        let (keys, layout) = members(10, false);
        let ring = GroupRing::with_options(&layout, device, 2, options).unwrap();
        assert_eq!((ring.depth(), ring.device(), ring.is_pinned()), (2, device, false));
        assert!(format!("{ring:?}").contains("depth=2"), "{ring:?}");
        // Its layout is the one that it was made of.
        let again = GroupRing::new(ring.layout(), device, 1).unwrap();
        assert_eq!(again.cpu(keys[0]).unwrap().len(), 10);
    });
}

// ---- what goes wrong ----

#[test]
#[cfg(target_os = "linux")]
fn the_current_slot_stays_where_advancing_is_an_error() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    type Advance = fn(&mut BufferRing<u32>) -> cpu_gpu_buffer::Result<bool>;
    let advance: Advance = |ring| ring.advance().map(|_| true);
    let try_advance: Advance = |ring| ring.try_advance().map(|slot| slot.is_some());
    let stream = Stream::new(device).unwrap();
    let mut ring = BufferRing::<u32>::new(100, device, 2).unwrap();
    for (fails, action, value) in
        [(c"cuEventQuery", try_advance, 10), (c"cuEventSynchronize", advance, 20)]
    {
        ring.synchronize().unwrap();
        let gate = Gate::close(&stream);
        ring.advance().unwrap();
        send(&mut ring, value, &stream);
        ring.advance().unwrap();
        send(&mut ring, value + 1, &stream);
        common::sim::reset();
        common::sim::fail_function(fails, 700);
        let advanced = action(&mut ring);
        common::sim::heal();
        assert!(matches!(advanced, Err(Error::Cuda { .. })), "{fails:?}: {advanced:?}");
        all(ring.cpu().unwrap(), value + 1);
        // And is guarded as before.
        assert!(ring.try_advance().unwrap().is_none());
        assert!(!gate.is_open());
        gate.waits(|| ring.cpu_mut().unwrap().fill(9));
        all(&gpu(&ring), value + 1);
    }
}

#[test]
fn dropping_waits_for_the_uploads_of_every_slot() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut ring = BufferRing::<u32>::new(words, device, 2).unwrap();
        let gate = Gate::close(&stream);
        send(&mut ring, 1, &stream);
        ring.advance().unwrap();
        let (_, early) = gate.during(Duration::from_millis(50), || drop(ring));
        assert!(!early, "memory was given back that an upload reads");
    });
}
