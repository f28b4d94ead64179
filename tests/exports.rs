//! Nothing touches or releases an exported side while its consumer, or queued work of the consumer,
//! may use it.

#![cfg(feature = "dlpack")]

mod common;

use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{Foreign, Gate, all, device_words, test_name};
use cpu_gpu_buffer::dlpack::{
    self, DLDataType, DLDevice, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned,
    DLPackVersion, DLTensor, Tensor,
};
use cpu_gpu_buffer::{
    BufferOptions, BufferPool, CpuGpuBuffer, Device, Element, Error, Pinning, PoolOptions, Result,
    Side, Stream, sys,
};

const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;
/// More than the largest piece of a chunk, so that each host side is pinned memory that is counted.
const WORDS: usize = 300_000;

/// A library that took a tensor over.
struct Consumer(*mut DLManagedTensorVersioned);

// SAFETY: DLPack's tensors may be used from, and let go in, any thread.
unsafe impl Send for Consumer {}

impl Consumer {
    fn new(tensor: Tensor) -> Consumer {
        Consumer(tensor.into_raw())
    }

    fn tensor(&self) -> &DLTensor {
        // SAFETY: it lives until it is let go.
        unsafe { &(*self.0).dl_tensor }
    }

    fn data(&self) -> *mut u32 {
        self.tensor().data.cast()
    }

    fn let_go(self) {
        // SAFETY: as above.
        let deleter = unsafe { (*self.0).deleter }.unwrap();
        // SAFETY: once, and it is not used again.
        unsafe { deleter(self.0) };
    }
}

/// Copies words on a stream that the buffer knows nothing of.
fn copy(to: *mut u32, from: *const u32, words: usize, stream: &Stream) {
    let kind = match (is_host(to), is_host(from)) {
        (false, false) => sys::cudaMemcpyKind::cudaMemcpyDeviceToDevice,
        (true, _) => sys::cudaMemcpyKind::cudaMemcpyDeviceToHost,
        (_, true) => sys::cudaMemcpyKind::cudaMemcpyHostToDevice,
    };
    // SAFETY: the callers name as many words of memory that lives.
    let status =
        unsafe { sys::cudaMemcpyAsync(to.cast(), from.cast(), words * 4, kind, stream.as_raw()) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
}

/// Whether it is pinned host memory.
fn is_host(address: *const u32) -> bool {
    let mut flags = 0;
    // SAFETY: a valid place; an address that is none of host memory is a status.
    let status = unsafe { sys::cudaHostGetFlags(&mut flags, address.cast_mut().cast()) };
    // SAFETY: no arguments. Takes the error away.
    let _ = unsafe { sys::cudaGetLastError() };
    status == sys::cudaError::cudaSuccess
}

/// A buffer with both sides `OLD`, of which nothing is in flight.
fn buffer(device: Device) -> (CpuGpuBuffer<u32>, Stream) {
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::new(WORDS, device).unwrap();
    buffer.fill(OLD, &stream).unwrap();
    buffer.synchronize().unwrap();
    (buffer, stream)
}

fn gpu(buffer: &CpuGpuBuffer<u32>) -> Vec<u32> {
    buffer.synchronize().unwrap();
    device_words(buffer.device(), buffer.device_ptr(), WORDS)
}

/// With a CUDA device, where nothing was left behind.
fn cuda(test: &str, run: impl FnOnce(Device)) {
    let Some((device, _turn)) = common::cuda(test) else { return };
    dlpack::reclaim().unwrap();
    // Makes the chunks of memory that stay with the device.
    drop(CpuGpuBuffer::<u8>::new(1, device).unwrap());
    run(device);
    dlpack::reclaim().unwrap();
}

/// Device allocations and pinned pieces that live, where they are counted.
fn live() -> [i64; 2] {
    #[cfg(target_os = "linux")]
    if common::is_simulated() {
        let [device, pinned, ..] = common::sim::live();
        return [device, pinned];
    }
    [0, 0]
}

/// How many more live than before; nobody knows where they are not counted.
fn more(before: [i64; 2]) -> Option<[i64; 2]> {
    #[cfg(target_os = "linux")]
    if common::is_simulated() {
        let now = live();
        return Some([now[0] - before[0], now[1] - before[1]]);
    }
    let _ = before;
    None
}

// ---- what a tensor says ----

#[test]
fn a_tensor_says_where_and_what_its_side_is() {
    fn check<T: Element>(code: u8) {
        for device in common::devices() {
            let stream = Stream::new(device).unwrap();
            for pinning in [Pinning::Preferred, Pinning::Never] {
                let options = BufferOptions { pinning, ..Default::default() };
                let mut buffer =
                    CpuGpuBuffer::<T>::with_options([3, 1, 5, 2], device, options).unwrap();
                let places = (buffer.device_ptr(), buffer.cpu().unwrap().as_ptr());
                let (gpu_kind, host_kind) = match device {
                    Device::Cpu => ((1, 0), (1, 0)),
                    Device::Cuda(ordinal) if buffer.is_pinned() => ((2, ordinal as i32), (3, 0)),
                    Device::Cuda(ordinal) => ((2, ordinal as i32), (1, 0)),
                };
                let expect = |tensor: &DLTensor, data: *const T, (kind, device_id): (i32, i32)| {
                    assert_eq!(tensor.data.cast_const().cast(), data);
                    let device_type = DLDeviceType(kind);
                    assert_eq!(tensor.device, DLDevice { device_type, device_id });
                    let bits = 8 * size_of::<T>() as u8;
                    assert_eq!(tensor.dtype, DLDataType { code, bits, lanes: 1 }, "{}", T::DTYPE);
                    assert_eq!((tensor.ndim, tensor.byte_offset), (4, 0));
                    // SAFETY: as many numbers as there are dimensions.
                    let shape = unsafe { std::slice::from_raw_parts(tensor.shape, 4) };
                    // SAFETY: as above.
                    let strides = unsafe { std::slice::from_raw_parts(tensor.strides, 4) };
                    assert_eq!((shape, strides), (&[3, 1, 5, 2][..], &[10, 10, 2, 1][..]));
                };
                let gpu = Consumer::new(buffer.export_gpu(&stream).unwrap());
                expect(gpu.tensor(), places.0, gpu_kind);
                // SAFETY: it lives.
                let managed = unsafe { &*gpu.0 };
                // The codes of FP8 came with version 1.1.
                let minor = u32::from(code >= 7);
                assert_eq!(managed.version, DLPackVersion { major: 1, minor });
                assert_eq!(managed.flags, 0);
                let again = buffer.export_gpu(&stream).unwrap().into_raw_unversioned();
                // SAFETY: it lives until the line after the next.
                let managed: &DLManagedTensor = unsafe { &*again };
                expect(&managed.dl_tensor, places.0, gpu_kind);
                // SAFETY: once, and it is not used again.
                unsafe { managed.deleter.unwrap()(again) };
                let host = buffer.export_cpu().unwrap();
                assert_eq!(host.device().device_type, DLDeviceType(host_kind.0));
                let host = Consumer::new(host);
                expect(host.tensor(), places.1, host_kind);
                let plain = Consumer::new(buffer.export_cpu().unwrap().as_plain_cpu());
                expect(plain.tensor(), places.1, (1, 0));
                assert_eq!(
                    buffer.export_gpu(&stream).unwrap().as_plain_cpu().device().device_type,
                    DLDeviceType(gpu_kind.0)
                );
                [gpu, host, plain].into_iter().for_each(Consumer::let_go);
                assert_eq!(
                    (buffer.device_ptr().cast_const(), buffer.cpu().unwrap().as_ptr()),
                    (places.0.cast_const(), places.1)
                );
            }
        }
    }
    let _turn = common::turn();
    check::<i8>(0);
    check::<i16>(0);
    check::<i32>(0);
    check::<i64>(0);
    check::<u8>(1);
    check::<u16>(1);
    check::<u32>(1);
    check::<u64>(1);
    check::<f32>(2);
    check::<f64>(2);
    #[cfg(feature = "half")]
    {
        check::<half::f16>(2);
        check::<half::bf16>(4);
    }
    #[cfg(feature = "fp8")]
    {
        check::<float8::F8E4M3>(10);
        check::<float8::F8E5M2>(12);
    }
}

#[test]
fn a_tensor_of_no_bytes_has_no_address_and_lends_nothing() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let mut buffer = CpuGpuBuffer::<u32>::new([4, 0, 3], device).unwrap();
        for tensor in [buffer.export_gpu(&stream), buffer.export_cpu()] {
            let consumer = Consumer::new(tensor.unwrap());
            assert!(consumer.data().is_null());
            // SAFETY: as many numbers as there are dimensions.
            let strides = unsafe { std::slice::from_raw_parts(consumer.tensor().strides, 3) };
            assert_eq!((consumer.tensor().ndim, strides), (3, &[3, 3, 1][..]));
            buffer.cpu_mut().unwrap();
            buffer.copy_to_gpu(.., &stream).unwrap();
            consumer.let_go();
        }
        // A buffer whose memory is larger than what it has of it now.
        let mut buffer = CpuGpuBuffer::<u32>::new(100, device).unwrap();
        buffer.resize(0).unwrap();
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        assert!(consumer.data().is_null());
        buffer.resize(100).unwrap();
        consumer.let_go();
    }
    // Dimensions are signed there.
    let stream = Stream::new(Device::Cpu).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new([usize::MAX, 0], Device::Cpu).unwrap();
    for tensor in [buffer.export_gpu(&stream), buffer.export_cpu()] {
        assert!(matches!(tensor, Err(Error::InvalidShape { .. })), "{tensor:?}");
    }
    let mut buffer = CpuGpuBuffer::<u8>::new([1 << 40, 1 << 40, 0], Device::Cpu).unwrap();
    buffer.export_cpu().unwrap();
}

// ---- what the consumer sees ----

#[test]
fn the_consumers_stream_comes_after_everything_that_is_pending() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let (theirs, seen) = (Stream::new(device).unwrap(), Foreign::new(WORDS, 0));
        buffer.fill_cpu(NEW).unwrap();
        let [first, gate] = [(); 2].map(|()| Gate::close(&stream));
        buffer.copy_to_gpu(.., &stream).unwrap();
        let consumer = first.passes(|| Consumer::new(buffer.export_gpu(&theirs).unwrap()));
        gate.waits(|| {
            copy(seen.as_ptr(), consumer.data(), WORDS, &theirs);
            theirs.synchronize().unwrap();
        });
        all(&seen.words(), NEW);
        consumer.let_go();
        // A kernel of ours on one stream, the consumer on another.
        let view = buffer.gpu_on(&stream).unwrap();
        let gate = Gate::close(&stream);
        common::store(view.as_mut_ptr(), view.len(), 7, &stream);
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        gate.waits(|| {
            copy(seen.as_ptr(), consumer.data(), WORDS, &theirs);
            theirs.synchronize().unwrap();
        });
        all(&seen.words(), 7);
        consumer.let_go();
    });
}

#[test]
fn a_consumer_finds_zeroes_where_nothing_was_written_yet() {
    cuda(test_name!(), |device| {
        let (one, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let (seen, also) = (Foreign::new(WORDS, 0xaa), Foreign::new(WORDS, 0xaa));
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        let gate = Gate::close(&one);
        let first = Consumer::new(buffer.export_gpu(&one).unwrap());
        // The second tensor's stream waits for what the first one's was given.
        let second = Consumer::new(buffer.export_gpu(&other).unwrap());
        gate.waits(|| {
            copy(also.as_ptr(), second.data(), WORDS, &other);
            other.synchronize().unwrap();
        });
        copy(seen.as_ptr(), first.data(), WORDS, &one);
        one.synchronize().unwrap();
        all(&also.words(), 0);
        all(&seen.words(), 0);
        first.let_go();
        second.let_go();
    });
}

#[test]
fn the_consumers_stream_may_be_destroyed_once_the_tensor_is_made() {
    cuda(test_name!(), |device| {
        let stream = Stream::new(device).unwrap();
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        let (theirs, raw) = foreign_stream(device);
        let used = buffer.gpu_on(&theirs).unwrap().len();
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        drop(theirs);
        // SAFETY: nothing remembers it.
        unsafe { destroy(raw) };
        let again = Consumer::new(buffer.export_gpu(&stream).unwrap());
        consumer.let_go();
        again.let_go();
        buffer.fill_cpu(NEW).unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        all(&gpu(&buffer), NEW);
        assert_eq!(used, WORDS);
    });
}

#[test]
fn a_consumer_of_the_host_side_finds_no_transfer_in_flight() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let write = |consumer: &Consumer| {
            // SAFETY: as many words of host memory, which are the consumer's alone.
            unsafe { std::slice::from_raw_parts_mut(consumer.data(), WORDS) }.fill(NEW);
        };
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        gate.waits(|| {
            let consumer = Consumer::new(buffer.export_cpu().unwrap());
            write(&consumer);
            consumer.let_go();
        });
        all(&gpu(&buffer), OLD);
        all(buffer.cpu().unwrap(), NEW);
        let gate = Gate::close(&stream);
        buffer.copy_to_cpu(.., &stream).unwrap();
        let consumer = gate.waits(|| Consumer::new(buffer.export_cpu().unwrap()));
        // SAFETY: as above.
        all(unsafe { std::slice::from_raw_parts(consumer.data(), WORDS) }, OLD);
        consumer.let_go();
    });
}

#[test]
fn a_stream_that_the_buffer_was_used_on_may_be_destroyed_once_the_buffer_is_gone() {
    let test = test_name!();
    cuda(test, |device| {
        let before = live();
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        let (theirs, raw) = foreign_stream(device);
        buffer.gpu_on(&theirs).unwrap();
        drop((buffer, theirs));
        // SAFETY: nothing remembers it.
        unsafe { destroy(raw) };
        consumer.let_go();
        dlpack::reclaim().unwrap();
        if let Some(more) = more(before) {
            assert_eq!(more, [0, 0], "it could not be waited for");
        }
    });
}

#[test]
fn memory_that_a_captured_stream_may_use_is_leaked_when_its_buffer_goes_also_where_it_was_lent() {
    let test = test_name!();
    cuda(test, |device| {
        // The buffer last, and the tensor.
        for consumer_first in [true, false] {
            let before = live();
            let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
            let consumer = Consumer::new(buffer.export_cpu().unwrap());
            let (theirs, raw) = foreign_stream(device);
            buffer.gpu_on(&theirs).unwrap();
            common::begin_capture(&theirs);
            match consumer_first {
                true => {
                    consumer.let_go();
                    drop(buffer);
                }
                false => {
                    drop(buffer);
                    consumer.let_go();
                }
            }
            common::end_capture(&theirs);
            // What was captured may be launched from now on.
            dlpack::reclaim().unwrap();
            if let Some(more) = more(before) {
                assert_eq!(more, [1, 1], "memory was given back that may be in use");
            }
            drop(theirs);
            // SAFETY: nothing remembers it.
            unsafe { destroy(raw) };
            dlpack::reclaim().unwrap();
        }
    });
}

/// A stream of somebody else's.
fn foreign_stream(device: Device) -> (Stream, sys::cudaStream_t) {
    let mut raw = std::ptr::null_mut();
    common::use_first_device();
    // SAFETY: a valid place.
    let made = unsafe { sys::cudaStreamCreateWithFlags(&mut raw, sys::cudaStreamNonBlocking) };
    assert_eq!(made, sys::cudaError::cudaSuccess);
    // SAFETY: of the device's primary context; it is destroyed when nothing remembers it any more.
    (unsafe { Stream::from_raw(raw, device, None) }.unwrap(), raw)
}

/// # Safety
///
/// Nobody uses it any more. What was sent to it goes on.
unsafe fn destroy(raw: sys::cudaStream_t) {
    // SAFETY: the caller vouches for it.
    let destroyed = unsafe { sys::cudaStreamDestroy(raw) };
    assert_eq!(destroyed, sys::cudaError::cudaSuccess);
}

// ---- while it lives ----

type Use = fn(&mut CpuGpuBuffer<u32>, &Stream) -> Result<()>;

/// What touches the host side alone.
const HOST: [(&str, Use); 5] = [
    ("cpu", |buffer, _| buffer.cpu().map(drop)),
    ("cpu_mut", |buffer, _| buffer.cpu_mut().map(drop)),
    ("try_cpu", |buffer, _| buffer.try_cpu().map(drop)),
    ("try_cpu_mut", |buffer, _| buffer.try_cpu_mut().map(drop)),
    ("fill_cpu", |buffer, _| buffer.fill_cpu(7)),
];

/// What touches the device side alone.
const DEVICE: [(&str, Use); 2] = [
    ("fill_gpu", |buffer, stream| buffer.fill_gpu(7, stream)),
    ("gpu_on", |buffer, stream| buffer.gpu_on(stream).map(drop)),
];

/// What touches both.
const ALL: [(&str, Use); 8] = [
    ("copy_to_gpu", |buffer, stream| buffer.copy_to_gpu(.., stream)),
    ("copy_to_gpu, no rows", |buffer, stream| buffer.copy_to_gpu(3..3, stream)),
    ("copy_to_cpu", |buffer, stream| buffer.copy_to_cpu(1..9, stream)),
    ("fill", |buffer, stream| buffer.fill(7, stream)),
    ("zero", |buffer, stream| buffer.zero(stream)),
    ("resize in place", |buffer, _| buffer.resize([2, 5])),
    ("resize beyond", |buffer, _| buffer.resize(2 * WORDS)),
    ("synchronize", |buffer, _| buffer.synchronize()),
];

#[test]
fn whatever_touches_a_side_that_is_lent_is_refused_and_changes_nothing() {
    let _turn = common::turn();
    for device in common::devices() {
        for side in [Side::Host, Side::Device] {
            let (mut buffer, stream) = buffer(device);
            let address = buffer.device_ptr();
            let tensor = |buffer: &mut CpuGpuBuffer<u32>| match side {
                Side::Host => buffer.export_cpu().unwrap(),
                Side::Device => buffer.export_gpu(&stream).unwrap(),
            };
            let (first, second) = (tensor(&mut buffer), tensor(&mut buffer));
            let (refused, free) = match side {
                Side::Host => (&HOST[..], &DEVICE[..]),
                Side::Device => (&DEVICE[..], &HOST[..]),
            };
            let check = |buffer: &mut CpuGpuBuffer<u32>| {
                reset();
                for (name, use_it) in refused.iter().chain(&ALL) {
                    let result = use_it(buffer, &stream);
                    assert_eq!(result, Err(Error::Exported { side }), "{name}, {device}");
                }
                assert_eq!(calls(c"cudaMalloc").unwrap_or(0), 0, "something is made in vain");
                assert_eq!(buffer.is_idle(), Ok(false));
                assert_eq!((buffer.shape(), buffer.device_ptr()), (&[WORDS][..], address));
            };
            check(&mut buffer);
            drop(first);
            check(&mut buffer);
            let untouched = match side {
                Side::Host => host_side_as_seen(&mut buffer, &stream),
                Side::Device => device_words(device, address, WORDS),
            };
            all(&untouched, OLD);
            for (name, use_it) in free {
                assert_eq!(use_it(&mut buffer, &stream), Ok(()), "{name}, {device}");
            }
            drop(second);
            buffer.synchronize().unwrap();
            assert_eq!(buffer.is_idle(), Ok(true));
            for (name, use_it) in HOST.iter().chain(&DEVICE).chain(&ALL) {
                assert_eq!(use_it(&mut buffer, &stream), Ok(()), "{name}, {device}");
            }
        }
    }
}

/// The host side, as a consumer sees it.
fn host_side_as_seen(buffer: &mut CpuGpuBuffer<u32>, _stream: &Stream) -> Vec<u32> {
    let consumer = Consumer::new(buffer.export_cpu().unwrap());
    // SAFETY: as many words of host memory, which nobody writes.
    let words = unsafe { std::slice::from_raw_parts(consumer.data(), WORDS) }.to_vec();
    consumer.let_go();
    words
}

#[test]
fn transfers_with_memory_of_others_touch_the_host_side_alone() {
    let _turn = common::turn();
    for device in common::devices() {
        let (mut buffer, stream) = buffer(device);
        let mut other = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        let theirs = other.gpu_on(&stream).unwrap().as_mut_ptr();
        let both = |buffer: &mut CpuGpuBuffer<u32>| {
            // SAFETY: as many words, which nothing else uses.
            let up = unsafe { buffer.copy_to_device_ptr(.., theirs, &stream) };
            // SAFETY: as above.
            let down = unsafe { buffer.copy_from_device_ptr(.., theirs, &stream) };
            [up, down]
        };
        let tensor = buffer.export_gpu(&stream).unwrap();
        assert_eq!(both(&mut buffer), [Ok(()), Ok(())]);
        drop(tensor);
        let tensor = buffer.export_cpu().unwrap();
        let refused = Err(Error::Exported { side: Side::Host });
        assert_eq!(both(&mut buffer), [refused.clone(), refused]);
        drop(tensor);
        buffer.synchronize().unwrap();
    }
}

// ---- when it is gone, and its work is not ----

/// Calls of a function since the reset, where they are counted.
fn calls(name: &CStr) -> Option<u64> {
    #[cfg(target_os = "linux")]
    if common::is_simulated() && Device::auto() != Device::Cpu {
        return Some(common::sim::calls_of(name));
    }
    let _ = name;
    None
}

/// Calls that wait for a device.
fn waits() -> Option<u64> {
    calls(c"cudaDeviceSynchronize")
}

fn reset() {
    #[cfg(target_os = "linux")]
    if common::is_simulated() {
        common::sim::reset();
    }
}

#[test]
fn an_upload_comes_after_what_the_last_consumer_queued() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let theirs = Stream::new(device).unwrap();
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        let [first, gate] = [(); 2].map(|()| Gate::close(&theirs));
        common::store(consumer.data(), WORDS, NEW, &theirs);
        first.passes(|| consumer.let_go());
        gate.waits(|| {
            buffer.copy_to_gpu(.., &stream).unwrap();
            stream.synchronize().unwrap();
        });
        theirs.synchronize().unwrap();
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn what_a_consumer_queued_is_waited_for_also_where_its_stream_is_destroyed() {
    let test = test_name!();
    cuda(test, |device| {
        let (mut buffer, stream) = buffer(device);
        let (theirs, raw) = foreign_stream(device);
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        let [first, gate] = [(); 2].map(|()| Gate::close(&theirs));
        common::store(consumer.data(), WORDS, NEW, &theirs);
        drop(theirs);
        first.passes(|| consumer.let_go());
        gate.waits(|| {
            // SAFETY: nobody uses it any more. What was sent to it goes on.
            unsafe { destroy(raw) };
            buffer.copy_to_gpu(.., &stream).unwrap();
            stream.synchronize().unwrap();
        });
        // SAFETY: no arguments.
        assert_eq!(unsafe { sys::cudaDeviceSynchronize() }, sys::cudaError::cudaSuccess);
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn the_host_side_is_looked_at_after_what_the_last_consumer_queued() {
    cuda(test_name!(), |device| {
        let (mut buffer, _stream) = buffer(device);
        let (theirs, foreign) = (Stream::new(device).unwrap(), Foreign::new(WORDS, 0x33));
        // It writes the side.
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        let gate = Gate::close(&theirs);
        copy(consumer.data(), foreign.as_ptr(), WORDS, &theirs);
        consumer.let_go();
        // Nobody knows yet, and trying does not wait.
        assert!(buffer.try_cpu().unwrap().is_none() && buffer.try_cpu_mut().unwrap().is_none());
        assert!(!buffer.is_idle().unwrap());
        let seen = gate.waits(|| buffer.cpu().unwrap().to_vec());
        all(&seen, 0x3333_3333);
        assert!(buffer.try_cpu().unwrap().is_some() && buffer.is_idle().unwrap());
        // It reads the side.
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        let gate = Gate::close(&theirs);
        copy(foreign.as_ptr(), consumer.data(), WORDS, &theirs);
        consumer.let_go();
        gate.waits(|| buffer.cpu_mut().unwrap().fill(NEW));
        theirs.synchronize().unwrap();
        all(&foreign.words(), 0x3333_3333);
        // The next one waits for the last one.
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        let gate = Gate::close(&theirs);
        copy(consumer.data(), foreign.as_ptr(), WORDS, &theirs);
        consumer.let_go();
        let seen = gate.waits(|| host_side_as_seen(&mut buffer, &theirs));
        all(&seen, 0x3333_3333);
    });
}

#[test]
fn the_next_consumer_comes_after_what_the_last_one_queued() {
    cuda(test_name!(), |device| {
        let (mut buffer, _stream) = buffer(device);
        let (theirs, others) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        let gate = Gate::close(&theirs);
        common::store(consumer.data(), WORDS, NEW, &theirs);
        consumer.let_go();
        gate.waits(|| {
            let next = Consumer::new(buffer.export_gpu(&others).unwrap());
            common::store(next.data(), WORDS, 7, &others);
            others.synchronize().unwrap();
            next.let_go();
        });
        theirs.synchronize().unwrap();
        all(&gpu(&buffer), 7);
    });
}

/// Holds a stream of the second device back, which has no gate.
struct Held(Box<std::sync::atomic::AtomicBool>);

impl Held {
    fn new(stream: &Stream) -> Held {
        unsafe extern "C" fn hold(flag: *mut c_void) {
            // SAFETY: the flag lives until the stream was waited for.
            let flag = unsafe { &*flag.cast::<std::sync::atomic::AtomicBool>() };
            while !flag.load(std::sync::atomic::Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let held = Held(Box::new(false.into()));
        let flag = (&raw const *held.0).cast_mut().cast();
        // SAFETY: the function calls no CUDA, and the flag lives until the stream was waited for.
        let status = unsafe { sys::cudaLaunchHostFunc(stream.as_raw(), Some(hold), flag) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        held
    }

    fn let_go(&self) {
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

#[test]
fn what_a_consumer_queued_on_another_device_is_waited_for() {
    let test = test_name!();
    cuda(test, |device| {
        if Device::cuda_count() < 2 {
            return common::left_out(test, "fewer than two CUDA devices");
        }
        let (mut buffer, _stream) = buffer(device);
        let far = Device::Cuda(1);
        let theirs = Stream::new(far).unwrap();
        let mut there = CpuGpuBuffer::<u32>::new(WORDS, far).unwrap();
        let to = there.gpu_on(&theirs).unwrap().as_mut_ptr();
        there.synchronize().unwrap();
        let consumer = Consumer::new(buffer.export_cpu().unwrap());
        // SAFETY: the device exists.
        assert_eq!(unsafe { sys::cudaSetDevice(1) }, sys::cudaError::cudaSuccess);
        let held = Held::new(&theirs);
        copy(to, consumer.data(), WORDS, &theirs);
        common::use_first_device();
        consumer.let_go();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                held.let_go();
            });
            buffer.cpu_mut().unwrap().fill(NEW);
        });
        theirs.synchronize().unwrap();
        there.copy_to_cpu(.., &theirs).unwrap();
        all(there.cpu().unwrap(), OLD);
    });
}

#[test]
fn the_devices_are_waited_for_once_and_only_where_something_was_lent() {
    let test = test_name!();
    cuda(test, |device| {
        if !common::is_simulated() {
            return common::left_out(test, "calls are counted by the simulated runtime");
        }
        let (mut buffer, stream) = buffer(device);
        let (mut other, _) = self::buffer(device);
        // Both devices may be in use by now, by other tests of this program.
        let contexts = (0..2).filter(|device| common::has_context(*device)).count() as u64;
        let uses = |buffer: &mut CpuGpuBuffer<u32>| {
            for (name, use_it) in HOST.iter().chain(&DEVICE).chain(&ALL) {
                assert_eq!(use_it(buffer, &stream), Ok(()), "{name}");
            }
            buffer.resize(WORDS).unwrap();
        };
        reset();
        uses(&mut other);
        drop(other);
        assert_eq!(waits(), Some(0));
        // Of either side, and of both at once.
        for lend in [
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| {
                drop(buffer.export_gpu(stream).unwrap())
            },
            |buffer: &mut CpuGpuBuffer<u32>, _: &Stream| drop(buffer.export_cpu().unwrap()),
            |buffer: &mut CpuGpuBuffer<u32>, stream: &Stream| {
                drop((buffer.export_cpu().unwrap(), buffer.export_gpu(stream).unwrap()));
            },
        ] {
            reset();
            lend(&mut buffer, &stream);
            assert_eq!(waits(), Some(0), "letting go waits");
            uses(&mut buffer);
            assert_eq!(waits(), Some(contexts));
        }
        // One wait is for both sides, but for one that is lent.
        let tensor = buffer.export_gpu(&stream).unwrap();
        drop(buffer.export_cpu().unwrap());
        reset();
        buffer.cpu_mut().unwrap()[0] = 1;
        assert_eq!(waits(), Some(contexts));
        drop(buffer.export_cpu().unwrap());
        drop(tensor);
        buffer.fill_gpu(1, &stream).unwrap();
        assert_eq!(waits(), Some(2 * contexts));
        buffer.cpu_mut().unwrap()[0] = 2;
        assert_eq!(waits(), Some(2 * contexts));
        // The other side has nothing to do with it.
        drop(buffer.export_cpu().unwrap());
        buffer.gpu_on(&stream).unwrap();
        assert_eq!(waits(), Some(2 * contexts));
    });
}

#[test]
fn a_device_that_nobody_uses_gets_no_context() {
    let test = test_name!();
    if !common::is_subprocess() {
        if Device::cuda_count() < 2 {
            return common::left_out(test, "fewer than two CUDA devices");
        }
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let (mut buffer, stream) = buffer(Device::Cuda(0));
    drop(buffer.export_gpu(&stream).unwrap());
    buffer.synchronize().unwrap();
    assert!(common::has_context(0) && !common::has_context(1));
}

// ---- who goes last ----

#[test]
fn memory_lives_as_long_as_its_tensor_and_what_that_queued() {
    cuda(test_name!(), |device| {
        let theirs = Stream::new(device).unwrap();
        let seen = Foreign::new(WORDS, 0);
        // The gate's page, which is never freed, comes first.
        drop(Gate::close(&theirs));
        theirs.synchronize().unwrap();
        let before = live();
        let (mut buffer, stream) = buffer(device);
        let gpu = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        let host = Consumer::new(buffer.export_cpu().unwrap());
        drop(buffer);
        dlpack::reclaim().unwrap();
        // Nothing is missing yet.
        common::store(gpu.data(), WORDS, NEW, &theirs);
        copy(host.data(), gpu.data(), WORDS, &theirs);
        theirs.synchronize().unwrap();
        // SAFETY: as many words of host memory, which nobody writes now.
        all(unsafe { std::slice::from_raw_parts(host.data(), WORDS) }, NEW);
        if let Some(more) = more(before) {
            assert_eq!(more, [1, 1]);
        }
        // It is touched again when all are gone.
        let gate = Gate::close(&theirs);
        copy(seen.as_ptr(), gpu.data(), WORDS, &theirs);
        copy(gpu.data(), host.data(), WORDS, &theirs);
        gate.passes(|| {
            let both = move || [gpu, host].into_iter().for_each(Consumer::let_go);
            thread::spawn(both).join().unwrap();
        });
        let again = Gate::close(&theirs);
        gate.open();
        again.waits(|| drop(CpuGpuBuffer::<u32>::new(WORDS, device).unwrap()));
        theirs.synchronize().unwrap();
        all(&seen.words(), NEW);
        if let Some(more) = more(before) {
            // Two gates' pages.
            assert_eq!(more, [0, 2], "the next one to allocate gives it back");
        }
        drop(stream);
    });
}

#[test]
fn a_buffer_that_goes_after_its_tensors_leaves_its_memory_to_be_reclaimed() {
    let test = test_name!();
    cuda(test, |device| {
        let theirs = Stream::new(device).unwrap();
        let before = live();
        let (mut buffer, _stream) = buffer(device);
        let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
        let gate = Gate::close(&theirs);
        common::store(consumer.data(), WORDS, NEW, &theirs);
        gate.passes(|| {
            consumer.let_go();
            drop(buffer);
        });
        let gate = Gate::close(&theirs);
        let (_, early) = gate.during(Duration::from_millis(50), || dlpack::reclaim().unwrap());
        assert!(!early, "memory was given back that a kernel writes");
        theirs.synchronize().unwrap();
        if let Some(more) = more(before) {
            assert_eq!(more, [0, 2], "with the gates' pages");
        }
        // Where somebody has waited, it goes at once.
        let before = live();
        let (mut buffer, stream) = self::buffer(device);
        drop(buffer.export_gpu(&stream).unwrap());
        buffer.synchronize().unwrap();
        drop(buffer);
        if let Some(more) = more(before) {
            assert_eq!(more, [0, 0]);
        }
    });
}

#[test]
fn a_buffer_goes_back_to_its_pool_after_its_tensors_and_what_they_queued() {
    cuda(test_name!(), |device| {
        let (theirs, stream) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        for tensor_first in [true, false] {
            let mut buffer = pool.acquire().unwrap();
            let place = buffer.device_ptr();
            let consumer = Consumer::new(buffer.export_gpu(&theirs).unwrap());
            let [first, gate] = [(); 2].map(|()| Gate::close(&theirs));
            common::store(consumer.data(), WORDS, NEW, &theirs);
            first.passes(|| {
                if tensor_first {
                    consumer.let_go();
                    drop(buffer);
                } else {
                    drop(buffer);
                    assert!(pool.try_acquire().is_none(), "it is lent");
                    assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 1 }));
                    consumer.let_go();
                }
                assert!(pool.try_acquire().is_none(), "a kernel writes it");
                assert_eq!(pool.available(), 0);
            });
            gate.waits(|| {
                let mut buffer = pool.acquire().unwrap();
                assert_eq!(buffer.device_ptr(), place);
                buffer.fill(OLD, &stream).unwrap();
                stream.synchronize().unwrap();
            });
            theirs.synchronize().unwrap();
            assert_eq!((pool.available(), pool.total()), (1, 1));
            all(&device_words(device, place, WORDS), OLD);
        }
        // One that was waited for goes back at once, and a pool that may grow does.
        let mut buffer = pool.acquire().unwrap();
        drop(buffer.export_gpu(&stream).unwrap());
        buffer.copy_to_gpu(.., &stream).unwrap();
        drop(buffer);
        assert_eq!(pool.available(), 1);
        let pool = BufferPool::<u32>::new(WORDS, device, 1).unwrap();
        let consumer = Consumer::new(pool.acquire().unwrap().export_gpu(&stream).unwrap());
        assert_ne!(pool.acquire().unwrap().device_ptr(), consumer.data());
        assert_eq!(pool.total(), 2);
        let before = live();
        drop(pool);
        consumer.let_go();
        dlpack::reclaim().unwrap();
        if let Some(more) = more(before) {
            assert_eq!(more, [-2, -2], "of the pool that is gone");
        }
    });
}

/// Leaves a buffer behind whose consumer's work stands behind the gate.
fn left_behind_a_gate(mut buffer: CpuGpuBuffer<u32>, theirs: &Stream) -> Gate {
    let consumer = Consumer::new(buffer.export_gpu(theirs).unwrap());
    let gate = Gate::close(theirs);
    common::store(consumer.data(), WORDS, NEW, theirs);
    drop(buffer);
    consumer.let_go();
    gate
}

/// Until another thread waits for the devices, as far as that can be told.
fn until_somebody_waits() {
    match waits() {
        Some(_) => {
            let start = Instant::now();
            while waits() == Some(0) {
                assert!(start.elapsed() < Duration::from_secs(10), "nobody waits");
                thread::yield_now();
            }
        }
        None => thread::sleep(Duration::from_millis(50)),
    }
}

#[test]
fn a_thread_that_waits_for_what_was_left_behind_hides_it_from_nobody() {
    let test = test_name!();
    cuda(test, |device| {
        let theirs = Stream::new(device).unwrap();
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        let gate = left_behind_a_gate(pool.acquire().unwrap(), &theirs);
        reset();
        thread::scope(|scope| {
            scope.spawn(|| dlpack::reclaim().unwrap());
            until_somebody_waits();
            gate.waits(|| drop(pool.acquire().unwrap()));
        });
        theirs.synchronize().unwrap();
    });
}

#[test]
fn what_is_left_behind_during_a_wait_stays_for_the_next_one() {
    let test = test_name!();
    cuda(test, |device| {
        if !common::is_simulated() {
            return common::left_out(test, "hardware may wait for what comes later, too");
        }
        let theirs = Stream::new(device).unwrap();
        let (first, second) = (buffer(device).0, buffer(device).0);
        let gate = left_behind_a_gate(first, &theirs);
        reset();
        thread::scope(|scope| {
            let reclaims = scope.spawn(|| dlpack::reclaim().unwrap());
            until_somebody_waits();
            // A stream that the other thread has not heard of.
            let later = Stream::new(device).unwrap();
            let before = live();
            let later_gate = left_behind_a_gate(second, &later);
            gate.open();
            later_gate.waits(|| reclaims.join().unwrap());
            // The gate's page came, the first one went.
            assert_eq!(more(before), Some([-1, 0]));
            dlpack::reclaim().unwrap();
            assert_eq!(more(before), Some([-2, -1]));
        });
    });
}

/// The owner of a stream, which does something when it is let go.
struct Owner<F: Fn()>(F);

impl<F: Fn()> Drop for Owner<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A tensor whose buffer is gone. When that is given back, the owner of its stream does this.
fn lent_with_owner(stream: &Stream, let_go: impl Fn() + Send + Sync + 'static) -> Tensor {
    let (raw, device) = (stream.as_raw(), stream.device());
    // SAFETY: the tests keep the stream.
    let adopted = unsafe { Stream::from_raw(raw, device, Some(Arc::new(Owner(let_go)))) }.unwrap();
    let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
    buffer.copy_to_gpu(.., &adopted).unwrap();
    buffer.export_gpu(stream).unwrap()
}

#[test]
fn a_pool_is_not_exhausted_while_a_buffer_of_it_is_left_behind() {
    cuda(test_name!(), |device| {
        let stream = Stream::new(device).unwrap();
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        // Takes what comes back before the one who waited for it, and leaves it behind, too.
        let takes = {
            let pool = pool.clone();
            move || drop(pool.try_acquire().unwrap().export_cpu().unwrap())
        };
        drop(lent_with_owner(&stream, takes));
        drop(pool.acquire().unwrap().export_cpu().unwrap());
        assert_eq!(pool.available(), 0);
        drop(pool.acquire().unwrap());
    });
}

/// A pool of one buffer, which is out, and a buffer that has nothing to do with it and was left
/// behind.
fn exhausted_beside_one_left_behind(device: Device) -> (BufferPool<u32>, CpuGpuBuffer<u32>) {
    let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
    let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
    let held = pool.acquire().unwrap();
    drop(buffer(device).0.export_cpu().unwrap());
    (pool, held)
}

#[test]
fn an_exhausted_pool_waits_for_no_device_while_others_left_buffers_behind() {
    cuda(test_name!(), |device| {
        let (pool, held) = exhausted_beside_one_left_behind(device);
        let stream = Stream::new(device).unwrap();
        reset();
        let gate = Gate::close(&stream);
        gate.passes(|| {
            assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 1 }));
        });
        assert_eq!(waits().unwrap_or(0), 0);
        gate.open();
        // Nor does it end a capture.
        common::begin_capture(&stream);
        assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 1 }));
        common::end_capture(&stream);
        // Its own it has back, by one wait.
        drop(CpuGpuBuffer::export_cpu(&mut { held }).unwrap());
        reset();
        drop(pool.acquire().unwrap());
        assert!(waits().is_none_or(|waits| waits == 1));
    });
}

#[test]
fn an_owner_that_leaves_one_behind_each_time_makes_a_pool_wait_once() {
    cuda(test_name!(), |device| {
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        let stream = Stream::new(device).unwrap();
        // Each that is given back leaves the next one behind, and the first takes the pool's
        // buffer, too.
        type Kept = Arc<Mutex<Option<CpuGpuBuffer<u32>>>>;
        let kept: Kept = Arc::default();
        fn leaves_another(stream: Stream, left: usize) {
            if left > 0 {
                let next = stream.clone();
                drop(lent_with_owner(&stream, move || leaves_another(next.clone(), left - 1)));
            }
        }
        let (takes, keeps, again) = (pool.clone(), Arc::clone(&kept), stream.clone());
        drop(lent_with_owner(&stream, move || {
            *keeps.lock().unwrap() = takes.try_acquire();
            leaves_another(again.clone(), 100);
        }));
        drop(pool.acquire().unwrap().export_cpu().unwrap());
        reset();
        assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 1 }));
        assert!(waits().is_none_or(|waits| waits <= 2), "{:?} waits", waits());
        drop(kept.lock().unwrap().take());
        drop(pool.acquire().unwrap());
        // Otherwise the rest would be there for the next test.
        while waits().is_some() {
            reset();
            dlpack::reclaim().unwrap();
            if waits() == Some(0) {
                break;
            }
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_pool_that_lacks_memory_to_grow_takes_back_what_others_left_behind() {
    let test = test_name!();
    let Some((device, limits)) = common::sim::Limits::of(test) else { return };
    dlpack::reclaim().unwrap();
    let pool = BufferPool::<u32>::new(WORDS, device, 1).unwrap();
    let held = pool.acquire().unwrap();
    let mut lone = buffer(device).0;
    limits.allocate(0, device);
    let full = pool.acquire().err();
    assert!(matches!(full, Some(Error::OutOfMemory { .. })), "{full:?}");
    drop(lone.export_cpu().unwrap());
    drop(lone);
    reset();
    let grown = pool.acquire().unwrap();
    let once = waits();
    assert!(pool.total() == 2 && once > Some(0));
    // There is no more to come back, and nobody waits for that.
    assert!(matches!(pool.acquire().err(), Some(Error::OutOfMemory { .. })));
    assert_eq!(waits(), once);
    drop((held, grown));
}

#[test]
fn an_export_that_is_refused_changes_nothing() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let other = Stream::new(device).unwrap();
        let before = live();
        buffer.gpu_on(&other).unwrap();
        // What the other stream was sent cannot be waited for.
        common::begin_capture(&other);
        assert_eq!(buffer.export_gpu(&stream).err(), Some(Error::StreamCapturing));
        common::end_capture(&other);
        reset();
        let gate = Gate::close(&stream);
        gate.passes(|| buffer.copy_to_gpu(.., &other).unwrap());
        buffer.synchronize().unwrap();
        assert!(buffer.is_idle().unwrap());
        assert_eq!(waits().unwrap_or(0), 0);
        gate.open();
        drop(buffer);
        if let Some(more) = more(before) {
            // The gate's page came, and the buffer went, with nothing left behind.
            assert_eq!(more, [-1, 0]);
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn whatever_fails_in_an_export_nothing_is_lent_and_the_next_use_comes_after_what_was_queued() {
    let test = test_name!();
    cuda(test, |device| {
        if !common::is_simulated() {
            return common::left_out(test, "faults need the simulated runtime");
        }
        let stream = Stream::new(device).unwrap();
        // With its effect: the zeroing is queued although the call failed. Alone, or all calls after it, too, so that no
        // event can be recorded behind the zeroing.
        for once in [true, false] {
            let mut failed = 0;
            for number in 1.. {
                let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
                buffer.fill_cpu(NEW).unwrap();
                let (theirs, raw) = foreign_stream(device);
                let gate = Gate::close(&theirs);
                common::sim::reset();
                common::sim::fail(number, 700, once, true);
                let exported = buffer.export_gpu(&theirs);
                let injected = common::sim::injected();
                common::sim::heal();
                // The buffer may not touch it any more.
                drop(theirs);
                // SAFETY: as above.
                unsafe { destroy(raw) };
                if injected == 0 {
                    gate.open();
                    break;
                }
                common::sim::reset();
                let lent = exported.is_ok();
                drop(exported);
                gate.waits(|| {
                    buffer.copy_to_gpu(.., &stream).unwrap();
                    stream.synchronize().unwrap();
                });
                // SAFETY: no arguments. The zeroing, if it comes later.
                assert_eq!(unsafe { sys::cudaDeviceSynchronize() }, sys::cudaError::cudaSuccess);
                all(&gpu(&buffer), NEW);
                failed += u64::from(!lent);
                if once && !lent {
                    // One wait is that of this test.
                    assert_eq!(waits(), Some(1), "call {number}");
                }
                reset();
                drop(buffer);
                dlpack::reclaim().unwrap();
                assert_eq!(waits(), Some(0), "call {number}: something was left behind");
            }
            assert!(failed > 3, "only {failed} calls failed");
        }
    });
}

#[test]
fn a_tensor_that_is_ordered_with_nothing_waits_for_nothing_and_is_guarded() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let theirs = Stream::new(device).unwrap();
        let seen = Foreign::new(WORDS, 0);
        // The work of an earlier consumer is unknown, a copy is queued, and a stream is captured.
        drop(buffer.export_gpu(&stream).unwrap());
        let gate = Gate::close(&stream);
        // SAFETY: as many words, which nothing else uses.
        unsafe { buffer.copy_to_device_ptr(.., seen.as_ptr(), &stream) }.unwrap();
        common::begin_capture(&theirs);
        reset();
        let consumer = gate.passes(|| {
            // SAFETY: used when the stream was waited for.
            Consumer::new(unsafe { buffer.export_gpu_unordered() }.unwrap())
        });
        #[cfg(target_os = "linux")]
        if common::is_simulated() {
            assert_eq!(common::sim::calls(), 0, "CUDA was called");
        }
        common::end_capture(&theirs);
        let refused = Err(Error::Exported { side: Side::Device });
        assert_eq!(buffer.copy_to_gpu(.., &stream), refused);
        stream.synchronize().unwrap();
        let gate = Gate::close(&theirs);
        common::store(consumer.data(), WORDS, NEW, &theirs);
        consumer.let_go();
        gate.waits(|| {
            buffer.copy_to_gpu(.., &stream).unwrap();
            stream.synchronize().unwrap();
        });
        theirs.synchronize().unwrap();
        all(&gpu(&buffer), OLD);
    });
}

#[test]
fn dropping_a_lent_buffer_never_waits_also_where_its_memory_is_given_up() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let captured = Stream::new(device).unwrap();
        // SAFETY: nothing uses the tensor.
        let tensor = unsafe { buffer.export_gpu_unguarded() }.unwrap();
        buffer.gpu_on(&captured).unwrap();
        let foreign = Foreign::new(WORDS, 0);
        let gate = Gate::close(&stream);
        // SAFETY: the words are the test's own, and live until the stream was waited for.
        unsafe { buffer.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
        buffer.gpu_on(&captured).unwrap();
        common::begin_capture(&captured);
        gate.passes(|| drop(buffer));
        common::end_capture(&captured);
        gate.open();
        stream.synchronize().unwrap();
        all(&foreign.words(), OLD);
        drop(tensor);
    });
}

#[test]
fn the_owner_of_a_stream_may_use_the_pool_that_has_it_let_go() {
    cuda(test_name!(), |device| {
        let pool = BufferPool::<u32>::new(WORDS, device, 0).unwrap();
        let stream = Stream::new(device).unwrap();
        let acquires = {
            let pool = pool.clone();
            move || drop(pool.acquire().unwrap())
        };
        drop(lent_with_owner(&stream, acquires));
        drop(pool.acquire().unwrap());
        dlpack::reclaim().unwrap();
        assert_eq!((pool.available(), pool.total()), (1, 1));
    });
}

#[test]
fn on_the_cpu_everything_goes_with_the_last_one() {
    let pool = BufferPool::<u32>::new(WORDS, Device::Cpu, 1).unwrap();
    let stream = Stream::new(Device::Cpu).unwrap();
    let mut buffer = pool.acquire().unwrap();
    let gpu = Consumer::new(buffer.export_gpu(&stream).unwrap());
    let host = Consumer::new(buffer.export_cpu().unwrap());
    // SAFETY: as many words, which are the consumer's alone.
    unsafe { std::slice::from_raw_parts_mut(host.data(), WORDS) }.fill(NEW);
    drop(buffer);
    gpu.let_go();
    assert_eq!(pool.available(), 0);
    thread::spawn(|| host.let_go()).join().unwrap();
    assert_eq!(pool.available(), 1);
    all(pool.acquire().unwrap().cpu().unwrap(), NEW);
    // Nothing is queued there: when the tensor is gone, so is all that its consumer does.
    let mut buffer = pool.acquire().unwrap();
    drop((buffer.export_cpu().unwrap(), buffer.export_gpu(&stream).unwrap()));
    assert_eq!(buffer.is_idle(), Ok(true));
    assert!(buffer.try_cpu().unwrap().is_some() && buffer.try_cpu_mut().unwrap().is_some());
    // Of its own.
    let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, Device::Cpu).unwrap();
    let gpu = Consumer::new(buffer.export_gpu(&stream).unwrap());
    drop(buffer);
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(gpu.data(), WORDS) }.fill(NEW);
    gpu.let_go();
}

#[test]
fn whatever_is_forgotten_races_with_nothing() {
    cuda(test_name!(), |device| {
        let (mut buffer, stream) = buffer(device);
        let place = buffer.device_ptr();
        // A tensor: its side stays lent, and the memory with it.
        common::forget(buffer.export_gpu(&stream).unwrap());
        let refused = Err(Error::Exported { side: Side::Device });
        assert_eq!(buffer.copy_to_gpu(.., &stream), refused);
        drop(buffer);
        dlpack::reclaim().unwrap();
        // A buffer, and with it the memory that its tensor has.
        let (mut buffer, stream) = self::buffer(device);
        let consumer = Consumer::new(buffer.export_gpu(&stream).unwrap());
        let other = consumer.data();
        common::forget(buffer);
        consumer.let_go();
        dlpack::reclaim().unwrap();
        let next: Vec<_> = (0..5).map(|_| self::buffer(device).0).collect();
        assert!(next.iter().all(|next| ![place, other].contains(&next.device_ptr())));
        all(&device_words(device, place, WORDS), OLD);
        all(&device_words(device, other, WORDS), OLD);
    });
}

#[test]
fn buffers_and_tensors_that_go_at_once_in_many_threads_leave_nothing_behind() {
    let test = test_name!();
    cuda(test, |device| {
        let stream = Stream::new(device).unwrap();
        let pool = BufferPool::<u32>::new(WORDS, device, 2).unwrap();
        drop(buffer(device));
        let before = live();
        let total = pool.total();
        for round in 0..100 {
            let mut buffer = match round % 2 {
                0 => pool.acquire().unwrap(),
                _ => CpuGpuBuffer::new(WORDS, device).unwrap(),
            };
            let tensors: Vec<_> = (0..3)
                .flat_map(|_| [buffer.export_gpu(&stream).unwrap(), buffer.export_cpu().unwrap()])
                .map(Consumer::new)
                .collect();
            thread::scope(|scope| {
                let mut threads: Vec<_> = tensors
                    .into_iter()
                    .map(|tensor| scope.spawn(move || tensor.let_go()))
                    .collect();
                threads.push(scope.spawn(move || drop(buffer)));
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            });
            if round % 7 == 0 {
                dlpack::reclaim().unwrap();
            }
        }
        dlpack::reclaim().unwrap();
        assert_eq!((pool.available(), pool.total()), (total, total));
        if let Some(more) = more(before) {
            assert_eq!(more, [0, 0]);
        }
    });
}

#[test]
fn a_tensor_that_is_not_guarded_keeps_the_memory_and_nothing_else() {
    cuda(test_name!(), |device| {
        let stream = Stream::new(device).unwrap();
        let seen = Foreign::new(WORDS, 0);
        let before = live();
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        // SAFETY: used on `stream`, after `gpu_on`, and no more once the buffer is gone.
        let consumer = Consumer::new(unsafe { buffer.export_gpu_unguarded() }.unwrap());
        for step in 0..3 {
            buffer.cpu_mut().unwrap().fill(step);
            buffer.copy_to_gpu(.., &stream).unwrap();
            buffer.gpu_on(&stream).unwrap();
            copy(seen.as_ptr(), consumer.data(), WORDS, &stream);
            stream.synchronize().unwrap();
            all(&seen.words(), step);
        }
        buffer.synchronize().unwrap();
        assert_eq!(buffer.is_idle(), Ok(true));
        drop(buffer);
        all(&device_words(device, consumer.data(), WORDS), 2);
        // Where it goes first, nobody has to be waited for.
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
        // SAFETY: not used.
        drop(unsafe { buffer.export_gpu_unguarded() }.unwrap());
        drop(buffer);
        if let Some(more) = more(before) {
            assert_eq!(more, [1, 1]);
        }
        consumer.let_go();
        dlpack::reclaim().unwrap();
        if let Some(more) = more(before) {
            assert_eq!(more, [0, 0]);
        }
    });
}

// ---- captures ----

/// Ends a capture that a wait for the device has ended already.
fn end_broken_capture(stream: &Stream) {
    let mut graph = std::ptr::null_mut();
    // SAFETY: the stream is live, the place valid.
    let status = unsafe { sys::cudaStreamEndCapture(stream.as_raw(), &mut graph) };
    assert_eq!(status, sys::cudaError::cudaErrorStreamCaptureInvalidated);
    // SAFETY: no arguments. Takes the error away.
    let _ = unsafe { sys::cudaGetLastError() };
}

#[test]
fn letting_go_ends_no_capture_and_using_again_says_that_it_does() {
    cuda(test_name!(), |device| {
        let (mut first, stream) = buffer(device);
        let (mut second, _) = buffer(device);
        let (mut third, _) = buffer(device);
        let captured = Stream::new(device).unwrap();
        let earlier = Consumer::new(first.export_gpu(&stream).unwrap());
        common::begin_capture(&captured);
        // Neither in the thread that captures nor in another one.
        let tensors = [
            first.export_gpu(&stream).unwrap(),
            second.export_gpu(&stream).unwrap(),
            third.export_cpu().unwrap(),
        ];
        assert_eq!(first.export_gpu(&captured).err(), Some(Error::StreamCapturing));
        drop(tensors);
        earlier.let_go();
        drop(first);
        thread::spawn(move || drop(third)).join().unwrap();
        // It is refused for the stream's sake, before anybody waits.
        assert_eq!(second.copy_to_gpu(.., &captured), Err(Error::StreamCapturing));
        assert_eq!(second.gpu_on(&captured).map(drop), Err(Error::StreamCapturing));
        common::end_capture(&captured);

        common::begin_capture(&captured);
        assert_eq!(second.copy_to_gpu(.., &stream), Err(Error::StreamCapturing));
        assert_eq!(dlpack::reclaim(), Err(Error::StreamCapturing));
        end_broken_capture(&captured);
        second.copy_to_gpu(.., &stream).unwrap();
        all(&gpu(&second), OLD);
    });
}

#[test]
fn a_slot_that_was_given_up_during_a_capture_has_nothing_to_do_with_its_stream_any_more() {
    let test = test_name!();
    cuda(test, |device| {
        let (stream, captured) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        let mut buffer = pool.acquire().unwrap();
        let tensor = buffer.export_cpu().unwrap();
        buffer.gpu_on(&captured).unwrap();
        common::begin_capture(&captured);
        drop((buffer, tensor));
        common::end_capture(&captured);
        dlpack::reclaim().unwrap();
        let mut buffer = pool.acquire().unwrap();
        assert_eq!(pool.stats().in_flight, 0);
        common::begin_capture(&captured);
        buffer.copy_to_gpu(.., &stream).unwrap();
        common::end_capture(&captured);
    });
}

// ---- faults, forks, and the end ----

#[test]
#[cfg(target_os = "linux")]
fn what_cannot_be_waited_for_stays_and_is_given_back_later() {
    let test = test_name!();
    cuda(test, |device| {
        if !common::is_simulated() {
            return common::left_out(test, "faults need the simulated runtime");
        }
        let options = PoolOptions { max_buffers: Some(1), ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, device, 1, options).unwrap();
        let before = live();
        let (mut left, stream) = buffer(device);
        let (mut used, _) = buffer(device);
        drop([left.export_gpu(&stream), used.export_cpu(), pool.acquire().unwrap().export_cpu()]);
        drop(left);
        common::sim::reset();
        common::sim::fail_function(c"cudaDeviceSynchronize", 700);
        let failed = |result: Result<()>| {
            let Err(Error::Cuda { code, call }) = result else { panic!("{result:?}") };
            assert_eq!((code.0, call), (700, "cudaDeviceSynchronize"));
        };
        for _ in 0..2 {
            failed(used.cpu_mut().map(drop));
            failed(used.copy_to_gpu(.., &stream));
            failed(dlpack::reclaim());
            assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 1 }));
            // Without what was left behind.
            drop(CpuGpuBuffer::<u8>::new(9, device).unwrap());
            assert_eq!(more(before), Some([2, 2]));
        }
        common::sim::heal();
        all(used.cpu_mut().unwrap(), OLD);
        drop(used);
        drop(pool.acquire().unwrap());
        assert_eq!(more(before), Some([0, 0]));
        // Where CUDA answers nothing any more, letting go is as quiet as ever.
        let (mut broken, _) = buffer(device);
        let tensor = broken.export_gpu(&stream).unwrap();
        common::sim::reset();
        common::sim::break_at(1, 700);
        drop(broken);
        drop(tensor);
        assert_eq!(common::sim::calls(), 0, "letting go calls CUDA");
        assert!(dlpack::reclaim().is_err());
        common::sim::heal();
        dlpack::reclaim().unwrap();
        assert_eq!(more(before), Some([0, 0]));
    });
}

static KEPT: Mutex<Vec<Consumer>> = Mutex::new(Vec::new());

extern "C" fn let_kept_go() {
    KEPT.lock().unwrap().drain(..).for_each(Consumer::let_go);
}

#[test]
#[cfg(target_os = "linux")]
fn tensors_may_be_let_go_in_a_forked_child_and_after_the_runtimes_end() {
    let test = test_name!();
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    // SAFETY: the handler is a function of this program's and does not unwind. Registered before the first use of
    // CUDA, so that it runs after the runtime's end.
    assert_eq!(unsafe { libc::atexit(let_kept_go) }, 0);
    for device in common::devices() {
        let calls = || match common::is_simulated() {
            true => common::sim::calls(),
            false => 0,
        };
        let (mut buffer, stream) = buffer(device);
        let (mut gone, _) = self::buffer(device);
        let pool = BufferPool::<u32>::new(WORDS, device, 1).unwrap();
        let mut pooled = pool.acquire().unwrap();
        let mut tensors = vec![buffer.export_gpu(&stream).unwrap()];
        for lent in [&mut buffer, &mut gone, &mut pooled] {
            tensors.push(lent.export_cpu().unwrap());
        }
        drop(gone);
        let before = if device == Device::Cpu { 0 } else { calls() };
        // SAFETY: no other thread of this process is within the allocator: streams only wait here.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if device != Device::Cpu {
                    assert_eq!(buffer.export_cpu().err(), Some(Error::Forked));
                    assert_eq!(buffer.export_gpu(&stream).err(), Some(Error::Forked));
                    // SAFETY: it is refused.
                    let unguarded = unsafe { buffer.export_gpu_unguarded() };
                    assert_eq!(unguarded.err(), Some(Error::Forked));
                    assert_eq!(dlpack::reclaim(), Err(Error::Forked));
                }
                drop(pooled);
                drop(tensors);
                drop((buffer, pool));
                if device != Device::Cpu {
                    assert_eq!(calls(), before, "the child called CUDA");
                }
            }));
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(outcome.is_err().into()) };
        }
        let mut status = -1;
        // SAFETY: the child is ours, the place valid.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child failed");
        let mut tensors = tensors.into_iter().map(Consumer::new);
        tensors.next().unwrap().let_go();
        buffer.fill_gpu(NEW, &stream).unwrap();
        // The rest is let go at the end, some after their buffers.
        KEPT.lock().unwrap().extend(tensors);
        drop((pooled, pool));
        common::forget(buffer);
    }
}
