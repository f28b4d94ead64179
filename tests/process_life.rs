//! Processes and threads end quietly while buffers and streams are alive.
//!
//! The status is 0, standard error is empty, and nothing crashes or hangs. Exit handlers and
//! thread-locals may run after the end of the runtime. All calls then return
//! `cudaErrorCudartUnloading`, in the simulated runtime, too.

#![cfg(target_os = "linux")]

mod common;

use std::cell::RefCell;
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{Foreign, Gate, all, test_name};
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Event, Stream};

const WORDS: usize = 1 << 20;

/// Buffers idle, used by a stream, and with transfers queued, with their stream and an event of it.
struct Life {
    idle: CpuGpuBuffer<u32>,
    used: CpuGpuBuffer<u32>,
    uploading: CpuGpuBuffer<u32>,
    downloading: CpuGpuBuffer<u32>,
    stream: Stream,
    event: Event,
    // Dropped last.
    _after: After,
}

/// Where the buffers before it were dropped while CUDA could still be asked, they waited for their transfers.
struct After(Stream);

impl Drop for After {
    fn drop(&mut self) {
        if self.0.is_idle() == Ok(false) {
            say("the buffers did not wait\n");
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(1) };
        }
    }
}

impl Life {
    /// The transfers are held up for a moment, so that whoever drops them soon has to wait.
    fn new(device: Device) -> Life {
        Life::held(device, |gate| {
            thread::spawn(|| {
                thread::sleep(Duration::from_millis(30));
                drop(gate);
            });
        })
    }

    /// Hands out the gate that holds the transfers up.
    fn held(device: Device, hold: impl FnOnce(Gate)) -> Life {
        let stream = Stream::new(device).unwrap();
        let buffer = || CpuGpuBuffer::new(WORDS, device).unwrap();
        let (mut idle, mut used) = (buffer(), buffer());
        let (mut uploading, mut downloading) = (buffer(), buffer());
        idle.fill(1, &stream).unwrap();
        idle.synchronize().unwrap();
        if device != Device::Cpu {
            hold(Gate::close(&stream));
        }
        used.gpu_on(&stream).unwrap();
        uploading.copy_to_gpu(.., &stream).unwrap();
        downloading.copy_to_cpu(.., &stream).unwrap();
        let event = stream.record().unwrap();
        let _after = After(stream.clone());
        Life { idle, used, uploading, downloading, stream, event, _after }
    }
}

static KEPT: Mutex<Option<Life>> = Mutex::new(None);

thread_local! {
    static LOCAL: RefCell<Option<Life>> = const { RefCell::new(None) };
}

/// Said by the last thing that a process does, so that its parent knows that it was done.
fn say(text: &str) {
    // SAFETY: as many bytes as there are; standard output as the standard library has it may be gone by now.
    let written = unsafe { libc::write(1, text.as_ptr().cast(), text.len()) };
    assert_eq!(written, text.len() as isize);
}

fn at_exit(handler: extern "C" fn()) {
    // SAFETY: the handler is a function of this program's and does not unwind.
    assert_eq!(unsafe { libc::atexit(handler) }, 0);
}

extern "C" fn drop_kept() {
    drop(KEPT.lock().unwrap().take());
    say("done\n");
}

/// Ends the process as `exit` does, with this thread's thread-locals and the exit handlers.
fn exit() -> ! {
    std::process::exit(0)
}

type Scenario = (&'static str, fn(Device));

const SCENARIO: &str = "CPU_GPU_BUFFER_SCENARIO";
const DEVICE: &str = "CPU_GPU_BUFFER_DEVICE";

/// Runs each scenario with each device in a process of its own, which must end quietly.
fn each(test: &str, scenarios: &[Scenario]) {
    if common::is_subprocess() {
        let device = std::env::var(DEVICE).unwrap().parse().unwrap();
        let name = std::env::var(SCENARIO).unwrap();
        let (_, run) = scenarios.iter().find(|(known, _)| *known == name).unwrap();
        return run(device);
    }
    if common::devices().len() == 1 {
        common::left_out(test, "the CUDA half, no CUDA device");
    }
    for device in common::devices() {
        for (name, _) in scenarios {
            let device = device.to_string();
            let mut command = common::subprocess(test, &[(SCENARIO, name), (DEVICE, &device)]);
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let start = Instant::now();
            while child.try_wait().unwrap().is_none() {
                if start.elapsed() > Duration::from_secs(60) {
                    child.kill().unwrap();
                    panic!("{name}, {device}: it hangs");
                }
                thread::sleep(Duration::from_millis(2));
            }
            let output = child.wait_with_output().unwrap();
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let what = format!("{name}, {device}: {:?}\n{out}{err}", output.status);
            assert!(output.status.success() && err.is_empty(), "{what}");
            assert!(out.contains("done"), "not to its end: {what}");
        }
    }
}

// ---- the end of a process ----

#[test]
fn what_statics_keep_is_left_to_the_end_of_the_process() {
    let keep = |device| {
        // Held up until the end, and beyond it.
        *KEPT.lock().unwrap() = Some(Life::held(device, common::forget));
        say("done\n");
    };
    each(
        test_name!(),
        &[
            ("main returns", keep),
            ("exit", |device| {
                *KEPT.lock().unwrap() = Some(Life::new(device));
                say("done\n");
                exit();
            }),
        ],
    );
}

#[test]
fn exit_handlers_may_drop_before_and_after_the_runtimes_end() {
    each(
        test_name!(),
        &[
            ("registered after the first use, so run before the runtime's end", |device| {
                *KEPT.lock().unwrap() = Some(Life::new(device));
                at_exit(drop_kept);
            }),
            ("registered before the first use, so run after the runtime's end", |device| {
                at_exit(drop_kept);
                *KEPT.lock().unwrap() = Some(Life::new(device));
            }),
            ("registered before the first use, and the transfers are never let go", |device| {
                at_exit(drop_kept);
                *KEPT.lock().unwrap() = Some(Life::held(device, common::forget));
                exit();
            }),
            ("both, one after the other", |device| {
                at_exit(drop_kept);
                *KEPT.lock().unwrap() = Some(Life::new(device));
                at_exit(drop_kept);
                exit();
            }),
        ],
    );
}

/// After the runtime's end, CUDA's answer is an error like any other.
extern "C" fn use_kept() {
    let mut kept = KEPT.lock().unwrap().take().unwrap();
    let device = kept.stream.device();
    let refused = |result: cpu_gpu_buffer::Result<()>| match (device, result) {
        (Device::Cpu, Ok(())) => true,
        (Device::Cuda(_), Err(Error::Cuda { code, call })) => {
            code == cpu_gpu_buffer::sys::cudaError::cudaErrorCudartUnloading && !call.is_empty()
        }
        _ => false,
    };
    let stream = &kept.stream;
    let all = refused(kept.idle.copy_to_gpu(.., stream))
        && refused(kept.idle.copy_to_cpu(.., stream))
        && refused(kept.idle.gpu_on(stream).map(drop))
        && refused(kept.used.synchronize())
        && refused(kept.uploading.cpu_mut().map(drop))
        && refused(kept.downloading.cpu().map(drop))
        && refused(kept.used.resize(2 * WORDS))
        && refused(CpuGpuBuffer::<u8>::new(9, device).map(drop))
        && refused(Stream::new(device).map(drop))
        && refused(stream.synchronize())
        && refused(stream.is_idle().map(drop))
        && refused(stream.record().map(drop))
        && refused(stream.wait(&kept.event))
        && refused(kept.event.is_complete().map(drop))
        && refused(kept.event.synchronize());
    // What is known to have finished is there without CUDA.
    let known = kept.idle.cpu().is_ok_and(|words| words.iter().all(|word| *word == 1));
    drop(kept);
    say(if all && known { "done\n" } else { "something else was answered\n" });
}

#[test]
fn after_the_runtimes_end_every_use_is_an_error_that_says_so() {
    each(
        test_name!(),
        &[("exit", |device| {
            at_exit(use_kept);
            *KEPT.lock().unwrap() = Some(Life::held(device, common::forget));
            exit();
        })],
    );
}

// ---- the end of a thread ----

/// A thread whose thread-locals keep buffers, and which ends when it is told to.
static ENDING: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
static THREAD: Mutex<Option<JoinHandle<()>>> = Mutex::new(None);

extern "C" fn end_thread() {
    *ENDING.0.lock().unwrap() = true;
    ENDING.1.notify_all();
    let ended = THREAD.lock().unwrap().take().unwrap().join();
    say(if ended.is_ok() { "done\n" } else { "the thread panicked\n" });
}

fn start_thread(device: Device) {
    let (kept, is_kept) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        LOCAL.set(Some(Life::new(device)));
        kept.send(()).unwrap();
        let ending = ENDING.0.lock().unwrap();
        drop(ENDING.1.wait_while(ending, |ending| !*ending).unwrap());
    });
    is_kept.recv().unwrap();
    *THREAD.lock().unwrap() = Some(thread);
}

#[test]
fn thread_locals_are_dropped_with_their_thread_or_with_the_process() {
    each(
        test_name!(),
        &[
            ("a thread ends", |device| {
                start_thread(device);
                end_thread();
            }),
            ("a thread that knew the thread-local before CUDA ends", |device| {
                let thread = thread::spawn(move || {
                    LOCAL.with_borrow(|local| assert!(local.is_none()));
                    LOCAL.set(Some(Life::new(device)));
                });
                thread.join().unwrap();
                say("done\n");
            }),
            ("the thread that exits", |device| {
                LOCAL.set(Some(Life::new(device)));
                say("done\n");
                exit();
            }),
            ("a thread that lives on to the end of the process", |device| {
                start_thread(device);
                say("done\n");
            }),
            ("a thread that ends within the exit, before the runtime's end", |device| {
                start_thread(device);
                at_exit(end_thread);
            }),
            ("a thread that ends within the exit, after the runtime's end", |device| {
                at_exit(end_thread);
                start_thread(device);
            }),
        ],
    );
}

// ---- forked children ----

static CALLS: Mutex<Option<u64>> = Mutex::new(None);

/// The last exit handler of a child: where calls are counted, it made none.
extern "C" fn expect_no_calls() {
    if let Some(calls) = *CALLS.lock().unwrap()
        && calls != common::sim::calls()
    {
        say("the child called CUDA\n");
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(1) };
    }
}

/// Forks; the child ends as it says, and well.
fn forked(device: Device, child: fn()) {
    if device != Device::Cpu && common::is_simulated() {
        *CALLS.lock().unwrap() = Some(common::sim::calls());
    }
    // SAFETY: the other threads, of streams and gates, hold neither the allocator nor a lock of this program's.
    let process = unsafe { libc::fork() };
    if process == 0 {
        child();
        exit();
    }
    let mut status = -1;
    // SAFETY: the child is ours, the place valid.
    assert_eq!(unsafe { libc::waitpid(process, &mut status, 0) }, process);
    assert_eq!(status, 0, "the child did not end well");
    *CALLS.lock().unwrap() = None;
    // The parent goes on.
    let mut kept = KEPT.lock().unwrap();
    let kept = kept.as_mut().unwrap();
    kept.idle.copy_to_gpu(.., &kept.stream).unwrap();
    kept.idle.fill_cpu(0).unwrap();
    kept.idle.copy_to_cpu(.., &kept.stream).unwrap();
    all(kept.idle.cpu().unwrap(), 1);
    kept.event.synchronize().unwrap();
}

/// A static, a thread-local of the forking thread, and exit handlers on both sides of the runtime's end.
fn before_the_fork(device: Device) {
    at_exit(expect_no_calls);
    *KEPT.lock().unwrap() = Some(Life::new(device));
    LOCAL.set(Some(Life::new(device)));
    at_exit(drop_kept);
}

#[test]
fn a_forked_child_that_only_drops_or_exits_calls_nothing_and_ends_quietly() {
    each(
        test_name!(),
        &[
            ("exits, and handlers and thread-locals drop", |device| {
                before_the_fork(device);
                forked(device, || ());
            }),
            ("drops", |device| {
                before_the_fork(device);
                forked(device, || {
                    drop(LOCAL.take());
                    drop(KEPT.lock().unwrap().take());
                });
            }),
            ("a thread of its own drops", |device| {
                before_the_fork(device);
                forked(device, || {
                    let taken = (LOCAL.take(), KEPT.lock().unwrap().take());
                    thread::spawn(move || drop(taken)).join().unwrap();
                });
            }),
            ("exits at once", |device| {
                before_the_fork(device);
                // SAFETY: ends the child without handlers.
                forked(device, || unsafe { libc::_exit(0) });
            }),
        ],
    );
}

/// Its end would be felt on the other side of the fork.
struct Owner;

impl Drop for Owner {
    fn drop(&mut self) {
        say("the owner was let go\n");
    }
}

#[test]
fn a_forked_child_does_not_let_the_owner_of_a_foreign_stream_go() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    if common::is_subprocess() {
        let raw = Stream::new(device).unwrap();
        // SAFETY: the stream outlives the handle.
        let foreign = unsafe { Stream::from_raw(raw.as_raw(), device, Some(Arc::new(Owner))) };
        let mut buffer = CpuGpuBuffer::<u8>::new(9, device).unwrap();
        buffer.fill(1, &foreign.unwrap()).unwrap();
        // SAFETY: as in `forked`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop((buffer, raw));
            say("the child is done\n");
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let mut status = -1;
        // SAFETY: the child is ours, the place valid.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        say("and now the parent\n");
        return drop(buffer);
    }
    let output = common::in_subprocess(test, &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let places = ["the child is done", "and now the parent", "the owner was let go"];
    let places = places.map(|said| text.find(said).unwrap_or_else(|| panic!("{said}: {text}")));
    assert!(places.is_sorted(), "{text}");
    assert_eq!(text.matches("the owner was let go").count(), 1, "{text}");
}

// ---- panics ----

#[test]
fn a_panic_while_a_transfer_is_queued_unwinds_and_the_buffer_waits_for_it() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let foreign = Foreign::new(WORDS, 0);
    let stream = Stream::new(device).unwrap();
    let mut uploading = CpuGpuBuffer::new(WORDS, device).unwrap();
    uploading.fill_cpu(7).unwrap();
    let downloading = CpuGpuBuffer::<u32>::new(WORDS, device).unwrap();
    let gate = Gate::close(&stream);
    let (caught, early) = gate.during(Duration::from_millis(50), || {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let (mut uploading, mut downloading) = (uploading, downloading);
            // SAFETY: the memory has as many words.
            unsafe { uploading.copy_to_device_ptr(.., foreign.as_ptr(), &stream) }.unwrap();
            downloading.copy_to_cpu(.., &stream).unwrap();
            std::panic::resume_unwind(Box::new("in the middle"));
        }))
    });
    let caught = caught.map(|()| "nothing").unwrap_err();
    assert_eq!(caught.downcast_ref(), Some(&"in the middle"));
    assert!(!early, "memory was given back that copies read and write");
    stream.synchronize().unwrap();
    all(&foreign.words(), 7);
}
