//! Tests in subprocesses: other runtime libraries, broken contexts, and memory counts.

mod common;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{Gate, in_subprocess, is_subprocess, test_name};
use cpu_gpu_buffer::{
    BufferOptions, BufferRing, CpuGpuBuffer, Device, Error, Pinning, Shape, Side, Stream,
    is_pinned_memory_available, sys,
};

#[track_caller]
fn succeeded(output: &Output) {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}\n{out}\n{err}", output.status);
    assert!(out.contains("1 passed"), "{out}\n{err}");
}

// ---- the runtime library ----

/// Runs in the process with a library that cannot be used: everything says so, and the CPU works.
fn unusable(expected: &str) {
    assert_eq!(Device::auto(), Device::Cpu);
    assert_eq!(Device::cuda_count(), 0);
    let library = std::env::var("CUDART_LIBRARY").unwrap();
    for result in [
        Device::cuda(0).map(drop),
        Stream::new(Device::Cuda(0)).map(drop),
        CpuGpuBuffer::<u8>::new(1, Device::Cuda(0)).map(drop),
    ] {
        let Err(Error::Unavailable { reason }) = result else { panic!("{result:?}") };
        assert!(reason.contains(expected), "{reason}");
        assert!(reason.contains(&library), "{reason}");
    }
    let mut count = 7;
    // SAFETY: a valid place.
    let status = unsafe { sys::cudaGetDeviceCount(&mut count) };
    assert_eq!(status, sys::cudaError::LIBRARY_NOT_LOADED);
    assert!(status.to_string().contains(expected), "{status}");

    let stream = Stream::new(Device::Cpu).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu).unwrap();
    buffer.fill(1, &stream).unwrap();

    // What has no bytes needs no CUDA.
    let mut empty = CpuGpuBuffer::<u32>::new([0, 4], Device::Cuda(0)).unwrap();
    assert!(empty.cpu_mut().unwrap().is_empty());
    empty.synchronize().unwrap();
    empty.resize([3, 0]).unwrap();
    assert!(matches!(empty.resize([3, 1]), Err(Error::Unavailable { .. })));
    assert_eq!(empty.shape(), Shape::from([3, 0]).dims());
}

/// Runs the test in its own process with a library that is named to the loader.
fn with_library(test: &str, library: &str, variables: &[(&str, &str)]) {
    if common::is_linked() {
        return common::left_out(test, "the runtime is part of this program");
    }
    let variables = [&[("CUDART_LIBRARY", library)], variables].concat();
    succeeded(&in_subprocess(test, &variables));
}

#[test]
fn a_named_library_that_is_not_there_is_an_error_and_no_other_is_taken() {
    if is_subprocess() {
        return unusable("nothing-here");
    }
    let test = test_name!();
    with_library(test, "/nothing-here/libcudart.so.13", &[]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_named_library_that_is_no_runtime_is_an_error() {
    if is_subprocess() {
        return unusable("not a CUDA runtime");
    }
    with_library(test_name!(), "libc.so.6", &[]);
}

/// Runs the test in its own process on the simulated runtime, with some of its settings.
#[cfg(target_os = "linux")]
fn with_simulated(test: &str, settings: &[(&str, &str)]) {
    with_library(test, common::simulated().to_str().unwrap(), settings);
}

#[test]
#[cfg(target_os = "linux")]
fn a_named_runtime_of_an_unknown_major_version_is_an_error() {
    if is_subprocess() {
        return unusable("CUDA 14.2, need 12 or 13");
    }
    let test = test_name!();
    with_simulated(test, &[("CUDART_SIM_VERSION", "14020")]);
}

/// Runs in the process whose driver does not do for the runtime: everything says so, and the CPU works.
#[cfg(target_os = "linux")]
fn without_its_driver(expected: &str) {
    assert_eq!(Device::auto(), Device::Cpu);
    assert_eq!(Device::cuda_count(), 0);
    let library = std::env::var("CUDART_LIBRARY").unwrap();
    for result in [
        Device::cuda(0).map(drop),
        Stream::new(Device::Cuda(0)).map(drop),
        CpuGpuBuffer::<u8>::new(1, Device::Cuda(0)).map(drop),
    ] {
        let Err(Error::Unavailable { reason }) = result else { panic!("{result:?}") };
        assert!(reason.starts_with(expected), "{reason}");
        assert!(reason.contains(&format!("{library} is CUDA 13.0")), "{reason}");
    }
    let mut count = 7;
    // SAFETY: a valid place.
    let status = unsafe { sys::cudaGetDeviceCount(&mut count) };
    assert_eq!(status, sys::cudaError::cudaErrorInsufficientDriver);
    let mut buffer = CpuGpuBuffer::<u8>::new(4, Device::Cpu).unwrap();
    buffer.fill(1, &Stream::new(Device::Cpu).unwrap()).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn a_driver_that_is_too_old_for_the_runtime_is_an_error_that_names_both() {
    if is_subprocess() {
        return without_its_driver("the driver is one of CUDA 12.4, too old for the runtime: ");
    }
    let test = test_name!();
    with_simulated(test, &[("CUDART_SIM_DRIVER", "12040")]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_runtime_without_a_driver_is_an_error_that_says_so() {
    if is_subprocess() {
        return without_its_driver("there is no CUDA driver on this machine; ");
    }
    let test = test_name!();
    with_simulated(test, &[("CUDART_SIM_DRIVER", "0")]);
}

/// What `Device::cuda` says of a device that there is not.
#[cfg(target_os = "linux")]
fn absent(ordinal: u32) -> String {
    match Device::cuda(ordinal) {
        Err(Error::Unavailable { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
#[cfg(target_os = "linux")]
fn an_absent_device_is_named_with_what_hides_it() {
    const SHOWN: &str = "; CUDA_VISIBLE_DEVICES is ";
    if is_subprocess() {
        let value = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let shown = value.map_or(String::new(), |value| format!("{SHOWN}{value:?}"));
        return match std::env::var("CUDART_SIM_DEVICES").as_deref() {
            Ok("0") => {
                let text = absent(0);
                let expected = "this machine has no CUDA device: cudaGetDeviceCount failed with ";
                assert!(text.starts_with(expected) && text.contains(" (100): "), "{text}");
                assert!(
                    text.ends_with(&shown) && text.contains(SHOWN) != shown.is_empty(),
                    "{text}"
                );
            }
            _ => assert_eq!(
                absent(3),
                format!("there is no device cuda:3: this machine has 2{shown}")
            ),
        };
    }
    let test = test_name!();
    for devices in ["0", "2"] {
        let count = ("CUDART_SIM_DEVICES", devices);
        with_simulated(test, &[count]);
        with_simulated(test, &[count, ("CUDA_VISIBLE_DEVICES", "")]);
        with_simulated(test, &[count, ("CUDA_VISIBLE_DEVICES", "1,7")]);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_machine_that_is_not_set_up_says_what_to_do() {
    if !is_subprocess() {
        return with_simulated(test_name!(), &[]);
    }
    assert!(sys::runtime().is_ok());
    for (code, word) in
        [(802, "fabric manager"), (803, "reboot"), (804, "cuda-compat"), (3, "fork")]
    {
        common::sim::fail_function(c"cudaGetDeviceCount", code);
        let text = absent(0);
        let beginning = "cudaGetDeviceCount failed with cudaError";
        assert!(text.starts_with(beginning) && text.contains(&format!("({code}): ")), "{text}");
        assert!(text.contains(word), "{text}");
        common::sim::heal();
    }
    Device::cuda(0).unwrap();
    // The same where the context is made, and at any later call.
    common::sim::fail_function(c"cuDevicePrimaryCtxRetain", 802);
    let text = absent(1);
    assert!(text.starts_with("cuda:1: ") && text.contains("fabric manager"), "{text}");
}

/// What a forked child says; it ends well.
#[cfg(target_os = "linux")]
fn in_child(says: impl FnOnce()) {
    // SAFETY: no other thread of this process holds a lock that the child needs, but the
    // allocator's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(says));
        // SAFETY: ends the child at once, without the parent's exit handlers.
        unsafe { libc::_exit(outcome.is_err().into()) };
    }
    let mut status = -1;
    // SAFETY: the child is ours, the place valid.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
}

#[test]
#[cfg(target_os = "linux")]
fn a_child_of_a_process_in_which_cuda_never_worked_learns_why() {
    let test = test_name!();
    if is_subprocess() {
        let calls = || {
            if sys::runtime().is_ok() { common::sim::calls_of(c"cudaGetDeviceCount") } else { 0 }
        };
        let (text, asked) = (absent(0), calls());
        return in_child(|| {
            assert_eq!(absent(0), text);
            assert_eq!(Device::cuda_count(), 0);
            assert_eq!(Device::auto(), Device::Cpu);
            // The driver, which has failed, is not asked again: it may crash a child.
            assert_eq!(calls(), asked);
            in_child(|| assert_eq!(absent(0), text));
        });
    }
    with_simulated(test, &[("CUDART_SIM_DRIVER", "0")]);
    with_simulated(test, &[("CUDART_SIM_DRIVER", "12040")]);
    with_simulated(test, &[("CUDART_SIM_DEVICES", "0")]);
    with_library(test, "/nothing-here/libcudart.so.13", &[]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_child_of_a_process_that_only_counted_devices_learns_that_cuda_was_used() {
    let test = test_name!();
    if !is_subprocess() {
        return with_simulated(test, &[]);
    }
    // Until it is asked, CUDA is the child's own. That child's children are told.
    in_child(|| {
        Device::cuda(0).unwrap();
        in_child(|| assert_eq!(Device::cuda(0), Err(Error::Forked)));
    });
    // The count initializes the driver.
    assert_eq!(Device::cuda_count(), 2);
    in_child(|| {
        assert_eq!(Device::cuda(0), Err(Error::Forked));
        let text = Error::Forked.to_string();
        assert_eq!(text, "CUDA was used before a fork, and does not work in the child");
    });
}

/// Runs the test in its own process with a runtime library that answers `version` and has no other function.
#[cfg(target_os = "linux")]
fn with_runtime(test: &str, version: i32) {
    let directory = std::env::temp_dir().join(format!("cgb-{version}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let source = directory.join("runtime.rs");
    let library = directory.join("libcudart.so");
    let text = format!(
        "#[unsafe(no_mangle)] unsafe extern \"C\" fn cudaRuntimeGetVersion(v: *mut i32) -> u32 \
         {{ unsafe {{ *v = {version} }}; 0 }}"
    );
    std::fs::write(&source, text).unwrap();
    let built = Command::new("rustc")
        .args(["--edition", "2024", "--crate-type", "cdylib", "-o"])
        .args([&library, &source])
        .output();
    match built {
        Err(_) => common::left_out(test, "no rustc"),
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            with_library(test, library.to_str().unwrap(), &[]);
        }
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn a_function_that_the_runtime_lacks_is_a_status_that_names_it() {
    if !is_subprocess() {
        return with_runtime(test_name!(), 12000);
    }
    let library = std::env::var("CUDART_LIBRARY").unwrap();
    let mut count = 0;
    // SAFETY: a valid place.
    let status = unsafe { sys::cudaGetDeviceCount(&mut count) };
    assert_eq!(status, sys::cudaError::SYMBOL_NOT_FOUND);
    let Err(Error::Unavailable { reason }) = Device::cuda(0) else { panic!("it has no functions") };
    for text in [status.to_string(), reason] {
        assert!(text.contains(&library) && text.contains("12000"), "{text}");
        assert!(text.contains("cudaGetDeviceCount, "), "{text}");
    }
    assert_eq!(sys::runtime().unwrap().version(), 12000);
    assert_eq!(Device::auto(), Device::Cpu);
}

// ---- a broken context ----

#[test]
fn after_a_sticky_error_every_call_returns_it_and_drop_neither_panics_nor_hangs() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if !is_subprocess() {
        return succeeded(&in_subprocess(test, &[]));
    }
    let start = Instant::now();
    let stream = Stream::new(device).unwrap();
    let other = Stream::new(device).unwrap();
    let event = stream.record().unwrap();
    let mut idle = CpuGpuBuffer::<u32>::new(1000, device).unwrap();
    let mut busy = CpuGpuBuffer::<u32>::new(1000, device).unwrap();
    let mut used = CpuGpuBuffer::<u32>::new(1000, device).unwrap();
    idle.fill(1, &stream).unwrap();
    idle.synchronize().unwrap();
    let gate = Gate::close(&stream);
    busy.copy_to_gpu(.., &stream).unwrap();
    used.gpu_on(&stream).unwrap();
    let queued = stream.record().unwrap();
    common::break_context(&stream);
    gate.open();
    // The error shows where somebody waits for the stream.
    let Err(Error::Cuda { code, .. }) = stream.synchronize() else { panic!("nothing broke") };
    assert_eq!(code, sys::cudaError::cudaErrorIllegalAddress);
    let calls: Vec<(&str, cpu_gpu_buffer::Result<()>)> = vec![
        ("copy_to_gpu", idle.copy_to_gpu(.., &stream)),
        ("copy_to_cpu", idle.copy_to_cpu(.., &other)),
        ("fill", idle.fill(2, &stream)),
        ("fill_gpu", used.fill_gpu(2, &stream)),
        ("zero", used.zero(&other)),
        ("gpu_on", used.gpu_on(&stream).map(drop)),
        ("synchronize", used.synchronize()),
        ("is_idle", used.is_idle().map(drop)),
        ("cpu_mut", busy.cpu_mut().map(drop)),
        ("try_cpu_mut", busy.try_cpu_mut().map(drop)),
        ("resize", busy.resize(1_000_000)),
        ("new", CpuGpuBuffer::<u32>::new(1000, device).map(drop)),
        ("stream", Stream::new(device).map(drop)),
        ("stream.synchronize", other.synchronize()),
        ("stream.is_idle", other.is_idle().map(drop)),
        ("stream.record", other.record().map(drop)),
        ("stream.wait", other.wait(&event)),
        ("event.synchronize", queued.synchronize()),
        ("event.is_complete", queued.is_complete().map(drop)),
        ("memory", device.memory().map(drop)),
    ];
    for (name, result) in calls {
        let error = result.expect_err(name);
        let Error::Cuda { code: seen, .. } = error else { panic!("{name}: {error}") };
        assert_eq!(seen, code, "{name}");
    }
    assert_eq!(busy.shape(), [1000]);
    drop((idle, busy, used, event, queued, stream, other));
    assert!(start.elapsed() < Duration::from_secs(20));
}

// ---- contexts and processes ----

#[test]
fn a_thread_that_never_chose_a_device_gets_no_context_on_another_one() {
    let test = test_name!();
    if !is_subprocess() {
        return match Device::cuda_count() {
            0 | 1 => common::left_out(test, "fewer than two CUDA devices"),
            _ => succeeded(&in_subprocess(test, &[])),
        };
    }
    let far = Device::Cuda(1);
    let stream = Stream::new(far).unwrap();
    let other = Stream::new(far).unwrap();
    let mut buffer = CpuGpuBuffer::<u16>::new(1000, far).unwrap();
    std::thread::spawn(move || {
        buffer.fill(7, &stream).unwrap();
        buffer.copy_to_gpu(..9, &other).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
        buffer.try_cpu().unwrap();
        assert_eq!(buffer.cpu().unwrap(), [7; 1000]);
        buffer.gpu_on(&other).unwrap();
        buffer.is_idle().unwrap();
        buffer.resize(100_000).unwrap();
        // Large enough to be registered, and not allocated.
        buffer.resize(3 << 20).unwrap();
        let event = other.record().unwrap();
        stream.wait(&event).unwrap();
        event.is_complete().unwrap();
        event.synchronize().unwrap();
        stream.is_idle().unwrap();
        stream.synchronize().unwrap();
        far.memory().unwrap();
        drop((event, buffer, other, stream));
        CpuGpuBuffer::<u8>::new(1usize << 46, far).unwrap_err();
    })
    .join()
    .unwrap();
    assert!(!common::has_context(0), "a context was made on device 0");
    assert!(common::has_context(1));
}

/// Runs the test in a process of its own, where no device was used yet, on the simulated runtime, which can hold
/// the making of a context back. Whether this is that process.
#[cfg(target_os = "linux")]
fn in_process_with_held_calls(test: &str) -> bool {
    if !common::is_simulated() {
        common::left_out(test, "calls are held back by the simulated runtime");
        return false;
    }
    if !is_subprocess() {
        succeeded(&in_subprocess(test, &[]));
        return false;
    }
    // Loads the runtime, and makes no context.
    assert_eq!(Device::cuda_count(), 2);
    assert!(!common::has_context(0) && !common::has_context(1));
    true
}

/// Waits for a thread that may never end, for as long as the patience lasts; whether it has ended.
#[cfg(target_os = "linux")]
fn ends<T>(thread: &std::thread::ScopedJoinHandle<'_, T>, patience: Duration) -> bool {
    let start = Instant::now();
    while !thread.is_finished() && start.elapsed() < patience {
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.is_finished()
}

#[test]
#[cfg(target_os = "linux")]
fn a_context_whose_kernels_cannot_be_loaded_is_given_back_and_made_by_a_later_call() {
    let test = test_name!();
    if !in_process_with_held_calls(test) {
        return;
    }
    // Of the image and of the PTX that stands in for it, the module is loaded or not, and unloaded again.
    for (fails, unloaded) in [(c"cuModuleLoadData", 0), (c"cuModuleGetFunction", 2)] {
        common::sim::reset();
        common::sim::fail_function(fails, 2);
        for result in [Device::cuda(0).map(drop), Stream::new(Device::Cuda(0)).map(drop)] {
            let Err(Error::Unavailable { reason }) = result else { panic!("{result:?}") };
            let call = fails.to_str().unwrap();
            assert!(reason.contains("cuda:0") && reason.contains(call), "{reason}");
        }
        assert_eq!(Device::auto(), Device::Cpu);
        let calls = [c"cuDevicePrimaryCtxRetain", c"cuDevicePrimaryCtxRelease", c"cuModuleUnload"];
        // The last of them tried the second device, too.
        assert_eq!(calls.map(common::sim::calls_of), [4, 4, 4 * unloaded]);
        common::sim::heal();
    }
    assert_eq!(Device::auto(), Device::Cuda(0));
}

#[test]
#[cfg(target_os = "linux")]
fn threads_that_come_to_a_device_at_once_make_its_context_once() {
    let test = test_name!();
    if !in_process_with_held_calls(test) {
        return;
    }
    common::sim::reset();
    let held = common::sim::Held::next(c"cuModuleLoadData");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| Device::cuda(0));
        held.wait();
        let second = scope.spawn(|| Device::cuda(0));
        // It has to wait; should it not, it makes a context of its own now.
        ends(&second, Duration::from_millis(100));
        drop(held);
        assert_eq!(first.join().unwrap(), Ok(Device::Cuda(0)));
        assert_eq!(second.join().unwrap(), Ok(Device::Cuda(0)));
    });
    assert_eq!(common::sim::calls_of(c"cuDevicePrimaryCtxRetain"), 1);
    assert_eq!(common::sim::calls_of(c"cuModuleLoadData"), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_device_is_used_while_the_context_of_another_is_being_made() {
    let test = test_name!();
    if !in_process_with_held_calls(test) {
        return;
    }
    let held = common::sim::Held::next(c"cuModuleLoadData");
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| Device::cuda(0).unwrap());
        held.wait();
        let other = scope.spawn(|| Device::cuda(1).unwrap());
        let ended = ends(&other, Duration::from_secs(10));
        drop(held);
        ended
    });
    assert!(ended, "it waits for a device that it has nothing to do with");
}

#[test]
#[cfg(unix)]
fn a_forked_child_neither_uses_nor_frees_what_the_parent_made() {
    use cpu_gpu_buffer::{BufferGroup, GroupLayoutBuilder, GroupRing};
    let test = test_name!();
    if !is_subprocess() {
        return succeeded(&in_subprocess(test, &[]));
    }
    let device = Device::auto();
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(3 << 20, device).unwrap();
    buffer.fill(5, &stream).unwrap();
    buffer.copy_to_gpu(.., &stream).unwrap();
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(1000);
    let layout = builder.build().unwrap();
    let mut group = BufferGroup::new(&layout, device).unwrap();
    let mut ring = GroupRing::new(&layout, device, 2).unwrap();
    group.copy_to_gpu(&[key.rows(..)], &stream).unwrap();
    ring.copy_to_gpu(&[key.rows(..)], &stream).unwrap();
    let event = stream.record().unwrap();
    let address = buffer.gpu_on(&stream).unwrap().as_mut_ptr();
    // SAFETY: the child calls nothing that another thread of the parent could have left half done, but
    // the allocator, which takes care of itself.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            assert_eq!(Device::auto(), Device::Cpu);
            if device != Device::Cpu {
                // Addresses are told, and mean nothing here.
                assert_eq!(buffer.device_ptr(), address);
                let clone = stream.clone();
                for result in [
                    buffer.cpu().map(drop),
                    buffer.cpu_mut().map(drop),
                    buffer.try_cpu().map(drop),
                    buffer.try_cpu_mut().map(drop),
                    buffer.is_idle().map(drop),
                    buffer.synchronize(),
                    buffer.copy_to_gpu(.., &stream),
                    buffer.copy_to_cpu(.., &clone),
                    buffer.fill(1, &stream),
                    buffer.fill_cpu(1),
                    buffer.fill_gpu(1, &stream),
                    buffer.zero(&stream),
                    buffer.resize(1),
                    buffer.resize(9 << 20),
                    buffer.gpu_on(&stream).map(drop),
                    group.cpu(key).map(drop),
                    group.cpu_mut(key).map(drop),
                    group.members_mut().cpu_mut(key).map(drop),
                    group.is_idle().map(drop),
                    group.synchronize(),
                    group.copy_to_gpu(&[key.rows(..)], &stream),
                    group.copy_to_cpu(&[key.rows(..)], &clone),
                    group.gpu_on(&stream).map(drop),
                    ring.advance(),
                    ring.try_advance().map(drop),
                    ring.cpu(key).map(drop),
                    ring.cpu_mut(key).map(drop),
                    ring.copy_to_gpu(&[key.rows(..)], &stream),
                    ring.gpu_on(&stream).map(drop),
                    BufferGroup::new(&layout, device).map(drop),
                    stream.synchronize(),
                    clone.is_idle().map(drop),
                    clone.record().map(drop),
                    stream.wait(&event),
                    event.is_complete().map(drop),
                    event.synchronize(),
                    event.elapsed_since(&event).map(drop),
                    device.memory().map(drop),
                    Device::cuda(0).map(drop),
                    Stream::new(device).map(drop),
                    CpuGpuBuffer::<u8>::new(1, device).map(drop),
                    // SAFETY: it is refused, and the stream is live in the parent.
                    unsafe { Stream::from_raw(stream.as_raw(), device, None) }.map(drop),
                ] {
                    assert_eq!(result, Err(Error::Forked));
                }
            }
            drop((buffer, group, ring, event, stream));
            // The CPU has nothing to do with it.
            let stream = Stream::new(Device::Cpu).unwrap();
            let mut buffer = CpuGpuBuffer::<u8>::new(100, Device::Cpu).unwrap();
            buffer.fill(1, &stream).unwrap();
            buffer.copy_to_gpu(.., &stream).unwrap();
            buffer.gpu_on(&stream).unwrap();
        }));
        // SAFETY: ends the child at once, without the parent's exit handlers.
        unsafe { libc::_exit(outcome.is_err().into()) };
    }
    let mut status = -1;
    // SAFETY: the child is ours, the place valid.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
    buffer.fill_cpu(0).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 5));
}

// ---- memory ----

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn ten_thousand_buffers_leave_no_memory_behind() {
    let test = test_name!();
    if !is_subprocess() {
        return succeeded(&in_subprocess(test, &[]));
    }
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let cycle = |step: usize| {
            let mut buffer = CpuGpuBuffer::<u8>::new(1000 + step % 7 * 10_000, device).unwrap();
            buffer.copy_to_gpu(.., &stream).unwrap();
            buffer.copy_to_cpu(..100, &stream).unwrap();
            if step.is_multiple_of(3) {
                buffer.gpu_on(&stream).unwrap();
            }
            if step.is_multiple_of(5) {
                buffer.resize(200_000).unwrap();
            }
            if step.is_multiple_of(50) {
                // On pages of its own, which are there once they are written.
                buffer.resize(3 << 20).unwrap();
                buffer.fill_cpu(1).unwrap();
            }
        };
        (0..500).for_each(cycle);
        let free = || device.memory().map(|memory| memory.free).unwrap_or(0);
        let before = (resident(), free());
        (0..10_000).for_each(cycle);
        let after = (resident(), free());
        println!("{device}: resident and free {before:?} before, {after:?} after");
        assert!(after.0 < before.0 + (4 << 20), "resident memory grew");
        if device != Device::Cpu {
            assert!(after.1 >= before.1, "device memory is lost");
        }
    }
}

// ---- the example ----

/// An example program, beside this test's folder in a build and where the tests are packed.
fn example(name: &str, arguments: &[&str]) -> Output {
    let program = std::env::current_exe().unwrap();
    let program = program.parent().unwrap().parent().unwrap().join("examples").join(name);
    Command::new(program).args(arguments).output().unwrap()
}

fn quickstart(arguments: &[&str]) -> Output {
    example(test_name!(), arguments)
}

#[test]
fn the_example_moves_files_of_any_length_with_any_number_of_readers() {
    const PIECE: usize = 4 << 20;
    let file = std::env::temp_dir().join(format!("cgb-example-{}", std::process::id()));
    let name = file.to_str().unwrap();
    let mut whole = vec![0; 3 * PIECE - 1];
    blake3::Hasher::new().finalize_xof().fill(&mut whole);
    for len in [0, 1, 4095, whole.len()] {
        let bytes = &whole[..len];
        std::fs::write(&file, bytes).unwrap();
        let digests = bytes.chunks(PIECE).map(|piece| {
            let (first, second) = piece.split_at(piece.len() / 2);
            let halves = [first, second].map(|half| *blake3::hash(half).as_bytes());
            *blake3::hash(&halves.concat()).as_bytes()
        });
        let digest = blake3::hash(&digests.collect::<Vec<_>>().concat()).to_hex();
        for arguments in [
            vec![name],
            vec![name, "--readers", "1"],
            vec![name, "--readers", "2"],
            vec![name, "--readers", "16"],
            vec!["--device", "cpu", name],
        ] {
            let output = quickstart(&arguments);
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
            let expected = format!("{name}, {len} bytes, digest {digest}: every byte came back");
            assert!(text.contains(&expected), "{expected}:\n{text}");
            let device = if arguments.contains(&"cpu") { Device::Cpu } else { Device::auto() };
            assert!(text.contains(&device.to_string()) && text.contains("GB/s"), "{text}");
        }
    }
    std::fs::remove_file(file).unwrap();
    // Its own executable.
    assert!(quickstart(&[]).status.success());
}

#[test]
fn the_example_says_what_is_wrong() {
    let directory = std::env::temp_dir();
    for (arguments, expected) in [
        (vec!["/no/such/file"], "/no/such/file"),
        (vec![directory.to_str().unwrap()], directory.to_str().unwrap()),
        (vec!["--device", "tpu"], "\"tpu\""),
        (vec!["--device", "cuda:77"], "CUDA cannot be used"),
        (vec!["--device"], "--device"),
        (vec!["--sideways"], "--sideways"),
        (vec!["--readers", "0"], "\"0\""),
        (vec!["--readers", "all"], "\"all\""),
        (vec!["a", "b"], "\"b\""),
    ] {
        let output = quickstart(&arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(expected) && !text.contains("panicked"), "{arguments:?}: {text}");
    }
}

#[test]
fn a_range_of_a_file_is_loaded_without_a_progress_bar_in_a_pipe() {
    let file = std::env::temp_dir().join(format!("cgb-load-example-{}", std::process::id()));
    let name = file.to_str().unwrap();
    let mut bytes = vec![0; 5 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    std::fs::write(&file, &bytes).unwrap();
    for (arguments, bytes) in [
        (vec![name], &bytes[..]),
        (vec![name, "--range", "5..4194309", "--readers", "3"], &bytes[5..4194309]),
        (vec![name, "--range", "7..7", "--device", "cpu"], &[]),
    ] {
        let output = example("load_file", &arguments);
        let (text, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && error.is_empty(), "{text}{error}");
        let expected = format!("{} bytes, digest {}", bytes.len(), blake3::hash(bytes).to_hex());
        assert!(text.contains(&expected), "{expected}:\n{text}");
    }
    for (arguments, expected) in [
        (vec![], "path"),
        (vec![name, "--range", "0..5242881"], "it has 5242880 bytes"),
        (vec![name, "--range", "9..5"], "no range 9..5"),
        (vec![name, "--range", "9"], "BEGIN..END"),
        (vec![name, "--readers", "0"], "\"0\""),
        (vec!["/no/such/file"], "/no/such/file"),
        (vec!["/dev/null"], "not a regular file"),
    ] {
        let output = example("load_file", &arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(expected) && !text.contains("panicked"), "{arguments:?}: {text}");
    }
    // More than any device has. The file itself takes no room.
    std::fs::File::create(&file).unwrap().set_len(1 << 42).unwrap();
    let output = example("load_file", &[name]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && text.contains("4398046511104 bytes"), "{text}");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn producers_feed_one_device_through_a_pool() {
    for (arguments, batches) in [
        (vec!["--producers", "5", "--batches", "40", "--buffers", "0"], "200 batches"),
        (vec!["--device", "cpu", "--producers", "2", "--batches", "30"], "60 batches"),
        (vec!["--producers", "1", "--batches", "1"], "1 batches"),
    ] {
        let output = example("producers", &arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains(batches) && text.contains("arrived as it was made"), "{text}");
        let device = if arguments.contains(&"cpu") { Device::Cpu } else { Device::auto() };
        assert!(text.contains(&device.to_string()), "{text}");
    }
    let output = example("producers", &["--batches", "many"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && !text.contains("panicked"), "{text}");
}

#[test]
fn a_serving_loop_samples_the_same_in_each_way_to_keep_its_input() {
    for arguments in [
        vec!["--steps", "40", "--requests", "20", "--kernel-us", "50"],
        vec!["--steps", "30", "--requests", "6", "--depth", "3", "--mirrored"],
        vec!["--steps", "60", "--device", "cpu"],
        vec!["--steps", "1", "--depth", "2"],
    ] {
        let output = example("decode_loop", &arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("every step of every way sampled what it must"), "{text}");
        let device = if arguments.contains(&"cpu") { Device::Cpu } else { Device::auto() };
        assert!(text.contains(&device.to_string()), "{text}");
        // The kernel itself runs where there is a GPU.
        let on_gpu = device != Device::Cpu && !common::is_simulated();
        assert_eq!(text.contains("left out"), !on_gpu, "{text}");
    }
    for arguments in [vec!["--requests", "1025"], vec!["--steps", "0"], vec!["--depth", "1"]] {
        let output = example("decode_loop", &arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && !text.contains("panicked"), "{text}");
    }
}

#[test]
#[cfg(unix)]
fn a_serving_loop_in_python_that_fails_is_an_error() {
    for python in ["/no/such/python", "/bin/false", "/bin/true"] {
        let output =
            example("decode_loop", &["--device", "cpu", "--steps", "5", "--torch", python]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(python), "{text}");
    }
}

// ---- a fork while another thread asks ----

/// Forks while another thread is held in a call of this function, in a process of its own with some
/// variables set. The child must get this error, and must not hang.
#[cfg(target_os = "linux")]
fn forked_while_held(
    test: &str,
    function: &std::ffi::CStr,
    variables: &[(&str, &str)],
    expected: fn() -> Error,
) {
    if !common::is_simulated() {
        return common::left_out(test, "calls are held back by the simulated runtime");
    }
    if !is_subprocess() {
        return succeeded(&in_subprocess(test, variables));
    }
    let expected = expected();
    // Only what is loaded can be held back.
    let _ = sys::runtime();
    let held = common::sim::Held::next(function);
    let asks = std::thread::spawn(|| drop(Device::cuda(0)));
    held.wait();
    common::in_child(|| {
        // SAFETY: ends the child, should it hang.
        unsafe { libc::alarm(10) };
        assert_eq!(Device::cuda(0), Err(expected.clone()));
        assert_eq!(Device::cuda_count(), 0);
        CpuGpuBuffer::<u8>::new(1, Device::Cpu).unwrap();
    });
    drop(held);
    asks.join().unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_child_that_is_forked_while_a_thread_asks_for_the_first_time_is_refused_and_does_not_hang() {
    let test = test_name!();
    forked_while_held(test, c"cudaGetDeviceCount", &[], || Error::Forked);
}

#[cfg(target_os = "linux")]
#[test]
fn a_child_that_is_forked_while_a_thread_learns_why_cuda_does_not_work_gets_the_reason() {
    let test = test_name!();
    let variables = [("CUDART_SIM_DRIVER", "12040")];
    forked_while_held(test, c"cudaDriverGetVersion", &variables, || Device::cuda(0).unwrap_err());
}

// ---- pinning ----

#[test]
fn asking_whether_memory_can_be_pinned_makes_no_context() {
    let test = test_name!();
    if !is_subprocess() {
        return succeeded(&in_subprocess(test, &[]));
    }
    let available = is_pinned_memory_available();
    assert_eq!(available, Device::cuda_count() > 0);
    if available {
        assert!(!common::has_context(0));
        let buffer = CpuGpuBuffer::<u8>::new(1, Device::Cuda(0)).unwrap();
        assert!(common::has_context(0) && buffer.is_pinned());
    }
}

#[test]
fn a_variable_turns_pinning_off_and_the_buffer_says_so() {
    let test = test_name!();
    let variable = "CPU_GPU_BUFFER_PINNING";
    if !is_subprocess() {
        for value in ["never", "no", ""] {
            succeeded(&in_subprocess(test, &[(variable, value)]));
        }
        return;
    }
    let off = std::env::var(variable).as_deref() == Ok("never");
    let device = Device::auto();
    assert_eq!(is_pinned_memory_available(), device != Device::Cpu && !off);
    let with = |pinning| {
        let options = BufferOptions { pinning, ..Default::default() };
        CpuGpuBuffer::<u8>::with_options(100, device, options)
    };
    let preferred = with(Pinning::Preferred).unwrap();
    assert_eq!(preferred.is_pinned(), device != Device::Cpu && !off);
    if device == Device::Cpu {
        return assert!(preferred.pinning_error().is_none());
    }
    match with(Pinning::Required) {
        Ok(required) => {
            assert!(!off && required.is_pinned() && preferred.pinning_error().is_none());
        }
        Err(error) => {
            assert!(off && error.to_string().contains("CPU_GPU_BUFFER_PINNING=never"), "{error}");
            assert_eq!(preferred.pinning_error(), Some(&error));
        }
    }
}

/// A control group within this process's own that may have so much memory, if one can be made.
#[cfg(target_os = "linux")]
struct LimitedGroup(std::path::PathBuf);

#[cfg(target_os = "linux")]
impl LimitedGroup {
    fn new(bytes: usize) -> Option<LimitedGroup> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let name = format!("cpu-gpu-buffer-{}", std::process::id());
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let (mount, limit) = match controllers {
                "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
                "" => ("/sys/fs/cgroup", "memory.max"),
                _ => return None,
            };
            let group = LimitedGroup(format!("{mount}{path}/{name}").into());
            std::fs::create_dir(&group.0).ok()?;
            std::fs::write(group.0.join(limit), bytes.to_string()).ok()?;
            Some(group)
        })
    }
}

#[cfg(target_os = "linux")]
impl Drop for LimitedGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_host_side_beyond_the_containers_limit_is_an_error_and_not_the_end_of_the_process() {
    let test = test_name!();
    let variable = "CPU_GPU_BUFFER_TEST_GROUP";
    const LIMIT: usize = 512 << 20;
    if !is_subprocess() {
        let Some(group) = LimitedGroup::new(LIMIT) else {
            return common::left_out(test, "no control group can be made");
        };
        return succeeded(&in_subprocess(test, &[(variable, group.0.to_str().unwrap())]));
    }
    let Some((device, _turn)) = common::cuda(test) else { return };
    drop(CpuGpuBuffer::<u8>::new(1, device).unwrap());
    let procs = std::path::Path::new(&std::env::var(variable).unwrap()).join("cgroup.procs");
    std::fs::write(procs, std::process::id().to_string()).unwrap();
    let memory = Device::Cpu.memory().unwrap();
    assert!(memory.total == LIMIT && memory.free <= LIMIT, "{memory:?}");
    // Many host sides to one device side, which the simulated runtime keeps in the group, too.
    const SLOT: usize = 16 << 20;
    for pinning in [Pinning::Required, Pinning::Preferred] {
        let options = BufferOptions { pinning, ..Default::default() };
        let ring = |slots| BufferRing::<u8>::with_options(SLOT, device, slots, options);
        let (side, bytes) = (Side::Host, 2 * LIMIT);
        let beyond = Error::OutOfMemory { side, bytes, device };
        assert_eq!(ring(2 * LIMIT / SLOT).err(), Some(beyond));
        assert!(ring(4).unwrap().is_pinned());
        // Nor do small ones end the process, of which none is beyond the limit by itself.
        let small = || BufferRing::<u8>::with_options(1 << 16, device, 128, options);
        let mut held = Vec::new();
        let error = loop {
            match small() {
                Ok(ring) => held.push(ring),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Error::OutOfMemory { side, bytes: 8 << 20, device });
        assert!(held.len() > 20, "{}", held.len());
    }
}
