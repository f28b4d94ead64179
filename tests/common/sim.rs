//! The controls of the simulated runtime.

use std::ffi::{CStr, CString, c_char};
use std::sync::MutexGuard;
use std::thread;
use std::time::{Duration, Instant};

use cpu_gpu_buffer::{CpuGpuBuffer, Device};

/// A function of the simulation's, in the copy of it that the loader loaded.
fn function<F>(name: &CStr) -> F {
    let library = CString::new(std::env::var("CUDART_LIBRARY").unwrap()).unwrap();
    // SAFETY: the name is NUL-terminated. The flags load no new library.
    let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    assert!(!handle.is_null(), "the simulated runtime is not loaded yet");
    // SAFETY: the library is never unloaded.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!address.is_null() && size_of::<F>() == size_of_val(&address));
    // SAFETY: the callers name the type that belongs to the name.
    unsafe { std::mem::transmute_copy(&address) }
}

/// Starts counting at 0, and ends all faults.
pub fn reset() {
    function::<extern "C" fn()>(c"cudart_sim_reset")();
}

/// Makes a call fail. `number` counts from the last reset, `once` limits the fault to one call, and
/// `effect` lets the call do its work.
pub fn fail(number: u64, code: u32, once: bool, effect: bool) {
    type Fail = unsafe extern "C" fn(*const c_char, u64, u32, bool, bool);
    // SAFETY: null stands for every function.
    unsafe { function::<Fail>(c"cudart_sim_fail")(std::ptr::null(), number, code, once, effect) };
}

/// Makes every call of one function fail, without its effect.
pub fn fail_function(name: &CStr, code: u32) {
    fail_call(name, 0, code, false, false);
}

/// As [`fail`], for the calls of one function.
pub fn fail_call(name: &CStr, number: u64, code: u32, once: bool, effect: bool) {
    type Fail = unsafe extern "C" fn(*const c_char, u64, u32, bool, bool);
    // SAFETY: a NUL-terminated name.
    unsafe { function::<Fail>(c"cudart_sim_fail")(name.as_ptr(), number, code, once, effect) };
}

/// Breaks the context at a call, whose number counts from the last reset. That call and all later
/// ones on the device return `code`.
pub fn break_at(number: u64, code: u32) {
    type Break = unsafe extern "C" fn(*const c_char, u64, u32);
    // SAFETY: null stands for every function.
    unsafe { function::<Break>(c"cudart_sim_break")(std::ptr::null(), number, code) };
}

/// Ends all faults and repairs broken contexts.
pub fn heal() {
    function::<extern "C" fn()>(c"cudart_sim_heal")();
}

/// Excludes the memory that is pinned now from the checks of [`heal`].
pub fn leave_behind() {
    function::<extern "C" fn()>(c"cudart_sim_leave_behind")();
}

/// A call that is held at its beginning, before it has any effect.
pub struct Held(());

impl Held {
    /// Holds the next call of a function, in any thread.
    pub fn next(name: &CStr) -> Held {
        type Hold = unsafe extern "C" fn(*const c_char);
        // SAFETY: a NUL-terminated name.
        unsafe { function::<Hold>(c"cudart_sim_hold")(name.as_ptr()) };
        Held(())
    }

    /// Waits until the call begins.
    pub fn wait(&self) {
        let is_held: extern "C" fn() -> bool = function(c"cudart_sim_is_held");
        let start = Instant::now();
        while !is_held() {
            assert!(start.elapsed() < Duration::from_secs(20), "the call does not come");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        function::<extern "C" fn()>(c"cudart_sim_let_go")();
    }
}

/// The calls since the reset.
pub fn calls() -> u64 {
    type Calls = unsafe extern "C" fn(*const c_char) -> u64;
    // SAFETY: null stands for every function.
    unsafe { function::<Calls>(c"cudart_sim_calls")(std::ptr::null()) }
}

/// The calls of one function since the reset.
pub fn calls_of(name: &CStr) -> u64 {
    type Calls = unsafe extern "C" fn(*const c_char) -> u64;
    // SAFETY: a NUL-terminated name.
    unsafe { function::<Calls>(c"cudart_sim_calls")(name.as_ptr()) }
}

/// The calls that were made to fail since the reset, or at which a context broke.
pub fn injected() -> u64 {
    function::<extern "C" fn() -> u64>(c"cudart_sim_injected")()
}

/// The number of releases that a test made fail, or that found a broken context. Their memory stays
/// behind.
pub fn injected_releases() -> u64 {
    function::<extern "C" fn() -> u64>(c"cudart_sim_injected_releases")()
}

/// The numbers of live device allocations, pinned ranges, streams, events and graphs.
pub fn live() -> [i64; 5] {
    let live: extern "C" fn(usize) -> i64 = function(c"cudart_sim_live");
    [0, 1, 2, 3, 4].map(|kind| live(kind))
}

/// The number of pinned bytes.
pub fn pinned_bytes() -> usize {
    function::<extern "C" fn() -> usize>(c"cudart_sim_pinned_bytes")()
}

fn limit_pinned(bytes: usize) {
    function::<extern "C" fn(usize)>(c"cudart_sim_limit_pinned")(bytes);
}

fn limit_registration(bytes: usize) {
    function::<extern "C" fn(usize)>(c"cudart_sim_limit_registration")(bytes);
}

/// Limits each device's memory, in bytes.
pub fn limit_device(bytes: usize) {
    function::<extern "C" fn(usize)>(c"cudart_sim_limit_device")(bytes);
}

/// Limits of memory. Dropping the value removes all limits and faults.
pub struct Limits {
    _turn: MutexGuard<'static, ()>,
}

impl Limits {
    /// Takes the turn of the first device. `None` except on the simulated runtime, since only that
    /// can run out of memory on request.
    pub fn of(test: &str) -> Option<(Device, Limits)> {
        let (device, turn) = super::cuda(test)?;
        if !super::is_simulated() {
            super::left_out(test, "memory runs out on the simulated runtime alone");
            return None;
        }
        // Makes the chunks of memory that stay with the device.
        drop(CpuGpuBuffer::<u8>::new(1, device).unwrap());
        Some((device, Limits { _turn: turn }))
    }

    /// Limits further pinning to this many bytes.
    pub fn pin(&self, bytes: usize) {
        limit_pinned(pinned_bytes() + bytes);
    }

    /// Limits a single registration to this many bytes.
    pub fn register(&self, bytes: usize) {
        limit_registration(bytes);
    }

    /// Limits further allocations on the first device to this many bytes.
    pub fn allocate(&self, bytes: usize, device: Device) {
        let memory = device.memory().unwrap();
        limit_device(memory.total - memory.free + bytes);
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        heal();
        limit_pinned(8 << 30);
        limit_registration(usize::MAX);
        limit_device(8 << 30);
    }
}
