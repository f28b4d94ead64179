//! Devices, their primary contexts, what is current in a thread, and errors that stick.
//!
//! Contexts are those of the driver's primary ones; a thread has a stack of current contexts, and most calls
//! of the runtime make that of device 0 current where there is none, as the real one was seen to.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{LazyLock, Once};

use cudart_sys::cudaStreamCaptureMode as Mode;

use crate::control;
use crate::{Result, Status};

struct Device {
    active: AtomicBool,
    sticky: AtomicU32,
    /// How often its context broke.
    breaks: AtomicU32,
}

/// The most devices that there can be.
pub(crate) const MOST: usize = 8;

static DEVICES: [Device; MOST] = [const {
    Device { active: AtomicBool::new(false), sticky: AtomicU32::new(0), breaks: AtomicU32::new(0) }
}; MOST];

fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// The version that the simulation says it is of: 13000, unless `CUDART_SIM_VERSION` says another.
pub(crate) fn version() -> i32 {
    setting("CUDART_SIM_VERSION", 13000)
}

/// The newest version that the driver of the simulation takes: 13000, unless `CUDART_SIM_DRIVER` says another; 0
/// where there is none.
pub(crate) fn driver_version() -> i32 {
    static VERSION: LazyLock<i32> = LazyLock::new(|| setting("CUDART_SIM_DRIVER", 13000));
    *VERSION
}

/// Whether the driver is of an older major version than the runtime, or not there. Every call that needs one answers
/// the same in both cases, as real runtimes from 12.0 to 13.5 do without a driver.
pub(crate) fn is_driver_too_old() -> bool {
    static TOO_OLD: LazyLock<bool> = LazyLock::new(|| driver_version() / 1000 < version() / 1000);
    *TOO_OLD
}

/// Which calls wait for the device without being asked to: none, unless `CUDART_SIM_WAITING` is 1,
/// for releasing memory and loading modules, or 2, for allocating and pinning memory, too. CUDA
/// allows each and promises none. They hide different faults, so that no run does now the one and
/// now the other: waiting hides that work still uses what is released, and not waiting hides a wait
/// for work that is held up.
pub(crate) fn waiting() -> u32 {
    static WAITING: LazyLock<u32> = LazyLock::new(|| setting("CUDART_SIM_WAITING", 0));
    *WAITING
}

/// How many devices there are: 2, unless `CUDART_SIM_DEVICES` says another number up to 8.
pub(crate) fn count() -> usize {
    setting("CUDART_SIM_DEVICES", 2).min(DEVICES.len())
}

/// Devices whose contexts are current, the innermost last. Where pops are made to fail it grows without end: of
/// more than there is room for, the outermost are forgotten.
#[derive(Clone, Copy)]
struct Stack {
    devices: [usize; 16],
    depth: usize,
}

// None of these has a destructor: calls come from the destructors of other thread-locals, too.
thread_local! {
    static STACK: Cell<Stack> = const { Cell::new(Stack { devices: [0; 16], depth: 0 }) };
    static LAST_ERROR: Cell<Status> = const { Cell::new(Status::cudaSuccess) };
    static MODE: Cell<Mode> = const { Cell::new(Mode::cudaStreamCaptureModeGlobal) };
}

fn device(device: usize) -> Result<&'static Device> {
    DEVICES[..count()].get(device).ok_or(Status::cudaErrorInvalidDevice)
}

/// The device of the thread's current context; of a thread without one, the first.
pub(crate) fn current_device() -> usize {
    current().unwrap_or(0)
}

/// The device of the thread's current context, if it has one.
pub(crate) fn current() -> Option<usize> {
    let stack = STACK.get();
    stack.devices[..stack.depth].last().copied()
}

pub(crate) fn push(on: usize) {
    let mut stack = STACK.get();
    if stack.depth == stack.devices.len() {
        stack.devices.rotate_left(1);
        stack.depth -= 1;
    }
    stack.devices[stack.depth] = on;
    stack.depth += 1;
    STACK.set(stack);
}

pub(crate) fn pop() -> Option<usize> {
    let current = current();
    let mut stack = STACK.get();
    stack.depth = stack.depth.saturating_sub(1);
    STACK.set(stack);
    current
}

/// Makes a primary context, if there is none yet.
pub(crate) fn activate(on: usize) -> Result {
    device(on)?.active.store(true, Ordering::SeqCst);
    Ok(())
}

pub(crate) fn is_active(on: usize) -> Result<bool> {
    Ok(device(on)?.active.load(Ordering::SeqCst))
}

/// Makes a context current where there is none; the answer is its device.
pub(crate) fn bind_any() -> Result<usize> {
    if let Some(on) = current() {
        return Ok(on);
    }
    activate(0)?;
    push(0);
    Ok(0)
}

/// What most calls of the runtime begin with: a current context, whose sticky error they answer.
pub(crate) fn bind() -> Result {
    sticky(bind_any()?).map_or(Ok(()), Err)
}

/// `cudaSetDevice`: takes the place of the current context. A broken one can be chosen like any other.
pub(crate) fn set_device(on: usize) -> Result {
    activate(on)?;
    pop();
    push(on);
    Ok(())
}

/// The error that every call on the device answers, once a kernel broke its context ("CUDA Runtime API,
/// `cudaErrorIllegalAddress`"). Calls that only choose, count or name things go on working, as on hardware.
pub(crate) fn sticky(on: usize) -> Option<Status> {
    let code = DEVICES.get(on)?.sticky.load(Ordering::SeqCst);
    (code != 0).then_some(cudart_sys::cudaError(code))
}

/// How often the device's context broke: what was queued before it last did never runs, mended or not.
pub(crate) fn breaks(on: usize) -> u32 {
    DEVICES.get(on).map_or(0, |device| device.breaks.load(Ordering::SeqCst))
}

pub(crate) fn break_context(on: usize, code: Status) {
    if let Some(device) = DEVICES.get(on) {
        device.breaks.fetch_add(1, Ordering::SeqCst);
        device.sticky.store(code.0, Ordering::SeqCst);
    }
}

/// Lets broken contexts work again, which no real one does.
pub(crate) fn mend() {
    DEVICES.iter().for_each(|device| device.sticky.store(0, Ordering::SeqCst));
}

static TORN_DOWN: AtomicBool = AtomicBool::new(false);

extern "C" fn tear_down() {
    TORN_DOWN.store(true, Ordering::SeqCst);
}

/// Has the runtime torn down when the process exits. As on hardware, that is arranged by the first call that
/// needs the driver: exit handlers that were registered before it run after the runtime's end.
pub(crate) fn live_until_exit() {
    static ARRANGED: Once = Once::new();
    ARRANGED.call_once(|| {
        // SAFETY: the handler stores to an atomic, and this library is never unloaded.
        if unsafe { libc::atexit(tear_down) } != 0 {
            control::violation("no exit handler could be registered");
        }
    });
}

/// Whether the process is so far in its exit that every call answers `cudaErrorCudartUnloading`.
pub(crate) fn is_torn_down() -> bool {
    TORN_DOWN.load(Ordering::SeqCst)
}

/// The last error of this thread's calls. A broken context's is found here when a call has answered it, and
/// then once, as for any other.
pub(crate) fn last_error(take: bool) -> Status {
    if is_torn_down() {
        return Status::cudaErrorCudartUnloading;
    }
    match take {
        true => LAST_ERROR.replace(Status::cudaSuccess),
        false => LAST_ERROR.get(),
    }
}

pub(crate) fn set_last_error(status: Status) {
    LAST_ERROR.set(status);
}

pub(crate) fn capture_mode() -> Mode {
    MODE.get()
}

pub(crate) fn exchange_capture_mode(mode: Mode) -> Mode {
    MODE.replace(mode)
}
