//! What a test can ask of the simulation: to count the calls, and to make some of them fail.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::{Result, Status, memory};

/// A call that is to fail.
struct Fault {
    /// The call's number, counted over all functions, or over one.
    number: u64,
    function: Option<String>,
    code: u32,
    /// This call only, or all from it on.
    once: bool,
    /// Whether the call does its work all the same, as an error of earlier work lets it.
    effect: bool,
}

struct Control {
    calls: u64,
    by_name: BTreeMap<&'static str, u64>,
    fault: Option<Fault>,
    injected: u64,
    injected_releases: u64,
}

impl Control {
    const fn new() -> Control {
        Control {
            calls: 0,
            by_name: BTreeMap::new(),
            fault: None,
            injected: 0,
            injected_releases: 0,
        }
    }
}

static CONTROL: Mutex<Control> = Mutex::new(Control::new());

/// What a call is to do.
enum Verdict {
    Proceed,
    Fail(u32),
    ProceedAndFail(u32),
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
        if number < fault.number || fault.once && number > fault.number {
            return Verdict::Proceed;
        }
        control.injected += 1;
        control.injected_releases += u64::from(RELEASES.contains(&name));
        match fault.effect {
            true => Verdict::ProceedAndFail(fault.code),
            false => Verdict::Fail(fault.code),
        }
    })
}

/// Makes a call: counts it, and lets it do its work or fail. The answer is its error.
pub(crate) fn run(name: &'static str, body: impl FnOnce() -> Result) -> Option<Status> {
    match verdict(name) {
        Verdict::Proceed => body().err(),
        Verdict::Fail(code) => Some(cudart_sys::cudaError(code)),
        Verdict::ProceedAndFail(code) => {
            let _ = body();
            Some(cudart_sys::cudaError(code))
        }
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
    let function = (!function.is_null()).then(|| {
        // SAFETY: not null, so the caller vouches for it.
        unsafe { CStr::from_ptr(function) }.to_string_lossy().into_owned()
    });
    control(|control| control.fault = Some(Fault { number, function, code, once, effect }));
}

/// No call fails any more.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_heal() {
    control(|control| control.fault = None);
}

/// The calls since the reset.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_calls() -> u64 {
    control(|control| control.calls)
}

/// The calls that give something back, and of which a failing one leaves it behind.
const RELEASES: [&str; 5] =
    ["cudaFree", "cudaFreeHost", "cudaHostUnregister", "cudaEventDestroy", "cudaStreamDestroy"];

/// The calls that give something back and were made to fail since the reset.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected_releases() -> u64 {
    control(|control| control.injected_releases)
}

/// The calls that were made to fail since the reset.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_injected() -> u64 {
    control(|control| control.injected)
}

/// Things that live, by kind: device memory, pinned memory, streams, events.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Device,
    Pinned,
    Stream,
    Event,
}

static LIVE: [AtomicI64; 4] = [const { AtomicI64::new(0) }; 4];

pub(crate) fn born(kind: Kind) {
    LIVE[kind as usize].fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn died(kind: Kind) {
    LIVE[kind as usize].fetch_sub(1, Ordering::SeqCst);
}

/// How many of a kind live: 0 device allocations, 1 pinned pieces of host memory, 2 streams, 3 events.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_live(kind: usize) -> i64 {
    LIVE.get(kind).map_or(-1, |live| live.load(Ordering::SeqCst))
}

/// Limits device memory, in bytes for each device.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_device(bytes: usize) {
    memory::limit_device(bytes);
}

/// Limits the host memory that can be pinned, in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn cudart_sim_limit_pinned(bytes: usize) {
    memory::limit_pinned(bytes);
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
