//! Device memory or pinned memory runs out.
//!
//! A fallback reports itself and is guarded like other memory. A failed operation releases
//! everything that it had, and it succeeds once other memory is released.

#![cfg(target_os = "linux")]

mod common;

use common::sim::{self, Limits};
use common::{Foreign, Gate, all, test_name};
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, CpuGpuBuffer, Device, Error, GroupLayout, GroupLayoutBuilder,
    GroupRing, HostFlags, MemberKey, Pinning, Result, Side, Stream,
};

/// More than the largest piece of a chunk, so that each host side is registered by itself.
const WORDS: usize = 300_000;
const BYTES: usize = WORDS * 4;
/// cudaErrorMemoryAllocation.
const SHORTAGE: u32 = 2;
/// cudaErrorNotSupported, which a system returns that cannot register memory.
const NOT_SUPPORTED: u32 = 801;
const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;

fn with(pinning: Pinning, device: Device) -> Result<CpuGpuBuffer<u32>> {
    of(WORDS, pinning, device)
}

fn of(words: usize, pinning: Pinning, device: Device) -> Result<CpuGpuBuffer<u32>> {
    let options = BufferOptions { pinning, ..Default::default() };
    CpuGpuBuffer::with_options(words, device, options)
}

/// Rows arrive in both directions, and each direction is guarded while it is queued.
fn works_and_is_guarded(buffer: &mut CpuGpuBuffer<u32>, device: Device) {
    let stream = Stream::new(device).unwrap();
    let foreign = Foreign::new(buffer.numel(), 0);
    buffer.fill_cpu(OLD).unwrap();
    let gate = Gate::close(&stream);
    gate.waits(|| {
        // A pageable side may make this wait for the gate.
        // SAFETY: the memory has as many words.
        unsafe { buffer.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        assert!(gate.is_open() || buffer.try_cpu_mut().unwrap().is_none());
        buffer.cpu_mut().unwrap().fill(NEW);
    });
    stream.synchronize().unwrap();
    all(&foreign.words(), OLD);
    let gate = Gate::close(&stream);
    let seen = gate.waits(|| {
        // SAFETY: as above.
        unsafe { buffer.copy_from_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        buffer.cpu().unwrap().to_vec()
    });
    all(&seen, OLD);
    let gate = Gate::close(&stream);
    buffer.fill_cpu(NEW).unwrap();
    gate.waits(|| buffer.copy_to_gpu(.., &stream).unwrap());
    buffer.fill_cpu(0).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    all(buffer.cpu().unwrap(), NEW);
}

#[test]
fn where_no_more_can_be_pinned_preferred_is_pageable_and_required_an_error() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let mut pinned = with(Pinning::Required, device).unwrap();
    assert!(pinned.is_pinned());
    // The gates pin pages of their own.
    limits.pin(BYTES / 2);
    let before = sim::live();
    let mut pageable = with(Pinning::Preferred, device).unwrap();
    assert!(!pageable.is_pinned());
    assert_eq!(sim::live()[1], before[1]);
    all(pageable.cpu().unwrap(), 0);
    works_and_is_guarded(&mut pageable, device);
    works_and_is_guarded(&mut pinned, device);
    let before = sim::live();
    let Err(Error::PinningUnavailable { bytes, reason }) = with(Pinning::Required, device) else {
        panic!("there was nothing left to pin");
    };
    assert_eq!(bytes, BYTES);
    assert!(reason.contains("cudaHostAlloc") && reason.contains("MemoryAllocation"), "{reason}");
    assert_eq!(sim::live(), before, "the device side was not given back");
    // One that is there already stays as it is.
    pinned.fill_cpu(OLD).unwrap();
    let grown = pinned.resize(2 * WORDS);
    assert!(matches!(grown, Err(Error::PinningUnavailable { .. })), "{grown:?}");
    assert_eq!((pinned.shape(), pinned.is_pinned()), (&[WORDS][..], true));
    all(pinned.cpu().unwrap(), OLD);
    assert_eq!(sim::live(), before);
    // Exhaustion passes.
    drop(pinned);
    assert!(with(Pinning::Required, device).unwrap().is_pinned());
}

#[test]
fn either_way_of_pinning_is_enough() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    for (fails, releases) in
        [(c"cudaHostRegister", c"cudaFreeHost"), (c"cudaHostAlloc", c"cudaHostUnregister")]
    {
        let before = sim::live();
        sim::reset();
        sim::fail_function(fails, SHORTAGE);
        let mut buffer = with(Pinning::Required, device).unwrap();
        assert!(buffer.is_pinned() && buffer.pinning_error().is_none());
        assert!(with(Pinning::Preferred, device).unwrap().is_pinned());
        sim::heal();
        all(buffer.cpu().unwrap(), 0);
        works_and_is_guarded(&mut buffer, device);
        sim::reset();
        drop(buffer);
        assert_eq!(sim::calls_of(releases), 1, "{fails:?}");
        // The gates keep their pages.
        let after = sim::live();
        assert_eq!(
            [after[0], after[1], after[3]],
            [before[0], before[1] + 3, before[3]],
            "{fails:?}"
        );
    }
}

#[test]
fn a_device_that_refuses_registering_is_not_asked_again() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "only the simulated runtime refuses when it is told to");
    }
    // The refusal is remembered for the life of the process.
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        return assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    }
    let Some((device, _turn)) = common::cuda(test) else { return };
    sim::reset();
    // A shortage passes, so it is asked again.
    for number in 1..=2 {
        sim::fail_function(c"cudaHostRegister", SHORTAGE);
        assert!(of(100, Pinning::Required, device).unwrap().is_pinned());
        assert_eq!(sim::calls_of(c"cudaHostRegister"), number);
    }
    sim::fail_function(c"cudaHostRegister", NOT_SUPPORTED);
    for words in [100, WORDS, 10 * WORDS] {
        assert!(of(words, Pinning::Required, device).unwrap().is_pinned());
        assert_eq!(sim::calls_of(c"cudaHostRegister"), 3, "{words} words");
    }
    // Other flags may be taken.
    sim::heal();
    let portable = BufferOptions { host_flags: HostFlags::PORTABLE, ..Default::default() };
    drop(CpuGpuBuffer::<u8>::with_options(100, device, portable).unwrap());
    assert_eq!(sim::calls_of(c"cudaHostRegister"), 4);
    // The other device did not refuse.
    sim::heal();
    let other = Device::cuda(1).unwrap();
    assert!(of(100, Pinning::Required, other).unwrap().is_pinned());
    assert_eq!(sim::calls_of(c"cudaHostRegister"), 5);
    // `cudaHostAlloc` gives memory that may hold anything.
    let mut dirty = of(100, Pinning::Required, device).unwrap();
    dirty.fill_cpu(OLD).unwrap();
    drop(dirty);
    all(of(100, Pinning::Required, device).unwrap().cpu().unwrap(), 0);
}

#[test]
fn where_neither_way_of_pinning_works_required_is_an_error_and_preferred_pageable() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.pin(0);
    for fails in [c"cudaHostRegister", c"cudaHostAlloc"] {
        sim::reset();
        sim::fail_function(fails, NOT_SUPPORTED);
        let before = sim::live();
        let Err(required) = with(Pinning::Required, device) else {
            panic!("there was nothing left to pin");
        };
        assert!(matches!(required, Error::PinningUnavailable { .. }), "{required}");
        let preferred = with(Pinning::Preferred, device).unwrap();
        assert!(!preferred.is_pinned());
        assert_eq!(preferred.pinning_error(), Some(&required));
        drop(preferred);
        assert!(with(Pinning::Never, device).unwrap().pinning_error().is_none());
        assert_eq!(sim::live(), before, "{fails:?}");
        sim::heal();
    }
}

#[test]
fn where_the_device_is_full_the_error_says_so_and_nothing_stays_behind() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let full = |bytes| Error::OutOfMemory { side: Side::Device, bytes, device };
    for pinning in [Pinning::Required, Pinning::Preferred, Pinning::Never] {
        limits.allocate(5 * BYTES / 2, device);
        let stream = Stream::new(device).unwrap();
        let mut buffer = with(pinning, device).unwrap();
        let other = with(pinning, device).unwrap();
        buffer.fill(OLD, &stream).unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.synchronize().unwrap();
        let before = sim::live();
        assert_eq!(with(pinning, device).map(drop), Err(full(BYTES)));
        assert_eq!(sim::live(), before, "{pinning:?}");
        // A resize that fails leaves the buffer as it was: shape, address and bytes.
        let (address, pinned) = (buffer.device_ptr(), buffer.is_pinned());
        assert_eq!(buffer.resize([2, WORDS]), Err(full(2 * BYTES)));
        assert_eq!(sim::live(), before, "{pinning:?}");
        assert_eq!((buffer.shape(), buffer.numel()), (&[WORDS][..], WORDS));
        assert_eq!((buffer.device_ptr(), buffer.is_pinned()), (address, pinned));
        all(buffer.cpu().unwrap(), OLD);
        buffer.fill_cpu(NEW).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
        all(buffer.cpu().unwrap(), OLD);
        // What fits in place needs no memory.
        buffer.resize([WORDS / 2, 2]).unwrap();
        // Exhaustion passes.
        drop(other);
        let third = with(pinning, device).unwrap();
        assert_eq!(sim::live()[0], before[0]);
        drop(third);
        buffer.resize(3 * WORDS / 2).unwrap();
        all(buffer.cpu().unwrap(), 0);
    }
}

// ---- groups ----

/// Members of so many bytes together.
fn members() -> (Vec<MemberKey<u32>>, GroupLayout) {
    let mut builder = GroupLayoutBuilder::new();
    let keys = (0..4).map(|_| builder.add(WORDS / 4)).collect();
    (keys, builder.build().unwrap())
}

fn grouped(layout: &GroupLayout, pinning: Pinning, device: Device) -> Result<BufferGroup> {
    let options = BufferOptions { pinning, ..Default::default() };
    BufferGroup::with_options(layout, device, options)
}

#[test]
fn a_group_that_cannot_be_pinned_is_pageable_and_guarded_or_an_error() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let (keys, layout) = members();
    assert!(grouped(&layout, Pinning::Required, device).unwrap().is_pinned());
    limits.pin(BYTES / 2);
    let before = sim::live();
    let required = grouped(&layout, Pinning::Required, device).map(drop);
    assert!(matches!(required, Err(Error::PinningUnavailable { .. })), "{required:?}");
    assert_eq!(sim::live(), before, "the device side was not given back");
    let mut group = grouped(&layout, Pinning::Preferred, device).unwrap();
    assert!(!group.is_pinned() && sim::live()[1] == before[1]);
    let stream = Stream::new(device).unwrap();
    group.gpu_on(&stream).unwrap();
    group.synchronize().unwrap();
    // Rows between which lie others.
    let rows: Vec<_> = keys.iter().map(|key| key.rows(1..)).collect();
    let write = |group: &mut BufferGroup, value| {
        keys.iter().for_each(|key| group.cpu_mut(*key).unwrap().fill(value));
    };
    write(&mut group, OLD);
    let gate = Gate::close(&stream);
    // CUDA may read pageable memory at once, or wait for the gate.
    gate.waits(|| {
        group.copy_to_gpu(&rows, &stream).unwrap();
        write(&mut group, NEW);
    });
    let gate = Gate::close(&stream);
    let seen = gate.waits(|| {
        group.copy_to_cpu(&rows, &stream).unwrap();
        keys.iter().map(|key| group.cpu(*key).unwrap().to_vec()).collect::<Vec<_>>()
    });
    for words in seen {
        assert_eq!(words[0], NEW);
        all(&words[1..], OLD);
    }
    // Exhaustion of the pinned kind passes with its holder, and a ring takes its own share.
    limits.pin(2 * BYTES);
    assert!(GroupRing::new(&layout, device, 2).is_ok_and(|ring| !ring.is_pinned()));
    assert!(GroupRing::new(&layout, device, 1).is_ok_and(|ring| ring.is_pinned()));
}

#[test]
fn a_group_for_which_the_device_is_too_full_leaves_nothing_behind() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let (keys, layout) = members();
    // The last member needs no padding.
    let bytes = 3 * (BYTES / 4).next_multiple_of(256) + BYTES / 4;
    let full = Error::OutOfMemory { side: Side::Device, bytes, device };
    for pinning in [Pinning::Required, Pinning::Preferred, Pinning::Never] {
        limits.allocate(3 * BYTES / 2, device);
        let group = grouped(&layout, pinning, device).unwrap();
        let before = sim::live();
        assert_eq!(grouped(&layout, pinning, device).map(drop), Err(full.clone()));
        assert_eq!(GroupRing::new(&layout, device, 3).map(drop), Err(full.clone()));
        assert_eq!(sim::live(), before, "{pinning:?}");
        all(group.cpu(keys[3]).unwrap(), 0);
        drop(group);
        // One device side, however many host slots.
        drop(GroupRing::new(&layout, device, 3).unwrap());
    }
}
