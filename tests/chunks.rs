//! Small host sides are ranges of chunks, and each chunk is registered once.
//!
//! The ranges never overlap, begin as zeroes, and need no call of CUDA while a chunk has room. One
//! chunk stays allocated. A forked child never changes pinned memory of its parent.

#![cfg(target_os = "linux")]

mod common;

use std::thread;

use common::sim::{self, Held, Limits};
use common::{in_child, in_subprocess, is_all, is_subprocess, test_name};
use cpu_gpu_buffer::{BufferOptions, CpuGpuBuffer, Device, HostFlags, Pinning, Stream};

const LARGEST: usize = 1 << 20;

fn buffer(bytes: usize, device: Device) -> CpuGpuBuffer<u8> {
    let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
    CpuGpuBuffer::with_options(bytes, device, options).unwrap()
}

/// Device allocations and pinned memory that live.
fn live() -> [i64; 2] {
    let [device, pinned, ..] = sim::live();
    [device, pinned]
}

#[test]
fn a_lone_small_buffer_is_made_and_dropped_without_pinning_anything() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    drop(buffer(1, device));
    let before = live();
    for bytes in [1, 4096, 100_000, LARGEST] {
        sim::reset();
        drop(buffer(bytes, device));
        assert_eq!(sim::calls_of(c"cudaMalloc"), 1, "{bytes} bytes");
        let pinning =
            [c"cudaHostRegister", c"cudaHostUnregister", c"cudaHostAlloc", c"cudaFreeHost"];
        assert_eq!(pinning.map(sim::calls_of), [0; 4], "{bytes} bytes");
    }
    assert_eq!(live(), before);
}

#[test]
fn one_chunk_of_either_side_stays_with_its_device() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "counting allocations needs the simulated runtime");
    }
    if !is_subprocess() {
        return succeeded(test);
    }
    let Some((device, _turn)) = common::cuda(test) else { return };
    let before = live();
    drop(buffer(1, device));
    assert_eq!(live(), [before[0] + 1, before[1] + 1]);
    // Two fit into a chunk.
    let many: Vec<_> = (0..5).map(|_| buffer(LARGEST, device)).collect();
    assert_eq!(live(), [before[0] + 6, before[1] + 3]);
    drop(many);
    assert_eq!(live(), [before[0] + 1, before[1] + 1]);
    // Other flags are another registration, which stays, too.
    let options = BufferOptions { host_flags: HostFlags::PORTABLE, ..Default::default() };
    for _ in 0..2 {
        drop(CpuGpuBuffer::<u8>::with_options(1, device, options).unwrap());
        assert_eq!(live(), [before[0] + 1, before[1] + 2]);
    }
}

#[test]
fn memory_above_the_largest_piece_is_registered_by_itself() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    drop(buffer(1, device));
    for bytes in [LARGEST + 1, 5 << 20] {
        sim::reset();
        drop(buffer(bytes, device));
        let calls = [c"cudaHostRegister", c"cudaHostUnregister", c"cudaHostAlloc"];
        assert_eq!(calls.map(sim::calls_of), [1, 1, 0], "{bytes} bytes");
    }
}

#[test]
fn a_buffer_without_bytes_has_nothing_to_pin_and_is_made_all_the_same() {
    for device in common::devices() {
        let empty = buffer(0, device);
        assert!(!empty.is_pinned() && empty.pinning_error().is_none());
    }
}

#[test]
fn small_host_sides_never_overlap_and_begin_as_zeroes_whatever_the_piece_held() {
    // Other tests count calls.
    let _turn = common::turn();
    for device in common::devices() {
        let mut random = 1u64;
        let mut next = move |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as usize % below
        };
        let mut held: Vec<(u8, CpuGpuBuffer<u8>)> = Vec::new();
        for step in 0..600 {
            if held.len() > 40 || next(3) == 0 && !held.is_empty() {
                let (value, old) = held.swap_remove(next(held.len()));
                assert!(is_all(old.cpu().unwrap(), value), "{device}");
                continue;
            }
            let bytes = match next(4) {
                0 => 1 + next(LARGEST),
                _ => 1 + next(5000),
            };
            let mut new = CpuGpuBuffer::<u8>::new(bytes, device).unwrap();
            assert!(is_all(new.cpu().unwrap(), 0), "{device}: {bytes} bytes");
            assert_eq!(new.cpu().unwrap().as_ptr().addr() % 256, 0);
            let value = (1 + step % 255) as u8;
            new.fill_cpu(value).unwrap();
            held.push((value, new));
        }
    }
}

#[test]
fn threads_that_make_and_drop_small_buffers_at_once_never_share_a_byte() {
    let _turn = common::turn();
    let device = Device::auto();
    thread::scope(|scope| {
        for number in 1..=4 {
            scope.spawn(move || {
                for step in 0..150 {
                    let mut first = CpuGpuBuffer::<u8>::new(1 + step * 97, device).unwrap();
                    let mut second = CpuGpuBuffer::<u8>::new(200_000, device).unwrap();
                    first.fill_cpu(number).unwrap();
                    second.fill_cpu(number + 100).unwrap();
                    assert!(is_all(first.cpu().unwrap(), number));
                    drop(first);
                    assert!(is_all(second.cpu().unwrap(), number + 100));
                }
            });
        }
    });
}

#[test]
fn a_thread_that_registers_a_chunk_holds_up_no_other_threads_pieces() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    let mine = buffer(4096, device);
    // Until no chunk has room for the largest piece.
    let mut full = Vec::new();
    loop {
        sim::reset();
        full.push(buffer(LARGEST, device));
        if sim::calls_of(c"cudaHostRegister") == 1 {
            full.push(buffer(LARGEST, device));
            break;
        }
    }
    let held = Held::next(c"cudaHostRegister");
    thread::scope(|scope| {
        scope.spawn(|| drop(buffer(LARGEST, device)));
        held.wait();
        // A lock that is held across the call would never come free.
        drop(mine);
        drop(buffer(4096, device));
        drop(held);
    });
}

#[test]
fn a_chunk_that_cannot_be_registered_leaves_nothing_behind_and_the_other_way_stands_in() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    drop(buffer(1, device));
    let before = live();
    // The first two share the chunk that stays, so the third needs another one.
    let pair = [buffer(LARGEST, device), buffer(LARGEST, device)];
    for effect in [false, true] {
        sim::reset();
        sim::fail_call(c"cudaHostRegister", 1, 2, true, effect);
        let third = buffer(LARGEST, device);
        assert_eq!(sim::injected(), 1);
        assert_eq!(sim::calls_of(c"cudaHostAlloc"), 1);
        sim::heal();
        drop(third);
        assert_eq!(live(), [before[0] + 2, before[1]], "effect {effect}");
    }
    drop(pair);
    assert_eq!(live(), before);
}

fn succeeded(test: &str) {
    let output = in_subprocess(test, &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
}

#[test]
fn a_slice_that_lives_across_fork_reads_zeroes_in_the_child_and_aliases_nothing() {
    let test = test_name!();
    if !is_subprocess() {
        return succeeded(test);
    }
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        for pinning in [Pinning::Preferred, Pinning::Never] {
            for bytes in [4096, LARGEST, 3 << 20, 64 << 20] {
                let what = format!("{bytes} bytes, {pinning:?}, {device}");
                let options = BufferOptions { pinning, ..Default::default() };
                let mut buffer = CpuGpuBuffer::<u8>::with_options(bytes, device, options).unwrap();
                buffer.fill_cpu(5).unwrap();
                // Pageable memory is the child's own copy.
                let inherited = if buffer.is_pinned() { 0 } else { 5 };
                let host = buffer.cpu_mut().unwrap();
                in_child(|| {
                    assert!(is_all(host, inherited), "{what}");
                    // As much as the slice, and some more.
                    let mut heap: Vec<Vec<u8>> =
                        (0..5 + (bytes >> 20)).map(|_| vec![7; 1 << 20]).collect();
                    host.fill(9);
                    assert!(
                        heap.iter().all(|some| is_all(some, 7)),
                        "{what}: the heap was changed"
                    );
                    heap.iter_mut().for_each(|some| some.fill(8));
                    assert!(is_all(host, 9), "{what}: the slice was changed");
                });
                assert!(is_all(host, 5), "{what}: the child changed the parent's");
                buffer.copy_to_gpu(.., &stream).unwrap();
                buffer.fill_cpu(0).unwrap();
                buffer.copy_to_cpu(.., &stream).unwrap();
                let arrived = is_all(buffer.cpu().unwrap(), 5);
                assert!(arrived, "{what}: the device read the child's bytes");
            }
        }
    }
}
