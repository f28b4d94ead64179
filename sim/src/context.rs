//! Devices, their primary contexts, the current contexts of a thread, and sticky errors.
//!
//! Contexts are the driver's primary contexts. A thread has a stack of current contexts. If it is
//! empty, most runtime calls make the context of device 0 current, as on hardware.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cudart_sys::cudaStreamCaptureMode as Mode;

use crate::settings::{self, MOST_DEVICES};
use crate::status::{Result, Status};
use crate::violation::violation;

struct Device {
    active: AtomicBool,
    sticky: AtomicU32,
    /// How often its context broke.
    breaks: AtomicU32,
    /// The devices whose memory its kernels reach, as bits.
    peers: AtomicU32,
}

static DEVICES: [Device; MOST_DEVICES] = [const {
    Device {
        active: AtomicBool::new(false),
        sticky: AtomicU32::new(0),
        breaks: AtomicU32::new(0),
        peers: AtomicU32::new(0),
    }
}; MOST_DEVICES];

/// The devices whose contexts are current, the innermost last.
///
/// The stack grows without end if a test makes pops fail. A full stack drops its outermost entry.
#[derive(Clone, Copy)]
struct Stack {
    devices: [usize; 16],
    depth: usize,
}

// None of these has a destructor, since destructors of other thread-locals make calls, too.
thread_local! {
    static STACK: Cell<Stack> = const { Cell::new(Stack { devices: [0; 16], depth: 0 }) };
    static LAST_ERROR: Cell<Status> = const { Cell::new(Status::cudaSuccess) };
    static MODE: Cell<Mode> = const { Cell::new(Mode::cudaStreamCaptureModeGlobal) };
}

fn device(device: usize) -> Result<&'static Device> {
    DEVICES[..settings::device_count()].get(device).ok_or(Status::cudaErrorInvalidDevice)
}

/// True if a device can be given access to memory of another one.
pub(crate) fn can_access_peer(on: usize, peer: usize) -> Result<bool> {
    device(on)?;
    device(peer)?;
    Ok(on != peer && settings::has_peers())
}

/// Gives the current device access to memory of another one.
pub(crate) fn enable_peer_access(peer: usize) -> Result {
    let on = current_device();
    if !can_access_peer(on, peer)? {
        return Err(Status::cudaErrorPeerAccessUnsupported);
    }
    activate(peer)?;
    match device(on)?.peers.fetch_or(1 << peer, Ordering::SeqCst) & (1 << peer) {
        0 => Ok(()),
        _ => Err(Status::cudaErrorPeerAccessAlreadyEnabled),
    }
}

/// True if kernels of a device reach the memory of another one.
pub(crate) fn is_peer(on: usize, other: usize) -> bool {
    on == other || device(on).is_ok_and(|on| on.peers.load(Ordering::SeqCst) & (1 << other) != 0)
}

/// The device of the thread's current context. The default is the first device.
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

/// Makes a context current if there is none, and returns its device.
pub(crate) fn bind_any() -> Result<usize> {
    if let Some(on) = current() {
        return Ok(on);
    }
    activate(0)?;
    push(0);
    Ok(0)
}

/// Begins most runtime calls: binds a context and returns its sticky error.
pub(crate) fn bind() -> Result {
    sticky(bind_any()?).map_or(Ok(()), Err)
}

/// `cudaSetDevice`: replaces the current context. A broken context may be chosen, too.
pub(crate) fn set_device(on: usize) -> Result {
    activate(on)?;
    pop();
    push(on);
    Ok(())
}

/// The error that every call on the device returns after a kernel broke its context ("CUDA Runtime
/// API, `cudaErrorIllegalAddress`").
///
/// Calls that only choose, count or name things still work, as on hardware.
pub(crate) fn sticky(on: usize) -> Option<Status> {
    let code = DEVICES.get(on)?.sticky.load(Ordering::SeqCst);
    (code != 0).then_some(cudart_sys::cudaError(code))
}

/// How often the context of the device broke. Work from before the last break never runs, even
/// after a repair.
pub(crate) fn breaks(on: usize) -> u32 {
    DEVICES.get(on).map_or(0, |device| device.breaks.load(Ordering::SeqCst))
}

pub(crate) fn break_context(on: usize, code: Status) {
    if let Some(device) = DEVICES.get(on) {
        device.breaks.fetch_add(1, Ordering::SeqCst);
        device.sticky.store(code.0, Ordering::SeqCst);
    }
}

/// Repairs broken contexts. Real contexts cannot be repaired.
pub(crate) fn mend() {
    DEVICES.iter().for_each(|device| device.sticky.store(0, Ordering::SeqCst));
}

static TORN_DOWN: AtomicBool = AtomicBool::new(false);

extern "C" fn tear_down() {
    TORN_DOWN.store(true, Ordering::SeqCst);
}

/// Arranges the end of the runtime at the exit of the process.
///
/// As on hardware, the first call that needs the driver does this. Exit handlers that were
/// registered earlier run after the end of the runtime.
pub(crate) fn live_until_exit() {
    static ARRANGED: Once = Once::new();
    ARRANGED.call_once(|| {
        // SAFETY: the handler stores to an atomic. This library is never unloaded.
        if unsafe { libc::atexit(tear_down) } != 0 {
            violation("no exit handler could be registered");
        }
    });
}

/// True if every call now returns `cudaErrorCudartUnloading`, late in the exit of the process.
pub(crate) fn is_torn_down() -> bool {
    TORN_DOWN.load(Ordering::SeqCst)
}

/// The last error of this thread's calls.
///
/// The error of a broken context appears here once, after a call returned it.
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
