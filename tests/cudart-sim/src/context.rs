//! Devices, their primary contexts, what is current in a thread, and errors that stick.
//!
//! Contexts are those of the driver's primary ones; a thread has a stack of current contexts, and most calls
//! of the runtime make that of device 0 current where there is none, as the real one was seen to.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cudart_sys::cudaStreamCaptureMode as Mode;

use crate::{Result, Status};

struct Device {
    active: AtomicBool,
    sticky: AtomicU32,
}

static DEVICES: [Device; 8] =
    [const { Device { active: AtomicBool::new(false), sticky: AtomicU32::new(0) } }; 8];

fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// The version that the simulation says it is of: 13000, unless `CUDART_SIM_VERSION` says another.
pub(crate) fn version() -> i32 {
    setting("CUDART_SIM_VERSION", 13000)
}

/// How many devices there are: 2, unless `CUDART_SIM_DEVICES` says another number up to 8.
pub(crate) fn count() -> usize {
    setting("CUDART_SIM_DEVICES", 2).min(DEVICES.len())
}

thread_local! {
    /// Devices whose contexts are current, the innermost last.
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
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
    STACK.with_borrow(|stack| stack.last().copied())
}

pub(crate) fn push(on: usize) {
    STACK.with_borrow_mut(|stack| stack.push(on));
}

pub(crate) fn pop() -> Option<usize> {
    STACK.with_borrow_mut(Vec::pop)
}

/// Makes a primary context, if there is none yet.
pub(crate) fn activate(on: usize) -> Result {
    device(on)?.active.store(true, Ordering::SeqCst);
    Ok(())
}

pub(crate) fn is_active(on: usize) -> Result<bool> {
    Ok(device(on)?.active.load(Ordering::SeqCst))
}

/// What most calls of the runtime begin with: a current context, whose sticky error they answer.
pub(crate) fn bind() -> Result {
    let on = match current() {
        Some(on) => on,
        None => {
            activate(0)?;
            push(0);
            0
        }
    };
    sticky(on).map_or(Ok(()), Err)
}

/// `cudaSetDevice`: takes the place of the current context.
pub(crate) fn set_device(on: usize) -> Result {
    activate(on)?;
    pop();
    push(on);
    sticky(on).map_or(Ok(()), Err)
}

/// The error that every call on the device answers, once a kernel broke its context.
pub(crate) fn sticky(on: usize) -> Option<Status> {
    let code = DEVICES.get(on)?.sticky.load(Ordering::SeqCst);
    (code != 0).then_some(cudart_sys::cudaError(code))
}

pub(crate) fn break_context(on: usize, code: Status) {
    if let Some(device) = DEVICES.get(on) {
        device.sticky.store(code.0, Ordering::SeqCst);
    }
}

pub(crate) fn last_error(take: bool) -> Status {
    if let Some(code) = current().and_then(sticky) {
        return code;
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
