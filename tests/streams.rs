//! Streams and events: order, ownership, and no change of the caller's current device.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use common::sim::{self, Held};
use common::{Gate, all, test_name};
use cpu_gpu_buffer::{
    CpuGpuBuffer, Device, Error, Stream, StreamFlags, StreamOptions, WaitPolicy, sys,
};

const SUCCESS: sys::cudaError_t = sys::cudaError::cudaSuccess;

#[test]
fn an_event_completes_when_the_work_before_it_has() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let before = stream.record().unwrap();
    before.synchronize().unwrap();
    let gate = Gate::close(&stream);
    let after = stream.record().unwrap();
    gate.passes(|| {
        assert!(before.is_complete().unwrap());
        assert!(!after.is_complete().unwrap());
        assert!(!stream.is_idle().unwrap());
    });
    after.synchronize().unwrap();
    assert!(after.is_complete().unwrap());
    stream.synchronize().unwrap();
    assert!(stream.is_idle().unwrap());
    assert_eq!(before.device(), device);
}

#[test]
fn a_stream_that_waits_for_an_event_runs_after_it() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (first, second) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let host = Stream::new(Device::Cpu).unwrap();
    let gate = Gate::close(&first);
    let event = first.record().unwrap();
    second.wait(&event).unwrap();
    gate.passes(|| assert!(!second.is_idle().unwrap()));
    second.synchronize().unwrap();
    // A stream of the CPU does its work at once, so its caller waits.
    let gate = Gate::close(&first);
    let event = first.record().unwrap();
    gate.waits(|| host.wait(&event).unwrap());
    assert!(event.is_complete().unwrap());
}

#[test]
fn an_event_seen_complete_answers_for_the_transfers_before_it() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    for wait in [WaitPolicy::DeviceDefault, WaitPolicy::Block] {
        let options = StreamOptions { wait, priority: -1, ..Default::default() };
        let stream = Stream::with_options(device, options).unwrap();
        let mut buffer = CpuGpuBuffer::<u32>::new(1 << 16, device).unwrap();
        buffer.cpu_mut().unwrap().fill(9);
        let gate = Gate::close(&stream);
        buffer.copy_to_gpu(.., &stream).unwrap();
        let event = stream.record().unwrap();
        gate.waits(|| event.synchronize().unwrap());
        buffer.copy_to_cpu(.., &stream).unwrap();
        all(buffer.cpu().unwrap(), 9);
        let gate = Gate::close(&stream);
        buffer.fill_gpu(4, &stream).unwrap();
        gate.waits(|| stream.synchronize().unwrap());
        buffer.copy_to_cpu(.., &stream).unwrap();
        all(buffer.cpu().unwrap(), 4);
    }
}

/// Keeps a raw stream alive, and says when it no longer does.
struct Owner(sys::cudaStream_t, Arc<AtomicBool>);

// SAFETY: a stream may be used from any thread.
unsafe impl Send for Owner {}
// SAFETY: as above.
unsafe impl Sync for Owner {}

impl Drop for Owner {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
        // SAFETY: the last use of the stream.
        assert_eq!(unsafe { sys::cudaStreamDestroy(self.0) }, SUCCESS);
    }
}

#[test]
fn the_owner_of_a_foreign_stream_is_kept_while_a_buffer_remembers_it() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let gone = Arc::new(AtomicBool::new(false));
    let mut raw = std::ptr::null_mut();
    common::use_first_device();
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaStreamCreateWithFlags(&mut raw, 1) }, SUCCESS);
    let owner = Arc::new(Owner(raw, Arc::clone(&gone)));
    // SAFETY: the owner keeps the stream.
    let stream = unsafe { Stream::from_raw(raw, device, Some(owner)) }.unwrap();
    assert_eq!(stream.as_raw(), raw);
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 16, device).unwrap();
    buffer.cpu_mut().unwrap().fill(3);
    let gate = Gate::close(&stream);
    buffer.copy_to_gpu(.., &stream).unwrap();
    drop(stream);
    assert!(!gone.load(Ordering::SeqCst));
    gate.waits(|| buffer.cpu_mut().unwrap().fill(0));
    drop(buffer);
    assert!(gone.load(Ordering::SeqCst));
}

#[test]
fn an_owner_that_panics_when_it_is_let_go_leaves_the_buffer_whole() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    struct Panicking;
    impl Drop for Panicking {
        fn drop(&mut self) {
            if !thread::panicking() {
                panic!("let go");
            }
        }
    }
    // SAFETY: the legacy stream lives as long as its context.
    let foreign = || unsafe {
        Stream::from_raw(std::ptr::null_mut(), device, Some(Arc::new(Panicking))).unwrap()
    };
    let ours = Stream::new(device).unwrap();
    let catch = |action: &mut dyn FnMut()| {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
        assert!(caught.is_err(), "nothing was let go");
    };
    let mut buffer = CpuGpuBuffer::<u32>::new(64, device).unwrap();

    buffer.cpu_mut().unwrap().fill(1);
    buffer.copy_to_gpu(.., &foreign()).unwrap();
    catch(&mut || buffer.copy_to_gpu(.., &ours).unwrap());
    buffer.cpu_mut().unwrap().fill(2);
    buffer.copy_to_gpu(.., &ours).unwrap();

    // A device use on the foreign stream, and a fresh device side.
    buffer.gpu_on(&foreign()).unwrap();
    buffer.resize(32).unwrap();
    buffer.cpu_mut().unwrap().fill(7);
    buffer.copy_to_gpu(.., &ours).unwrap();
    buffer.cpu_mut().unwrap().fill(0);
    buffer.copy_to_cpu(.., &ours).unwrap();
    all(buffer.cpu().unwrap(), 7);
    catch(&mut || {
        buffer.gpu_on(&ours).unwrap();
    });

    // Growing lets go of everything that the smaller memory remembered.
    buffer.copy_to_cpu(.., &foreign()).unwrap();
    catch(&mut || buffer.resize(1 << 20).unwrap());
    assert_eq!(buffer.shape(), [1 << 20]);
    all(buffer.cpu().unwrap(), 0);
    buffer.fill(3, &ours).unwrap();
    buffer.copy_to_cpu(.., &ours).unwrap();
    all(buffer.cpu().unwrap(), 3);
}

#[test]
fn an_owner_that_chooses_another_device_when_it_is_let_go_does_not_divert_the_work() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "one CUDA device");
    }
    struct Choosing;
    impl Drop for Choosing {
        fn drop(&mut self) {
            // SAFETY: no pointers.
            assert_eq!(unsafe { sys::cudaSetDevice(1) }, SUCCESS);
        }
    }
    Stream::new(Device::Cuda(1)).unwrap();
    common::use_first_device();
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 16, device).unwrap();
    // SAFETY: the legacy stream lives as long as its context.
    let legacy = |owner| unsafe { Stream::from_raw(std::ptr::null_mut(), device, owner).unwrap() };
    let ours = legacy(None);
    for value in 1..9 {
        buffer.cpu_mut().unwrap().fill(value);
        buffer.copy_to_gpu(.., &legacy(Some(Arc::new(Choosing)))).unwrap();
        // Here the last handle of the other stream goes, and with it its owner.
        buffer.copy_to_gpu(.., &ours).unwrap();
        buffer.fill_cpu(0).unwrap();
        buffer.copy_to_cpu(.., &ours).unwrap();
        all(buffer.cpu().unwrap(), value);
    }
    let mut current = -1;
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaGetDevice(&mut current) }, SUCCESS);
    assert_eq!(current, 0);
}

#[test]
fn the_legacy_stream_of_a_device_can_be_used_from_any_thread() {
    let test = test_name!();
    let Some((first, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        common::left_out(test, "its part with a second device, one device here");
    }
    let devices = [first].into_iter().chain((Device::cuda_count() > 1).then_some(Device::Cuda(1)));
    // The legacy stream under its two names, in a thread that never chose a device and in one that chose
    // the first.
    for device in devices {
        for (raw, chosen) in [(0, false), (0, true), (1, false), (1, true)] {
            let raw = std::ptr::without_provenance_mut(raw);
            // SAFETY: the legacy stream lives as long as its context.
            let legacy = unsafe { Stream::from_raw(raw, device, None) }.unwrap();
            let work = move || {
                if chosen {
                    common::use_first_device();
                }
                let mut buffer = CpuGpuBuffer::<[u8; 3]>::new(1000, device).unwrap();
                buffer.fill([1, 2, 3], &legacy).unwrap();
                buffer.fill_cpu([0; 3]).unwrap();
                buffer.copy_to_cpu(.., &legacy).unwrap();
                assert_eq!(buffer.cpu().unwrap(), [[1, 2, 3]; 1000]);
                buffer.copy_to_gpu(..9, &legacy).unwrap();
                assert!(!legacy.is_idle().unwrap() || buffer.is_idle().unwrap());
                legacy.record().unwrap().synchronize().unwrap();
                legacy.synchronize().unwrap();
                let options = StreamOptions { flags: StreamFlags::empty(), ..Default::default() };
                let other = Stream::with_options(device, options).unwrap();
                buffer.copy_to_cpu(.., &other).unwrap();
                assert_eq!(buffer.cpu().unwrap(), [[1, 2, 3]; 1000]);
            };
            thread::spawn(work).join().unwrap();
        }
    }
}

#[test]
fn the_callers_current_device_is_left_alone() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "one CUDA device");
    }
    // SAFETY: no pointers.
    assert_eq!(unsafe { sys::cudaSetDevice(1) }, SUCCESS);
    let (stream, far) = (Stream::new(device).unwrap(), Stream::new(Device::Cuda(1)).unwrap());
    // SAFETY: the legacy stream lives as long as its context.
    let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), device, None) }.unwrap();
    let mut buffer = CpuGpuBuffer::<[u8; 3]>::new(1000, device).unwrap();
    buffer.fill([1, 2, 3], &stream).unwrap();
    buffer.fill_cpu([0; 3]).unwrap();
    buffer.copy_to_cpu(.., &legacy).unwrap();
    far.wait(&stream.record().unwrap()).unwrap();
    far.synchronize().unwrap();
    assert_eq!(buffer.cpu().unwrap(), [[1, 2, 3]; 1000]);
    buffer.resize(5000).unwrap();
    device.memory().unwrap();
    drop((buffer, stream));
    let mut current = -1;
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaGetDevice(&mut current) }, SUCCESS);
    assert_eq!(current, 1);
}

#[test]
fn a_device_that_is_not_current_is_used_like_one_that_is() {
    let test = test_name!();
    let Some((_, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "one CUDA device");
    }
    fn fills<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(value: T) {
        let far = Device::Cuda(1);
        let stream = Stream::new(far).unwrap();
        let mut buffer = CpuGpuBuffer::<T>::new(5000, far).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), vec![T::zeroed(); 5000]);
        buffer.fill_gpu(value, &stream).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), vec![value; 5000]);
        assert!(buffer.is_idle().unwrap());
        buffer.resize(10_000).unwrap();
    }
    let all = || {
        fills(7u8);
        fills(0x0102u16);
        fills(1.5f32);
        fills([1u8, 2, 3]);
        fills([5u8; 4001]);
    };
    // With another device current, and in a thread that never chose one.
    common::use_first_device();
    all();
    thread::spawn(all).join().unwrap();
}

#[test]
fn streams_of_the_cpu_are_always_done() {
    let stream = Stream::new(Device::Cpu).unwrap();
    assert!(stream.as_raw().is_null());
    assert!(stream.is_idle().unwrap());
    let (first, second) = (stream.record().unwrap(), stream.record().unwrap());
    assert!(first.is_complete().unwrap());
    assert!(second.elapsed_since(&first).unwrap() < Duration::from_secs(60));
    stream.wait(&second).unwrap();
    let clone = stream.clone();
    assert_eq!(clone.device(), Device::Cpu);
    assert!(!matches!(clone.synchronize(), Err(Error::StreamCapturing)));
}

/// Whether the last error of the raw runtime's calls in this thread is still this.
fn last_error() -> sys::cudaError_t {
    // SAFETY: no arguments.
    unsafe { sys::cudaPeekAtLastError() }
}

#[test]
fn asking_a_busy_stream_leaves_another_librarys_last_error_alone() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let gate = Gate::close(&stream);
    gate.passes(|| {
        // SAFETY: no pointers.
        let status = unsafe { sys::cudaSetDevice(1000) };
        assert_eq!(status, sys::cudaError::cudaErrorInvalidDevice);
        assert!(!stream.is_idle().unwrap());
        assert_eq!(last_error(), status);
    });
    stream.synchronize().unwrap();
    assert!(stream.is_idle().unwrap());
    // SAFETY: no arguments.
    assert_eq!(unsafe { sys::cudaGetLastError() }, sys::cudaError::cudaErrorInvalidDevice);
}

#[test]
fn the_time_between_two_events_is_the_devices_in_seconds() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let warm = Gate::close(&stream);
    warm.open();
    stream.synchronize().unwrap();
    let span = Duration::from_millis(50);

    let begin = Instant::now();
    let before = stream.record().unwrap();
    before.synchronize().unwrap();
    let gate = Gate::close(&stream);
    let after = stream.record().unwrap();
    thread::sleep(span);
    gate.open();
    let elapsed = after.elapsed_since(&before).unwrap();
    let all = begin.elapsed();

    // The two clocks may differ a little.
    assert!(elapsed >= span * 99 / 100, "{elapsed:?} for at least {span:?}");
    assert!(elapsed <= all * 101 / 100, "{elapsed:?} within {all:?}");
    assert_eq!(before.elapsed_since(&after), Err(Error::EventOrder));
}

#[cfg(target_os = "linux")]
#[test]
fn the_time_between_events_is_waited_for_also_when_a_later_one_was_seen_first() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back on the simulated runtime alone");
    }
    let stream = Stream::new(device).unwrap();
    let before = stream.record().unwrap();
    // One event has its ticket, and is recorded only behind the gate; by then a later one has been
    // seen.
    let held = Held::next(c"cuEventRecord");
    let (late, gate) = thread::scope(|scope| {
        let late = scope.spawn(|| stream.record().unwrap());
        held.wait();
        stream.record().unwrap().synchronize().unwrap();
        let gate = Gate::close(&stream);
        drop(held);
        (late.join().unwrap(), gate)
    });
    assert!(late.is_complete().unwrap(), "what was sent before it has finished");
    let elapsed = gate.waits(|| late.elapsed_since(&before));
    assert!(elapsed.unwrap() >= Duration::from_millis(90));
}

/// Begins to capture the stream, and ends that when it goes.
#[cfg(target_os = "linux")]
struct Captured<'a>(&'a Stream);

#[cfg(target_os = "linux")]
impl Captured<'_> {
    /// Runs `action` in another thread, and begins to capture the stream when it makes its next
    /// call of this function: after it has asked whether the stream is being captured.
    fn while_calling<'a, R: Send>(
        function: &std::ffi::CStr,
        stream: &'a Stream,
        action: impl FnOnce() -> R + Send,
    ) -> (Captured<'a>, R) {
        let held = Held::next(function);
        thread::scope(|scope| {
            let action = scope.spawn(action);
            held.wait();
            common::begin_capture(stream);
            let captured = Captured(stream);
            drop(held);
            (captured, action.join().unwrap())
        })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Captured<'_> {
    fn drop(&mut self) {
        common::end_capture(self.0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_copy_that_another_threads_capture_swallows_is_refused_and_not_taken_for_finished() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back on the simulated runtime alone");
    }
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    let mut other = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    buffer.copy_to_gpu(.., &stream).unwrap();
    buffer.cpu_mut().unwrap().fill(7);
    let upload = || buffer.copy_to_gpu(.., &stream);
    let (captured, answer) = Captured::while_calling(c"cuMemcpyHtoDAsync", &stream, upload);
    assert_eq!(answer, Err(Error::StreamCapturing));
    assert_eq!(buffer.try_cpu_mut().err(), Some(Error::StreamCapturing), "nothing is known");
    drop(captured);

    // Nor does a later copy's ticket say that it has run.
    other.copy_to_gpu(.., &stream).unwrap();
    other.synchronize().unwrap();
    let gate = Gate::close(&stream);
    assert!(gate.passes(|| buffer.try_cpu_mut().unwrap().is_none()), "the record is not open");
    buffer.copy_to_gpu(.., &stream).unwrap();
    gate.open();
    buffer.fill_cpu(0).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    all(buffer.cpu().unwrap(), 7);
}

#[cfg(target_os = "linux")]
#[test]
fn an_event_or_a_fill_that_another_threads_capture_swallows_is_refused() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back on the simulated runtime alone");
    }
    let stream = Stream::new(device).unwrap();
    let record = || stream.record().map(drop);
    let (captured, answer) = Captured::while_calling(c"cuEventRecord", &stream, record);
    drop(captured);
    assert_eq!(answer, Err(Error::StreamCapturing));

    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    let fill = || buffer.fill_gpu(0x0101_0101, &stream);
    let (captured, answer) = Captured::while_calling(c"cudaMemsetAsync", &stream, fill);
    drop(captured);
    assert_eq!(answer, Err(Error::StreamCapturing));
    // The device side is still to be zeroed.
    buffer.cpu_mut().unwrap().fill(7);
    buffer.copy_to_cpu(.., &stream).unwrap();
    all(buffer.cpu().unwrap(), 0);
}

#[test]
fn asking_about_work_on_the_legacy_stream_leaves_the_capture_of_a_blocking_stream_alone() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let options = StreamOptions { flags: StreamFlags::empty(), ..Default::default() };
    let blocking = Stream::with_options(device, options).unwrap();
    // SAFETY: the legacy stream lives as long as its context.
    let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), device, None) }.unwrap();
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    buffer.gpu_on(&legacy).unwrap();
    common::begin_capture(&blocking);
    assert_eq!(buffer.is_idle(), Err(Error::StreamCapturing));
    assert_eq!(buffer.synchronize(), Err(Error::StreamCapturing));
    assert_eq!(legacy.record().map(drop), Err(Error::StreamCapturing));
    assert_eq!(legacy.is_idle(), Err(Error::StreamCapturing));
    common::end_capture(&blocking);
    buffer.synchronize().unwrap();
    assert!(buffer.is_idle().unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn streams_whose_wait_policies_alternate_make_no_event_for_each_copy() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !common::is_simulated() {
        return common::left_out(test, "calls are counted on the simulated runtime alone");
    }
    let streams = [WaitPolicy::DeviceDefault, WaitPolicy::Block].map(|wait| {
        Stream::with_options(device, StreamOptions { wait, ..Default::default() }).unwrap()
    });
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    let mut round = |value| {
        for stream in &streams {
            buffer.cpu_mut().unwrap().fill(value);
            buffer.copy_to_gpu(.., stream).unwrap();
            buffer.fill_cpu(0).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            all(buffer.cpu().unwrap(), value);
            buffer.gpu_on(stream).unwrap();
        }
    };
    round(1);
    sim::reset();
    (2..20).for_each(round);
    assert_eq!(sim::calls_of(c"cudaEventCreateWithFlags"), 0);
}

#[test]
fn a_broken_device_that_is_current_does_not_spoil_streams_and_events_of_another() {
    let test = test_name!();
    // The context stays broken.
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("left out") {
            common::left_out(test, "see its own process");
        }
        return assert!(
            output.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    let Some((device, _turn)) = common::cuda(test) else { return };
    if Device::cuda_count() < 2 {
        return common::left_out(test, "one CUDA device");
    }
    let stream = Stream::new(device).unwrap();
    let events = [stream.record().unwrap(), stream.record().unwrap()];
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    buffer.cpu_mut().unwrap().fill(5);
    common::break_device(1);
    #[cfg(target_os = "linux")]
    let before = common::is_simulated().then(sim::live);

    events[1].elapsed_since(&events[0]).unwrap();
    buffer.copy_to_gpu(.., &stream).unwrap();
    buffer.fill_cpu(0).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    all(buffer.cpu().unwrap(), 5);
    assert!(Stream::new(device).unwrap().record().unwrap().elapsed_since(&events[0]).is_ok());
    assert!(stream.is_idle().unwrap());
    drop((stream, events, buffer));
    #[cfg(target_os = "linux")]
    if let Some([device, pinned, streams, events, graphs]) = before {
        // The buffer's records made two more.
        // Its host side was a piece of a chunk, which stays.
        assert_eq!(sim::live(), [device - 1, pinned, streams - 1, events - 2, graphs]);
    }
}

/// Begins to capture a stream when it is dropped.
struct Capturer(Stream);

impl Drop for Capturer {
    fn drop(&mut self) {
        common::begin_capture(&self.0);
    }
}

#[test]
fn a_copy_that_a_capture_takes_after_the_stream_was_asked_is_refused_and_not_taken_for_finished() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, foreign) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    buffer.fill(3, &stream).unwrap();
    // The buffer is the last that remembers this handle. It lets the owner go between its question
    // and its copy.
    // SAFETY: `foreign` outlives the buffer's use of it.
    let borrowed = unsafe {
        Stream::from_raw(foreign.as_raw(), device, Some(Arc::new(Capturer(stream.clone()))))
    };
    buffer.copy_to_gpu(.., &borrowed.unwrap()).unwrap();
    buffer.cpu_mut().unwrap().fill(7);
    assert_eq!(buffer.copy_to_gpu(.., &stream), Err(Error::StreamCapturing));
    assert_eq!(buffer.try_cpu_mut().err(), Some(Error::StreamCapturing), "nothing is known");
    common::end_capture(&stream);

    // A later copy's ticket does not say that this one has run, and what is copied again arrives.
    let mut other = CpuGpuBuffer::<u32>::new(1 << 10, device).unwrap();
    other.copy_to_gpu(.., &stream).unwrap();
    other.synchronize().unwrap();
    buffer.copy_to_gpu(.., &stream).unwrap();
    buffer.fill_cpu(0).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    all(buffer.cpu().unwrap(), 7);
}

#[test]
fn a_clone_of_an_event_outlives_the_original_and_its_stream() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let gate = common::Gate::close(&stream);
    let event = stream.record().unwrap();
    let clone = event.clone();
    drop((event, stream));
    gate.passes(|| {
        assert!(!clone.is_complete().unwrap());
        other.wait(&clone).unwrap();
        assert!(!other.is_idle().unwrap());
    });
    clone.synchronize().unwrap();
    other.synchronize().unwrap();
    assert!(clone.is_complete().unwrap());
}
