//! What a test can ask of the simulation: to count the calls, to make some of them fail, and to hold one back.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::{Result, Status, context, memory};

/// A call at which something goes wrong.
struct Fault {
    /// The call's number, counted over all functions, or over one.
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
        /// Whether the call does its work all the same, as an error of earlier work lets it.
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
    /// The function whose next call is to be held back.
    hold: Option<String>,
    /// Whether a call is being held back.
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

/// What a call is to do.
enum Verdict {
    Proceed,
    Fail(u32),
    ProceedAndFail(u32),
    Break(u32),
}

fn control<R>(action: impl FnOnce(&mut Control) -> R) -> R {
    action(&mut CONTROL.lock())
}

/// Counts a call and decides what becomes of it.
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

/// Makes a call: counts it, and lets it do its work or fail. The answer is its error.
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
    if context::is_driver_too_old() && name != "cudaDriverGetVersion" {
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

/// From the reset on, the call of this number fails with `code`: of the function that is named, or of all
/// for null. `once` or for ever; with or without doing its work.
///
/// # Safety
///
/// `function` is null or a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_fail(
    function: *const c_char,
    number: u64,
    code: u32,
    once: bool,
    effect: bool,
) {
    // SAFETY: the caller vouches for it.
    let function = unsafe { name(function) };
    let harm = Harm::Fail { once, effect };
    control(|control| control.fault = Some(Fault { number, function, code, harm }));
}

/// At the call of this number, counted from the reset, of the function that is named, or of all for null, the
/// calling thread's current context breaks: that call and every later one on the device answers `code`, and
/// what is queued there does not run any more.
///
/// # Safety
///
/// As for [`cudart_sim_fail`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_break(function: *const c_char, number: u64, code: u32) {
    // SAFETY: the caller vouches for it.
    let function = unsafe { name(function) };
    let harm = Harm::Break;
    control(|control| control.fault = Some(Fault { number, function, code, harm }));
}

/// # Safety
///
/// `text` is null or NUL-terminated.
unsafe fn name(text: *const c_char) -> Option<String> {
    (!text.is_null()).then(|| {
        // SAFETY: not null, so the caller vouches for it.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    })
}

/// No call fails any more, and a broken context works again. Ends the program if host memory was unmapped that
/// is still pinned, unless it was left behind.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_heal() {
    control(|control| control.fault = None);
    context::mend();
    memory::check_pinned();
}

/// The host memory that is pinned now stays so, and is nobody's any more: what is left behind by many faults costs
/// time at each look.
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
    // SAFETY: the caller vouches for it.
    let function = unsafe { name(function) };
    control(|control| control.hold = function);
}

/// Whether a call is being held back.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_is_held() -> bool {
    control(|control| control.held)
}

/// Lets the call go that is held back, and holds back none.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_let_go() {
    control(|control| {
        control.hold = None;
        control.held = false;
    });
    LET_GO.notify_all();
}

/// The calls since the reset: of the function that is named, or of all for null.
///
/// # Safety
///
/// As for [`cudart_sim_fail`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudart_sim_calls(function: *const c_char) -> u64 {
    // SAFETY: the caller vouches for it.
    let function = unsafe { name(function) };
    control(|control| match function {
        None => control.calls,
        Some(function) => control.by_name.get(function.as_str()).copied().unwrap_or(0),
    })
}

/// The calls that give something back, and of which a failing one leaves it behind.
const RELEASES: [&str; 7] = [
    "cudaFree",
    "cudaFreeHost",
    "cudaHostUnregister",
    "cudaEventDestroy",
    "cudaStreamDestroy",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
];

/// The calls that give something back and were made to fail since the reset, or met a broken context.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected_releases() -> u64 {
    control(|control| control.injected_releases)
}

/// The calls that were made to fail since the reset, or at which a context broke.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected() -> u64 {
    control(|control| control.injected)
}

/// Things that live, by kind: device memory, pinned memory, streams, events, graphs and what is instantiated of them.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Device,
    Pinned,
    Stream,
    Event,
    Graph,
}

static LIVE: [AtomicI64; 5] = [const { AtomicI64::new(0) }; 5];

pub(crate) fn born(kind: Kind) {
    LIVE[kind as usize].fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn died(kind: Kind) {
    LIVE[kind as usize].fetch_sub(1, Ordering::SeqCst);
}

/// How many of a kind live: 0 device allocations, 1 pinned pieces of host memory, 2 streams, 3 events, 4 graphs.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_live(kind: usize) -> i64 {
    LIVE.get(kind).map_or(-1, |live| live.load(Ordering::SeqCst))
}

/// Limits device memory, in bytes for each device.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_device(bytes: usize) {
    memory::limit_device(bytes);
}

/// The host memory that is pinned, in bytes.
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

/// A pseudo-random number from the seed in `CUDART_SIM_SEED`.
pub(crate) fn random() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    if STATE.load(Ordering::Relaxed) == 0 {
        let seed = std::env::var("CUDART_SIM_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(1u64).max(1);
        // Whoever comes first sets it.
        let _ = STATE.compare_exchange(0, seed, Ordering::Relaxed, Ordering::Relaxed);
    }
    // SplitMix64, by Steele, Lea and Flood.
    let mut z = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Ends the program: something touched what it must not.
pub(crate) fn violation(what: &str) -> ! {
    eprintln!("cudart-sim: {what}");
    std::process::abort()
}
