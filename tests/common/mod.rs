//! The tests' shared code: devices, gates that hold a stream, and raw access to device memory.

#![allow(dead_code)]

pub mod runtime;
#[cfg(target_os = "linux")]
pub mod sim;

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Pod;
use cpu_gpu_buffer::{Device, Stream, sys};
pub use runtime::*;

const SUCCESS: sys::cudaError_t = sys::cudaError::cudaSuccess;

/// The CPU, and the first CUDA device if there is one.
pub fn devices() -> Vec<Device> {
    match Device::auto() {
        Device::Cpu => vec![Device::Cpu],
        cuda => vec![Device::Cpu, cuda],
    }
}

/// Makes the memory that stays with a device after its first small buffer. A test that counts
/// allocations calls this before it begins to count.
pub fn make_what_stays(device: Device) {
    drop(cpu_gpu_buffer::CpuGpuBuffer::<u8>::new(1, device).unwrap());
}

/// The first CUDA device, and this thread's turn on it. Prints that the test is left out if there
/// is no device.
pub fn cuda(test: &str) -> Option<(Device, MutexGuard<'static, ()>)> {
    // The turn comes first. The next line makes calls, too, and another test may be counting calls.
    let turn = turn();
    match Device::auto() {
        Device::Cpu => {
            left_out(test, "no CUDA device");
            None
        }
        device => Some((device, turn)),
    }
}

/// Tests that hold streams take turns, since a held stream makes `cudaFree` wait in every thread.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Two kernels. `gate` holds its stream until the word at `flag` is not 0, but at most for 20
/// seconds. `store` writes `value` to `count` words.
static KERNELS: &CStr = c"
.version 8.0
.target sm_75
.address_size 64
.visible .entry gate(.param .u64 flag) {
    .reg .u64 %at, %start, %now;
    .reg .u32 %word;
    .reg .pred %open, %waiting;
    ld.param.u64 %at, [flag];
    mov.u64 %start, %globaltimer;
LOOK:
    ld.volatile.global.u32 %word, [%at];
    setp.ne.u32 %open, %word, 0;
    @%open bra DONE;
    nanosleep.u32 1000;
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %waiting, %now, 20000000000;
    @%waiting bra LOOK;
DONE:
    ret;
}
.visible .entry store(.param .u64 dst, .param .u64 count, .param .u32 value) {
    .reg .u64 %at, %i, %count, %step;
    .reg .u32 %a, %b, %c, %value;
    .reg .pred %done;
    ld.param.u64 %at, [dst];
    ld.param.u64 %count, [count];
    ld.param.u32 %value, [value];
    mov.u32 %a, %ctaid.x;
    mov.u32 %b, %ntid.x;
    mov.u32 %c, %tid.x;
    mul.wide.u32 %i, %a, %b;
    cvt.u64.u32 %step, %c;
    add.u64 %i, %i, %step;
    mov.u32 %a, %nctaid.x;
    mul.wide.u32 %step, %a, %b;
    mad.lo.u64 %at, %i, 4, %at;
STORE:
    setp.ge.u64 %done, %i, %count;
    @%done bra END;
    st.global.u32 [%at], %value;
    add.u64 %i, %i, %step;
    mad.lo.u64 %at, %step, 4, %at;
    bra STORE;
END:
    ret;
}
";

struct Kernels {
    gate: sys::CUfunction,
    store: sys::CUfunction,
}
// SAFETY: function handles may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// A function of the driver.
pub fn entry<F>(name: &CStr) -> F {
    let mut address = ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    // SAFETY: all pointers are valid.
    let mut status = unsafe {
        sys::cudaGetDriverEntryPointByVersion(name.as_ptr(), &mut address, 12000, 0, &mut found)
    };
    if status == sys::cudaError::SYMBOL_NOT_FOUND {
        // Runtimes before 12.5.
        // SAFETY: as above.
        status =
            unsafe { sys::cudaGetDriverEntryPoint(name.as_ptr(), &mut address, 0, &mut found) };
    }
    assert_eq!(status, SUCCESS);
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: the callers name the type that belongs to the name.
    unsafe { std::mem::transmute_copy(&address) }
}

/// Loaded once, while nothing is held.
fn kernels() -> &'static Kernels {
    static LOADED: OnceLock<Kernels> = OnceLock::new();
    LOADED.get_or_init(|| {
        use_first_device();
        load_kernels()
    })
}

/// Loads the kernels into the current context.
fn load_kernels() -> Kernels {
    let load: sys::PFN_cuModuleLoadData_v2000 = entry(c"cuModuleLoadData");
    let get: sys::PFN_cuModuleGetFunction_v2000 = entry(c"cuModuleGetFunction");
    let (load, get) = (load.unwrap(), get.unwrap());
    let mut module = ptr::null_mut();
    // SAFETY: PTX that ends with a NUL.
    let status = unsafe { load(&mut module, KERNELS.as_ptr().cast()) };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    let function = |name: &CStr| {
        let mut function = ptr::null_mut();
        // SAFETY: the module was just loaded.
        let status = unsafe { get(&mut function, module, name.as_ptr()) };
        assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
        function
    };
    Kernels { gate: function(c"gate"), store: function(c"store") }
}

/// True if the device's primary context exists.
pub fn has_context(device: i32) -> bool {
    type GetState = unsafe extern "C" fn(i32, *mut u32, *mut i32) -> sys::CUresult;
    let get_state: GetState = entry(c"cuDevicePrimaryCtxGetState");
    let (mut flags, mut active) = (0, 0);
    // SAFETY: all pointers are valid.
    let status = unsafe { get_state(device, &mut flags, &mut active) };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    active != 0
}

pub fn use_first_device() {
    use_device(0);
}

pub fn use_device(ordinal: i32) {
    // SAFETY: no pointers.
    assert_eq!(unsafe { sys::cudaSetDevice(ordinal) }, SUCCESS);
}

fn launch(function: sys::CUfunction, blocks: u32, parameters: &mut [*mut c_void], stream: &Stream) {
    let launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel");
    let (launch, parameters) = (launch.unwrap(), parameters.as_mut_ptr());
    // SAFETY: the callers pass the parameters of the kernel. Its context is current.
    let status = unsafe {
        let raw = stream.as_raw();
        launch(function, blocks, 1, 1, 128, 1, 1, 0, raw, parameters, ptr::null_mut())
    };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
}

/// Sends a kernel that writes `value` to `count` words at `to`.
pub fn store(to: *mut u32, count: usize, value: u32, stream: &Stream) {
    let (mut to, mut count, mut value) = (to, count as u64, value);
    let parameters = &mut [(&raw mut to).cast(), (&raw mut count).cast(), (&raw mut value).cast()];
    let kernels = kernels();
    use_first_device();
    launch(kernels.store, 64, parameters, stream);
}

/// Enqueues a kernel that breaks the context by writing to an invalid address.
pub fn break_context(stream: &Stream) {
    store(ptr::without_provenance_mut(0x10), 4, 1, stream);
}

/// The same as [`store`], on a stream of any device. Makes that device current.
pub fn store_on(ordinal: i32, to: *mut u32, count: usize, value: u32, stream: &Stream) {
    use_device(ordinal);
    let (mut to, mut count, mut value) = (to, count as u64, value);
    let parameters = &mut [(&raw mut to).cast(), (&raw mut count).cast(), (&raw mut value).cast()];
    launch(load_kernels().store, 64, parameters, stream);
}

/// Breaks the context of any device. Makes that device current.
pub fn break_device(ordinal: i32) {
    let stream = Stream::new(Device::Cuda(ordinal as u32)).unwrap();
    store_on(ordinal, ptr::without_provenance_mut(0x10), 4, 1, &stream);
    assert!(stream.synchronize().is_err());
}

/// A gate on a stream. Later work of the stream waits until the gate opens.
pub struct Gate(&'static AtomicU32);

impl Gate {
    /// Everything that a closed gate would hold up is loaded before the first one closes.
    pub fn close(stream: &Stream) -> Gate {
        let kernels = kernels();
        let mut flag: *mut c_void = ptr::null_mut();
        // SAFETY: the pointer is valid for a write. The page is never freed, since a kernel may
        // read it.
        assert_eq!(unsafe { sys::cudaHostAlloc(&mut flag, 4096, 3) }, SUCCESS);
        // SAFETY: the word is aligned, large enough, and never freed.
        let word = unsafe { &*flag.cast::<AtomicU32>() };
        word.store(0, Ordering::SeqCst);
        launch_single(kernels.gate, flag, stream);
        Gate(word)
    }

    pub fn open(&self) {
        self.0.store(1, Ordering::SeqCst);
    }

    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }

    /// Runs `action` with the gate closed, and returns whether it finished before the gate opened.
    ///
    /// The gate opens when the action has returned, or after `patience`. An action that fails to
    /// wait thus does its harm before the held work begins, every time.
    pub fn during<R>(&self, patience: Duration, action: impl FnOnce() -> R) -> (R, bool) {
        let returned = AtomicBool::new(false);
        let result = thread::scope(|scope| {
            let opener = scope.spawn(|| {
                let start = Instant::now();
                while !returned.load(Ordering::SeqCst) && start.elapsed() < patience {
                    thread::sleep(Duration::from_millis(1));
                }
                self.open();
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
            let before = !self.is_open();
            returned.store(true, Ordering::SeqCst);
            // ThreadSanitizer understands a join, but not the flag.
            opener.join().unwrap();
            result.map(|result| (result, before))
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs an action that must wait for the gate.
    pub fn waits<R>(&self, action: impl FnOnce() -> R) -> R {
        self.during(Duration::from_millis(100), action).0
    }

    /// Runs an action that must not wait for the gate.
    pub fn passes<R>(&self, action: impl FnOnce() -> R) -> R {
        let (result, before) = self.during(Duration::from_secs(10), action);
        assert!(before, "it waited for work that it has nothing to do with");
        result
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

fn launch_single(function: sys::CUfunction, argument: *mut c_void, stream: &Stream) {
    let launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel");
    let mut argument = argument;
    let mut parameters: [*mut c_void; 1] = [(&raw mut argument).cast()];
    use_first_device();
    // SAFETY: the parameter is that of `gate`.
    let status = unsafe {
        let raw = stream.as_raw();
        let parameters = parameters.as_mut_ptr();
        launch.unwrap()(function, 1, 1, 1, 1, 1, 1, 0, raw, parameters, ptr::null_mut())
    };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
}

/// The bytes at a device address, looked at by the raw runtime.
pub fn device_bytes(device: Device, from: *const u8, bytes: usize) -> Vec<u8> {
    let mut seen = vec![0; bytes];
    look(device, from, &mut seen);
    seen
}

/// The words at a device address.
pub fn device_words(device: Device, from: *const u32, count: usize) -> Vec<u32> {
    let mut seen = vec![0; count];
    look(device, from.cast(), bytemuck::cast_slice_mut(&mut seen));
    seen
}

fn look(device: Device, from: *const u8, seen: &mut [u8]) {
    match device {
        // SAFETY: the callers name memory of theirs.
        Device::Cpu => unsafe { ptr::copy_nonoverlapping(from, seen.as_mut_ptr(), seen.len()) },
        Device::Cuda(_) => {
            let kind = sys::cudaMemcpyKind::cudaMemcpyDeviceToHost;
            // SAFETY: as above.
            let status =
                unsafe { sys::cudaMemcpy(seen.as_mut_ptr().cast(), from.cast(), seen.len(), kind) };
            assert_eq!(status, SUCCESS);
        }
    }
}

/// Device memory that belongs to a test.
pub struct Foreign {
    address: *mut u32,
    count: usize,
}

impl Foreign {
    pub fn new(count: usize, value: u8) -> Foreign {
        let mut address = ptr::null_mut();
        use_first_device();
        // SAFETY: the pointer is valid for a write.
        assert_eq!(unsafe { sys::cudaMalloc(&mut address, count * 4) }, SUCCESS);
        // SAFETY: just allocated.
        let status = unsafe { sys::cudaMemset(address, value.into(), count * 4) };
        assert_eq!(status, SUCCESS);
        // SAFETY: no arguments. The legacy stream's memset does not order other streams.
        assert_eq!(unsafe { sys::cudaDeviceSynchronize() }, SUCCESS);
        Foreign { address: address.cast(), count }
    }

    pub fn as_ptr(&self) -> *mut u32 {
        self.address
    }

    pub fn words(&self) -> Vec<u32> {
        device_words(Device::Cuda(0), self.address, self.count)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`.
        let _ = unsafe { sys::cudaFree(self.address.cast()) };
    }
}

/// Never drops a value, like `mem::forget`. Keeps its address, so that leak detectors ignore it.
pub fn forget<T: 'static>(value: T) {
    static FORGOTTEN: Mutex<Vec<usize>> = Mutex::new(Vec::new());
    let kept = Box::into_raw(Box::new(std::mem::ManuallyDrop::new(value)));
    FORGOTTEN.lock().unwrap_or_else(|poison| poison.into_inner()).push(kept.expose_provenance());
}

/// True if all elements are `value`.
///
/// One call compares all neighbours. Without optimization a loop over millions of elements is slow,
/// and sanitizers would check each.
pub fn is_all<T: Pod + PartialEq>(elements: &[T], value: T) -> bool {
    let bytes: &[u8] = bytemuck::cast_slice(elements);
    elements.first().is_none_or(|first| {
        *first == value && bytes[size_of::<T>()..] == bytes[..bytes.len() - size_of::<T>()]
    })
}

/// Asserts that all words are `value`, without printing millions of them.
#[track_caller]
pub fn all(words: &[u32], value: u32) {
    if !is_all(words, value) {
        let at = words.iter().position(|word| *word != value).unwrap();
        panic!("word {at} of {} is {:#x}, not {value:#x}", words.len(), words[at]);
    }
}

/// Begins a capture that prohibited calls of any thread end.
pub fn begin_capture(stream: &Stream) {
    let mode = sys::cudaStreamCaptureMode::cudaStreamCaptureModeGlobal;
    // SAFETY: the stream is live.
    let status = unsafe { sys::cudaStreamBeginCapture(stream.as_raw(), mode) };
    assert_eq!(status, SUCCESS);
}

/// Ends a capture that must still be valid.
pub fn end_capture(stream: &Stream) {
    let mut graph = ptr::null_mut();
    // SAFETY: the stream is live, and the pointer is valid for a write.
    let status = unsafe { sys::cudaStreamEndCapture(stream.as_raw(), &mut graph) };
    assert_eq!(status, SUCCESS);
    // SAFETY: the capture made it.
    assert_eq!(unsafe { sys::cudaGraphDestroy(graph) }, SUCCESS);
}

/// Runs `action` in a forked child, which must succeed.
#[cfg(target_os = "linux")]
pub fn in_child(action: impl FnOnce()) {
    // SAFETY: the child calls nothing that another thread of the parent could have left half done.
    // The allocator protects itself.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
        // SAFETY: the call ends the child at once, without exit handlers of the parent.
        unsafe { libc::_exit(outcome.is_err().into()) };
    }
    let mut status = -1;
    // SAFETY: the child belongs to this process, and the pointer is valid for a write.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
}
