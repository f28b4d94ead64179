//! The functions of the runtime.
//!
//! The compiler compares each signature with the bindings.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::ptr;

use cudart_sys::{
    cudaDeviceAttr, cudaDriverEntryPointQueryResult, cudaEvent_t, cudaGraph_t, cudaHostFn_t,
    cudaMemcpyKind, cudaStream_t, cudaStreamCaptureMode, cudaStreamCaptureStatus,
};

use crate::memory::{self, Pinned};
use crate::status::{Result, Status, put};
use crate::{context, control, driver, event, graph, settings, stream, work};

/// Exports functions under the controls. An error becomes the last error of the thread.
macro_rules! export {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $type),*) -> Status {
            const _: unsafe fn($($type),*) -> Status = cudart_sys::$name;
            call(stringify!($name), || $body)
        }
    )*};
}

fn call(name: &'static str, body: impl FnOnce() -> Result) -> Status {
    let status = control::run(name, body);
    match status {
        None => Status::cudaSuccess,
        // Not an error, and not kept as one.
        Some(Status::cudaErrorNotReady) => Status::cudaErrorNotReady,
        Some(status) => {
            context::set_last_error(status);
            status
        }
    }
}

/// A call that is prohibited while a stream is in capture.
fn prohibited() -> Result {
    context::bind()?;
    stream::prohibited(context::capture_mode())
}

/// Releases memory. A broken context refuses, and the memory must not be released again.
fn release(address: *mut c_void, release: fn(usize) -> Result) -> Result {
    let allowed = prohibited();
    if allowed.is_err() && allowed.err() == context::sticky(context::current_device()) {
        memory::give_up(address.addr());
    }
    allowed?;
    stream::wait_from(1);
    release(address.addr())
}

fn fill(to: usize, value: c_int, bytes: usize, on: cudaStream_t) -> Result {
    work::fill(to, value as u8, bytes, &stream::stream(on.addr())?)
}

const MAPPED: c_uint = cudart_sys::cudaHostRegisterMapped;
const READ_ONLY: c_uint = cudart_sys::cudaHostRegisterReadOnly;

/// The greatest priority of an H100. The least is 0.
const GREATEST_PRIORITY: c_int = -5;

fn create_stream(place: *mut cudaStream_t, flags: c_uint, priority: c_int) -> Result {
    context::bind()?;
    if flags > 1 {
        return Err(Status::cudaErrorInvalidValue);
    }
    // It is brought into the range ("CUDA Runtime API, `cudaStreamCreateWithPriority`").
    let priority = priority.clamp(GREATEST_PRIORITY, 0);
    let handle = stream::create(context::current_device(), flags == 1, priority);
    put(place, ptr::without_provenance_mut(handle))
}

export! {
    fn cudaDriverGetVersion(place: *mut c_int) {
        put(place, settings::driver_version())
    }
    fn cudaGetDeviceCount(place: *mut c_int) {
        match settings::device_count() {
            0 => Err(Status::cudaErrorNoDevice),
            count => put(place, count as c_int),
        }
    }
    fn cudaGetDevice(place: *mut c_int) {
        put(place, context::current_device() as c_int)
    }
    fn cudaSetDevice(device: c_int) {
        context::set_device(usize::try_from(device).map_err(|_| Status::cudaErrorInvalidDevice)?)
    }
    fn cudaDeviceGetAttribute(place: *mut c_int, attribute: cudaDeviceAttr, device: c_int) {
        context::is_active(device as usize)?;
        let value = match attribute {
            cudaDeviceAttr::cudaDevAttrMultiProcessorCount => 4,
            cudaDeviceAttr::cudaDevAttrComputeCapabilityMajor => 9,
            _ => 0,
        };
        put(place, value)
    }
    fn cudaDeviceCanAccessPeer(place: *mut c_int, device: c_int, peer: c_int) {
        put(place, context::can_access_peer(device as usize, peer as usize)?.into())
    }
    fn cudaDeviceEnablePeerAccess(peer: c_int, flags: c_uint) {
        prohibited()?;
        match flags {
            0 => context::enable_peer_access(peer as usize),
            _ => Err(Status::cudaErrorInvalidValue),
        }
    }
    fn cudaDeviceGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        context::bind()?;
        put(least, 0)?;
        put(greatest, GREATEST_PRIORITY)
    }
    fn cudaDeviceSynchronize() {
        prohibited()?;
        stream::synchronize_device(context::current_device())?;
        context::bind()
    }
    fn cudaMalloc(place: *mut *mut c_void, bytes: usize) {
        prohibited()?;
        stream::wait_from(2);
        let address = memory::allocate_device(context::current_device(), bytes)?;
        put(place, memory::at(address).cast())
    }
    fn cudaMallocAsync(place: *mut *mut c_void, bytes: usize, on: cudaStream_t) {
        context::bind()?;
        let address = memory::allocate_device(stream::stream(on.addr())?.device, bytes)?;
        put(place, memory::at(address).cast())
    }
    fn cudaFree(address: *mut c_void) {
        release(address, memory::free_device)
    }
    fn cudaFreeAsync(address: *mut c_void, on: cudaStream_t) {
        context::bind()?;
        let address = address.addr();
        let freed = stream::stream(on.addr())?.enqueue(move || {
            let _ = memory::free_device(address);
        });
        freed.map(drop)
    }
    fn cudaMemGetInfo(free: *mut usize, total: *mut usize) {
        context::bind()?;
        let (is_free, all) = memory::info(context::current_device());
        put(free, is_free)?;
        put(total, all)
    }
    fn cudaHostAlloc(place: *mut *mut c_void, bytes: usize, flags: c_uint) {
        prohibited()?;
        if flags > 7 {
            return Err(Status::cudaErrorInvalidValue);
        }
        stream::wait_from(2);
        put(place, memory::at(memory::allocate_pinned(bytes)?).cast())
    }
    fn cudaFreeHost(address: *mut c_void) {
        release(address, memory::free_pinned)
    }
    fn cudaHostRegister(address: *mut c_void, bytes: usize, flags: c_uint) {
        prohibited()?;
        if flags > 15 {
            return Err(Status::cudaErrorInvalidValue);
        }
        stream::wait_from(2);
        // "CUDA Runtime API, `cudaHostRegister`": without flags it is mapped. Otherwise the flags
        // are "orthogonal".
        let (mapped, read_only) = (flags == 0 || flags & MAPPED != 0, flags & READ_ONLY != 0);
        memory::register(address.addr(), bytes, mapped, read_only)
    }
    fn cudaHostUnregister(address: *mut c_void) {
        release(address, memory::unregister)
    }
    fn cudaHostGetDevicePointer(place: *mut *mut c_void, address: *mut c_void, _flags: c_uint) {
        context::bind()?;
        match memory::reached(address.addr(), 1) {
            true => put(place, address),
            false => Err(Status::cudaErrorInvalidValue),
        }
    }
    fn cudaHostGetFlags(place: *mut c_uint, address: *mut c_void) {
        context::bind()?;
        match memory::pinned(address.addr(), 1) {
            Pinned::Whole(_) => put(place, 3),
            _ => Err(Status::cudaErrorInvalidValue),
        }
    }

    fn cudaMemcpyAsync(
        to: *mut c_void,
        from: *const c_void,
        bytes: usize,
        kind: cudaMemcpyKind,
        on: cudaStream_t,
    ) {
        context::bind()?;
        work::copy(to.expose_provenance(), from.expose_provenance(), bytes, kind, on)
    }
    fn cudaMemcpy(to: *mut c_void, from: *const c_void, bytes: usize, kind: cudaMemcpyKind) {
        prohibited()?;
        work::copy(to.expose_provenance(), from.expose_provenance(), bytes, kind, ptr::null_mut())?;
        stream::stream(0)?.synchronize()?;
        context::bind()
    }
    fn cudaMemsetAsync(to: *mut c_void, value: c_int, bytes: usize, on: cudaStream_t) {
        context::bind()?;
        fill(to.addr(), value, bytes, on)
    }
    fn cudaMemset(to: *mut c_void, value: c_int, bytes: usize) {
        prohibited()?;
        fill(to.addr(), value, bytes, ptr::null_mut())
    }

    fn cudaStreamCreateWithFlags(place: *mut cudaStream_t, flags: c_uint) {
        create_stream(place, flags, 0)
    }
    fn cudaStreamCreateWithPriority(place: *mut cudaStream_t, flags: c_uint, priority: c_int) {
        create_stream(place, flags, priority)
    }
    fn cudaStreamDestroy(on: cudaStream_t) {
        if let Err(broken) = context::bind() {
            stream::give_up(on.addr());
            return Err(broken);
        }
        stream::destroy(on.addr())
    }
    fn cudaStreamGetFlags(on: cudaStream_t, place: *mut c_uint) {
        context::bind()?;
        put(place, stream::stream(on.addr())?.non_blocking.into())
    }
    fn cudaStreamGetPriority(on: cudaStream_t, place: *mut c_int) {
        context::bind()?;
        put(place, stream::stream(on.addr())?.priority)
    }
    fn cudaStreamSynchronize(on: cudaStream_t) {
        prohibited()?;
        stream::stream(on.addr())?.synchronize()?;
        context::bind()
    }
    fn cudaStreamQuery(on: cudaStream_t) {
        context::bind()?;
        stream::query(on.addr())
    }
    fn cudaStreamWaitEvent(on: cudaStream_t, event: cudaEvent_t, _flags: c_uint) {
        context::bind()?;
        event::wait(&stream::stream(on.addr())?, event.addr())
    }
    fn cudaStreamIsCapturing(on: cudaStream_t, place: *mut cudaStreamCaptureStatus) {
        context::bind()?;
        put(place, stream::capture_status(on.addr(), context::current_device())?)
    }
    fn cudaStreamBeginCapture(on: cudaStream_t, mode: cudaStreamCaptureMode) {
        context::bind()?;
        stream::stream(on.addr())?.begin_capture(mode)
    }
    fn cudaStreamEndCapture(on: cudaStream_t, graph: *mut cudaGraph_t) {
        context::bind()?;
        put(graph, ptr::null_mut())?;
        stream::stream(on.addr())?.end_capture()?;
        put(graph, ptr::without_provenance_mut(16))
    }
    fn cudaGraphDestroy(graph: cudaGraph_t) {
        match graph.addr() {
            16 => Ok(()),
            _ => Err(Status::cudaErrorInvalidValue),
        }
    }
    fn cudaThreadExchangeStreamCaptureMode(mode: *mut cudaStreamCaptureMode) {
        context::bind_any()?;
        if mode.is_null() {
            return Err(Status::cudaErrorInvalidValue);
        }
        // SAFETY: the pointer is not null. C callers pass pointers that are valid for reads.
        let new = unsafe { mode.read() };
        put(mode, context::exchange_capture_mode(new))
    }

    fn cudaEventCreateWithFlags(place: *mut cudaEvent_t, flags: c_uint) {
        context::bind()?;
        let timing = flags & cudart_sys::cudaEventDisableTiming == 0;
        let handle = event::create(context::current_device(), timing);
        put(place, ptr::without_provenance_mut(handle))
    }
    fn cudaEventDestroy(event: cudaEvent_t) {
        context::bind()?;
        event::destroy(event.addr())
    }
    fn cudaEventRecord(event: cudaEvent_t, on: cudaStream_t) {
        context::bind()?;
        event::record(event.addr(), &stream::stream(on.addr())?)
    }
    fn cudaEventQuery(event: cudaEvent_t) {
        stream::prohibited(context::capture_mode())?;
        event::query(event.addr())
    }
    fn cudaEventSynchronize(event: cudaEvent_t) {
        stream::prohibited(context::capture_mode())?;
        event::synchronize(event.addr())
    }
    fn cudaEventElapsedTime(place: *mut f32, from: cudaEvent_t, to: cudaEvent_t) {
        context::bind()?;
        put(place, event::elapsed(from.addr(), to.addr())?)
    }
    fn cudaLaunchHostFunc(on: cudaStream_t, function: cudaHostFn_t, data: *mut c_void) {
        context::bind()?;
        let function = function.ok_or(Status::cudaErrorInvalidValue)?;
        let data = data.expose_provenance();
        let queued = stream::stream(on.addr())?.enqueue(move || {
            // SAFETY: the caller guarantees the function and its argument.
            unsafe { function(memory::at(data).cast()) }
        });
        queued.map(drop)
    }

    fn cudaGetDriverEntryPoint(
        name: *const c_char,
        place: *mut *mut c_void,
        _flags: c_ulonglong,
        found: *mut cudaDriverEntryPointQueryResult,
    ) {
        entry_point(name, place, found)
    }
}

/// The only bound function that the runtime of CUDA 12.0 lacks. Those of 12.8 and 13.0 lack none.
///
/// If the simulated version lacks it, this returns the loader's status and counts no call.
#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetDriverEntryPointByVersion(
    name: *const c_char,
    place: *mut *mut c_void,
    _version: c_uint,
    _flags: c_ulonglong,
    found: *mut cudaDriverEntryPointQueryResult,
) -> Status {
    const _: unsafe fn(
        *const c_char,
        *mut *mut c_void,
        c_uint,
        c_ulonglong,
        *mut cudaDriverEntryPointQueryResult,
    ) -> Status = cudart_sys::cudaGetDriverEntryPointByVersion;
    match settings::version() {
        // CUDA 12.5 introduced it.
        ..12050 => Status::SYMBOL_NOT_FOUND,
        _ => call("cudaGetDriverEntryPointByVersion", || entry_point(name, place, found)),
    }
}

/// Needs no driver. It works before the first call that needs one, and during the exit.
#[unsafe(no_mangle)]
unsafe extern "C" fn cudaRuntimeGetVersion(place: *mut c_int) -> Status {
    const _: unsafe fn(*mut c_int) -> Status = cudart_sys::cudaRuntimeGetVersion;
    put(place, settings::version()).err().unwrap_or(Status::cudaSuccess)
}

fn entry_point(
    name: *const c_char,
    place: *mut *mut c_void,
    found: *mut cudaDriverEntryPointQueryResult,
) -> Result {
    if name.is_null() {
        return Err(Status::cudaErrorInvalidValue);
    }
    // SAFETY: the name is not null, and C callers pass NUL-terminated names.
    let name = unsafe { std::ffi::CStr::from_ptr(name) };
    let address = driver::entry_point(name).or_else(|| graph::entry_point(name));
    let result = match address {
        None => cudaDriverEntryPointQueryResult::cudaDriverEntryPointSymbolNotFound,
        Some(_) => cudaDriverEntryPointQueryResult::cudaDriverEntryPointSuccess,
    };
    put(found, result)?;
    put(place, address.unwrap_or(ptr::null()).cast_mut())
}

// These two return the last error and never set it.

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetLastError() -> Status {
    const _: unsafe fn() -> Status = cudart_sys::cudaGetLastError;
    context::last_error(true)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaPeekAtLastError() -> Status {
    const _: unsafe fn() -> Status = cudart_sys::cudaPeekAtLastError;
    context::last_error(false)
}

/// Names of the statuses that tests look at; the others are numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetErrorName(status: Status) -> *const c_char {
    const _: unsafe fn(Status) -> *const c_char = cudart_sys::cudaGetErrorName;
    let name = match status {
        Status::cudaSuccess => c"cudaSuccess",
        Status::cudaErrorInvalidValue => c"cudaErrorInvalidValue",
        Status::cudaErrorMemoryAllocation => c"cudaErrorMemoryAllocation",
        Status::cudaErrorIllegalAddress => c"cudaErrorIllegalAddress",
        _ => c"cudaErrorOfTheSimulation",
    };
    name.as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetErrorString(_status: Status) -> *const c_char {
    const _: unsafe fn(Status) -> *const c_char = cudart_sys::cudaGetErrorString;
    c"an error of the simulated runtime".as_ptr()
}
