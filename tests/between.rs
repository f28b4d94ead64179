//! Copies between two buffers, and kernels that use a host side in place.

mod common;

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Gate, all, device_words, store, test_name};
use cpu_gpu_buffer::{
    BufferOptions, BufferPool, CpuGpuBuffer, Device, Error, HostFlags, Pinning, PoolOptions,
    Result, Stream,
};

const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;
/// Small enough for a piece of a chunk, and large enough for pages of its own.
const SIZES: [usize; 2] = [4096 / 4, (4 << 20) / 4];

type Buffer = CpuGpuBuffer<u32>;

/// A buffer whose host side is `host` and whose device side is `gpu`.
fn buffer(words: usize, device: Device, host: u32, gpu: u32) -> Buffer {
    let stream = Stream::new(device).unwrap();
    let mut buffer = Buffer::new(words, device).unwrap();
    buffer.fill_gpu(gpu, &stream).unwrap();
    buffer.fill_cpu(host).unwrap();
    buffer.synchronize().unwrap();
    buffer
}

fn gpu(buffer: &Buffer) -> Vec<u32> {
    buffer.synchronize().unwrap();
    device_words(buffer.device(), buffer.device_ptr(), buffer.numel())
}

/// For each size, with a CUDA device.
fn each(test: &str, run: impl Fn(usize, Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    for words in SIZES {
        run(words, device);
    }
}

type Copy = fn(&mut Buffer, usize, &mut Buffer, std::ops::Range<usize>, &Stream) -> Result<()>;

/// The three copies, with the names of the sides that they read and write.
const COPIES: [(&str, Copy); 3] = [
    ("host to device", |to, at, from, rows, stream| to.copy_to_gpu_from(at, from, rows, stream)),
    ("device to host", |to, at, from, rows, stream| to.copy_to_cpu_from(at, from, rows, stream)),
    ("device to device", |to, at, from, rows, stream| to.copy_gpu_from(at, from, rows, stream)),
];

/// The side of `to` that the copy of this number writes.
fn written(number: usize, to: &Buffer) -> Vec<u32> {
    match number {
        1 => to.cpu().unwrap().to_vec(),
        _ => gpu(to),
    }
}

// ---- rows ----

#[test]
fn rows_arrive_at_the_rows_that_begin_where_they_should() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        for (number, (name, copy)) in COPIES.into_iter().enumerate() {
            let mut from = Buffer::new([10, 3], device).unwrap();
            let values: Vec<u32> = (0..30).collect();
            from.write_rows(.., &values, &stream).unwrap();
            let mut to = Buffer::new([7, 3], device).unwrap();
            to.fill(OLD, &stream).unwrap();
            copy(&mut to, 4, &mut from, 6..8, &stream).unwrap();
            let mut expected = vec![OLD; 21];
            expected[12..18].copy_from_slice(&values[18..24]);
            assert_eq!(written(number, &to), expected, "{name}");
            assert_eq!(gpu(&from), values, "{name}");
            assert_eq!(from.cpu().unwrap(), values, "{name}");
        }
    }
}

#[test]
fn shapes_of_different_rank_fit_if_their_rows_have_one_length() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        let mut from = Buffer::new([2, 6], device).unwrap();
        let mut to = Buffer::new([3, 2, 3], device).unwrap();
        from.cpu_mut().unwrap().fill(NEW);
        to.copy_to_gpu_from(1, &mut from, .., &stream).unwrap();
        assert_eq!(gpu(&to), [[0; 6], [NEW; 6], [NEW; 6]].concat());
    }
}

#[test]
fn rows_that_were_never_written_arrive_as_zeroes() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        for (number, (name, copy)) in COPIES.into_iter().enumerate() {
            // The memory of a pool still holds what an earlier buffer wrote.
            let options = PoolOptions { zeroed: true, max_buffers: Some(1), ..Default::default() };
            let pool = BufferPool::<u32>::with_options(300, device, 1, options).unwrap();
            pool.acquire().unwrap().fill(NEW, &stream).unwrap();
            let mut from = pool.acquire().unwrap();
            let mut to = buffer(300, device, OLD, OLD);
            copy(&mut to, 0, &mut from, 0..200, &stream).unwrap();
            let mut expected = vec![0; 300];
            expected[200..].fill(OLD);
            assert_eq!(written(number, &to), expected, "{name}");
        }
    }
}

#[test]
fn a_download_of_a_part_into_a_zeroed_buffer_of_a_pool_stays() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        let options = PoolOptions { zeroed: true, max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(300, device, 1, options).unwrap();
        pool.acquire().unwrap().fill(OLD, &stream).unwrap();
        let (mut to, mut from) = (pool.acquire().unwrap(), buffer(300, device, NEW, NEW));
        to.copy_to_cpu_from(100, &mut from, ..50, &stream).unwrap();
        let words = to.cpu().unwrap();
        all(&words[..100], 0);
        all(&words[100..150], NEW);
        all(&words[150..], 0);
    }
}

#[test]
fn a_part_of_a_new_device_side_arrives_and_the_rest_is_zeroes() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        let mut from = buffer(300, device, NEW, NEW);
        for copy in [COPIES[0].1, COPIES[2].1] {
            let mut to = Buffer::new(300, device).unwrap();
            copy(&mut to, 100, &mut from, 0..50, &stream).unwrap();
            let words = gpu(&to);
            all(&words[..100], 0);
            all(&words[100..150], NEW);
            all(&words[150..], 0);
        }
    }
}

#[test]
fn a_refused_copy_changes_neither_buffer() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        for (name, copy) in COPIES {
            let mut from = buffer(8, device, NEW, NEW);
            let mut to = buffer(4, device, OLD, OLD);
            for (at, rows, error) in [
                (1, 0..4, Error::OutOfRange { start: 1, end: 5, rows: 4, member: None }),
                (5, 0..0, Error::OutOfRange { start: 5, end: 5, rows: 4, member: None }),
                (0, 6..9, Error::OutOfRange { start: 6, end: 9, rows: 8, member: None }),
                (
                    usize::MAX,
                    0..2,
                    Error::OutOfRange { start: usize::MAX, end: usize::MAX, rows: 4, member: None },
                ),
            ] {
                assert_eq!(copy(&mut to, at, &mut from, rows, &stream), Err(error), "{name}");
            }
            let mut wide = Buffer::new([8, 2], device).unwrap();
            let refused = copy(&mut to, 0, &mut wide, 0..1, &stream);
            assert!(matches!(refused, Err(Error::InvalidShape { .. })), "{name}: {refused:?}");
            assert!(copy(&mut to, 4, &mut from, 8..8, &stream).is_ok(), "{name}: no rows");
            for buffer in [&to, &from] {
                let value = if buffer.numel() == 4 { OLD } else { NEW };
                all(buffer.cpu().unwrap(), value);
                all(&gpu(buffer), value);
            }
        }
    }
}

#[test]
fn buffers_of_the_cpu_and_of_a_gpu_do_not_mix() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    for (at, other) in [(device, Device::Cpu), (Device::Cpu, device)] {
        let (mut to, mut from) = (buffer(4, at, OLD, OLD), buffer(4, other, NEW, NEW));
        for stream in [Stream::new(device).unwrap(), Stream::new(Device::Cpu).unwrap()] {
            for (name, copy) in COPIES {
                let refused = copy(&mut to, 0, &mut from, 0..4, &stream);
                assert!(matches!(refused, Err(Error::DeviceMismatch { .. })), "{name}");
            }
        }
        all(to.cpu().unwrap(), OLD);
        all(&gpu(&to), OLD);
    }
}

#[test]
fn a_stream_that_is_being_captured_is_refused() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let stream = Stream::new(device).unwrap();
    let (mut to, mut from) = (buffer(4, device, OLD, OLD), buffer(4, device, NEW, NEW));
    common::begin_capture(&stream);
    for (name, copy) in COPIES {
        let refused = copy(&mut to, 0, &mut from, 0..4, &stream);
        assert_eq!(refused, Err(Error::StreamCapturing), "{name}");
    }
    assert_eq!(from.cpu_on(&stream).err(), Some(Error::StreamCapturing));
    common::end_capture(&stream);
    all(&gpu(&to), OLD);
    all(to.cpu().unwrap(), OLD);
}

// ---- the host side that is read ----

#[test]
fn writing_a_staging_buffer_waits_for_its_uploads_to_others() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (mut staging, mut to) = (buffer(words, device, OLD, 0), buffer(words, device, 0, 0));
        let gate = Gate::close(&stream);
        to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
        gate.passes(|| {
            assert_eq!(staging.cpu().unwrap()[words - 1], OLD);
            assert!(staging.try_cpu_mut().unwrap().is_none());
            assert!(!staging.is_idle().unwrap() && !to.is_idle().unwrap());
        });
        let gate = Gate::close(&stream);
        to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
        gate.waits(|| staging.cpu_mut().unwrap().fill(NEW));
        all(&gpu(&to), OLD);
    });
}

#[test]
fn a_download_into_a_staging_buffer_comes_after_its_uploads_to_others() {
    each(test_name!(), |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let (mut staging, mut to) = (buffer(words, device, OLD, NEW), buffer(words, device, 0, 0));
        let gate = Gate::close(&stream);
        to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
        staging.copy_to_cpu(.., &other).unwrap();
        gate.waits(|| staging.synchronize().unwrap());
        all(&gpu(&to), OLD);
        all(staging.cpu().unwrap(), NEW);
    });
}

#[test]
fn an_upload_to_another_buffer_comes_after_the_download_that_it_reads() {
    each(test_name!(), |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let (mut staging, mut to) = (buffer(words, device, OLD, NEW), buffer(words, device, 0, 0));
        let gate = Gate::close(&stream);
        staging.copy_to_cpu(.., &stream).unwrap();
        to.copy_to_gpu_from(0, &mut staging, .., &other).unwrap();
        gate.waits(|| to.synchronize().unwrap());
        all(&gpu(&to), NEW);
    });
}

#[test]
fn uploads_from_one_host_side_on_two_streams_run_side_by_side() {
    each(test_name!(), |words, device| {
        let streams = [(); 2].map(|()| Stream::new(device).unwrap());
        let mut staging = buffer(words, device, OLD, 0);
        let mut to = [(); 2].map(|()| buffer(words, device, 0, 0));
        let gate = Gate::close(&streams[0]);
        let copy = |to: &mut [Buffer; 2], staging: &mut Buffer| {
            for (to, stream) in to.iter_mut().zip(&streams) {
                to.copy_to_gpu_from(0, staging, .., stream).unwrap();
            }
        };
        copy(&mut to, &mut staging);
        gate.passes(|| to[1].synchronize().unwrap());
        let gate = Gate::close(&streams[0]);
        copy(&mut to, &mut staging);
        to[1].synchronize().unwrap();
        gate.waits(|| staging.cpu_mut().unwrap().fill(NEW));
        to.iter().for_each(|to| all(&gpu(to), OLD));
    });
}

#[test]
fn dropping_a_staging_buffer_waits_for_its_uploads_to_others() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (mut staging, mut to) = (buffer(words, device, OLD, 0), buffer(words, device, 0, 0));
        let gate = Gate::close(&stream);
        to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
        gate.waits(|| drop(staging));
        all(&gpu(&to), OLD);
    });
}

#[test]
fn a_staging_buffer_of_a_pool_is_not_idle_for_its_next_holder_before_its_upload_is_over() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let stream = Stream::new(device).unwrap();
    let pool = BufferPool::<u32>::new(256, device, 2).unwrap();
    let mut to = buffer(256, device, 0, 0);
    let gate = Gate::close(&stream);
    let mut staging = pool.acquire().unwrap();
    staging.cpu_mut().unwrap().fill(OLD);
    let busy = staging.cpu().unwrap().as_ptr();
    to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
    drop(staging);
    // The idle one comes first, though the busy one was given back.
    let mut idle = pool.acquire().unwrap();
    assert!(!ptr::eq(idle.cpu().unwrap().as_ptr(), busy));
    idle.cpu_mut().unwrap().fill(NEW);
    let mut again = pool.try_acquire().unwrap();
    assert!(!gate.is_open(), "giving back and acquiring wait for nothing");
    gate.waits(|| again.cpu_mut().unwrap().fill(NEW));
    all(&gpu(&to), OLD);
}

// ---- the device side that is written ----

#[test]
fn work_of_the_target_on_another_stream_comes_after_a_copy_into_it() {
    each(test_name!(), |words, device| {
        for copy in [COPIES[0].1, COPIES[2].1] {
            let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
            let mut from = buffer(words, device, NEW, NEW);
            let mut to = buffer(words, device, 0, OLD);
            let gate = Gate::close(&stream);
            copy(&mut to, 0, &mut from, 0..words, &stream).unwrap();
            to.copy_to_cpu(.., &other).unwrap();
            let seen = gate.waits(|| to.cpu().unwrap().to_vec());
            all(&seen, NEW);
        }
    });
}

#[test]
fn a_copy_into_a_target_comes_after_its_work_on_another_stream() {
    each(test_name!(), |words, device| {
        for copy in [COPIES[0].1, COPIES[2].1] {
            let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
            let mut from = buffer(words, device, NEW, NEW);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            to.fill_gpu(OLD, &stream).unwrap();
            copy(&mut to, 0, &mut from, 0..words, &other).unwrap();
            gate.waits(|| to.synchronize().unwrap());
            all(&gpu(&to), NEW);
        }
    });
}

#[test]
fn dropping_a_target_waits_for_copies_into_it() {
    each(test_name!(), |words, device| {
        for copy in [COPIES[0].1, COPIES[2].1] {
            let stream = Stream::new(device).unwrap();
            let mut from = buffer(words, device, NEW, NEW);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            copy(&mut to, 0, &mut from, 0..words, &stream).unwrap();
            gate.waits(|| drop(to));
            stream.synchronize().unwrap();
        }
    });
}

#[test]
fn forgetting_either_buffer_leaves_a_copy_its_memory() {
    each(test_name!(), |words, device| {
        for (_, copy) in COPIES {
            let stream = Stream::new(device).unwrap();
            let mut from = buffer(words, device, NEW, NEW);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            copy(&mut to, 0, &mut from, 0..words, &stream).unwrap();
            common::forget(from);
            common::forget(to);
            gate.open();
            stream.synchronize().unwrap();
        }
    });
}

// ---- the host side that is written ----

#[test]
fn the_host_side_of_another_buffer_waits_for_a_download_into_it() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut from = buffer(words, device, 0, NEW);
        let mut to = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        to.copy_to_cpu_from(0, &mut from, .., &stream).unwrap();
        gate.passes(|| assert!(to.try_cpu().unwrap().is_none()));
        stream.synchronize().unwrap();
        to.fill_cpu(OLD).unwrap();
        let gate = Gate::close(&stream);
        to.copy_to_cpu_from(0, &mut from, .., &stream).unwrap();
        let seen = gate.waits(|| to.cpu().unwrap().to_vec());
        all(&seen, NEW);

        let gate = Gate::close(&stream);
        to.copy_to_cpu_from(0, &mut from, .., &stream).unwrap();
        gate.waits(|| to.cpu_mut().unwrap().fill(OLD));
        stream.synchronize().unwrap();
        all(to.cpu().unwrap(), OLD);
    });
}

#[test]
fn a_download_into_another_buffer_comes_after_uploads_of_that_host_side() {
    each(test_name!(), |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut from = buffer(words, device, 0, NEW);
        let mut to = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        to.copy_to_gpu(.., &stream).unwrap();
        to.copy_to_cpu_from(0, &mut from, .., &other).unwrap();
        gate.waits(|| to.synchronize().unwrap());
        all(&gpu(&to), OLD);
        all(to.cpu().unwrap(), NEW);
    });
}

// ---- the device side that is read ----

#[test]
fn work_of_the_source_on_another_stream_comes_after_a_copy_out_of_it() {
    each(test_name!(), |words, device| {
        for number in [1, 2] {
            let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
            let mut from = buffer(words, device, 0, OLD);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            COPIES[number].1(&mut to, 0, &mut from, 0..words, &stream).unwrap();
            from.fill_gpu(NEW, &other).unwrap();
            gate.waits(|| from.synchronize().unwrap());
            all(&written(number, &to), OLD);
        }
    });
}

#[test]
fn a_copy_out_of_a_source_comes_after_its_work_on_another_stream() {
    each(test_name!(), |words, device| {
        for number in [1, 2] {
            let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
            let mut from = buffer(words, device, 0, OLD);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            from.fill_gpu(NEW, &stream).unwrap();
            COPIES[number].1(&mut to, 0, &mut from, 0..words, &other).unwrap();
            gate.waits(|| to.synchronize().unwrap());
            all(&written(number, &to), NEW);
        }
    });
}

#[test]
fn dropping_a_source_waits_for_copies_out_of_it() {
    each(test_name!(), |words, device| {
        for number in [1, 2] {
            let stream = Stream::new(device).unwrap();
            let mut from = buffer(words, device, 0, NEW);
            let mut to = buffer(words, device, 0, 0);
            let gate = Gate::close(&stream);
            COPIES[number].1(&mut to, 0, &mut from, 0..words, &stream).unwrap();
            gate.waits(|| drop(from));
            all(&written(number, &to), NEW);
        }
    });
}

// ---- two devices ----

/// Two CUDA devices. With fewer, the test is reported as left out.
fn two_devices(test: &str, run: impl Fn(Device, Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "fewer than two CUDA devices");
    }
    run(device, Device::Cuda(1));
    run(Device::Cuda(1), device);
}

#[test]
fn a_staging_buffer_of_one_device_serves_another() {
    two_devices(test_name!(), |near, far| {
        for words in SIZES {
            let stream = Stream::new(far).unwrap();
            let mut staging = buffer(words, near, NEW, 0);
            let mut to = buffer(words, far, 0, 0);
            to.copy_to_gpu_from(0, &mut staging, .., &stream).unwrap();
            staging.cpu_mut().unwrap().fill(OLD);
            all(&gpu(&to), NEW);

            // Down into the host side of the other device's buffer.
            staging.copy_to_cpu_from(0, &mut to, .., &stream).unwrap();
            all(staging.cpu().unwrap(), NEW);
            let refused = to.copy_to_gpu_from(0, &mut staging, .., &Stream::new(near).unwrap());
            assert_eq!(refused, Err(Error::DeviceMismatch { expected: far, actual: near }));
        }
    });
}

#[test]
fn a_staging_buffer_that_serves_two_devices_in_turn_keeps_its_events() {
    two_devices(test_name!(), |near, far| {
        let streams = [near, far].map(|device| Stream::new(device).unwrap());
        let mut staging = buffer(256, near, 0, 0);
        let mut to = [near, far].map(|device| buffer(256, device, 0, 0));
        let mut step = |value| {
            staging.cpu_mut().unwrap().fill(value);
            for (to, stream) in to.iter_mut().zip(&streams) {
                to.copy_to_gpu_from(0, &mut staging, .., stream).unwrap();
                staging.copy_to_cpu_from(0, to, .., stream).unwrap();
            }
            to.iter().for_each(|to| all(&gpu(to), value));
        };
        step(1);
        #[cfg(target_os = "linux")]
        if common::is_simulated() {
            common::sim::reset();
            (2..6).for_each(&mut step);
            assert_eq!(common::sim::calls_of(c"cudaEventCreateWithFlags"), 0);
        }
        step(6);
    });
}

fn copy_between_devices(near: Device, far: Device) {
    for words in SIZES {
        let (stream, other) = (Stream::new(near).unwrap(), Stream::new(far).unwrap());
        let mut from = buffer(words, far, 0, OLD);
        let mut to = buffer(words, near, 0, 0);
        from.fill_gpu(NEW, &other).unwrap();
        to.copy_gpu_from(0, &mut from, .., &stream).unwrap();
        from.fill_gpu(OLD, &other).unwrap();
        all(&gpu(&to), NEW);
        all(&gpu(&from), OLD);
        // A source that nobody wrote is zeroed on its own device.
        let mut never = Buffer::new(words, far).unwrap();
        to.copy_gpu_from(0, &mut never, ..words / 2, &stream).unwrap();
        let words = gpu(&to);
        all(&words[..words.len() / 2], 0);
        all(&words[words.len() / 2..], NEW);
    }
}

#[test]
fn device_sides_of_two_devices_are_copied_with_peer_access() {
    two_devices(test_name!(), copy_between_devices);
}

#[test]
fn device_sides_of_two_devices_are_copied_without_peer_access() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "the simulated runtime alone can lack peer access");
    }
    match common::is_subprocess() {
        true => two_devices(test, copy_between_devices),
        false => {
            let output = common::in_subprocess(test, &[("CUDART_SIM_PEERS", "0")]);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        }
    }
}

#[test]
fn a_source_of_another_device_waits_for_copies_out_of_it() {
    two_devices(test_name!(), |near, far| {
        if near != Device::Cuda(0) {
            return; // A gate is on the first device.
        }
        for words in SIZES {
            let stream = Stream::new(near).unwrap();
            let mut from = buffer(words, far, 0, NEW);
            let mut to = buffer(words, near, 0, 0);
            let gate = Gate::close(&stream);
            to.copy_gpu_from(0, &mut from, .., &stream).unwrap();
            from.fill_gpu(OLD, &Stream::new(far).unwrap()).unwrap();
            gate.waits(|| drop(from));
            all(&gpu(&to), NEW);
        }
    });
}

// ---- kernels that use the host side in place ----

#[test]
fn a_kernel_reads_and_writes_the_host_side_in_place() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut host = buffer(words, device, OLD, OLD);
        let view = host.cpu_on(&stream).unwrap();
        assert_eq!((view.len(), view.shape(), view.device()), (words, &[words][..], device));
        store(view.as_mut_ptr(), words, NEW, &stream);
        all(host.cpu().unwrap(), NEW);
        all(&gpu(&host), OLD);
    });
}

#[test]
fn on_the_cpu_the_view_of_the_host_side_is_the_host_side() {
    let stream = Stream::new(Device::Cpu).unwrap();
    let mut host = buffer(8, Device::Cpu, OLD, NEW);
    assert_eq!(host.cpu_on(&stream).unwrap().as_host_slice(), Some(&[OLD; 8][..]));
}

#[test]
fn the_host_side_waits_for_kernels_that_use_it() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut host = buffer(words, device, OLD, OLD);
        let launch = |host: &mut Buffer| {
            let gate = Gate::close(&stream);
            let to = host.cpu_on(&stream).unwrap().as_mut_ptr();
            store(to, words, NEW, &stream);
            gate
        };
        let gate = launch(&mut host);
        gate.passes(|| {
            assert!(host.try_cpu().unwrap().is_none());
            assert!(host.try_cpu_mut().unwrap().is_none());
            assert!(!host.is_idle().unwrap());
        });
        let gate = launch(&mut host);
        let seen = gate.waits(|| host.cpu().unwrap().to_vec());
        all(&seen, NEW);
        let gate = launch(&mut host);
        gate.waits(|| host.cpu_mut().unwrap().fill(OLD));
        stream.synchronize().unwrap();
        all(host.cpu().unwrap(), OLD);
        let gate = launch(&mut host);
        gate.waits(|| host.fill_cpu(OLD).unwrap());
        stream.synchronize().unwrap();
        all(host.cpu().unwrap(), OLD);
        let gate = launch(&mut host);
        gate.waits(|| drop(host));
    });
}

#[test]
fn copies_on_other_streams_come_after_kernels_that_use_the_host_side() {
    each(test_name!(), |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut to = buffer(words, device, 0, 0);
        let copies: [&mut dyn FnMut(&mut Buffer); 3] = [
            &mut |host| host.copy_to_gpu(.., &other).unwrap(),
            &mut |host| host.copy_to_cpu(.., &other).unwrap(),
            &mut |host| to.copy_to_gpu_from(0, host, .., &other).unwrap(),
        ];
        for (number, copy) in copies.into_iter().enumerate() {
            let mut host = buffer(words, device, OLD, OLD);
            let gate = Gate::close(&stream);
            store(host.cpu_on(&stream).unwrap().as_mut_ptr(), words, NEW, &stream);
            gate.passes(|| copy(&mut host));
            gate.waits(|| other.synchronize().unwrap());
            // The download overwrote what the kernel had written.
            let (expected_host, expected_gpu) = [(NEW, NEW), (OLD, OLD), (NEW, OLD)][number];
            all(host.cpu().unwrap(), expected_host);
            all(&gpu(&host), expected_gpu);
        }
        all(&gpu(&to), NEW);
    });
}

#[test]
fn reading_waits_for_a_kernel_also_after_an_upload_of_what_it_writes() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let mut host = buffer(words, device, OLD, OLD);
        let gate = Gate::close(&stream);
        store(host.cpu_on(&stream).unwrap().as_mut_ptr(), words, NEW, &stream);
        host.copy_to_gpu(.., &stream).unwrap();
        let seen = gate.waits(|| host.cpu().unwrap().to_vec());
        all(&seen, NEW);
    });
}

#[test]
fn a_kernel_that_uses_the_host_side_comes_after_copies_on_other_streams() {
    each(test_name!(), |words, device| {
        let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let mut host = buffer(words, device, OLD, 0);
        let gate = Gate::close(&other);
        host.copy_to_gpu(.., &other).unwrap();
        store(host.cpu_on(&stream).unwrap().as_mut_ptr(), words, NEW, &stream);
        gate.waits(|| host.synchronize().unwrap());
        all(&gpu(&host), OLD);
        all(host.cpu().unwrap(), NEW);
    });
}

#[test]
fn a_pool_prefers_a_buffer_that_no_kernel_uses_in_place() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let stream = Stream::new(device).unwrap();
    let pool = BufferPool::<u32>::new(256, device, 2).unwrap();
    let gate = Gate::close(&stream);
    let mut used = pool.acquire().unwrap();
    let busy = used.cpu_on(&stream).unwrap().as_mut_ptr();
    store(busy, 256, NEW, &stream);
    drop(used);
    let mut idle = pool.acquire().unwrap();
    assert!(!ptr::eq(idle.cpu_mut().unwrap().as_ptr(), busy));
    let again = pool.try_acquire().unwrap();
    assert!(!gate.is_open(), "giving back and acquiring wait for nothing");
    let seen = gate.waits(|| again.cpu().unwrap().to_vec());
    all(&seen, NEW);
}

#[test]
fn memory_that_kernels_do_not_reach_is_refused() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let stream = Stream::new(device).unwrap();
    for options in [
        BufferOptions { pinning: Pinning::Never, ..Default::default() },
        BufferOptions { host_flags: HostFlags::PORTABLE, ..Default::default() },
    ] {
        let mut buffer = Buffer::with_options(256, device, options).unwrap();
        assert_eq!(buffer.cpu_on(&stream).err(), Some(Error::NotMapped));
        buffer.cpu_mut().unwrap().fill(NEW);
        assert!(buffer.is_idle().unwrap());
    }
    let mut none = Buffer::new(0, device).unwrap();
    assert!(none.cpu_on(&stream).unwrap().is_empty());
}

// ---- rows of the host side ----

#[test]
fn written_rows_are_on_both_sides_and_no_other_row_is_touched() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        let mut table = Buffer::new([5, 2], device).unwrap();
        table.fill(OLD, &stream).unwrap();
        table.write_rows(1..3, &[1, 2, 3, 4], &stream).unwrap();
        let expected = [OLD, OLD, 1, 2, 3, 4, OLD, OLD, OLD, OLD];
        assert_eq!(table.cpu().unwrap(), expected);
        assert_eq!(gpu(&table), expected);
        assert_eq!(table.cpu_rows(2..4).unwrap(), [3, 4, OLD, OLD]);
        table.cpu_rows_mut(4..).unwrap().fill(9);
        assert_eq!(table.cpu_rows(3..).unwrap(), [OLD, OLD, 9, 9]);
        let beyond = Error::OutOfRange { start: 4, end: 6, rows: 5, member: None };
        assert_eq!(table.cpu_rows(4..6).err(), Some(beyond.clone()));
        assert_eq!(table.cpu_rows_mut(4..6).err(), Some(beyond.clone()));
        assert_eq!(table.write_rows(4..6, &[0; 4], &stream), Err(beyond));
        let short = table.write_rows(4.., &[0; 1], &stream);
        assert!(matches!(short, Err(Error::InvalidShape { .. })), "{short:?}");
        assert_eq!(table.cpu_rows(3..).unwrap(), [OLD, OLD, 9, 9]);
    }
}

#[test]
fn writing_rows_waits_for_uploads_of_other_rows() {
    each(test_name!(), |words, device| {
        let stream = Stream::new(device).unwrap();
        let (mut table, mut to) = (buffer(words, device, OLD, 0), buffer(words, device, 0, 0));
        let gate = Gate::close(&stream);
        to.copy_to_gpu_from(0, &mut table, .., &stream).unwrap();
        gate.waits(|| table.write_rows(..1, &[NEW], &stream).unwrap());
        all(&gpu(&to), OLD);
        let seen = gpu(&table);
        assert_eq!(seen[0], NEW);
        all(&seen[1..], 0);
    });
}

#[test]
fn refused_values_leave_the_host_side_unchanged() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let (stream, cpu) = (Stream::new(device).unwrap(), Stream::new(Device::Cpu).unwrap());
    let mut table = buffer(4, device, OLD, OLD);
    let refused = table.write_rows(.., &[NEW; 4], &cpu);
    assert_eq!(refused, Err(Error::DeviceMismatch { expected: device, actual: Device::Cpu }));
    common::begin_capture(&stream);
    assert_eq!(table.write_rows(.., &[NEW; 4], &stream), Err(Error::StreamCapturing));
    common::end_capture(&stream);
    all(table.cpu().unwrap(), OLD);
}

#[test]
fn a_buffer_of_a_slice_has_it_on_both_sides() {
    for device in common::devices() {
        let _turn = common::turn();
        let stream = Stream::new(device).unwrap();
        let buffer = Buffer::from_slice([2, 2], &[1, 2, 3, 4], &stream).unwrap();
        assert_eq!((buffer.cpu().unwrap(), buffer.device()), (&[1, 2, 3, 4][..], device));
        assert_eq!(gpu(&buffer), [1, 2, 3, 4]);
        let refused = Buffer::from_slice([2, 2], &[1; 5], &stream);
        assert!(matches!(refused, Err(Error::InvalidShape { .. })));
        assert!(Buffer::from_slice(0, &[], &stream).unwrap().cpu().unwrap().is_empty());
    }
}

#[test]
fn rows_of_elements_without_size_are_as_many_as_the_shape_says() {
    let stream = Stream::new(Device::Cpu).unwrap();
    let mut units = CpuGpuBuffer::<()>::new([3, 2], Device::Cpu).unwrap();
    units.write_rows(1.., &[(); 4], &stream).unwrap();
    assert_eq!(units.cpu_rows(..2).unwrap().len(), 4);
    let mut others = CpuGpuBuffer::<()>::new([4, 2], Device::Cpu).unwrap();
    others.copy_gpu_from(1, &mut units, .., &stream).unwrap();
}

/// Counts its drops.
struct Owner(Arc<AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn both_buffers_keep_the_owner_of_a_borrowed_stream() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    for (name, copy) in COPIES {
        let drops = Arc::new(AtomicUsize::new(0));
        let real = Stream::new(device).unwrap();
        let owner = Arc::new((Owner(Arc::clone(&drops)), real.clone()));
        // SAFETY: the owner keeps the stream.
        let stream = unsafe { Stream::from_raw(real.as_raw(), device, Some(owner)) }.unwrap();
        drop(real);
        let (mut to, mut from) = (buffer(64, device, 0, 0), buffer(64, device, NEW, NEW));
        copy(&mut to, 0, &mut from, 0..64, &stream).unwrap();
        drop(stream);
        drop(to);
        assert_eq!(drops.load(Ordering::SeqCst), 0, "{name}");
        drop(from);
        assert_eq!(drops.load(Ordering::SeqCst), 1, "{name}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_copy_between_device_sides_that_another_threads_capture_swallows_is_refused() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held on the simulated runtime alone");
    }
    let stream = Stream::new(device).unwrap();
    let (mut from, mut to) = (buffer(1024, device, 7, 7), Buffer::new(1024, device).unwrap());
    let held = common::sim::Held::next(c"cudaMemcpyAsync");
    let answer = std::thread::scope(|scope| {
        let copy = scope.spawn(|| to.copy_gpu_from(0, &mut from, .., &stream));
        held.wait();
        common::begin_capture(&stream);
        drop(held);
        copy.join().unwrap()
    });
    common::end_capture(&stream);
    assert_eq!(answer, Err(Error::StreamCapturing));
    // The device side counts as never written.
    to.copy_to_cpu(.., &stream).unwrap();
    all(to.cpu().unwrap(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn uploads_of_one_host_side_on_streams_that_come_and_go_keep_few_of_them() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "streams are counted on the simulated runtime alone");
    }
    let main = Stream::new(device).unwrap();
    let mut from = buffer(1024, device, NEW, NEW);
    let mut round = || {
        let own = Stream::new(device).unwrap();
        let mut to = Buffer::new(1024, device).unwrap();
        to.copy_to_gpu_from(0, &mut from, .., &own).unwrap();
        to.copy_to_cpu(.., &main).unwrap();
        // So the upload has finished, and nobody asked its stream.
        all(to.cpu().unwrap(), NEW);
    };
    (0..3).for_each(|_| round());
    let before = common::sim::live();
    (0..50).for_each(|_| round());
    assert_eq!(common::sim::live()[2..4], before[2..4]);
}

#[test]
fn rows_whose_numbers_overflow_are_out_of_range_or_none() {
    let stream = Stream::new(Device::Cpu).unwrap();
    let new = || CpuGpuBuffer::<u32>::new([0, usize::MAX], Device::Cpu).unwrap();
    let (mut to, mut from) = (new(), new());
    to.copy_to_gpu_from(0, &mut from, .., &stream).unwrap();
    let new = || CpuGpuBuffer::<()>::new(usize::MAX, Device::Cpu).unwrap();
    let (mut to, mut from) = (new(), new());
    let (start, rows) = (10, usize::MAX);
    let beyond = Error::OutOfRange { start, end: usize::MAX, rows, member: None };
    assert_eq!(to.copy_to_gpu_from(10, &mut from, .., &stream), Err(beyond));
}
