//! A pool reuses its memory, has one holder for each buffer at a time, and waits for nothing.

mod common;

use std::collections::BTreeSet;
use std::mem;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use common::{Gate, all, device_words, test_name};
use cpu_gpu_buffer::{
    BufferPool, CpuGpuBuffer, Device, Error, Pinning, PoolGrowth, PoolOptions, Shape, Stream, sys,
};

const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;
const WORDS: usize = 3000;

fn each(run: impl Fn(Device, Stream)) {
    let _turn = common::turn();
    for device in common::devices() {
        run(device, Stream::new(device).unwrap());
    }
}

/// A pool that never has more buffers than these.
fn capped(device: Device, buffers: usize) -> BufferPool<u32> {
    let options = PoolOptions { max_buffers: Some(buffers), ..Default::default() };
    BufferPool::with_options(WORDS, device, buffers, options).unwrap()
}

fn zeroing(device: Device, buffers: usize) -> BufferPool<u32> {
    let options = PoolOptions { max_buffers: Some(buffers), zeroed: true, ..Default::default() };
    BufferPool::with_options(WORDS, device, buffers, options).unwrap()
}

fn gpu(buffer: &CpuGpuBuffer<u32>) -> Vec<u32> {
    buffer.synchronize().unwrap();
    device_words(buffer.device(), buffer.device_ptr(), buffer.numel())
}

fn addresses(buffers: &[CpuGpuBuffer<u32>]) -> BTreeSet<usize> {
    buffers.iter().map(|buffer| buffer.device_ptr().addr()).collect()
}

/// Runs on so many threads at once. They are joined, not only waited for: ThreadSanitizer sees the one and not the
/// other.
fn on_threads(count: usize, run: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || run(number))).collect();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

// ---- ordinary buffers ----

#[test]
fn a_pooled_buffer_is_an_ordinary_buffer() {
    each(|device, stream| {
        let pool = BufferPool::<u32>::new([5, 3], device, 3).unwrap();
        let mut buffer = pool.acquire().unwrap();
        assert_eq!((buffer.shape(), buffer.numel(), buffer.nbytes()), (&[5, 3][..], 15, 60));
        assert_eq!((pool.shape(), pool.device()), (&[5, 3][..], device));
        assert_eq!(buffer.device(), device);
        assert_eq!(buffer.is_pinned(), device != Device::Cpu);
        all(buffer.cpu().unwrap(), 0);
        buffer.copy_to_cpu(.., &stream).unwrap();
        all(buffer.cpu().unwrap(), 0);
        buffer.fill_cpu(NEW).unwrap();
        buffer.copy_to_gpu(1..2, &stream).unwrap();
        let mut expected = vec![0; 15];
        expected[3..6].fill(NEW);
        assert_eq!(gpu(&buffer), expected);
        buffer.resize([2, 2]).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [0; 4]);
        assert_eq!(
            format!("{pool:?}"),
            format!("BufferPool(shape=[5, 3], dtype=u32, device={device}, available=2 of 3)")
        );
    });
}

#[test]
fn buffers_of_a_pool_begin_at_bounds_of_256_bytes_and_of_their_elements() {
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C, align(1024))]
    struct Wide([u8; 1024]);

    each(|device, stream| {
        let pool = BufferPool::<u8>::new(300, device, 5).unwrap();
        for mut buffer in [(); 5].map(|()| pool.try_acquire().unwrap()) {
            assert_eq!(buffer.device_ptr().addr() % 256, 0);
            assert_eq!(buffer.cpu_mut().unwrap().as_ptr().addr() % 256, 0);
        }
        let pool = BufferPool::<Wide>::new(3, device, 5).unwrap();
        for mut buffer in [(); 5].map(|()| pool.try_acquire().unwrap()) {
            assert_eq!(buffer.device_ptr().addr() % 1024, 0);
            assert_eq!(buffer.cpu_mut().unwrap().as_ptr().addr() % 1024, 0);
            buffer.fill(Wide([7; 1024]), &stream).unwrap();
        }
    });
}

#[test]
fn what_one_holder_does_to_a_buffer_is_not_seen_in_another() {
    each(|device, stream| {
        let pool = capped(device, 7);
        let mut held: Vec<_> = (0..7).map(|_| pool.acquire().unwrap()).collect();
        for (value, buffer) in (1..).zip(&mut held) {
            buffer.fill(value, &stream).unwrap();
        }
        for (value, buffer) in (1..).zip(&mut held) {
            all(buffer.cpu().unwrap(), value);
            all(&gpu(buffer), value);
        }
    });
}

#[test]
fn a_buffer_comes_with_what_its_last_holder_left_unless_zeroing_was_asked_for() {
    each(|device, stream| {
        for (pool, expected) in [(capped(device, 1), OLD), (zeroing(device, 1), 0)] {
            let mut buffer = pool.acquire().unwrap();
            buffer.fill(OLD, &stream).unwrap();
            drop(buffer);
            let buffer = pool.acquire().unwrap();
            all(buffer.cpu().unwrap(), expected);
            drop(buffer);
            // The device side is zeroed in stream order, whatever comes first.
            let mut buffer = pool.acquire().unwrap();
            buffer.fill_cpu(NEW).unwrap();
            buffer.copy_to_gpu(..1, &stream).unwrap();
            let seen = gpu(&buffer);
            assert_eq!(seen[0], NEW);
            all(&seen[1..], expected);
            drop(buffer);
            // A partial copy leaves the rest of the host side alone, or zeroed.
            let mut buffer = pool.acquire().unwrap();
            buffer.copy_to_cpu(..1, &stream).unwrap();
            let left = if expected == 0 { [0, 0] } else { [NEW, NEW] };
            assert_eq!(buffer.cpu().unwrap()[..2], left);
        }
    });
}

#[test]
fn a_smaller_shape_given_back_leaves_nothing_undefined_behind() {
    type Use = fn(&mut CpuGpuBuffer<u32>, &Stream) -> cpu_gpu_buffer::Result<()>;
    let uses: [Use; 4] = [
        |buffer, stream| buffer.fill_gpu(OLD, stream),
        |buffer, stream| buffer.copy_to_gpu(.., stream),
        |buffer, stream| buffer.copy_to_gpu(..1, stream),
        |buffer, stream| buffer.gpu_on(stream).map(drop),
    ];
    each(|device, stream| {
        for small in uses {
            let pool = capped(device, 1);
            // The device side was never used beyond these words.
            let mut buffer = pool.acquire().unwrap();
            buffer.resize(10).unwrap();
            small(&mut buffer, &stream).unwrap();
            drop(buffer);
            let mut buffer = pool.acquire().unwrap();
            assert_eq!(buffer.shape(), [WORDS]);
            buffer.copy_to_cpu(.., &stream).unwrap();
            all(&buffer.cpu().unwrap()[10..], 0);
        }
    });
}

#[test]
fn whatever_is_done_to_a_buffer_the_next_one_is_as_the_pool_says() {
    each(|device, stream| {
        let pool = capped(device, 2);
        let mut first = pool.acquire().unwrap();
        let mut second = pool.acquire().unwrap();
        let places = addresses(&[first, second].map(|mut buffer| {
            buffer.fill(OLD, &stream).unwrap();
            buffer
        }));
        let check = |what: &str| {
            assert_eq!((pool.available(), pool.total()), (2, 2), "{what}");
            let held = [pool.acquire().unwrap(), pool.acquire().unwrap()];
            for buffer in &held {
                assert_eq!((buffer.shape(), buffer.device()), (&[WORDS][..], device), "{what}");
                assert_eq!(buffer.is_pinned(), device != Device::Cpu, "{what}");
            }
            assert_eq!(addresses(&held), places, "{what}");
        };
        check("given back");

        (first, second) = (pool.acquire().unwrap(), pool.acquire().unwrap());
        mem::swap(&mut first, &mut second);
        drop(first);
        assert_eq!(pool.available(), 1);
        drop(second);
        check("swapped");

        let mut buffer = pool.acquire().unwrap();
        drop(mem::replace(&mut buffer, CpuGpuBuffer::new(3, device).unwrap()));
        assert_eq!(pool.available(), 2);
        buffer.fill(NEW, &stream).unwrap();
        drop(buffer);
        check("replaced by one from elsewhere");

        let mut buffer = pool.acquire().unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.resize(5 * WORDS).unwrap();
        assert_eq!(pool.available(), 2, "what outgrew its slot still has it");
        assert!(!places.contains(&buffer.device_ptr().addr()));
        buffer.fill(NEW, &stream).unwrap();
        drop(buffer);
        check("outgrown");

        let mut buffer = pool.acquire().unwrap();
        buffer.resize([2, 2]).unwrap();
        drop(buffer);
        check("made smaller");

        let mut buffer = pool.acquire().unwrap();
        let refused = buffer.resize([1 << 40, 1 << 40]);
        assert!(matches!(refused, Err(Error::InvalidShape { .. })));
        assert!(places.contains(&buffer.device_ptr().addr()));
        drop(buffer);
        check("not resized");

        let mut buffer = pool.acquire().unwrap();
        let to_stream = stream.clone();
        thread::spawn(move || {
            buffer.fill(NEW, &to_stream).unwrap();
            drop(buffer);
        })
        .join()
        .unwrap();
        check("sent to another thread");

        let buffer = pool.acquire().unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let mut buffer = buffer;
            buffer.copy_to_gpu(.., &stream).unwrap();
            panic!("while holding one");
        }));
        assert!(panicked.is_err());
        check("panicked");
    });
}

#[test]
fn a_forgotten_buffer_costs_its_slot_and_nothing_else() {
    each(|device, stream| {
        let pool = capped(device, 3);
        let mut forgotten = pool.acquire().unwrap();
        let place = forgotten.device_ptr();
        forgotten.fill_cpu(OLD).unwrap();
        forgotten.copy_to_gpu(.., &stream).unwrap();
        common::forget(forgotten);
        for _ in 0..10 {
            let held = [pool.acquire().unwrap(), pool.acquire().unwrap()];
            assert!(held.iter().all(|buffer| buffer.device_ptr() != place));
            assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 3 }));
        }
        assert_eq!((pool.available(), pool.total()), (2, 3));
        stream.synchronize().unwrap();
        all(&device_words(device, place, WORDS), OLD);
    });
}

// ---- in flight ----

/// Runs with a CUDA device.
fn cuda(test: &str, run: impl Fn(Device, Stream)) {
    if let Some((device, _turn)) = common::cuda(test) {
        run(device, Stream::new(device).unwrap());
    }
}

#[test]
fn giving_back_and_acquiring_wait_for_nothing() {
    cuda(test_name!(), |device, stream| {
        let other = Stream::new(device).unwrap();
        for pool in [capped(device, 1), zeroing(device, 1)] {
            let mut buffer = pool.acquire().unwrap();
            buffer.fill(OLD, &stream).unwrap();
            buffer.synchronize().unwrap();
            let gate = Gate::close(&stream);
            buffer.copy_to_gpu(.., &stream).unwrap();
            buffer.copy_to_cpu(.., &stream).unwrap();
            buffer.gpu_on(&stream).unwrap();
            gate.passes(|| {
                drop(buffer);
                let mut buffer = pool.acquire().unwrap();
                assert!(buffer.try_cpu().unwrap().is_none());
                buffer.fill_gpu(NEW, &other).unwrap();
                drop(buffer);
                drop(pool.try_acquire().unwrap());
                assert_eq!(pool.available(), 1);
            });
            assert_eq!(pool.stats().in_flight, 2);
        }
    });
}

#[test]
fn what_is_handed_out_in_flight_is_guarded_by_its_own_records() {
    cuda(test_name!(), |device, stream| {
        let other = Stream::new(device).unwrap();
        let pool = capped(device, 1);
        // An upload of the last holder's.
        let mut buffer = pool.acquire().unwrap();
        buffer.fill(OLD, &stream).unwrap();
        buffer.synchronize().unwrap();
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        drop(buffer);
        let mut buffer = pool.acquire().unwrap();
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        all(&gpu(&buffer), OLD);
        // A download of the last holder's.
        let gate = Gate::close(&stream);
        buffer.copy_to_cpu(.., &stream).unwrap();
        drop(buffer);
        let buffer = pool.acquire().unwrap();
        all(&gate.waits(|| buffer.cpu().unwrap().to_vec()), OLD);
        drop(buffer);
        // A kernel of the last holder's.
        let mut buffer = pool.acquire().unwrap();
        let gate = Gate::close(&stream);
        let view = buffer.gpu_on(&stream).unwrap();
        common::store(view.as_mut_ptr(), view.len(), NEW, &stream);
        drop(buffer);
        let mut buffer = pool.acquire().unwrap();
        buffer.fill_gpu(OLD, &other).unwrap();
        gate.open();
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn a_zeroed_host_side_is_zeroed_after_the_transfers_of_its_last_holder() {
    let test = test_name!();
    type Look = fn(&mut CpuGpuBuffer<u32>, &Stream) -> Vec<u32>;
    let looks: [Look; 7] = [
        |buffer, _| buffer.cpu().unwrap().to_vec(),
        |buffer, _| buffer.cpu_mut().unwrap().to_vec(),
        |buffer, other| {
            buffer.copy_to_gpu(.., other).unwrap();
            gpu(buffer)
        },
        |buffer, other| {
            buffer.fill_gpu(NEW, other).unwrap();
            buffer.copy_to_cpu(..1, other).unwrap();
            let mut seen = buffer.cpu().unwrap().to_vec();
            assert_eq!(mem::take(&mut seen[0]), NEW);
            seen
        },
        |buffer, other| {
            let theirs = common::Foreign::new(WORDS, 9);
            // SAFETY: as many words, which nothing else uses.
            unsafe { buffer.copy_to_device_ptr(.., theirs.as_ptr(), other) }.unwrap();
            other.synchronize().unwrap();
            theirs.words()
        },
        |buffer, other| {
            let theirs = common::Foreign::new(WORDS, 9);
            // SAFETY: as above.
            unsafe { buffer.copy_from_device_ptr(..1, theirs.as_ptr(), other) }.unwrap();
            let mut seen = buffer.cpu().unwrap().to_vec();
            assert_eq!(mem::take(&mut seen[0]), 0x0909_0909);
            seen
        },
        |buffer, _| {
            while buffer.try_cpu().unwrap().is_none() {
                thread::yield_now();
            }
            buffer.try_cpu().unwrap().unwrap().to_vec()
        },
    ];
    cuda(test, |device, stream| {
        let other = Stream::new(device).unwrap();
        let pool = zeroing(device, 1);
        for look in looks {
            // Uploaded to memory of the test's own, since the pool's device side is zeroed, too.
            let theirs = common::Foreign::new(WORDS, 9);
            let mut buffer = pool.acquire().unwrap();
            buffer.fill_cpu(OLD).unwrap();
            let gate = Gate::close(&stream);
            // SAFETY: as many words, which nothing else uses.
            unsafe { buffer.copy_to_device_ptr(.., theirs.as_ptr(), &stream) }.unwrap();
            drop(buffer);
            let mut buffer = pool.acquire().unwrap();
            all(&gate.waits(|| look(&mut buffer, &other)), 0);
            stream.synchronize().unwrap();
            all(&theirs.words(), OLD);
        }
    });
}

#[test]
fn a_host_side_that_is_still_to_be_zeroed_is_not_to_be_had_by_trying_while_it_is_uploaded() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let pool = zeroing(device, 1);
        let mut buffer = pool.acquire().unwrap();
        buffer.fill_cpu(OLD).unwrap();
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        drop(buffer);
        let mut buffer = pool.acquire().unwrap();
        gate.passes(|| {
            assert!(buffer.try_cpu().unwrap().is_none());
            assert!(buffer.try_cpu_mut().unwrap().is_none());
        });
        buffer.synchronize().unwrap();
        all(buffer.try_cpu().unwrap().unwrap(), 0);
    });
}

/// For ThreadSanitizer, mostly.
#[test]
fn threads_that_look_at_once_at_a_host_side_to_be_zeroed_see_zeroes() {
    each(|device, _| {
        let pool = zeroing(device, 1);
        for _ in 0..20 {
            pool.acquire().unwrap().fill_cpu(OLD).unwrap();
            let buffer = pool.acquire().unwrap();
            on_threads(3, |_| all(buffer.cpu().unwrap(), 0));
        }
    });
}

#[test]
fn the_next_holder_waits_for_nothing_that_the_last_one_sent_after_giving_back() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let other = Stream::new(device).unwrap();
        let pool = capped(device, 1);
        let mut buffer = pool.acquire().unwrap();
        buffer.gpu_on(&stream).unwrap();
        drop(buffer);
        stream.synchronize().unwrap();
        let gate = Gate::close(&stream);
        let mut buffer = pool.acquire().unwrap();
        gate.passes(|| {
            buffer.copy_to_gpu(.., &other).unwrap();
            buffer.synchronize().unwrap();
        });
    });
}

#[test]
fn the_next_holder_has_nothing_to_do_with_a_capture_of_the_last_ones() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let other = Stream::new(device).unwrap();
        let pool = capped(device, 1);
        let mut buffer = pool.acquire().unwrap();
        buffer.gpu_on(&stream).unwrap();
        drop(buffer);
        stream.synchronize().unwrap();
        common::begin_capture(&stream);
        let mut buffer = pool.acquire().unwrap();
        buffer.copy_to_gpu(.., &other).unwrap();
        buffer.resize(2 * WORDS).unwrap();
        drop((buffer, pool));
        common::end_capture(&stream);
    });
}

#[test]
fn a_buffer_given_back_while_its_stream_is_captured_is_passed_over() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let other = Stream::new(device).unwrap();
        for buffers in [2, 8, 100] {
            let pool = capped(device, buffers);
            let mut buffer = pool.acquire().unwrap();
            buffer.gpu_on(&stream).unwrap();
            common::begin_capture(&stream);
            drop(buffer);
            for _ in 0..2 * buffers {
                pool.acquire().unwrap().copy_to_gpu(.., &other).unwrap();
                other.synchronize().unwrap();
            }
            common::end_capture(&stream);
            // Afterwards it is a buffer like the others.
            let mut all: Vec<_> = (0..buffers).map(|_| pool.acquire().unwrap()).collect();
            all.iter_mut().for_each(|buffer| buffer.fill(NEW, &other).unwrap());
        }
    });
}

#[test]
fn a_stream_that_was_adopted_may_go_when_the_last_buffer_used_on_it_was_given_back() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let pool = capped(device, 1);
        let mut raw = std::ptr::null_mut();
        common::use_first_device();
        // SAFETY: a valid place.
        let status = unsafe { sys::cudaStreamCreateWithFlags(&mut raw, 1) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        // SAFETY: it is destroyed when neither handle nor buffer is left.
        let adopted = unsafe { Stream::from_raw(raw, device, None) }.unwrap();
        let mut buffer = pool.acquire().unwrap();
        buffer.gpu_on(&adopted).unwrap();
        drop((buffer, adopted));
        // SAFETY: no handle is left.
        assert_eq!(unsafe { sys::cudaStreamDestroy(raw) }, sys::cudaError::cudaSuccess);
        let mut buffer = pool.acquire().unwrap();
        buffer.fill(NEW, &stream).unwrap();
        all(&gpu(&buffer), NEW);
    });
}

#[test]
fn a_buffer_that_is_known_ready_is_preferred() {
    cuda(test_name!(), |device, stream| {
        for buffers in [2, 4, 64, 100] {
            for upload in [true, false] {
                let pool = capped(device, buffers);
                let gate = Gate::close(&stream);
                let mut busy = pool.acquire().unwrap();
                match upload {
                    true => busy.copy_to_gpu(.., &stream).unwrap(),
                    false => busy.copy_to_cpu(.., &stream).unwrap(),
                }
                drop(busy);
                for _ in 0..2 * buffers {
                    let mut buffer = pool.acquire().unwrap();
                    assert!(buffer.try_cpu_mut().unwrap().is_some());
                }
                assert_eq!(pool.stats().in_flight, 0);
                gate.open();
            }
        }
    });
}

#[test]
fn a_loop_that_only_uploads_is_never_handed_the_newest_transfer() {
    cuda(test_name!(), |device, stream| {
        for buffers in [2, 3, 4, 16, 64, 100] {
            let pool = capped(device, buffers);
            let gate = Gate::close(&stream);
            let (mut newest, mut used) = (std::ptr::null_mut(), BTreeSet::new());
            for _ in 0..4 * buffers {
                let mut buffer = pool.acquire().unwrap();
                assert_ne!(buffer.device_ptr(), newest, "{buffers} buffers");
                newest = buffer.device_ptr();
                used.insert(newest);
                buffer.copy_to_gpu(.., &stream).unwrap();
            }
            assert_eq!(used.len(), buffers, "some were never handed out");
            let settled = pool.stats().in_flight;
            assert!(pool.total() == buffers && settled >= 3 * buffers);
            gate.open();
            stream.synchronize().unwrap();
            // Now the watermark shows all of them idle.
            drop(pool.acquire().unwrap());
            assert_eq!(pool.stats().in_flight, settled);
        }
    });
}

#[test]
fn acquire_learns_from_the_driver_what_no_wait_has_told() {
    cuda(test_name!(), |device, stream| {
        for upload in [true, false] {
            let pool = capped(device, 1);
            let mut buffer = pool.acquire().unwrap();
            match upload {
                true => buffer.copy_to_gpu(.., &stream).unwrap(),
                false => buffer.copy_to_cpu(.., &stream).unwrap(),
            }
            drop(buffer);
            // By a way that tells the stream's watermark nothing.
            // SAFETY: no arguments.
            let status = unsafe { sys::cudaDeviceSynchronize() };
            assert_eq!(status, sys::cudaError::cudaSuccess);
            drop(pool.try_acquire().unwrap());
            assert_eq!(pool.stats().in_flight, 1, "try_acquire asked the driver");
            drop(pool.acquire().unwrap());
            assert_eq!(pool.stats().in_flight, 1, "acquire did not ask the driver");
        }
    });
}

#[test]
#[cfg(target_os = "linux")]
fn acquire_asks_the_driver_once_at_most_and_try_acquire_never() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "counting calls needs the simulated runtime");
    }
    cuda(test, |device, stream| {
        let pool = capped(device, 40);
        let gate = Gate::close(&stream);
        // Until none of them is idle any more.
        for _ in 0..4 * 40 {
            pool.acquire().unwrap().copy_to_gpu(.., &stream).unwrap();
        }
        common::sim::reset();
        for _ in 0..100 {
            drop(pool.try_acquire().unwrap());
        }
        assert_eq!(common::sim::calls(), 0);
        for asked in 1..100 {
            drop(pool.acquire().unwrap());
            assert_eq!(common::sim::calls_of(c"cuEventQuery"), asked);
        }
        gate.open();
        stream.synchronize().unwrap();
        common::sim::reset();
        for _ in 0..100 {
            drop(pool.acquire().unwrap());
        }
        assert_eq!(common::sim::calls(), 0);
    });
}

#[test]
#[cfg(target_os = "linux")]
fn an_error_of_the_driver_that_acquire_asks_is_its_answer_and_loses_nothing() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    cuda(test, |device, stream| {
        let pool = capped(device, 2);
        for mut buffer in [pool.acquire().unwrap(), pool.acquire().unwrap()] {
            buffer.copy_to_gpu(.., &stream).unwrap();
        }
        common::sim::reset();
        common::sim::fail_function(c"cuEventQuery", 999);
        for _ in 0..5 {
            let code = sys::cudaError(999);
            let error = Error::Cuda { code, call: "cuEventQuery" };
            assert_eq!(pool.acquire().err(), Some(error));
            assert_eq!(pool.available(), 2);
        }
        common::sim::heal();
        drop([pool.acquire().unwrap(), pool.acquire().unwrap()]);
    });
}

// ---- growth ----

#[test]
fn growing_waits_for_nothing_that_is_queued() {
    cuda(test_name!(), |device, stream| {
        let pool = BufferPool::<u8>::new(1 << 20, device, 1).unwrap();
        let mut held = pool.acquire().unwrap();
        let gate = Gate::close(&stream);
        held.copy_to_gpu(.., &stream).unwrap();
        let other = gate.passes(|| pool.acquire().unwrap());
        assert_eq!(pool.total(), 2);
        drop(other);
    });
}

#[test]
#[cfg(target_os = "linux")]
fn a_pool_that_grows_by_one_again_and_again_goes_on_growing() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "memory runs out where the simulated runtime says");
    }
    cuda(test, |device, _| {
        const BYTES: usize = 1 << 16;
        drop(CpuGpuBuffer::<u8>::new(1, device).unwrap());
        let free = device.memory().unwrap();
        let used = free.total - free.free;
        let pool = BufferPool::<u8>::new(BYTES, device, 1).unwrap();
        let mut held = vec![pool.acquire().unwrap()];
        while held.len() < 100 {
            common::sim::limit_device(used + (held.len() + 1) * BYTES);
            held.push(pool.acquire().unwrap());
            assert_eq!(pool.total(), held.len());
        }
        common::sim::limit_device(free.total);
        held.push(pool.acquire().unwrap());
        assert_eq!(pool.total(), 200);
    });
}

#[test]
fn a_pool_of_large_buffers_grows_by_16_mb_or_by_the_number_that_its_options_say() {
    each(|device, _stream| {
        // 33 buffers of 1.1 MB, and one more.
        let pool = BufferPool::<u8>::new(1_100_000, device, 33).unwrap();
        let _held: Vec<_> = (0..34).map(|_| pool.acquire().unwrap()).collect();
        assert_eq!(pool.total(), 33 + 15);
        // Tiny ones take 256 bytes each.
        let pool = BufferPool::<u8>::new(1, device, 100_000).unwrap();
        let _held: Vec<_> = (0..100_001).map(|_| pool.acquire().unwrap()).collect();
        assert_eq!(pool.total(), 100_000 + (16 << 20) / 256);

        for by in [1, 3] {
            let growth = PoolGrowth::By(NonZeroUsize::new(by).unwrap());
            let options = PoolOptions { growth, max_buffers: Some(7), ..Default::default() };
            let pool = BufferPool::<u8>::with_options(100, device, 2, options).unwrap();
            let _held: Vec<_> = (0..3).map(|_| pool.acquire().unwrap()).collect();
            assert_eq!(pool.total(), 2 + by);
            let _others: Vec<_> = (0..4).map(|_| pool.acquire().unwrap()).collect();
            assert_eq!(pool.total(), 7);
            assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 7 }));
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_pool_that_falls_back_counts_its_pinned_and_its_pageable_buffers() {
    let test = test_name!();
    let Some((device, limits)) = common::sim::Limits::of(test) else { return };
    const BYTES: usize = 2 << 20;
    let pool = BufferPool::<u8>::new(BYTES, device, 2).unwrap();
    let counts = || (pool.stats().pinned, pool.stats().pageable);
    assert_eq!(counts(), (2, 0));
    limits.pin(0);
    let held: Vec<_> = (0..3).map(|_| pool.acquire().unwrap()).collect();
    assert_eq!(counts(), (2, 2));
    let pageable: Vec<_> = held.iter().filter(|buffer| !buffer.is_pinned()).collect();
    assert_eq!(pageable.len(), 1);
    let reason = pageable[0].pinning_error().unwrap().to_string();
    assert!(reason.contains("cudaHostAlloc"), "{reason}");
    let cpu = BufferPool::<u8>::new(BYTES, Device::Cpu, 2).unwrap();
    assert_eq!((cpu.stats().pinned, cpu.stats().pageable), (0, 2));
}

#[test]
fn a_pool_grows_by_doubling_up_to_its_cap_and_then_says_so() {
    each(|device, _| {
        let options = PoolOptions { max_buffers: Some(11), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 2, options).unwrap();
        let mut held = Vec::new();
        for count in 1..=11 {
            held.push(pool.acquire().unwrap());
            let total = [2, 4, 8, 11].into_iter().find(|total| *total >= count).unwrap();
            assert_eq!((pool.total(), pool.available()), (total, total - count));
        }
        assert_eq!(addresses(&held).len(), 11);
        let exhausted = Error::PoolExhausted { max_buffers: 11 };
        assert!(exhausted.to_string().contains("11 buffers"));
        assert_eq!(pool.acquire().err(), Some(exhausted));
        assert!(pool.try_acquire().is_none());
        held.pop();
        held.push(pool.try_acquire().unwrap());
        let stats = pool.stats();
        assert_eq!((stats.high_water, stats.growths, stats.total, stats.available), (11, 3, 11, 0));
        drop(held);
        assert_eq!((pool.available(), pool.total()), (11, 11));
    });
}

#[test]
fn a_pool_of_no_buffers_begins_with_its_first() {
    each(|device, stream| {
        let pool = BufferPool::<u32>::new(WORDS, device, 0).unwrap();
        assert_eq!((pool.available(), pool.total()), (0, 0));
        assert!(pool.try_acquire().is_none());
        let mut held = Vec::new();
        for total in [1, 2, 4, 4, 8] {
            let mut buffer = pool.acquire().unwrap();
            buffer.fill(NEW, &stream).unwrap();
            held.push(buffer);
            assert_eq!(pool.total(), total);
        }
        assert_eq!(pool.stats().growths, 4);
        let options = PoolOptions { max_buffers: Some(0), ..Default::default() };
        let none = BufferPool::<u32>::with_options(WORDS, device, 0, options).unwrap();
        assert_eq!(none.acquire().err(), Some(Error::PoolExhausted { max_buffers: 0 }));
        assert!(none.try_acquire().is_none());
    });
}

#[test]
fn shapes_without_bytes_have_buffers_too() {
    each(|device, stream| {
        for shape in [Shape::from([0, 4]), Shape::from([3, 0])] {
            let pool = BufferPool::<u64>::new(shape, device, 2).unwrap();
            let mut held: Vec<_> = (0..5).map(|_| pool.acquire().unwrap()).collect();
            for buffer in &mut held {
                assert_eq!(buffer.shape(), shape.dims());
                assert!(buffer.cpu_mut().unwrap().is_empty() && buffer.device_ptr().is_null());
                buffer.copy_to_gpu(.., &stream).unwrap();
                buffer.fill(1, &stream).unwrap();
            }
            held[0].resize([2, 2]).unwrap();
            held[0].fill(3, &stream).unwrap();
            assert_eq!(held[0].cpu().unwrap(), [3; 4]);
            drop(held);
            assert_eq!((pool.available(), pool.total()), (8, 8));
        }
    });
}

#[test]
fn bad_pools_are_refused() {
    each(|device, _| {
        let options = PoolOptions { max_buffers: Some(3), ..Default::default() };
        let made = BufferPool::<u8>::with_options(9, device, 4, options);
        assert_eq!(made.err(), Some(Error::PoolExhausted { max_buffers: 3 }));
        for (shape, buffers) in [
            (Shape::from([0; 9]), 1),
            (Shape::from([1 << 40, 1 << 40]), 0),
            // Together.
            (Shape::from(1usize << 40), 1 << 30),
            (Shape::from(1usize << 20), usize::MAX),
            // More than can be told apart.
            (Shape::from(0), 1 << 32),
            (Shape::from(0), usize::MAX),
        ] {
            let made = BufferPool::<u8>::new(shape, device, buffers);
            assert!(matches!(made, Err(Error::InvalidShape { .. })), "{shape:?}: {made:?}");
        }
    });
    for buffers in [0, 1] {
        let made = BufferPool::<u8>::new(1, Device::Cuda(99), buffers);
        assert!(matches!(made, Err(Error::Unavailable { .. })), "{made:?}");
    }
    let options = PoolOptions { pinning: Pinning::Required, ..Default::default() };
    let made = BufferPool::<u8>::with_options(8, Device::Cpu, 2, options);
    assert!(matches!(made, Err(Error::PinningUnavailable { .. })), "{made:?}");
}

#[test]
fn threads_that_find_the_pool_empty_at_once_grow_it_once() {
    each(|device, _| {
        for _ in 0..20 {
            let pool = capped(device, 4);
            let grown = BufferPool::<u32>::new(WORDS, device, 8).unwrap();
            let all: Vec<_> = (0..8).map(|_| grown.acquire().unwrap()).collect();
            let start = Barrier::new(8);
            on_threads(8, |_| {
                start.wait();
                let held = grown.acquire().unwrap();
                // All of them hold one before the first gives it back.
                start.wait();
                drop(held);
                if let Ok(held) = pool.acquire() {
                    drop(held);
                }
            });
            drop(all);
            assert_eq!((grown.total(), grown.available(), grown.stats().growths), (16, 16, 1));
            assert_eq!((pool.total(), pool.available()), (4, 4));
        }
    });
}

#[test]
#[cfg(target_os = "linux")]
fn a_failing_growth_takes_what_there_is_loses_nothing_and_passes() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "memory runs out where the simulated runtime says");
    }
    cuda(test, |device, stream| {
        const BYTES: usize = 1 << 20;
        drop(CpuGpuBuffer::<u8>::new(1, device).unwrap());
        let before = common::sim::live();
        let free = device.memory().unwrap();
        let used = free.total - free.free;
        // Room for seven buffers, of which four are there from the beginning.
        common::sim::limit_device(used + 7 * BYTES);
        let pool = BufferPool::<u8>::new(BYTES, device, 4).unwrap();
        let mut held: Vec<_> = (0..4).map(|_| pool.acquire().unwrap()).collect();
        // Not four, then, but two, and then one.
        for total in [6, 6, 7] {
            held.push(pool.acquire().unwrap());
            assert_eq!(pool.total(), total);
        }
        let live = common::sim::live();
        let full = Error::OutOfMemory { side: cpu_gpu_buffer::Side::Device, bytes: BYTES, device };
        for _ in 0..3 {
            assert_eq!(pool.acquire().err(), Some(full.clone()));
            assert_eq!((pool.total(), pool.available()), (7, 0));
        }
        assert_eq!(common::sim::live(), live, "something is left of what failed");
        common::sim::limit_device(free.total);
        held.push(pool.acquire().unwrap());
        assert_eq!(pool.total(), 14);
        for buffer in &mut held {
            buffer.fill(3, &stream).unwrap();
        }
        drop((held, pool));
        assert_eq!(common::sim::live(), before);
    });
}

// ---- memory ----

/// The owner of a stream, which does something when it is let go.
struct Owner<F: Fn()>(F);

impl<F: Fn()> Drop for Owner<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A handle to the stream whose owner does this.
fn owned_by(stream: &Stream, let_go: impl Fn() + Send + Sync + 'static) -> Stream {
    // SAFETY: the tests keep the stream.
    unsafe { Stream::from_raw(stream.as_raw(), stream.device(), Some(Arc::new(Owner(let_go)))) }
        .unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn an_owner_that_panics_when_a_pool_goes_leaves_nothing_behind() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "counting allocations needs the simulated runtime");
    }
    cuda(test, |device, stream| {
        common::make_what_stays(device);
        let before = common::sim::live();
        let pool = BufferPool::<u32>::new(WORDS, device, 1).unwrap();
        let mut held: Vec<_> = (0..4).map(|_| pool.acquire().unwrap()).collect();
        let adopted = owned_by(&stream, || panic!("let go"));
        held[0].copy_to_gpu(.., &adopted).unwrap();
        drop(adopted);
        // One that outlives the pool, of the last slab.
        let last = held.pop();
        drop(held);
        assert!(catch_unwind(AssertUnwindSafe(|| drop(pool))).is_err());
        drop(last);
        assert_eq!(common::sim::live(), before);
    });
}

#[test]
fn an_owner_that_uses_the_pool_when_it_is_let_go_holds_nothing_up() {
    let test = test_name!();
    cuda(test, |device, stream| {
        let other = Stream::new(device).unwrap();
        let pool = capped(device, 4);
        let again = pool.clone();
        let used = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&used);
        let adopted = owned_by(&stream, move || {
            let held: Vec<_> = (0..8).map_while(|_| again.acquire().ok()).collect();
            counted.fetch_add(held.len(), Ordering::Relaxed);
        });
        for _ in 0..8 {
            let mut buffer = pool.acquire().unwrap();
            buffer.copy_to_gpu(.., &adopted).unwrap();
            buffer.gpu_on(&adopted).unwrap();
        }
        drop(adopted);
        // Until no buffer remembers the stream.
        for _ in 0..12 {
            let mut buffer = pool.acquire().unwrap();
            buffer.copy_to_gpu(.., &other).unwrap();
            buffer.copy_to_cpu(.., &other).unwrap();
            buffer.gpu_on(&other).unwrap();
        }
        assert!(used.load(Ordering::Relaxed) > 0);
        assert_eq!(pool.available(), 4);
    });
}

#[test]
#[cfg(target_os = "linux")]
fn all_buffers_of_a_pool_cost_one_allocation_of_either_side() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "counting allocations needs the simulated runtime");
    }
    cuda(test, |device, _| {
        let [gpu, pinned, ..] = common::sim::live();
        let pool = BufferPool::<u8>::new(4096, device, 4096).unwrap();
        assert_eq!(common::sim::live()[..2], [gpu + 1, pinned + 1]);
        let all: Vec<_> = (0..4096).map(|_| pool.try_acquire().unwrap()).collect();
        drop(pool);
        assert_eq!(common::sim::live()[..2], [gpu + 1, pinned + 1]);
        drop(all);
        assert_eq!(common::sim::live()[..2], [gpu, pinned]);
    });
}

#[test]
#[cfg(target_os = "linux")]
fn a_slab_lives_exactly_as_long_as_the_pool_or_the_last_buffer_in_it() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "counting allocations needs the simulated runtime");
    }
    cuda(test, |device, stream| {
        common::make_what_stays(device);
        let before = common::sim::live()[0];
        let slabs = || common::sim::live()[0] - before;
        let pool = BufferPool::<u32>::new(WORDS, device, 2).unwrap();
        let mut held: Vec<_> = (0..5).map(|_| pool.acquire().unwrap()).collect();
        let same = pool.clone();
        assert_eq!(slabs(), 3);
        drop(pool);
        for buffer in &mut held {
            buffer.copy_to_gpu(.., &stream).unwrap();
        }
        // Of the first slab; the last buffer is of the third.
        drop(held.remove(0));
        drop(same);
        assert_eq!(slabs(), 3);
        drop(held.remove(0));
        assert_eq!(slabs(), 2, "the first slab is empty and still there");
        let last = held.pop().unwrap();
        thread::spawn(move || drop(held)).join().unwrap();
        assert_eq!(slabs(), 1, "the second slab is empty and still there");
        // What is left works without the pool.
        let mut last = last;
        last.fill(NEW, &stream).unwrap();
        all(&gpu(&last), NEW);
        drop(last);
        assert_eq!(slabs(), 0);
    });
}

#[test]
fn a_pool_that_goes_waits_for_what_its_buffers_left_queued() {
    cuda(test_name!(), |device, stream| {
        let theirs = common::Foreign::new(WORDS, 9);
        let pool = capped(device, 3);
        let mut buffer = pool.acquire().unwrap();
        buffer.fill_cpu(OLD).unwrap();
        let gate = Gate::close(&stream);
        // SAFETY: as many words, which nothing else uses.
        unsafe { buffer.copy_to_device_ptr(.., theirs.as_ptr(), &stream) }.unwrap();
        let kept = pool.acquire().unwrap();
        drop(buffer);
        gate.passes(|| drop(pool));
        let gate = {
            gate.open();
            stream.synchronize().unwrap();
            all(&theirs.words(), OLD);
            Gate::close(&stream)
        };
        let mut kept = kept;
        kept.fill_cpu(NEW).unwrap();
        // SAFETY: as above.
        unsafe { kept.copy_to_device_ptr(.., theirs.as_ptr(), &stream) }.unwrap();
        gate.waits(|| drop(kept));
        stream.synchronize().unwrap();
        all(&theirs.words(), NEW);
    });
}

// ---- many threads ----

/// Threads that take, mark, use and give back, for a while. Each mark is one of a kind: where two threads have the
/// same buffer, one finds the other's.
fn churn(pool: &BufferPool<u32>, threads: usize, hold: usize, rounds: usize) {
    let next = AtomicUsize::new(1);
    on_threads(threads, |number| {
        let stream = Stream::new(pool.device()).unwrap();
        for round in 0..rounds {
            let mut held = Vec::new();
            for _ in 0..1 + (round + number) % hold {
                // At most as many as there are: this never fails.
                let mut buffer = pool.acquire().unwrap();
                let mark = next.fetch_add(1, Ordering::Relaxed) as u32;
                buffer.cpu_mut().unwrap().fill(mark);
                buffer.copy_to_gpu(.., &stream).unwrap();
                held.push((buffer, mark));
            }
            thread::yield_now();
            for (buffer, mark) in &mut held {
                all(buffer.cpu().unwrap(), *mark);
                if round % 2 == 0 {
                    buffer.fill_cpu(0).unwrap();
                    buffer.copy_to_cpu(.., &stream).unwrap();
                    all(buffer.cpu().unwrap(), *mark);
                }
            }
            // The others go back with a copy queued.
        }
    });
}

#[test]
fn no_buffer_ever_has_two_holders() {
    each(|device, _| {
        for (threads, hold, buffers) in [(4, 4, 16), (16, 4, 64), (16, 1, 16), (3, 2, 7)] {
            let pool = capped(device, buffers);
            churn(&pool, threads, hold, 60);
            let stats = pool.stats();
            assert_eq!((stats.available, stats.total, stats.growths), (buffers, buffers, 0));
            assert!((1..=buffers).contains(&stats.high_water), "{stats:?}");
        }
        // Growing at the same time.
        let options = PoolOptions { max_buffers: Some(40), ..Default::default() };
        let pool = BufferPool::with_options(WORDS, device, 1, options).unwrap();
        churn(&pool, 10, 4, 60);
        assert!(pool.total() <= 40);
        assert_eq!(pool.available(), pool.total());
    });
}

#[test]
fn as_many_buffers_as_are_held_are_enough() {
    each(|device, _| {
        for (threads, hold) in [(2, 1), (4, 1), (16, 1), (8, 4), (16, 4)] {
            let pool = BufferPool::<u8>::new(16, device, threads * hold).unwrap();
            on_threads(threads, |_| {
                for round in 0..2000 {
                    let held: Vec<_> = (0..hold).map(|_| pool.acquire().unwrap()).collect();
                    if round % 64 == 0 {
                        thread::yield_now();
                    }
                    drop(held);
                }
            });
            let stats = pool.stats();
            assert_eq!(
                (stats.growths, stats.total, stats.available),
                (0, threads * hold, threads * hold)
            );
        }
    });
}

#[test]
fn pool_and_buffers_may_go_in_any_order_on_any_thread() {
    each(|device, stream| {
        for order in 0..6 {
            let pool = BufferPool::<u32>::new(WORDS, device, 1).unwrap();
            let mut held: Vec<_> = (0..4).map(|_| pool.acquire().unwrap()).collect();
            for buffer in &mut held {
                buffer.fill(NEW, &stream).unwrap();
                buffer.copy_to_gpu(.., &stream).unwrap();
            }
            held.rotate_left(order % 4);
            let (first, second) = (held.split_off(2), held);
            let pool = if order < 3 {
                drop(pool);
                None
            } else {
                Some(pool)
            };
            let threads = [first, second].map(|held| thread::spawn(move || drop(held)));
            drop(pool);
            for thread in threads {
                thread.join().unwrap();
            }
        }
    });
}

// ---- figures ----

#[test]
fn the_high_water_mark_is_the_most_that_was_out_at_once() {
    each(|device, stream| {
        let pool = BufferPool::<u32>::new(WORDS, device, 64).unwrap();
        let mut most = 0;
        for count in [1, 3, 2, 7, 5, 7, 20, 1, 40, 64, 2, 70] {
            let mut held: Vec<_> = (0..count).map(|_| pool.acquire().unwrap()).collect();
            // Some of them in flight, so that the next ones come from elsewhere.
            for buffer in held.iter_mut().step_by(2) {
                buffer.copy_to_gpu(.., &stream).unwrap();
            }
            // Given back on another thread.
            thread::spawn(move || drop(held)).join().unwrap();
            most = most.max(count);
            assert_eq!(pool.stats().high_water, most);
        }
    });
}

// ---- fork ----

#[test]
#[cfg(unix)]
fn a_forked_child_gets_no_buffers_from_a_pool_of_its_parents() {
    let test = test_name!();
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let device = Device::auto();
    let stream = Stream::new(device).unwrap();
    let pool = BufferPool::<u32>::new(WORDS, device, 2).unwrap();
    let mut held = pool.acquire().unwrap();
    held.fill(NEW, &stream).unwrap();
    held.copy_to_gpu(.., &stream).unwrap();
    // SAFETY: the child calls nothing that another thread of the parent could have left half done, but the
    // allocator, which takes care of itself.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if device != Device::Cpu {
                assert_eq!(pool.acquire().err(), Some(Error::Forked));
                assert!(pool.try_acquire().is_none());
                assert_eq!(held.cpu().err(), Some(Error::Forked));
                let made = BufferPool::<u32>::new(1, device, 1);
                assert_eq!(made.err(), Some(Error::Forked));
            }
            drop(held);
            drop(pool);
            let pool = BufferPool::<u32>::new(9, Device::Cpu, 1).unwrap();
            drop([pool.acquire().unwrap(), pool.acquire().unwrap()]);
        }));
        // SAFETY: ends the child at once, without the parent's exit handlers.
        unsafe { libc::_exit(outcome.is_err().into()) };
    }
    let mut status = -1;
    // SAFETY: the child is ours, the place valid.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
    drop(held);
    let buffer = pool.acquire().unwrap();
    assert_eq!(buffer.shape(), [WORDS]);
}
