//! The simulated runtime's controls.

use std::ffi::{CStr, CString, c_char};

/// A function of the simulation's, in the copy of it that the loader loaded.
fn function<F>(name: &CStr) -> F {
    let library = CString::new(std::env::var("CUDART_LIBRARY").unwrap()).unwrap();
    // SAFETY: a NUL-terminated name; nothing is loaded that was not.
    let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    assert!(!handle.is_null(), "the simulated runtime is not loaded yet");
    // SAFETY: the library is never unloaded.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!address.is_null() && size_of::<F>() == size_of_val(&address));
    // SAFETY: the callers name the type that belongs to the name.
    unsafe { std::mem::transmute_copy(&address) }
}

/// Counts calls from 0 again, and makes none fail.
pub fn reset() {
    function::<extern "C" fn()>(c"cudart_sim_reset")();
}

/// Makes the call of this number fail, counted from the reset: once or for ever, with or without its effect.
pub fn fail(number: u64, code: u32, once: bool, effect: bool) {
    type Fail = unsafe extern "C" fn(*const c_char, u64, u32, bool, bool);
    // SAFETY: null stands for every function.
    unsafe { function::<Fail>(c"cudart_sim_fail")(std::ptr::null(), number, code, once, effect) };
}

/// Makes no call fail any more.
pub fn heal() {
    function::<extern "C" fn()>(c"cudart_sim_heal")();
}

/// The calls that were made to fail since the reset.
pub fn injected() -> u64 {
    function::<extern "C" fn() -> u64>(c"cudart_sim_injected")()
}

/// Those among them that give something back, and so left it behind.
pub fn injected_releases() -> u64 {
    function::<extern "C" fn() -> u64>(c"cudart_sim_injected_releases")()
}

/// Device allocations, pinned pieces, streams and events that live.
pub fn live() -> [i64; 4] {
    let live: extern "C" fn(usize) -> i64 = function(c"cudart_sim_live");
    [0, 1, 2, 3].map(|kind| live(kind))
}

/// Limits what can be pinned, in bytes.
pub fn limit_pinned(bytes: usize) {
    function::<extern "C" fn(usize)>(c"cudart_sim_limit_pinned")(bytes);
}

/// Limits each device's memory, in bytes.
pub fn limit_device(bytes: usize) {
    function::<extern "C" fn(usize)>(c"cudart_sim_limit_device")(bytes);
}
