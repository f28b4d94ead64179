//! The rules of the simulated runtime, one by one, tested with raw functions.
//!
//! In the simulation each rule is as strict as CUDA allows. On hardware the result must be one that
//! the simulation knows. Each test runs in a subprocess, since some leave a broken context.

mod common;

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::{Gate, test_name};
use cpu_gpu_buffer::{Device, Stream, StreamFlags, StreamOptions, sys};
use sys::cudaError as Status;
use sys::cudaMemcpyKind as Kind;
use sys::cudaStreamCaptureMode as Mode;
use sys::cudaStreamCaptureStatus as Capture;

const SUCCESS: Status = Status::cudaSuccess;
const WORDS: usize = 1 << 10;

/// Runs a test in a process of its own, on the first device.
fn rule(test: &str, variables: &[(&str, &str)], body: impl FnOnce(Device)) {
    if common::is_subprocess() {
        let Some((device, _turn)) = common::cuda(test) else { return };
        common::use_first_device();
        return body(device);
    }
    let output = common::in_subprocess(test, variables);
    let said = String::from_utf8_lossy(&output.stderr);
    for line in said.lines().filter(|line| line.contains("left out") || line.contains("on CUDA")) {
        common::left_out(test, line);
    }
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
}

/// The simulation's answer is the strict one. CUDA's may be another of those that are allowed, and
/// is told.
#[track_caller]
fn strict<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, strict: T, also: &[T]) {
    if common::is_simulated() {
        return assert_eq!(seen, strict, "{what}");
    }
    eprintln!("on CUDA, {what}: {seen:?}; simulated: {strict:?}");
    assert!(seen == strict || also.contains(&seen), "{what}: {seen:?} is not expected");
}

fn stream(device: Device) -> Stream {
    Stream::new(device).unwrap()
}

/// A stream that waits for the legacy stream, which waits for it.
fn blocking(device: Device) -> Stream {
    let options = StreamOptions { flags: StreamFlags::empty(), ..Default::default() };
    Stream::with_options(device, options).unwrap()
}

fn begin(stream: &Stream, mode: Mode) -> Status {
    // SAFETY: the stream is live.
    unsafe { sys::cudaStreamBeginCapture(stream.as_raw(), mode) }
}

fn end(stream: &Stream) -> Status {
    let mut graph = ptr::null_mut();
    // SAFETY: the stream is live, the place valid.
    let status = unsafe { sys::cudaStreamEndCapture(stream.as_raw(), &mut graph) };
    assert_eq!(status == SUCCESS, !graph.is_null());
    if !graph.is_null() {
        // SAFETY: the capture made it.
        assert_eq!(unsafe { sys::cudaGraphDestroy(graph) }, SUCCESS);
    }
    status
}

fn capture_status(stream: &Stream) -> Capture {
    let mut status = Capture::cudaStreamCaptureStatusNone;
    // SAFETY: the stream is live, the place valid.
    let answer = unsafe { sys::cudaStreamIsCapturing(stream.as_raw(), &mut status) };
    assert_eq!(answer, SUCCESS);
    status
}

fn event() -> sys::cudaEvent_t {
    let mut event = ptr::null_mut();
    let flags = sys::cudaEventDisableTiming;
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaEventCreateWithFlags(&mut event, flags) }, SUCCESS);
    event
}

fn record(event: sys::cudaEvent_t, stream: &Stream) -> Status {
    // SAFETY: both are live.
    unsafe { sys::cudaEventRecord(event, stream.as_raw()) }
}

fn wait(stream: &Stream, event: sys::cudaEvent_t) -> Status {
    // SAFETY: both are live.
    unsafe { sys::cudaStreamWaitEvent(stream.as_raw(), event, 0) }
}

/// Waits for an event of the first of two streams on the second.
fn lead(from: &Stream, to: &Stream) -> Status {
    let event = event();
    assert_eq!(record(event, from), SUCCESS);
    wait(to, event)
}

/// Device memory, of the device that is current.
fn malloc(bytes: usize) -> *mut u32 {
    let mut address = ptr::null_mut();
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaMalloc(&mut address, bytes) }, SUCCESS);
    address.cast()
}

fn free(address: *mut u32) -> Status {
    // SAFETY: the callers allocated it.
    unsafe { sys::cudaFree(address.cast()) }
}

/// Pinned words, never given back.
fn pinned(value: u32) -> &'static mut [u32] {
    let mut address: *mut c_void = ptr::null_mut();
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaHostAlloc(&mut address, WORDS * 4, 0) }, SUCCESS);
    // SAFETY: as large, and any bits are words.
    let words = unsafe { std::slice::from_raw_parts_mut(address.cast::<u32>(), WORDS) };
    words.fill(value);
    words
}

fn upload(to: *mut u32, from: *const u32, stream: &Stream) -> Status {
    let kind = Kind::cudaMemcpyHostToDevice;
    // SAFETY: both have so many words, and the callers keep them.
    unsafe { sys::cudaMemcpyAsync(to.cast(), from.cast(), WORDS * 4, kind, stream.as_raw()) }
}

fn synchronize(stream: &Stream) -> Status {
    // SAFETY: the stream is live.
    unsafe { sys::cudaStreamSynchronize(stream.as_raw()) }
}

fn words(from: *const u32) -> Vec<u32> {
    common::device_words(Device::Cuda(0), from, WORDS)
}

/// This thread's calls end no capture of another mode.
fn relax() {
    let mut mode = Mode::cudaStreamCaptureModeRelaxed;
    // SAFETY: a valid place.
    assert_eq!(unsafe { sys::cudaThreadExchangeStreamCaptureMode(&mut mode) }, SUCCESS);
}

// ---- captures ----

#[test]
fn a_stream_that_waits_for_an_event_of_a_capture_joins_it() {
    let test = test_name!();
    rule(test, &[], |device| {
        let (origin, other) = (stream(device), stream(device));
        let (to, ones, twos) = (malloc(WORDS * 4), pinned(1), pinned(2));
        assert_eq!(upload(to, ones.as_ptr(), &other), SUCCESS);
        assert_eq!(synchronize(&other), SUCCESS);

        assert_eq!(begin(&origin, Mode::cudaStreamCaptureModeGlobal), SUCCESS);
        assert_eq!(lead(&origin, &other), SUCCESS);
        assert_eq!(capture_status(&other), Capture::cudaStreamCaptureStatusActive);
        assert_eq!(upload(to, twos.as_ptr(), &other), SUCCESS);
        assert_eq!(lead(&other, &origin), SUCCESS);
        assert_eq!(end(&origin), SUCCESS);

        assert_eq!(capture_status(&other), Capture::cudaStreamCaptureStatusNone);
        assert_eq!(synchronize(&other), SUCCESS);
        common::all(&words(to), 1);
    });
}

#[test]
fn joined_work_that_is_not_joined_back_spoils_the_capture() {
    rule(test_name!(), &[], |device| {
        let (origin, other) = (stream(device), stream(device));
        let (to, ones) = (malloc(WORDS * 4), pinned(1));
        assert_eq!(begin(&origin, Mode::cudaStreamCaptureModeGlobal), SUCCESS);
        assert_eq!(lead(&origin, &other), SUCCESS);
        assert_eq!(upload(to, ones.as_ptr(), &other), SUCCESS);
        assert_eq!(end(&origin), Status::cudaErrorStreamCaptureUnjoined);
        assert_eq!(capture_status(&origin), Capture::cudaStreamCaptureStatusNone);
        assert_eq!(capture_status(&other), Capture::cudaStreamCaptureStatusNone);
    });
}

#[test]
fn a_capture_that_waits_for_an_event_from_outside_is_void() {
    rule(test_name!(), &[], |device| {
        let (captured, other) = (stream(device), stream(device));
        let event = event();
        assert_eq!(record(event, &other), SUCCESS);
        assert_eq!(begin(&captured, Mode::cudaStreamCaptureModeGlobal), SUCCESS);
        assert_eq!(wait(&captured, event), Status::cudaErrorStreamCaptureIsolation);
        assert_eq!(capture_status(&captured), Capture::cudaStreamCaptureStatusInvalidated);
        assert_eq!(end(&captured), Status::cudaErrorStreamCaptureInvalidated);
        assert_eq!(capture_status(&captured), Capture::cudaStreamCaptureStatusNone);
    });
}

#[test]
fn two_captures_do_not_become_one() {
    rule(test_name!(), &[], |device| {
        let (one, two) = (stream(device), stream(device));
        assert_eq!(begin(&one, Mode::cudaStreamCaptureModeRelaxed), SUCCESS);
        assert_eq!(begin(&two, Mode::cudaStreamCaptureModeRelaxed), SUCCESS);
        assert_eq!(lead(&one, &two), Status::cudaErrorStreamCaptureMerge);
        let void = Status::cudaErrorStreamCaptureInvalidated;
        strict("the capture whose event was waited for", end(&one), void, &[SUCCESS]);
        assert_eq!(end(&two), void);
    });
}

#[test]
fn the_thread_and_the_stream_that_began_a_capture_end_it() {
    rule(test_name!(), &[], |device| {
        let (origin, other) = (stream(device), stream(device));
        assert_eq!(begin(&origin, Mode::cudaStreamCaptureModeGlobal), SUCCESS);
        let ended = thread::scope(|scope| scope.spawn(|| end(&origin)).join().unwrap());
        assert_eq!(ended, Status::cudaErrorStreamCaptureWrongThread);
        // The capture is over.
        let over = Status::cudaErrorIllegalState;
        let void = Status::cudaErrorStreamCaptureInvalidated;
        strict("end after another thread tried", end(&origin), over, &[SUCCESS, void]);

        assert_eq!(begin(&origin, Mode::cudaStreamCaptureModeGlobal), SUCCESS);
        assert_eq!(lead(&origin, &other), SUCCESS);
        assert_eq!(end(&other), Status::cudaErrorStreamCaptureUnmatched);
        let void = Status::cudaErrorStreamCaptureInvalidated;
        strict("end after a joined stream tried", end(&origin), void, &[SUCCESS]);
    });
}

#[test]
fn the_legacy_stream_cannot_be_captured() {
    rule(test_name!(), &[], |device| {
        // SAFETY: the legacy stream lives as long as its context.
        let legacy = unsafe { Stream::from_raw(ptr::null_mut(), device, None) }.unwrap();
        let refused = Status::cudaErrorStreamCaptureUnsupported;
        assert_eq!(begin(&legacy, Mode::cudaStreamCaptureModeRelaxed), refused);
        assert_eq!(synchronize(&legacy), SUCCESS);
    });
}

#[test]
fn work_on_the_legacy_stream_voids_the_capture_of_a_blocking_stream() {
    let test = test_name!();
    rule(test, &[], |device| {
        let (captured, to) = (blocking(device), malloc(WORDS * 4));
        assert_eq!(begin(&captured, Mode::cudaStreamCaptureModeThreadLocal), SUCCESS);
        // SAFETY: memory of the test's own.
        let set = unsafe { sys::cudaMemsetAsync(to.cast(), 0, WORDS * 4, ptr::null_mut()) };
        assert_eq!(set, Status::cudaErrorStreamCaptureImplicit);
        let void = Status::cudaErrorStreamCaptureInvalidated;
        strict("end after legacy work", end(&captured), void, &[SUCCESS]);
        // To ask is an error, too, and voids nothing.
        assert_eq!(begin(&captured, Mode::cudaStreamCaptureModeThreadLocal), SUCCESS);
        let mut status = Capture::cudaStreamCaptureStatusNone;
        // SAFETY: a valid place.
        let asked = unsafe { sys::cudaStreamIsCapturing(ptr::null_mut(), &mut status) };
        assert_eq!(asked, Status::cudaErrorStreamCaptureImplicit);
        assert_eq!(end(&captured), SUCCESS);
    });
}

#[test]
fn asking_for_an_event_of_a_capture_is_an_error() {
    rule(test_name!(), &[], |device| {
        let (captured, event) = (stream(device), event());
        relax();
        assert_eq!(begin(&captured, Mode::cudaStreamCaptureModeRelaxed), SUCCESS);
        assert_eq!(record(event, &captured), SUCCESS);
        // SAFETY: the event is live.
        let asked = unsafe { sys::cudaEventQuery(event) };
        let refused = Status::cudaErrorInvalidValue;
        strict("querying it", asked, refused, &[Status::cudaErrorCapturedEvent]);
        let void = Status::cudaErrorStreamCaptureInvalidated;
        strict("end after a query", end(&captured), void, &[SUCCESS]);
        // Nor is it ever reached.
        // SAFETY: the event is live.
        let asked = unsafe { sys::cudaEventQuery(event) };
        strict("querying it afterwards", asked, refused, &[Status::cudaErrorCapturedEvent]);
        // SAFETY: the event is live.
        let waited = unsafe { sys::cudaEventSynchronize(event) };
        strict("waiting for it", waited, refused, &[Status::cudaErrorCapturedEvent]);
        assert_eq!(record(event, &captured), SUCCESS);
        // SAFETY: the event is live.
        assert_eq!(unsafe { sys::cudaEventSynchronize(event) }, SUCCESS);
    });
}

// ---- memory ----

#[test]
fn registered_memory_has_a_device_address_if_it_is_mapped() {
    rule(test_name!(), &[], |_| {
        let address = |host: *mut c_void| {
            let mut mapped = ptr::null_mut();
            // SAFETY: a valid place.
            unsafe { sys::cudaHostGetDevicePointer(&mut mapped, host, 0) }
        };
        let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
        let registered = |flags| {
            // SAFETY: not of size 0.
            let page: *mut c_void = unsafe { std::alloc::alloc_zeroed(layout) }.cast();
            // SAFETY: a page of the test's own, given back when it is no longer registered.
            assert_eq!(unsafe { sys::cudaHostRegister(page, 4096, flags) }, SUCCESS);
            let status = address(page);
            // SAFETY: no arguments.
            let _ = unsafe { sys::cudaGetLastError() };
            // SAFETY: registered above, and in no use.
            assert_eq!(unsafe { sys::cudaHostUnregister(page) }, SUCCESS);
            // SAFETY: allocated above with this layout.
            unsafe { std::alloc::dealloc(page.cast(), layout) };
            status
        };
        assert_eq!(registered(sys::cudaHostRegisterDefault), SUCCESS);
        assert_eq!(registered(sys::cudaHostRegisterMapped), SUCCESS);
        let refused = Status::cudaErrorInvalidValue;
        let portable = registered(sys::cudaHostRegisterPortable);
        strict("the address of portable memory", portable, refused, &[SUCCESS]);
        // What is allocated is mapped, whatever the flags say.
        assert_eq!(address(pinned(0).as_mut_ptr().cast()), SUCCESS);
    });
}

#[test]
fn registrations_are_exact_to_the_byte_and_do_not_overlap() {
    rule(test_name!(), &[], |device| {
        let stream = stream(device);
        let layout = std::alloc::Layout::from_size_align(4 * 4096, 4096).unwrap();
        // SAFETY: not of size 0.
        let pages: *mut u8 = unsafe { std::alloc::alloc_zeroed(layout) };
        let at = |offset: usize| pages.wrapping_add(offset);
        let register = |offset: usize, bytes: usize| {
            // SAFETY: pages of the test's own, which it gives back when they are not registered.
            let status = unsafe { sys::cudaHostRegister(at(offset).cast(), bytes, 3) };
            // SAFETY: no arguments.
            let _ = unsafe { sys::cudaGetLastError() };
            status
        };
        let already = Status::cudaErrorHostMemoryAlreadyRegistered;
        assert_eq!(register(100, 4096), SUCCESS);
        for (offset, bytes) in [(100, 4096), (100, 1), (200, 10), (4195, 1), (0, 101), (0, 8192)] {
            assert_eq!(register(offset, bytes), already, "{bytes} bytes at {offset}");
        }
        // In the same pages.
        for (offset, bytes) in [(0, 100), (4196, 5000)] {
            assert_eq!(register(offset, bytes), SUCCESS, "{bytes} bytes at {offset}");
        }
        let range = |offset: usize| {
            type Attribute = sys::CUpointer_attribute;
            let ask: sys::PFN_cuPointerGetAttribute_v4000 = common::entry(c"cuPointerGetAttribute");
            let (mut kind, mut start, mut bytes) = (0u32, 0u64, 0u64);
            let asked = [
                ((&raw mut kind).cast(), Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE),
                ((&raw mut start).cast(), Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR),
                ((&raw mut bytes).cast(), Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE),
            ]
            .map(|(place, attribute)| {
                // SAFETY: a place of the attribute's type.
                unsafe { ask.unwrap()(place, attribute, at(offset).addr() as u64) }
            });
            if asked == [sys::CUresult::CUDA_SUCCESS; 3] {
                assert_eq!(kind, sys::CUmemorytype::CU_MEMORYTYPE_HOST.0);
                return Some((start as usize - pages.addr(), bytes as usize));
            }
            assert_eq!(asked, [sys::CUresult::CUDA_ERROR_INVALID_VALUE; 3]);
            None
        };
        assert_eq!([0, 99].map(range), [Some((0, 100)); 2]);
        assert_eq!([100, 4195].map(range), [Some((100, 4096)); 2]);
        assert_eq!([4196, 9195].map(range), [Some((4196, 5000)); 2]);
        assert_eq!(range(9196), None);
        for offset in [100, 0, 4196] {
            // SAFETY: registered above, and in no use.
            assert_eq!(unsafe { sys::cudaHostUnregister(at(offset).cast()) }, SUCCESS);
            assert_eq!(range(offset), None);
        }
        stream.synchronize().unwrap();
        // SAFETY: allocated above with this layout.
        unsafe { std::alloc::dealloc(pages, layout) };
    });
}

#[test]
#[cfg(target_os = "linux")]
fn memory_without_write_access_is_registered_as_read_only_and_never_downloaded_to() {
    rule(test_name!(), &[], |device| {
        let stream = stream(device);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let page = unsafe { libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        let register = |flags| {
            // SAFETY: a page of the test's own, which stays mapped.
            let status = unsafe { sys::cudaHostRegister(page, 4096, flags) };
            // SAFETY: no arguments.
            let _ = unsafe { sys::cudaGetLastError() };
            status
        };
        let (refused, flags) = (Status::cudaErrorInvalidValue, sys::cudaHostRegisterMapped);
        let plain = register(flags);
        // Where the device uses the host's page tables, it is not refused.
        strict("registering a page that cannot be written", plain, refused, &[SUCCESS]);
        if plain == SUCCESS {
            // SAFETY: just registered, and in no use.
            assert_eq!(unsafe { sys::cudaHostUnregister(page) }, SUCCESS);
        }
        assert_eq!(register(flags | sys::cudaHostRegisterReadOnly), SUCCESS);
        let device = malloc(4096);
        assert_eq!(upload(device, page.cast(), &stream), SUCCESS);
        let kind = Kind::cudaMemcpyDeviceToHost;
        // SAFETY: the call is refused, or breaks what the test leaves.
        let down =
            unsafe { sys::cudaMemcpyAsync(page, device.cast(), 4096, kind, stream.as_raw()) };
        assert_eq!(down, refused);
        // SAFETY: no arguments.
        let _ = unsafe { sys::cudaGetLastError() };
        assert_eq!(synchronize(&stream), SUCCESS);
        // SAFETY: registered above, and in no use.
        assert_eq!(unsafe { sys::cudaHostUnregister(page) }, SUCCESS);
        assert_eq!(free(device), SUCCESS);
    });
}

#[test]
fn a_kernel_does_not_reach_the_memory_of_another_device_and_a_copy_does() {
    let test = test_name!();
    rule(test, &[], |_| {
        if Device::cuda_count() < 2 {
            return common::left_out(test, "one CUDA device");
        }
        let (to, ones) = (malloc(WORDS * 4), pinned(1));
        let far = stream(Device::Cuda(1));
        assert_eq!(upload(to, ones.as_ptr(), &far), SUCCESS);
        assert_eq!(synchronize(&far), SUCCESS);
        common::all(&words(to), 1);
        common::store_on(1, to, WORDS, 2, &far);
        assert_eq!(synchronize(&far), Status::cudaErrorIllegalAddress);
    });
}

#[test]
fn an_address_is_used_again_at_once() {
    rule(test_name!(), &[], |_| {
        let before = malloc(1 << 22);
        assert_eq!(free(before), SUCCESS);
        let same = malloc(1 << 22) == before;
        strict("the same address", same, true, &[false]);
    });
}

#[test]
fn an_upload_from_pageable_memory_is_read_at_the_call_or_late() {
    rule(test_name!(), &[], |device| {
        let (stream, to) = (stream(device), malloc(WORDS * 4));
        let [mut early, mut late, mut waited] = [false; 3];
        for _ in 0..24 {
            let mut pageable = vec![1u32; WORDS];
            let gate = Gate::close(&stream);
            let ((), before) = gate.during(Duration::from_millis(30), || {
                assert_eq!(upload(to, pageable.as_ptr(), &stream), SUCCESS);
            });
            // What the gate still holds back sees this.
            pageable.fill(2);
            gate.open();
            assert_eq!(synchronize(&stream), SUCCESS);
            match words(to)[0] {
                1 if before => early = true,
                1 => waited = true,
                _ => late = true,
            }
        }
        if common::is_simulated() {
            return assert!(early && late && waited, "{early} {late} {waited}");
        }
        eprintln!("on CUDA, pageable uploads: at the call {early}, late {late}, waited {waited}");
    });
}

#[test]
fn what_is_sent_waits_while_a_queue_is_full() {
    rule(test_name!(), &[], |device| {
        let (stream, to) = (stream(device), malloc(WORDS * 4));
        let gate = Gate::close(&stream);
        let ((), before) = gate.during(Duration::from_millis(500), || {
            for _ in 0..4000 {
                // SAFETY: memory of the test's own.
                let status = unsafe { sys::cudaMemsetAsync(to.cast(), 1, 4, stream.as_raw()) };
                assert_eq!(status, SUCCESS);
            }
        });
        strict("4,000 fills wait", !before, true, &[false]);
        assert_eq!(synchronize(&stream), SUCCESS);
    });
}

/// Whether a call waits for a stream that is held.
fn waits(device: Device, call: impl FnOnce() -> Status) -> bool {
    let stream = stream(device);
    let gate = Gate::close(&stream);
    let (status, before) = gate.during(Duration::from_millis(200), call);
    assert_eq!(status, SUCCESS);
    assert_eq!(synchronize(&stream), SUCCESS);
    !before
}

#[test]
fn releasing_memory_waits_for_nothing_or_for_the_device() {
    let test = test_name!();
    for setting in ["0", "1"] {
        rule(test, &[("CUDART_SIM_WAITING", setting)], |device| {
            let setting = std::env::var("CUDART_SIM_WAITING").unwrap();
            let memory = malloc(1 << 20);
            let waits = waits(device, || free(memory));
            strict("cudaFree waits", waits, setting == "1", &[true, false]);
        });
    }
}

#[test]
fn allocating_memory_waits_for_nothing_or_for_the_device() {
    let test = test_name!();
    for setting in ["1", "2"] {
        rule(test, &[("CUDART_SIM_WAITING", setting)], |device| {
            let setting = std::env::var("CUDART_SIM_WAITING").unwrap();
            let waits = waits(device, || {
                malloc(1 << 20);
                SUCCESS
            });
            strict("cudaMalloc waits", waits, setting == "2", &[true, false]);
        });
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_forked_child_writes_the_parents_pinned_memory() {
    rule(test_name!(), &[], |_| {
        // SAFETY: aligned, never given back, and nobody else uses it.
        let word = unsafe { AtomicU32::from_ptr(&mut pinned(1)[0]) };
        // SAFETY: the child calls what is allowed in one, and ends.
        match unsafe { libc::fork() } {
            0 => {
                word.store(2, Ordering::SeqCst);
                // SAFETY: no arguments that are addresses.
                unsafe { libc::_exit(0) };
            }
            child => {
                let mut status = 0;
                // SAFETY: a valid place.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                assert_eq!(status, 0);
                assert_eq!(word.load(Ordering::SeqCst), 2);
            }
        }
    });
}
