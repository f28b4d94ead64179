//! The controls for tests: they count calls, make calls fail, and hold a call back.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};

use parking_lot::{Condvar, Mutex};

use crate::status::{Result, Status};
use crate::violation::violation;
use crate::{context, live, memory, settings};

/// A call at which something goes wrong.
struct Fault {
    /// The number of the call, counted over one function or over all.
    number: u64,
    function: Option<String>,
    code: u32,
    harm: Harm,
}

enum Harm {
    /// The call fails.
    Fail {
        /// This call only, or all from it on.
        once: bool,
        /// True if the call still does its work, like a call that returns the error of earlier
        /// work.
        effect: bool,
    },
    /// Before the call, a kernel breaks the calling thread's current context.
    Break,
}

struct Control {
    calls: u64,
    by_name: BTreeMap<&'static str, u64>,
    fault: Option<Fault>,
    injected: u64,
    injected_releases: u64,
    /// The function whose next call will be held back.
    hold: Option<String>,
    /// True while a call is held.
    held: bool,
}

impl Control {
    const fn new() -> Control {
        Control {
            calls: 0,
            by_name: BTreeMap::new(),
            fault: None,
            injected: 0,
            injected_releases: 0,
            hold: None,
            held: false,
        }
    }
}

static CONTROL: Mutex<Control> = Mutex::new(Control::new());
static LET_GO: Condvar = Condvar::new();

/// The effect of the controls on one call.
enum Verdict {
    Proceed,
    Fail(u32),
    ProceedAndFail(u32),
    Break(u32),
}

fn control<R>(action: impl FnOnce(&mut Control) -> R) -> R {
    action(&mut CONTROL.lock())
}

/// Counts a call and decides its verdict.
fn verdict(name: &'static str) -> Verdict {
    control(|control| {
        control.calls += 1;
        let count = control.by_name.entry(name).or_default();
        *count += 1;
        let (all, of_this) = (control.calls, *count);
        let Some(fault) = &control.fault else { return Verdict::Proceed };
        let number = match &fault.function {
            None => all,
            Some(function) if function == name => of_this,
            Some(_) => return Verdict::Proceed,
        };
        let (harmed, verdict) = match fault.harm {
            Harm::Fail { once: true, .. } if number != fault.number => (false, Verdict::Proceed),
            Harm::Fail { effect: true, .. } => (true, Verdict::ProceedAndFail(fault.code)),
            Harm::Fail { effect: false, .. } => (true, Verdict::Fail(fault.code)),
            Harm::Break => (number == fault.number, Verdict::Break(fault.code)),
        };
        if number < fault.number || !harmed {
            return Verdict::Proceed;
        }
        control.injected += 1;
        verdict
    })
}

/// Runs one call under the controls and returns its error.
pub(crate) fn run(name: &'static str, body: impl FnOnce() -> Result) -> Option<Status> {
    context::live_until_exit();
    wait_while_held(name);
    let verdict = verdict(name);
    if context::is_torn_down() {
        if name == "cudaDriverGetVersion" {
            violation("cudaDriverGetVersion after the runtime's end, where the real one crashes");
        }
        return Some(Status::cudaErrorCudartUnloading);
    }
    if settings::is_driver_too_old() && name != "cudaDriverGetVersion" {
        return Some(Status::cudaErrorInsufficientDriver);
    }
    let (answer, injected) = match verdict {
        Verdict::Proceed => (body().err(), false),
        Verdict::Fail(code) => (Some(cudart_sys::cudaError(code)), true),
        Verdict::ProceedAndFail(code) => {
            let _ = body();
            (Some(cudart_sys::cudaError(code)), true)
        }
        Verdict::Break(code) => {
            context::break_context(context::current_device(), cudart_sys::cudaError(code));
            (body().err(), false)
        }
    };
    let broken = answer.is_some() && answer == context::sticky(context::current_device());
    if RELEASES.contains(&name) && (injected || broken) {
        control(|control| control.injected_releases += 1);
    }
    answer
}

/// Waits at the beginning of a call that a test holds back.
fn wait_while_held(name: &str) {
    let mut control = CONTROL.lock();
    if control.hold.as_deref() != Some(name) {
        return;
    }
    control.hold = None;
    control.held = true;
    while control.held {
        LET_GO.wait(&mut control);
    }
}

/// Counts from 0 again.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_reset() {
    control(|control| *control = Control::new());
}

/// Makes a call fail with `code`.
///
/// `number` counts from the last reset. It counts the calls of one function, or of all functions if
/// `function` is null. `once` limits the fault to this one call. `effect` lets the call do its
/// work.
///
/// # Safety
///
/// `function` is null or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_fail(
    function: *const c_char,
    number: u64,
    code: u32,
    once: bool,
    effect: bool,
) {
    // SAFETY: the caller guarantees it.
    let function = unsafe { name(function) };
    let harm = Harm::Fail { once, effect };
    control(|control| control.fault = Some(Fault { number, function, code, harm }));
}

/// Breaks the calling thread's current context at a call.
///
/// `function` and `number` select the call as in [`cudart_sim_fail`]. This call and every later one
/// on the device return `code`. Queued work of the device no longer runs.
///
/// # Safety
///
/// The same as for [`cudart_sim_fail`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_break(function: *const c_char, number: u64, code: u32) {
    // SAFETY: the caller guarantees it.
    let function = unsafe { name(function) };
    let harm = Harm::Break;
    control(|control| control.fault = Some(Fault { number, function, code, harm }));
}

/// # Safety
///
/// `text` is null or NUL-terminated.
unsafe fn name(text: *const c_char) -> Option<String> {
    (!text.is_null()).then(|| {
        // SAFETY: the pointer is not null, and the caller guarantees the rest.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    })
}

/// Ends all faults and repairs broken contexts.
///
/// Aborts the program if pinned host memory was unmapped, except memory that was left behind.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_heal() {
    control(|control| control.fault = None);
    context::mend();
    memory::check_pinned();
}

/// Excludes the memory that is pinned now from the checks of [`cudart_sim_heal`].
///
/// Many faults leave much memory behind, and each check costs time.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_leave_behind() {
    memory::leave_behind();
}

/// Holds back the next call of a function, before it is counted and does anything.
///
/// # Safety
///
/// `function` is NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_hold(function: *const c_char) {
    // SAFETY: the caller guarantees it.
    let function = unsafe { name(function) };
    control(|control| control.hold = function);
}

/// True while a call is held.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_is_held() -> bool {
    control(|control| control.held)
}

/// Releases the held call. No other call will be held.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_let_go() {
    control(|control| {
        control.hold = None;
        control.held = false;
    });
    LET_GO.notify_all();
}

/// The number of calls since the last reset, of one function or of all if `function` is null.
///
/// # Safety
///
/// The same as for [`cudart_sim_fail`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_calls(function: *const c_char) -> u64 {
    // SAFETY: the caller guarantees it.
    let function = unsafe { name(function) };
    control(|control| match function {
        None => control.calls,
        Some(function) => control.by_name.get(function.as_str()).copied().unwrap_or(0),
    })
}

/// The calls that release something. If one fails, the thing stays behind.
const RELEASES: [&str; 7] = [
    "cudaFree",
    "cudaFreeHost",
    "cudaHostUnregister",
    "cudaEventDestroy",
    "cudaStreamDestroy",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
];

/// The number of releases since the reset that a test made fail, or that found a broken context.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected_releases() -> u64 {
    control(|control| control.injected_releases)
}

/// The number of calls since the reset that a test made fail, or at which a context broke.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected() -> u64 {
    control(|control| control.injected)
}

/// The number of live things of one kind: 0 device allocations, 1 pinned host ranges, 2 streams, 3
/// events, 4 graphs.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_live(kind: usize) -> i64 {
    live::count(kind).unwrap_or(-1)
}

/// Limits device memory, in bytes for each device.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_device(bytes: usize) {
    memory::limit_device(bytes);
}

/// The bytes of pinned host memory.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_pinned_bytes() -> usize {
    memory::pinned_bytes()
}

/// Limits the host memory that can be pinned, in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_pinned(bytes: usize) {
    memory::limit_pinned(bytes);
}

/// Limits the host memory that can be registered at once, in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_registration(bytes: usize) {
    memory::limit_registration(bytes);
}
