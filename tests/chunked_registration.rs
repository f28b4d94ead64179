//! Pinned memory that can only be registered in chunks works like memory of one registration.
//!
//! Rows cross the boundaries in both directions, and each transfer is guarded as a whole. If a
//! chunk cannot be registered, no chunk stays registered. Memory that may be registered is never
//! unmapped.

#![cfg(target_os = "linux")]

mod common;

use std::ops::Range;
use std::ptr;

use common::sim::{self, Limits};
use common::{Foreign, Gate, all, device_bytes, is_all, test_name};
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, BufferPool, CpuGpuBuffer, Device, Error, GroupLayoutBuilder,
    HostFlags, MemberKey, Pinning, Result, Stream, sys,
};

/// The smallest size of pieces.
const REGISTRATION: usize = 64 << 20;
/// Two whole pieces and the beginning of a third.
const BYTES: usize = 2 * REGISTRATION + 100_005;
/// What is mapped for them.
const PAGES: usize = BYTES.next_multiple_of(4096);

fn with(bytes: usize, pinning: Pinning, device: Device) -> Result<CpuGpuBuffer<u8>> {
    let options = BufferOptions { pinning, ..Default::default() };
    CpuGpuBuffer::with_options(bytes, device, options)
}

/// A buffer whose host side is in three pieces.
fn in_registrations(limits: &Limits, device: Device) -> CpuGpuBuffer<u8> {
    limits.register(REGISTRATION);
    let before = (sim::live()[1], sim::pinned_bytes());
    let buffer = with(BYTES, Pinning::Required, device).unwrap();
    assert_eq!((sim::live()[1], sim::pinned_bytes()), (before.0 + 3, before.1 + PAGES));
    buffer
}

/// The bytes that a forked child does not inherit (`MADV_WIPEONFORK`), which are mapped in order to
/// be registered.
fn mapped() -> usize {
    let table = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut size, mut sum) = (0, 0);
    for line in table.lines() {
        if let Some(rest) = line.strip_prefix("Size:") {
            size = rest.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split(' ').any(|flag| flag == "wf")
        {
            sum += size;
        }
    }
    sum
}

/// Bytes from this place on. They differ at neighbouring places, at the same place of other
/// registrations, and for each seed.
fn pattern(from: usize, bytes: usize, seed: usize) -> Vec<u8> {
    let mut pattern = vec![0; bytes];
    let mut stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    stream.set_position(from as u64);
    stream.fill(&mut pattern);
    pattern
}

/// At most so many of them are there at a time.
const SOME: usize = 1 << 20;

fn paint(bytes: &mut [u8], from: usize, seed: usize) {
    for (number, some) in bytes.chunks_mut(SOME).enumerate() {
        some.copy_from_slice(&pattern(from + number * SOME, some.len(), seed));
    }
}

#[track_caller]
fn painted(bytes: &[u8], from: usize, seed: usize) {
    for (number, some) in bytes.chunks(SOME).enumerate() {
        let expected = pattern(from + number * SOME, some.len(), seed);
        if some != expected {
            let at = some.iter().zip(&expected).position(|(seen, expected)| seen != expected);
            panic!("byte {at:?} of the {} from {from} and {number} MB on is wrong", bytes.len());
        }
    }
}

/// Ranges, and the pieces that they meet.
const RANGES: [(Range<usize>, u64); 10] = [
    (0..BYTES, 3),
    (5..9, 1),
    (REGISTRATION - 3..REGISTRATION + 5, 2),
    (REGISTRATION - 1..REGISTRATION + 1, 2),
    (REGISTRATION - 3..REGISTRATION, 1),
    (REGISTRATION..REGISTRATION + 7, 1),
    (REGISTRATION..2 * REGISTRATION, 1),
    (REGISTRATION - 1..2 * REGISTRATION, 2),
    (REGISTRATION - 1..2 * REGISTRATION + 1, 3),
    (2 * REGISTRATION - 70_001..BYTES - 1, 2),
];

/// Runs a transfer, which must be as many copies as it meets pieces, and no more events than if it were one.
fn transfer(registrations: u64, action: impl FnOnce() -> Result<()>) {
    sim::reset();
    action().unwrap();
    let copies = sim::calls_of(c"cuMemcpyHtoDAsync") + sim::calls_of(c"cuMemcpyDtoHAsync");
    assert_eq!(copies, registrations);
    assert_eq!(sim::calls_of(c"cuEventRecord"), 1);
}

#[test]
fn rows_arrive_across_the_bounds_of_registrations_in_both_directions() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    let mut buffer = in_registrations(&limits, device);
    assert!(is_all(buffer.cpu().unwrap(), 0));
    for (seed, (range, registrations)) in RANGES.into_iter().enumerate() {
        // With some bytes on either side, which stay as they are in the side that is written.
        let (begin, end) = (range.start.saturating_sub(9), BYTES.min(range.end + 9));
        let sides = [begin..range.start, range.end..end];
        let gpu = buffer.device_ptr();
        let there = |range: &Range<usize>| {
            stream.synchronize().unwrap();
            device_bytes(device, gpu.wrapping_add(range.start), range.len())
        };
        let before = sides.each_ref().map(there);
        let host = buffer.cpu_mut().unwrap();
        host[begin..end].fill(0xee);
        paint(&mut host[range.clone()], range.start, seed);
        transfer(registrations, || buffer.copy_to_gpu(range.clone(), &stream));
        painted(&there(&range), range.start, seed);
        assert_eq!(sides.each_ref().map(there), before, "{range:?}");
        buffer.cpu_mut().unwrap()[begin..end].fill(0xee);
        transfer(registrations, || buffer.copy_to_cpu(range.clone(), &stream));
        let host = buffer.cpu().unwrap();
        painted(&host[range.clone()], range.start, seed);
        assert!(sides.iter().all(|side| is_all(&host[side.clone()], 0xee)));
    }
}

#[test]
fn rows_arrive_in_and_from_the_memory_of_others_across_the_bounds_of_registrations() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    let mut buffer = in_registrations(&limits, device);
    let memory = Foreign::new(REGISTRATION / 4 + 3, 0xaa);
    let foreign = memory.as_ptr().cast::<u8>();
    for (seed, (range, registrations)) in RANGES.into_iter().enumerate().skip(1) {
        paint(&mut buffer.cpu_mut().unwrap()[range.clone()], range.start, seed);
        // Row `i` goes to row `i`: the first one that goes to the second byte.
        let odd = foreign.wrapping_add(1).wrapping_sub(range.start);
        transfer(registrations, || {
            // SAFETY: the memory has as many bytes, and one more before and after them.
            unsafe { buffer.copy_to_device_ptr(range.clone(), odd, &stream) }
        });
        buffer.cpu_mut().unwrap()[range.clone()].fill(0);
        transfer(registrations, || {
            // SAFETY: as above.
            unsafe { buffer.copy_from_device_ptr(range.clone(), odd, &stream) }
        });
        painted(&buffer.cpu().unwrap()[range.clone()], range.start, seed);
        let seen = device_bytes(device, foreign, range.len() + 1);
        assert_eq!(seen[0], 0xaa);
        painted(&seen[1..], range.start, seed);
    }
}

const OLD: u8 = 0x11;
const NEW: u8 = 0x22;
/// On either side of a bound.
const ACROSS: Range<usize> = REGISTRATION - 4000..REGISTRATION + 4000;

#[test]
fn a_transfer_in_registrations_is_in_flight_until_the_last_has_arrived() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    let mut buffer = in_registrations(&limits, device);
    let foreign = Foreign::new(ACROSS.len() / 4, 0);
    buffer.cpu_mut().unwrap()[ACROSS].fill(OLD);
    let gate = Gate::close(&stream);
    let address = foreign.as_ptr().cast::<u8>().wrapping_sub(ACROSS.start);
    // SAFETY: the memory has as many bytes.
    gate.passes(|| unsafe { buffer.copy_to_device_ptr(ACROSS, address, &stream) }.unwrap());
    let gate = Gate::close(&stream);
    gate.waits(|| buffer.cpu_mut().unwrap()[ACROSS].fill(NEW));
    stream.synchronize().unwrap();
    all(&foreign.words(), u32::from_ne_bytes([OLD; 4]));
    let gate = Gate::close(&stream);
    let seen = gate.waits(|| {
        // SAFETY: as above.
        unsafe { buffer.copy_from_device_ptr(ACROSS, address, &stream) }.unwrap();
        assert!(gate.is_open() || buffer.try_cpu().unwrap().is_none());
        buffer.cpu().unwrap()[ACROSS].to_vec()
    });
    assert!(is_all(&seen, OLD));
}

#[test]
fn a_transfer_of_which_a_registration_is_refused_counts_as_in_flight() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    let mut buffer = in_registrations(&limits, device);
    let foreign = Foreign::new(ACROSS.len() / 4, 0);
    buffer.cpu_mut().unwrap()[ACROSS].fill(OLD);
    let gate = Gate::close(&stream);
    sim::reset();
    sim::fail_call(c"cuMemcpyHtoDAsync", 2, 1, true, false);
    let address = foreign.as_ptr().cast::<u8>().wrapping_sub(ACROSS.start);
    // SAFETY: the memory has as many bytes.
    let sent = unsafe { buffer.copy_to_device_ptr(ACROSS, address, &stream) };
    let refused =
        Err(Error::Cuda { code: sys::cudaError::cudaErrorInvalidValue, call: "cuMemcpyHtoDAsync" });
    assert_eq!(sent, refused);
    sim::heal();
    gate.waits(|| buffer.cpu_mut().unwrap()[ACROSS].fill(NEW));
    stream.synchronize().unwrap();
    // The first piece was sent, and the second was not.
    let words = foreign.words();
    let (first, second) = words.split_at(words.len() / 2);
    all(first, u32::from_ne_bytes([OLD; 4]));
    all(second, 0);
}

#[test]
fn buffers_of_a_pool_may_lie_across_the_bounds_of_registrations() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.register(REGISTRATION);
    const EACH: usize = 43 << 20;
    let before = sim::live();
    let pool = BufferPool::<u8>::new(EACH, device, 3).unwrap();
    assert_eq!(sim::live()[1], before[1] + 3);
    let stream = Stream::new(device).unwrap();
    let mut held: Vec<_> = (0..3).map(|_| pool.acquire().unwrap()).collect();
    assert!(held.iter().all(CpuGpuBuffer::is_pinned));
    for (seed, buffer) in held.iter_mut().enumerate() {
        paint(buffer.cpu_mut().unwrap(), 0, seed);
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.fill_cpu(0).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
    }
    sim::reset();
    for (seed, buffer) in held.iter_mut().enumerate() {
        painted(buffer.cpu().unwrap(), 0, seed);
        buffer.copy_to_gpu(.., &stream).unwrap();
    }
    // The first lies in one piece, the others in two.
    assert_eq!(sim::calls_of(c"cuMemcpyHtoDAsync"), 5);
    drop((held, pool, stream));
    assert_eq!(sim::live(), before);
}

#[test]
fn members_of_a_group_may_lie_across_the_bounds_of_registrations() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.register(REGISTRATION);
    let before = sim::live();
    let mut builder = GroupLayoutBuilder::new();
    // The fourth and the last lie across bounds.
    let sizes = [100, 3000, REGISTRATION - 20_000, 50_000, 700, REGISTRATION - 50_000, 40_000];
    let keys: [MemberKey<u8>; 7] = sizes.map(|size| builder.add(size));
    let layout = builder.build().unwrap();
    let stream = Stream::new(device).unwrap();
    let all = BufferOptions::default().host_flags;
    for host_flags in [all, all - HostFlags::MAPPED] {
        let options = BufferOptions { host_flags, ..Default::default() };
        let mut group = BufferGroup::with_options(&layout, device, options).unwrap();
        assert!(group.is_pinned() && sim::live()[1] == before[1] + 3);
        group.gpu_on(&stream).unwrap();
        let kernel = host_flags == all;
        for (seed, (members, inset, registrations, copies)) in [
            // Short ones by one kernel, which looks at addresses, or by copies, which are cut.
            ([0, 1, 3, 4, 6].as_slice(), 3, 5, 7),
            (&[3, 6], 9, 2, 4),
            // Long ones by copies; neighbours as one.
            (&[2, 5], 1, 1, 2),
            (&[3, 4], 0, 1, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let rows = |member: &usize| inset..sizes[*member] - inset;
            let selected: Vec<_> =
                members.iter().map(|member| keys[*member].rows(rows(member))).collect();
            for member in members {
                let host = group.cpu_mut(keys[*member]).unwrap();
                host.fill(0xee);
                paint(&mut host[rows(member)], *member, seed);
            }
            let launched = kernel && registrations > 1;
            let (launches, copies) = if launched { (1, 0) } else { (0, copies) };
            let calls = || {
                let launches = sim::calls_of(c"cuGraphLaunch") + sim::calls_of(c"cuLaunchKernel");
                let copies = [c"cuMemcpyHtoDAsync", c"cuMemcpyDtoHAsync"].map(sim::calls_of);
                (launches, copies)
            };
            sim::reset();
            group.copy_to_gpu(&selected, &stream).unwrap();
            assert_eq!(calls(), (launches, [copies, 0]), "{members:?}");
            for member in members {
                group.cpu_mut(keys[*member]).unwrap().fill(0xee);
            }
            sim::reset();
            group.copy_to_cpu(&selected, &stream).unwrap();
            assert_eq!(calls(), (launches, [0, copies]), "{members:?}");
            for member in members {
                let host = group.cpu(keys[*member]).unwrap();
                painted(&host[rows(member)], *member, seed);
                let sides = [&host[..inset], &host[sizes[*member] - inset..]].concat();
                assert!(is_all(&sides, 0xee), "{members:?}");
            }
        }
    }
    drop(stream);
    assert_eq!(sim::live(), before);
}

#[test]
fn all_registrations_are_unregistered_and_then_unmapped() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let before = (sim::live(), sim::pinned_bytes(), mapped());
    let buffer = in_registrations(&limits, device);
    assert_eq!(mapped(), before.2 + PAGES);
    sim::reset();
    // What is unmapped before it is unregistered ends the program.
    drop(buffer);
    assert_eq!(sim::calls_of(c"cudaHostUnregister"), 3);
    assert_eq!((sim::live(), sim::pinned_bytes(), mapped()), before);
}

#[test]
fn whichever_registration_fails_nothing_stays_registered_and_the_other_way_stands_in() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.register(REGISTRATION);
    let before = (sim::live(), sim::pinned_bytes(), mapped());
    // With and without the call's effect, which an error of earlier work lets it have.
    for (once, effect) in [(true, false), (false, false), (true, true)] {
        // The whole, and three pieces.
        for number in 1..=5 {
            sim::reset();
            sim::fail_call(c"cudaHostRegister", number, 2, once, effect);
            let buffer = with(BYTES, Pinning::Required, device).unwrap();
            let what = format!("call {number}, once {once}, effect {effect}");
            assert_eq!(sim::injected() == 0, number == 5, "{what}");
            // The whole is refused anyway.
            let registered = number == 5 || number == 1 && once;
            assert_eq!(sim::calls_of(c"cudaHostAlloc"), u64::from(!registered), "{what}");
            assert_eq!(mapped(), before.2 + if registered { PAGES } else { 0 }, "{what}");
            sim::heal();
            drop(buffer);
            assert_eq!((sim::live(), sim::pinned_bytes(), mapped()), before, "{what}");
        }
    }
}

#[test]
fn where_the_registrations_together_are_too_much_nothing_stays_registered() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    for room in [0, REGISTRATION - 1, REGISTRATION, 2 * REGISTRATION, BYTES - 1] {
        // Also where a single registration may be of any size.
        for single in [REGISTRATION, usize::MAX] {
            limits.register(single);
            limits.pin(room);
            let before = (sim::live(), sim::pinned_bytes(), mapped());
            let required = with(BYTES, Pinning::Required, device);
            assert!(matches!(required, Err(Error::PinningUnavailable { .. })), "{room}");
            assert_eq!((sim::live(), sim::pinned_bytes(), mapped()), before, "{room}");
            let preferred = with(BYTES, Pinning::Preferred, device).unwrap();
            assert!(!preferred.is_pinned());
            drop(preferred);
            assert_eq!((sim::live(), sim::pinned_bytes(), mapped()), before, "{room}");
        }
    }
}

/// cudaErrorIllegalAddress, which says nothing about what is asked.
const ILLEGAL: u32 = 700;

#[test]
fn pages_that_may_still_be_registered_after_a_failed_attempt_are_never_unmapped() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.register(REGISTRATION);
    // The call, what is asked for, and the pieces that stay. The first call is about the whole, the second about the
    // last piece, which is refused; and then come those before it.
    for (number, bytes, stay) in [(2, REGISTRATION + 1, 0), (3, BYTES, 1)] {
        let (pages, last) = (bytes.next_multiple_of(4096), bytes.div_ceil(REGISTRATION) - 1);
        limits.pin(last * REGISTRATION);
        let before = (sim::live()[1], mapped());
        sim::reset();
        sim::fail_call(c"cudaHostUnregister", number, ILLEGAL, true, false);
        drop(with(bytes, Pinning::Preferred, device).unwrap());
        assert_eq!(sim::injected(), 1);
        assert_eq!(sim::calls_of(c"cudaHostUnregister"), last as u64 + 2);
        assert_eq!((sim::live()[1], mapped()), (before.0 + stay, before.1 + pages));
        // Ends the program where what is pinned is not mapped.
        sim::heal();
    }
}

#[test]
fn pages_that_may_still_be_registered_after_a_release_are_never_unmapped() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    for number in 1..=3 {
        let before = (sim::live(), mapped());
        let buffer = in_registrations(&limits, device);
        let address = buffer.cpu().unwrap().as_ptr().cast_mut();
        sim::reset();
        sim::fail_call(c"cudaHostUnregister", number, ILLEGAL, true, false);
        drop(buffer);
        // The others are unregistered all the same.
        assert_eq!((sim::calls_of(c"cudaHostUnregister"), sim::injected()), (3, 1));
        assert_eq!((sim::live()[1], mapped()), (before.0[1] + 1, before.1 + PAGES));
        // Ends the program where what is pinned is not mapped.
        sim::heal();
        // Nobody else will.
        let registration = address.wrapping_add((number as usize - 1) * REGISTRATION);
        // SAFETY: the piece is registered, and nothing is in flight.
        let status = unsafe { sys::cudaHostUnregister(registration.cast()) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        // SAFETY: the pages were leaked, and nothing refers to them.
        assert_eq!(unsafe { libc::munmap(address.cast(), PAGES) }, 0);
        assert_eq!((sim::live(), mapped()), before);
    }
}

#[test]
fn cuda_refuses_a_copy_that_spans_registrations_or_is_registered_in_part() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    const PART: usize = 2 << 20;
    let foreign = Foreign::new(PART / 4, 0);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let pages = unsafe { libc::mmap(ptr::null_mut(), 3 * PART, protection, flags, -1, 0) };
    assert_ne!(pages, libc::MAP_FAILED);
    let at = |offset: usize| pages.wrapping_byte_add(offset);
    let success = sys::cudaError::cudaSuccess;
    for part in [at(0), at(PART)] {
        // SAFETY: the pages are mapped, and unmapped after they are unregistered.
        assert_eq!(unsafe { sys::cudaHostRegister(part, PART, 3) }, success);
    }
    let stream = Stream::new(device).unwrap();
    for (from, bytes, expected) in [
        (0, PART, success),
        (PART, PART, success),
        (PART - 8, 8, success),
        (PART - 8, 16, sys::cudaError::cudaErrorInvalidValue),
        (2 * PART - 8, 16, sys::cudaError::cudaErrorInvalidValue),
    ] {
        let (up, down) = (
            sys::cudaMemcpyKind::cudaMemcpyHostToDevice,
            sys::cudaMemcpyKind::cudaMemcpyDeviceToHost,
        );
        let (host, gpu, stream) = (at(from), foreign.as_ptr().cast(), stream.as_raw());
        // SAFETY: both ranges are there, and nothing else uses them.
        let up = unsafe { sys::cudaMemcpyAsync(gpu, host, bytes, up, stream) };
        // SAFETY: as above.
        let down = unsafe { sys::cudaMemcpyAsync(host, gpu, bytes, down, stream) };
        assert_eq!([up, down], [expected; 2], "{bytes} bytes at {from}");
        // SAFETY: no arguments. The next check is not to find this.
        let _ = unsafe { sys::cudaGetLastError() };
    }
    stream.synchronize().unwrap();
    for part in [at(0), at(PART)] {
        // SAFETY: registered above, and nothing is in flight.
        assert_eq!(unsafe { sys::cudaHostUnregister(part) }, success);
    }
    // SAFETY: mapped above, and nothing refers to them.
    assert_eq!(unsafe { libc::munmap(pages, 3 * PART) }, 0);
}
