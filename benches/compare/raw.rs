//! The runtime's own calls, as a program without this crate makes them.

use std::ffi::{CStr, c_void};
use std::ptr;
use std::slice;

use cpu_gpu_buffer::sys;

pub fn checked(status: sys::cudaError_t) {
    assert_eq!(status, sys::cudaError::cudaSuccess, "{status}");
}

/// Makes a device this thread's current one.
pub fn set_device(ordinal: u32) {
    // SAFETY: an ordinal that does not exist is a status.
    checked(unsafe { sys::cudaSetDevice(ordinal as i32) });
}

/// Waits for all that the device has to do.
pub fn synchronize_device() {
    // SAFETY: no arguments.
    checked(unsafe { sys::cudaDeviceSynchronize() });
}

/// `cudaDeviceGetAttribute`.
pub fn attribute(attribute: sys::cudaDeviceAttr, ordinal: u32) -> i32 {
    let mut value = 0;
    // SAFETY: `value` is valid for a write.
    checked(unsafe { sys::cudaDeviceGetAttribute(&mut value, attribute, ordinal as i32) });
    value
}

/// `cudaRuntimeGetVersion` and `cudaDriverGetVersion`.
pub fn versions() -> [i32; 2] {
    let [mut runtime, mut driver] = [0; 2];
    // SAFETY: `runtime` is valid for a write.
    checked(unsafe { sys::cudaRuntimeGetVersion(&mut runtime) });
    // SAFETY: as above.
    checked(unsafe { sys::cudaDriverGetVersion(&mut driver) });
    [runtime, driver]
}

/// A function of the driver, if it exists.
pub fn driver_function(name: &CStr) -> Option<*mut c_void> {
    let mut address = ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    let flags = u64::from(sys::cudaGetDriverEntryPointFlags::cudaEnableDefault.0);
    // SAFETY: the name is NUL-terminated, and both results are valid for writes.
    let mut status = unsafe {
        let name = name.as_ptr();
        sys::cudaGetDriverEntryPointByVersion(name, &mut address, 12000, flags, &mut found)
    };
    if status == sys::cudaError::SYMBOL_NOT_FOUND {
        // Runtimes before 12.5.
        // SAFETY: as above.
        status =
            unsafe { sys::cudaGetDriverEntryPoint(name.as_ptr(), &mut address, flags, &mut found) };
    }
    (status == sys::cudaError::cudaSuccess && !address.is_null()).then_some(address)
}

/// A non-blocking stream.
pub struct Stream(sys::cudaStream_t);

// SAFETY: the runtime's streams may be used from any thread.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new() -> Stream {
        let mut stream = ptr::null_mut();
        // SAFETY: `stream` is valid for a write.
        checked(unsafe { sys::cudaStreamCreateWithFlags(&mut stream, sys::cudaStreamNonBlocking) });
        Stream(stream)
    }

    pub fn as_raw(&self) -> sys::cudaStream_t {
        self.0
    }

    pub fn synchronize(&self) {
        synchronize(self.0);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream came from `new`, and nothing uses it any more.
        checked(unsafe { sys::cudaStreamDestroy(self.0) });
    }
}

/// Waits for a live stream.
pub fn synchronize(stream: sys::cudaStream_t) {
    // SAFETY: the callers keep the stream.
    checked(unsafe { sys::cudaStreamSynchronize(stream) });
}

/// An event without or with a time stamp.
pub struct Event(sys::cudaEvent_t);

// SAFETY: the runtime's events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    pub fn new(timing: bool) -> Event {
        let flags = if timing { sys::cudaEventDefault } else { sys::cudaEventDisableTiming };
        let mut event = ptr::null_mut();
        // SAFETY: `event` is valid for a write.
        checked(unsafe { sys::cudaEventCreateWithFlags(&mut event, flags) });
        Event(event)
    }

    /// Records the event on a live stream.
    pub fn record(&self, stream: sys::cudaStream_t) {
        // SAFETY: the callers keep the stream.
        checked(unsafe { sys::cudaEventRecord(self.0, stream) });
    }

    /// True if it has finished: `cudaEventQuery`.
    pub fn query(&self) -> bool {
        // SAFETY: a live event.
        let status = unsafe { sys::cudaEventQuery(self.0) };
        finished(status)
    }

    pub fn synchronize(&self) {
        // SAFETY: a live event.
        checked(unsafe { sys::cudaEventSynchronize(self.0) });
    }

    /// Seconds since an earlier one.
    fn since(&self, earlier: &Event) -> f64 {
        let mut milliseconds = 0.0;
        // SAFETY: the result is valid for a write. Both events are live and have recorded time
        // stamps.
        checked(unsafe { sys::cudaEventElapsedTime(&mut milliseconds, earlier.0, self.0) });
        f64::from(milliseconds) * 1e-3
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event came from `new`, and nothing uses it any more.
        checked(unsafe { sys::cudaEventDestroy(self.0) });
    }
}

/// True if a live stream has finished: `cudaStreamQuery`.
pub fn stream_query(stream: sys::cudaStream_t) -> bool {
    // SAFETY: the callers keep the stream.
    let status = unsafe { sys::cudaStreamQuery(stream) };
    finished(status)
}

fn finished(status: sys::cudaError_t) -> bool {
    if status == sys::cudaError::cudaErrorNotReady {
        return false;
    }
    checked(status);
    true
}

/// Two events with a time stamp.
pub struct Timer {
    start: Event,
    end: Event,
}

impl Timer {
    pub fn new() -> Timer {
        Timer { start: Event::new(true), end: Event::new(true) }
    }

    /// Seconds that the work of `send` takes on a live stream.
    pub fn seconds(&self, stream: sys::cudaStream_t, send: impl FnOnce()) -> f64 {
        self.start.record(stream);
        send();
        self.end.record(stream);
        self.end.synchronize();
        self.end.since(&self.start)
    }
}

/// Pinned memory of `cudaHostAlloc`.
pub struct Pinned {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: memory that the value owns.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(bytes: usize) -> Pinned {
        let mut address = ptr::null_mut();
        // SAFETY: `address` is valid for a write.
        checked(unsafe { sys::cudaHostAlloc(&mut address, bytes, sys::cudaHostAllocPortable) });
        Pinned { address, bytes }
    }

    pub fn as_ptr(&self) -> *mut c_void {
        self.address
    }

    /// # Safety
    ///
    /// No copy touches the memory while the slice lives.
    pub unsafe fn slice(&mut self) -> &mut [u8] {
        // SAFETY: the memory has this many bytes. The kernel zeroes new pages, so all are
        // initialised.
        unsafe { slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the memory came from `new`. Its owner has waited for all copies.
        checked(unsafe { sys::cudaFreeHost(self.address) });
    }
}

/// Device memory of `cudaMalloc`.
pub struct DeviceMemory(*mut c_void);

// SAFETY: memory that the value owns.
unsafe impl Send for DeviceMemory {}

impl DeviceMemory {
    pub fn new(bytes: usize) -> DeviceMemory {
        let mut address = ptr::null_mut();
        // SAFETY: `address` is valid for a write.
        checked(unsafe { sys::cudaMalloc(&mut address, bytes) });
        DeviceMemory(address)
    }

    pub fn as_ptr(&self) -> *mut c_void {
        self.0
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: the memory came from `new`. Its owner has waited for all copies.
        checked(unsafe { sys::cudaFree(self.0) });
    }
}

/// Registered memory of `mmap` and `cudaHostRegister`, in small pages that were all touched.
pub struct Registered {
    address: *mut c_void,
    bytes: usize,
}

impl Registered {
    pub fn new(bytes: usize) -> Registered {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "no memory");
        // SAFETY: the advice covers pages of this value. A kernel without huge pages refuses it,
        // which is harmless.
        unsafe { libc::madvise(address, bytes, libc::MADV_NOHUGEPAGE) };
        for page in (0..bytes).step_by(4096) {
            // SAFETY: within the mapping.
            let byte = unsafe { address.cast::<u8>().add(page) };
            // SAFETY: as above.
            unsafe { byte.write_volatile(0) };
        }
        // SAFETY: whole pages of the value's own.
        checked(unsafe { sys::cudaHostRegister(address, bytes, sys::cudaHostRegisterPortable) });
        Registered { address, bytes }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: `new` registered the memory, and nothing copies it.
        checked(unsafe { sys::cudaHostUnregister(self.address) });
        // SAFETY: the pages belong to this value, and nothing refers to them any more.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// Enqueues a copy between the two sides.
///
/// # Safety
///
/// - Both pointers are valid for this many bytes.
/// - They and the stream outlive the copy.
pub unsafe fn copy(
    to: *mut c_void,
    from: *const c_void,
    bytes: usize,
    kind: sys::cudaMemcpyKind,
    stream: sys::cudaStream_t,
) {
    // SAFETY: the caller guarantees it.
    checked(unsafe { sys::cudaMemcpyAsync(to, from, bytes, kind, stream) });
}

/// Enqueues `cudaMemsetAsync`.
///
/// # Safety
///
/// - `to` points to this many bytes of device memory.
/// - The memory and the stream outlive the fill.
pub unsafe fn memset(to: *mut c_void, byte: u8, bytes: usize, stream: sys::cudaStream_t) {
    // SAFETY: the caller guarantees it.
    checked(unsafe { sys::cudaMemsetAsync(to, byte.into(), bytes, stream) });
}
