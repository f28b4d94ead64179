//! No safe program can race with a transfer.
//!
//! A gate on the stream holds each race open. An action that fails to wait does its harm before the
//! transfer begins.

mod common;

use std::mem;
use std::thread;

use common::{Foreign, Gate, all, device_words, test_name};
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;

/// One of each kind of pinned memory. On hardware the copy of the longer one takes a while; the simulation copies late
/// whatever the size.
fn sizes() -> [usize; 2] {
    let long = if common::is_simulated() { 4 << 20 } else { 64 << 20 };
    [(64 << 10) / 4, long / 4]
}

/// A buffer whose host side is `host` and whose device side is `gpu`, and a stream to hold.
fn buffer(words: usize, device: Device, host: u32, gpu: u32) -> (CpuGpuBuffer<u32>, Stream) {
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::new(words, device).unwrap();
    buffer.fill_gpu(gpu, &stream).unwrap();
    buffer.fill_cpu(host).unwrap();
    stream.synchronize().unwrap();
    buffer.synchronize().unwrap();
    (buffer, stream)
}

fn gpu(buffer: &CpuGpuBuffer<u32>) -> Vec<u32> {
    buffer.synchronize().unwrap();
    device_words(buffer.device(), buffer.device_ptr(), buffer.numel())
}

/// For each size, with a CUDA device.
fn each(test: &str, run: impl Fn(usize, Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    for words in sizes() {
        run(words, device);
    }
}

#[test]
fn writing_the_host_side_waits_for_its_upload() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        all(&gpu(&buffer), OLD);
        all(buffer.cpu().unwrap(), NEW);
    });
}

#[test]
fn writing_the_host_side_waits_for_its_download() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, 0, OLD);
        let gate = Gate::close(&stream);
        buffer.copy_to_cpu(.., &stream).unwrap();
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        stream.synchronize().unwrap();
        all(buffer.cpu().unwrap(), NEW);
    });
}

#[test]
fn reading_the_host_side_waits_for_its_download() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, 0, NEW);
        let gate = Gate::close(&stream);
        buffer.copy_to_cpu(.., &stream).unwrap();
        let seen = gate.waits(|| buffer.cpu().unwrap().to_vec());
        all(&seen, NEW);
    });
}

#[test]
fn reading_the_host_side_does_not_wait_for_its_upload() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        let seen = gate.passes(|| buffer.cpu().unwrap()[words - 1]);
        assert_eq!(seen, OLD);
    });
}

#[test]
fn trying_answers_none_instead_of_waiting() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, NEW);
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.passes(|| {
            assert!(buffer.try_cpu().unwrap().is_some());
            assert!(buffer.try_cpu_mut().unwrap().is_none());
            assert!(!buffer.is_idle().unwrap());
        });
        buffer.synchronize().unwrap();
        assert!(buffer.try_cpu_mut().unwrap().is_some());

        let gate = Gate::close(&stream);
        buffer.copy_to_cpu(.., &stream).unwrap();
        gate.passes(|| {
            assert!(buffer.try_cpu().unwrap().is_none());
            assert!(buffer.try_cpu_mut().unwrap().is_none());
        });
        stream.synchronize().unwrap();
        all(buffer.try_cpu().unwrap().unwrap(), OLD);
        assert!(buffer.is_idle().unwrap());
    });
}

#[test]
fn a_kernel_in_flight_does_not_make_the_host_side_wait() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let view = buffer.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), NEW, &stream);
        gate.passes(|| {
            assert_eq!(buffer.cpu().unwrap()[0], OLD);
            buffer.cpu_mut().unwrap()[0] = NEW;
            buffer.try_cpu_mut().unwrap().unwrap()[1] = NEW;
            assert!(!buffer.is_idle().unwrap());
        });
        all(&gpu(&buffer), NEW);
    });
}

#[test]
fn waiting_for_one_buffer_does_not_wait_for_another() {
    each(test_name!(), |words, device| {
        let (mut held, stream) = buffer(words, device, OLD, 0);
        let (mut free, other) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        held.copy_to_gpu(.., &stream).unwrap();
        gate.passes(|| {
            free.copy_to_gpu(.., &other).unwrap();
            free.cpu_mut().unwrap()[0] = NEW;
            free.synchronize().unwrap();
            other.synchronize().unwrap();
        });
    });
}

#[test]
fn synchronize_waits_for_transfers_fills_and_kernels_of_the_buffer() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        for use_it in [
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| {
                buffer.copy_to_gpu(.., stream).unwrap()
            },
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| {
                buffer.copy_to_cpu(.., stream).unwrap()
            },
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| buffer.fill_gpu(NEW, stream).unwrap(),
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| {
                let view = buffer.gpu_on(stream).unwrap();
                common::store(view.as_mut_ptr(), view.len(), NEW, stream);
            },
        ] {
            let gate = Gate::close(&stream);
            use_it(&mut buffer, &stream);
            let (_, early) =
                gate.during(std::time::Duration::from_millis(50), || buffer.synchronize().unwrap());
            assert!(!early, "it did not wait");
            assert!(buffer.is_idle().unwrap());
        }
    });
}

#[test]
fn filling_waits_for_transfers_of_the_host_side() {
    each(test_name!(), |words, device| {
        // An upload, to memory that the fill does not write again afterwards.
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let foreign = Foreign::new(words, 0);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        // SAFETY: the memory has as many words, and is looked at after the copy.
        unsafe { buffer.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.fill(NEW, &other).unwrap());
        stream.synchronize().unwrap();
        all(&foreign.words(), OLD);
        all(&gpu(&buffer), NEW);

        // A download, which would come down on what the fill wrote.
        let gate = Gate::close(&stream);
        // SAFETY: as above.
        unsafe { buffer.copy_from_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.fill_cpu(7).unwrap());
        stream.synchronize().unwrap();
        all(buffer.cpu().unwrap(), 7);

        let gate = Gate::close(&stream);
        // SAFETY: as above.
        unsafe { buffer.copy_from_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.zero(&other).unwrap());
        stream.synchronize().unwrap();
        all(buffer.cpu().unwrap(), 0);
        all(&gpu(&buffer), 0);
    });
}

#[test]
fn filling_the_device_side_on_another_stream_comes_after_the_upload() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.waits(|| {
            buffer.fill_gpu(NEW, &other).unwrap();
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&buffer), NEW);
    });
}

#[test]
fn an_upload_on_another_stream_comes_after_a_fill_of_the_device_side() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        buffer.fill_gpu(NEW, &stream).unwrap();
        gate.waits(|| {
            buffer.copy_to_gpu(.., &other).unwrap();
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn a_download_on_another_stream_comes_after_the_upload() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, NEW, OLD);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.waits(|| {
            buffer.copy_to_cpu(.., &other).unwrap();
            all(buffer.cpu().unwrap(), NEW);
        });
    });
}

#[test]
fn an_upload_on_another_stream_comes_after_the_download() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let foreign = Foreign::new(words, 0x77);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        // SAFETY: the memory has as many words.
        unsafe { buffer.copy_from_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| {
            buffer.copy_to_gpu(.., &other).unwrap();
            other.synchronize().unwrap();
        });
        all(&gpu(&buffer), 0x7777_7777);
    });
}

#[test]
fn an_upload_on_another_stream_comes_after_a_kernel() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let other = Stream::new(device).unwrap();
        let view = buffer.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), NEW, &stream);
        gate.waits(|| {
            buffer.copy_to_gpu(.., &other).unwrap();
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn a_kernel_on_another_stream_comes_after_the_upload_and_after_a_kernel() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let other = Stream::new(device).unwrap();
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.waits(|| {
            let view = buffer.gpu_on(&other).unwrap();
            common::store(view.as_mut_ptr(), view.len(), NEW, &other);
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&buffer), NEW);

        let view = buffer.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), 5, &stream);
        gate.waits(|| {
            let view = buffer.gpu_on(&other).unwrap();
            common::store(view.as_mut_ptr(), view.len(), 6, &other);
            other.synchronize().unwrap();
        });
        stream.synchronize().unwrap();
        all(&gpu(&buffer), 6);
    });
}

#[test]
fn resizing_in_place_waits_for_transfers_of_the_host_side() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, NEW);
        let foreign = Foreign::new(words, 0);
        let gate = Gate::close(&stream);
        // SAFETY: the memory has as many words.
        unsafe { buffer.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.resize([words / 4, 4]).unwrap());
        stream.synchronize().unwrap();
        all(&foreign.words(), OLD);

        let gate = Gate::close(&stream);
        // SAFETY: as above.
        unsafe { buffer.copy_from_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.resize(words).unwrap());
        stream.synchronize().unwrap();
        all(buffer.cpu().unwrap(), 0);
    });
}

#[test]
fn resizing_in_place_zeroes_the_device_side_after_a_kernel_on_another_stream() {
    let test = test_name!();
    each(test, |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, OLD);
        let other = Stream::new(device).unwrap();
        let view = buffer.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), NEW, &stream);
        let before = buffer.device_ptr();
        gate.waits(|| {
            buffer.resize([words / 2, 2]).unwrap();
            buffer.gpu_on(&other).unwrap();
            other.synchronize().unwrap();
        });
        assert_eq!(buffer.device_ptr(), before);
        all(&gpu(&buffer), 0);
    });
}

#[test]
fn growing_waits_for_everything_in_flight() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let foreign = Foreign::new(words, 0);
        let gate = Gate::close(&stream);
        // SAFETY: the memory has as many words.
        unsafe { buffer.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        gate.waits(|| buffer.resize(words * 2).unwrap());
        stream.synchronize().unwrap();
        all(&foreign.words(), OLD);
        all(buffer.cpu().unwrap(), 0);
        buffer.gpu_on(&stream).unwrap();
        all(&gpu(&buffer), 0);
    });
}

#[test]
fn dropping_waits_for_transfers_and_kernels() {
    each(test_name!(), |words, device| {
        let foreign = Foreign::new(words, 0);

        let (mut uploading, stream) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        // SAFETY: the memory has as many words.
        unsafe { uploading.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        let (_, early) = gate.during(std::time::Duration::from_millis(50), || drop(uploading));
        assert!(!early, "memory was given back that a copy reads");
        stream.synchronize().unwrap();
        all(&foreign.words(), OLD);

        let (mut downloading, stream) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        downloading.copy_to_cpu(.., &stream).unwrap();
        let (_, early) = gate.during(std::time::Duration::from_millis(50), || drop(downloading));
        assert!(!early, "memory was given back that a copy writes");

        let (mut computing, stream) = buffer(words, device, OLD, 0);
        let view = computing.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), NEW, &stream);
        let (_, early) = gate.during(std::time::Duration::from_millis(50), || drop(computing));
        assert!(!early, "memory was given back that a kernel writes");
        stream.synchronize().unwrap();
    });
}

#[test]
fn forgetting_leaves_a_queued_upload_its_bytes() {
    each(test_name!(), |words, device| {
        let (mut forgotten, stream) = buffer(words, device, OLD, 0);
        let address = forgotten.device_ptr();
        let gate = Gate::close(&stream);
        forgotten.copy_to_gpu(.., &stream).unwrap();
        common::forget(forgotten);
        // Whatever memory comes next, it is not the forgotten buffer's.
        let mut next = CpuGpuBuffer::<u32>::new(words, device).unwrap();
        assert_ne!(next.device_ptr(), address);
        gate.passes(|| next.cpu_mut().unwrap().fill(NEW));
        stream.synchronize().unwrap();
        all(&device_words(device, address, words), OLD);
    });
}

#[test]
fn forgetting_leaves_a_queued_download_its_memory() {
    each(test_name!(), |words, device| {
        let (mut forgotten, stream) = buffer(words, device, 0, NEW);
        let gate = Gate::close(&stream);
        forgotten.copy_to_cpu(.., &stream).unwrap();
        common::forget(forgotten);
        let mut next = CpuGpuBuffer::<u32>::new(words, device).unwrap();
        gate.passes(|| next.cpu_mut().unwrap().fill(OLD));
        stream.synchronize().unwrap();
        all(next.cpu().unwrap(), OLD);
    });
}

#[test]
fn moving_swapping_and_sending_a_buffer_takes_its_records_along() {
    each(test_name!(), |words, device| {
        let (mut a, stream) = buffer(words, device, OLD, 0);
        let (mut b, _) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        a.copy_to_gpu(.., &stream).unwrap();
        mem::swap(&mut a, &mut b);
        // The other one is free. Before the gate's patience begins: to fill it may take longer than that.
        a.cpu_mut().unwrap().fill(NEW);
        assert!(b.try_cpu_mut().unwrap().is_none());
        let b = gate.waits(move || {
            let mut moved = Box::new(b);
            let elsewhere = thread::spawn(move || {
                moved.cpu_mut().unwrap().fill(NEW);
                *moved
            });
            elsewhere.join().unwrap()
        });
        all(&gpu(&b), OLD);
        all(b.cpu().unwrap(), NEW);
    });
}

#[test]
fn dropping_the_stream_leaves_the_records_pending() {
    each(test_name!(), |words, device| {
        let (mut buffer, stream) = buffer(words, device, OLD, 0);
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        drop(stream);
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn the_watermark_answers_for_other_buffers_of_the_stream_and_not_for_later_transfers() {
    let test = test_name!();
    each(test, |words, device| {
        let (mut first, stream) = buffer(words, device, OLD, 0);
        let (mut second, _) = buffer(words, device, OLD, 0);
        first.copy_to_gpu(.., &stream).unwrap();
        second.copy_to_gpu(.., &stream).unwrap();
        second.synchronize().unwrap();
        assert!(first.is_idle().unwrap());
        // The watermark is now at the newest ticket, and not a ticket further.
        stream.synchronize().unwrap();
        let gate = Gate::close(&stream);
        first.copy_to_gpu(.., &stream).unwrap();
        second.copy_to_gpu(.., &stream).unwrap();
        gate.passes(|| {
            assert!(first.try_cpu_mut().unwrap().is_none());
            assert!(second.try_cpu_mut().unwrap().is_none());
        });
        stream.synchronize().unwrap();
        assert!(first.try_cpu_mut().unwrap().is_some());
    });
}

#[test]
fn threads_that_share_a_stream_each_wait_for_their_own_upload() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let stream = stream.clone();
            thread::spawn(move || {
                let mut buffer = CpuGpuBuffer::<u32>::new(1024, device).unwrap();
                let mut back = CpuGpuBuffer::<u32>::new(1024, device).unwrap();
                for step in 0..500 {
                    let value = thread * 1000 + step;
                    buffer.cpu_mut().unwrap().fill(value);
                    buffer.copy_to_gpu(.., &stream).unwrap();
                    let from = buffer.device_ptr();
                    // SAFETY: as many words, and read on the stream that wrote them.
                    unsafe { back.copy_from_device_ptr(.., from, &stream) }.unwrap();
                    buffer.cpu_mut().unwrap().fill(!0);
                    all(back.cpu().unwrap(), value);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
#[cfg(target_os = "linux")]
fn a_transfer_that_another_thread_overtakes_is_not_taken_for_finished() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "a call is held back by the simulated runtime alone");
    }
    type Transfer = fn(&mut CpuGpuBuffer<u32>, &Stream) -> cpu_gpu_buffer::Result<()>;
    let transfers: [(&std::ffi::CStr, Transfer); 2] = [
        (c"cuMemcpyHtoDAsync", |buffer, stream| buffer.copy_to_gpu(.., stream)),
        (c"cuMemcpyDtoHAsync", |buffer, stream| buffer.copy_to_cpu(.., stream)),
    ];
    for (call, transfer) in transfers {
        let (mut buffer, stream) = buffer(sizes()[0], device, OLD, OLD);
        let held = common::sim::Held::next(call);
        let gate = thread::scope(|scope| {
            let enqueues = scope.spawn(|| transfer(&mut buffer, &stream).unwrap());
            // The copy is about to be enqueued. Another thread sees everything finished that was submitted so far:
            // ticket and event, had they come before the copy.
            held.wait();
            stream.synchronize().unwrap();
            let gate = Gate::close(&stream);
            drop(held);
            enqueues.join().unwrap();
            gate
        });
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        stream.synchronize().unwrap();
        all(&device_words(device, buffer.device_ptr(), buffer.numel()), OLD);
        all(buffer.cpu().unwrap(), NEW);
    }
}

#[test]
fn memory_whose_use_cannot_be_known_is_leaked_and_not_given_back() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (mut buffer, stream) = buffer(sizes()[1], device, OLD, OLD);
    let bytes = buffer.nbytes();
    buffer.gpu_on(&stream).unwrap();
    // Whether the stream still uses the memory cannot be asked while it is in capture.
    common::begin_capture(&stream);
    let before = device.memory().unwrap().free;
    drop(buffer);
    let after = device.memory().unwrap().free;
    common::end_capture(&stream);
    assert!(after < before + bytes, "memory was given back that may be in use");
}
