//! Every call into CUDA that this crate makes, each with its status turned into a [`Result`].
//!
//! A status that is not success clears the runtime's last error, so that the check of the next library
//! in the process does not trip over ours. Calls that end another thread's stream capture, as CUDA's
//! "Prohibited and Unhandled Operations" has it (allocation, also that of graphs, release, queries, waiting), stand within
//! [`RelaxedCapture`]; copies, fills, launches and event records do not, and need not.

use std::ffi::{CStr, c_int, c_void};
use std::marker::PhantomData;
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::sys;

use sys::cudaError as Status;

/// Turns a status of the runtime's into a result.
#[inline]
fn check(status: sys::cudaError_t, call: &'static str) -> Result<()> {
    match status {
        Status::cudaSuccess => Ok(()),
        code => {
            // SAFETY: it has no arguments. Its status is the one in hand, or that of an earlier call.
            let _ = unsafe { sys::cudaGetLastError() };
            Err(failed(code, call))
        }
    }
}

#[cold]
fn failed(code: sys::cudaError_t, call: &'static str) -> Error {
    match code {
        Status::LIBRARY_NOT_LOADED => Error::Unavailable { reason: code.text().into_owned() },
        code => Error::Cuda { code, call },
    }
}

/// Turns a result that may say "not ready" into whether it was success.
fn ready(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Cuda { code: Status::cudaErrorNotReady, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Turns a status of the driver's into a result. They have the numbers of the runtime's (since CUDA 10.1),
/// and leave the runtime's last error alone.
#[inline]
fn check_driver(status: sys::CUresult, call: &'static str) -> Result<()> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(failed(sys::cudaError(code.0), call)),
    }
}

/// This thread's calls do not end another thread's capture while this lives.
struct RelaxedCapture(sys::CUstreamCaptureMode);

const RELAXED: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

impl RelaxedCapture {
    fn begin() -> RelaxedCapture {
        RelaxedCapture(exchange_capture_mode(RELAXED))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        if self.0 != RELAXED {
            exchange_capture_mode(self.0);
        }
    }
}

/// Sets this thread's mode and gives back the one before. Should that fail, which leaves the mode as it is, the
/// answer is the mode that was asked for: there is nothing to put back.
fn exchange_capture_mode(mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    if let Ok(driver) = driver() {
        // SAFETY: `mode` is a valid mode, and a place for the previous one.
        let status = unsafe { (driver.exchange_capture_mode)(&mut mode) };
        let _ = check_driver(status, "cuThreadExchangeStreamCaptureMode");
    }
    mode
}

// ---- the driver's own functions -------------------------------------------------------------------

/// Functions of the driver that the runtime lacks, or whose namesake in the runtime costs a multiple: asking
/// for capture takes 21 ns there and 59 in the runtime, exchanging its mode 11 and 47, a copy of 4 KB 0.1 us less
/// (H100, driver 580). The runtime hands them out: `libcuda` is never linked. Handles are the same in both ("CUDA Runtime API,
/// Interactions with the CUDA Driver API").
struct Driver {
    device_get: unsafe extern "C" fn(*mut sys::CUdevice_v1, c_int) -> sys::CUresult,
    primary_retain: unsafe extern "C" fn(*mut sys::CUcontext, sys::CUdevice_v1) -> sys::CUresult,
    primary_release: unsafe extern "C" fn(sys::CUdevice_v1) -> sys::CUresult,
    current: unsafe extern "C" fn(*mut sys::CUcontext) -> sys::CUresult,
    push: unsafe extern "C" fn(sys::CUcontext) -> sys::CUresult,
    pop: unsafe extern "C" fn(*mut sys::CUcontext) -> sys::CUresult,
    module_load: unsafe extern "C" fn(*mut sys::CUmodule, *const c_void) -> sys::CUresult,
    module_unload: unsafe extern "C" fn(sys::CUmodule) -> sys::CUresult,
    module_function: ModuleGetFunction,
    launch: LaunchKernel,
    memset_d16: MemsetD16,
    memset_d32: MemsetD32,
    memcpy_h2d: MemcpyH2D,
    memcpy_d2h: MemcpyD2H,
    exchange_capture_mode: unsafe extern "C" fn(*mut sys::CUstreamCaptureMode) -> sys::CUresult,
    is_capturing:
        unsafe extern "C" fn(sys::CUstream, *mut sys::CUstreamCaptureStatus) -> sys::CUresult,
    stream_query: unsafe extern "C" fn(sys::CUstream) -> sys::CUresult,
    event_record: unsafe extern "C" fn(sys::CUevent, sys::CUstream) -> sys::CUresult,
    event_query: unsafe extern "C" fn(sys::CUevent) -> sys::CUresult,
    event_synchronize: unsafe extern "C" fn(sys::CUevent) -> sys::CUresult,
    graph_create: unsafe extern "C" fn(*mut sys::CUgraph, u32) -> sys::CUresult,
    graph_destroy: unsafe extern "C" fn(sys::CUgraph) -> sys::CUresult,
    graph_add_kernel: GraphAddKernel,
    graph_instantiate:
        unsafe extern "C" fn(*mut sys::CUgraphExec, sys::CUgraph, u64) -> sys::CUresult,
    graph_exec_destroy: unsafe extern "C" fn(sys::CUgraphExec) -> sys::CUresult,
    graph_set_kernel: GraphSetKernel,
    graph_launch: unsafe extern "C" fn(sys::CUgraphExec, sys::CUstream) -> sys::CUresult,
}

type ModuleGetFunction = unsafe extern "C" fn(
    *mut sys::CUfunction,
    sys::CUmodule,
    *const std::ffi::c_char,
) -> sys::CUresult;
type LaunchKernel = unsafe extern "C" fn(
    sys::CUfunction,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    sys::CUstream,
    *mut *mut c_void,
    *mut *mut c_void,
) -> sys::CUresult;
type GraphAddKernel = unsafe extern "C" fn(
    *mut sys::CUgraphNode,
    sys::CUgraph,
    *const sys::CUgraphNode,
    usize,
    *const sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> sys::CUresult;
type GraphSetKernel = unsafe extern "C" fn(
    sys::CUgraphExec,
    sys::CUgraphNode,
    *const sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> sys::CUresult;
type MemcpyH2D =
    unsafe extern "C" fn(sys::CUdeviceptr_v2, *const c_void, usize, sys::CUstream) -> sys::CUresult;
type MemcpyD2H =
    unsafe extern "C" fn(*mut c_void, sys::CUdeviceptr_v2, usize, sys::CUstream) -> sys::CUresult;
type MemsetD16 =
    unsafe extern "C" fn(sys::CUdeviceptr_v2, u16, usize, sys::CUstream) -> sys::CUresult;
type MemsetD32 =
    unsafe extern "C" fn(sys::CUdeviceptr_v2, u32, usize, sys::CUstream) -> sys::CUresult;

static DRIVER: OnceLock<Driver> = OnceLock::new();

#[inline]
fn driver() -> Result<&'static Driver> {
    match DRIVER.get() {
        Some(driver) => Ok(driver),
        None => load_driver(),
    }
}

#[cold]
fn load_driver() -> Result<&'static Driver> {
    // Each type is stated twice, here by the headers' versioned name, and the two must agree.
    let device_get: sys::PFN_cuDeviceGet_v2000 = entry(c"cuDeviceGet", 2000)?;
    let primary_retain: sys::PFN_cuDevicePrimaryCtxRetain_v7000 =
        entry(c"cuDevicePrimaryCtxRetain", 7000)?;
    let primary_release: sys::PFN_cuDevicePrimaryCtxRelease_v11000 =
        entry(c"cuDevicePrimaryCtxRelease", 11000)?;
    let current: sys::PFN_cuCtxGetCurrent_v4000 = entry(c"cuCtxGetCurrent", 4000)?;
    let push: sys::PFN_cuCtxPushCurrent_v4000 = entry(c"cuCtxPushCurrent", 4000)?;
    let pop: sys::PFN_cuCtxPopCurrent_v4000 = entry(c"cuCtxPopCurrent", 4000)?;
    let module_load: sys::PFN_cuModuleLoadData_v2000 = entry(c"cuModuleLoadData", 2000)?;
    let module_unload: sys::PFN_cuModuleUnload_v2000 = entry(c"cuModuleUnload", 2000)?;
    let module_function: sys::PFN_cuModuleGetFunction_v2000 = entry(c"cuModuleGetFunction", 2000)?;
    let launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel", 4000)?;
    let memset_d16: sys::PFN_cuMemsetD16Async_v3020 = entry(c"cuMemsetD16Async", 3020)?;
    let memset_d32: sys::PFN_cuMemsetD32Async_v3020 = entry(c"cuMemsetD32Async", 3020)?;
    let memcpy_h2d: sys::PFN_cuMemcpyHtoDAsync_v3020 = entry(c"cuMemcpyHtoDAsync", 3020)?;
    let memcpy_d2h: sys::PFN_cuMemcpyDtoHAsync_v3020 = entry(c"cuMemcpyDtoHAsync", 3020)?;
    let exchange_capture_mode: sys::PFN_cuThreadExchangeStreamCaptureMode_v10010 =
        entry(c"cuThreadExchangeStreamCaptureMode", 10010)?;
    let is_capturing: sys::PFN_cuStreamIsCapturing_v10000 = entry(c"cuStreamIsCapturing", 10000)?;
    let stream_query: sys::PFN_cuStreamQuery_v2000 = entry(c"cuStreamQuery", 2000)?;
    let event_record: sys::PFN_cuEventRecord_v2000 = entry(c"cuEventRecord", 2000)?;
    let event_query: sys::PFN_cuEventQuery_v2000 = entry(c"cuEventQuery", 2000)?;
    let event_synchronize: sys::PFN_cuEventSynchronize_v2000 = entry(c"cuEventSynchronize", 2000)?;
    let graph_create: sys::PFN_cuGraphCreate_v10000 = entry(c"cuGraphCreate", 10000)?;
    let graph_destroy: sys::PFN_cuGraphDestroy_v10000 = entry(c"cuGraphDestroy", 10000)?;
    let graph_add_kernel: sys::PFN_cuGraphAddKernelNode_v12000 =
        entry(c"cuGraphAddKernelNode", 12000)?;
    let graph_instantiate: sys::PFN_cuGraphInstantiateWithFlags_v11040 =
        entry(c"cuGraphInstantiateWithFlags", 11040)?;
    let graph_exec_destroy: sys::PFN_cuGraphExecDestroy_v10000 =
        entry(c"cuGraphExecDestroy", 10000)?;
    let graph_set_kernel: sys::PFN_cuGraphExecKernelNodeSetParams_v12000 =
        entry(c"cuGraphExecKernelNodeSetParams", 12000)?;
    let graph_launch: sys::PFN_cuGraphLaunch_v10000 = entry(c"cuGraphLaunch", 10000)?;
    let all = (|| {
        Some(Driver {
            device_get: device_get?,
            primary_retain: primary_retain?,
            primary_release: primary_release?,
            current: current?,
            push: push?,
            pop: pop?,
            module_load: module_load?,
            module_unload: module_unload?,
            module_function: module_function?,
            launch: launch?,
            memset_d16: memset_d16?,
            memset_d32: memset_d32?,
            memcpy_h2d: memcpy_h2d?,
            memcpy_d2h: memcpy_d2h?,
            exchange_capture_mode: exchange_capture_mode?,
            is_capturing: is_capturing?,
            stream_query: stream_query?,
            event_record: event_record?,
            event_query: event_query?,
            event_synchronize: event_synchronize?,
            graph_create: graph_create?,
            graph_destroy: graph_destroy?,
            graph_add_kernel: graph_add_kernel?,
            graph_instantiate: graph_instantiate?,
            graph_exec_destroy: graph_exec_destroy?,
            graph_set_kernel: graph_set_kernel?,
            graph_launch: graph_launch?,
        })
    })();
    let driver = all.ok_or_else(|| Error::Unavailable {
        reason: "the driver lacks a function that CUDA 12.0 has".into(),
    })?;
    Ok(DRIVER.get_or_init(|| driver))
}

/// The driver's function of this name, in the version of the signature that `F` declares.
fn entry<F>(name: &CStr, version: u32) -> Result<Option<F>> {
    const { assert!(size_of::<Option<F>>() == size_of::<*mut c_void>()) };
    let mut address = ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    let flags = u64::from(sys::cudaGetDriverEntryPointFlags::cudaEnableLegacyStream.0);
    // SAFETY: `name` is NUL-terminated, and the other two are valid places.
    let mut status = unsafe {
        sys::cudaGetDriverEntryPointByVersion(
            name.as_ptr(),
            &mut address,
            version,
            flags,
            &mut found,
        )
    };
    if status == Status::SYMBOL_NOT_FOUND {
        // Runtimes before 12.5. It answers with the newest signature that the runtime's own version
        // knows, which for these functions is the same one.
        // SAFETY: as above.
        status =
            unsafe { sys::cudaGetDriverEntryPoint(name.as_ptr(), &mut address, flags, &mut found) };
    }
    check(status, "cudaGetDriverEntryPoint")?;
    // SAFETY: `F` is a C function pointer, by the assertion as large as an address, whose `None` is null;
    // the driver gave the address for the name and version of `F`'s declaration in its headers.
    Ok(unsafe { mem::transmute_copy::<*mut c_void, Option<F>>(&address) })
}

// ---- devices and contexts -------------------------------------------------------------------------

/// The number of CUDA devices.
pub(crate) fn device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: `count` is a valid place for an int.
    let status = unsafe { sys::cudaGetDeviceCount(&mut count) };
    check(status, "cudaGetDeviceCount")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The newest version of CUDA that the driver takes, 13000 for 13.0; 0 where there is no driver.
pub(crate) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: `version` is a valid place for an int.
    let status = unsafe { sys::cudaDriverGetVersion(&mut version) };
    check(status, "cudaDriverGetVersion")?;
    Ok(version)
}

/// Creates the device's primary context if there is none yet, and keeps it from being destroyed.
pub(crate) fn retain_primary(ordinal: u32) -> Result<sys::CUcontext> {
    let driver = driver()?;
    let mut device = 0;
    // SAFETY: `device` is a valid place; an ordinal out of range is a status.
    let status = unsafe { (driver.device_get)(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    let mut context = ptr::null_mut();
    // SAFETY: `context` is a valid place, and the driver just gave `device`.
    let status = unsafe { (driver.primary_retain)(&mut context, device) };
    check_driver(status, "cuDevicePrimaryCtxRetain")?;
    Ok(context)
}

/// Takes one [`retain_primary`] back.
pub(crate) fn release_primary(ordinal: u32) -> Result<()> {
    let driver = driver()?;
    let mut device = 0;
    // SAFETY: as in `retain_primary`.
    let status = unsafe { (driver.device_get)(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    // SAFETY: the caller retained this device's primary context, and uses it no more.
    check_driver(unsafe { (driver.primary_release)(device) }, "cuDevicePrimaryCtxRelease")
}

/// This thread's current context, or null. Where there is none, most calls of the runtime make one: that of
/// device 0, whatever device their arguments belong to; and most of the driver's fail.
#[inline]
pub(crate) fn current_context() -> Result<sys::CUcontext> {
    let mut context = ptr::null_mut();
    let current = driver()?.current;
    // SAFETY: `context` is a valid place.
    check_driver(unsafe { current(&mut context) }, "cuCtxGetCurrent")?;
    Ok(context)
}

/// A context is this thread's current one while this lives; the one before comes back after.
pub(crate) struct Entered {
    driver: &'static Driver,
    // It belongs to the thread whose context it put aside.
    not_send: PhantomData<*const ()>,
}

/// Makes `context` current.
///
/// `cudaSetDevice` there and back would do for most callers, but creates a context on device 0 in a
/// thread that never chose a device, and replaces a context that is not its device's primary one.
///
/// # Safety
///
/// `context` must be live.
pub(crate) unsafe fn enter(context: sys::CUcontext) -> Result<Entered> {
    let driver = driver()?;
    // SAFETY: the caller vouches for the context.
    check_driver(unsafe { (driver.push)(context) }, "cuCtxPushCurrent")?;
    Ok(Entered { driver, not_send: PhantomData })
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: `popped` is a valid place, and what is popped is what `enter` pushed: this value does
        // not leave the thread, and its uses in this crate end in the reverse order of their beginnings.
        let status = unsafe { (self.driver.pop)(&mut popped) };
        let _ = check_driver(status, "cuCtxPopCurrent");
    }
}

/// Free and total bytes of the current device.
pub(crate) fn memory_info() -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are valid places.
    let status = unsafe { sys::cudaMemGetInfo(&mut free, &mut total) };
    check(status, "cudaMemGetInfo")?;
    Ok((free, total))
}

/// Whether the device has a primary context.
#[cfg(feature = "dlpack")]
pub(crate) fn has_primary(ordinal: u32) -> Result<bool> {
    let device_get = driver()?.device_get;
    let mut device = 0;
    // SAFETY: `device` is a valid place; an ordinal out of range is a status.
    let status = unsafe { device_get(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    // Asked seldom, and so looked for each time.
    let get_state: sys::PFN_cuDevicePrimaryCtxGetState_v7000 =
        entry(c"cuDevicePrimaryCtxGetState", 7000)?;
    let get_state = get_state.ok_or_else(|| Error::Unavailable {
        reason: "the driver lacks cuDevicePrimaryCtxGetState, which CUDA 12.0 has".into(),
    })?;
    let (mut flags, mut active) = (0, 0);
    // SAFETY: both are valid places, and the driver just gave `device`.
    let status = unsafe { get_state(device, &mut flags, &mut active) };
    check_driver(status, "cuDevicePrimaryCtxGetState")?;
    Ok(active != 0)
}

/// Waits for everything that was sent to the current context. Ends each capture of a stream there, whatever its mode and
/// this thread's: a context that encompasses a capture cannot be waited for ("CUDA C++ Programming Guide, Prohibited and
/// Unhandled Operations"; seen with CUDA 13.0 on an H100).
#[cfg(feature = "dlpack")]
pub(crate) fn context_synchronize() -> Result<()> {
    // Captures elsewhere have nothing to do with it.
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: no arguments.
    match check(unsafe { sys::cudaDeviceSynchronize() }, "cudaDeviceSynchronize") {
        Err(Error::Cuda { code: Status::cudaErrorStreamCaptureUnsupported, .. }) => {
            Err(Error::StreamCapturing)
        }
        result => result,
    }
}

// ---- memory ---------------------------------------------------------------------------------------

/// Device memory of the current device.
pub(crate) fn malloc(bytes: usize) -> Result<*mut u8> {
    let _relaxed = RelaxedCapture::begin();
    let mut address = ptr::null_mut();
    // SAFETY: `address` is a valid place.
    let status = unsafe { sys::cudaMalloc(&mut address, bytes) };
    check(status, "cudaMalloc")?;
    Ok(address.cast())
}

/// # Safety
///
/// `address` is one that [`malloc`] gave in the current context, freed once, and used by nothing.
pub(crate) unsafe fn free(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaFree(address.cast()) }, "cudaFree")
}

/// Pinned host memory, not zeroed.
pub(crate) fn host_alloc(bytes: usize, flags: u32) -> Result<*mut u8> {
    let _relaxed = RelaxedCapture::begin();
    let mut address = ptr::null_mut();
    // SAFETY: `address` is a valid place.
    let status = unsafe { sys::cudaHostAlloc(&mut address, bytes, flags) };
    check(status, "cudaHostAlloc")?;
    Ok(address.cast())
}

/// # Safety
///
/// `address` is one that [`host_alloc`] gave, freed once, and used by nothing.
pub(crate) unsafe fn free_host(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaFreeHost(address.cast()) }, "cudaFreeHost")
}

/// Pins pages.
///
/// # Safety
///
/// The pages are mapped, and stay so until [`host_unregister`] succeeds.
#[cfg(unix)]
pub(crate) unsafe fn host_register(address: *mut u8, bytes: usize, flags: u32) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the pages.
    let status = unsafe { sys::cudaHostRegister(address.cast(), bytes, flags) };
    check(status, "cudaHostRegister")
}

/// # Safety
///
/// `address` was registered, and nothing is in flight from or to it.
#[cfg(unix)]
pub(crate) unsafe fn host_unregister(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaHostUnregister(address.cast()) }, "cudaHostUnregister")
}

/// The address under which kernels of the current device reach pinned host memory.
pub(crate) fn host_device_ptr(address: *mut u8) -> Result<*mut u8> {
    let mut mapped = ptr::null_mut();
    // SAFETY: `mapped` is a valid place; an address that is not of mapped memory is a status.
    let status = unsafe { sys::cudaHostGetDevicePointer(&mut mapped, address.cast(), 0) };
    check(status, "cudaHostGetDevicePointer")?;
    Ok(mapped.cast())
}

// ---- streams --------------------------------------------------------------------------------------

/// A new stream of the current device.
pub(crate) fn stream_create(flags: u32, priority: i32) -> Result<sys::cudaStream_t> {
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is a valid place.
    let status = unsafe { sys::cudaStreamCreateWithPriority(&mut stream, flags, priority) };
    check(status, "cudaStreamCreateWithPriority")?;
    Ok(stream)
}

/// # Safety
///
/// `stream` is one that [`stream_create`] gave, and is not used again.
pub(crate) unsafe fn stream_destroy(stream: sys::cudaStream_t) -> Result<()> {
    // SAFETY: the caller vouches for the stream.
    check(unsafe { sys::cudaStreamDestroy(stream) }, "cudaStreamDestroy")
}

/// An error where work sent to the stream would be captured into a graph.
///
/// # Safety
///
/// `stream` is live; if it is a legacy stream, its device's context is current.
#[inline]
pub(crate) unsafe fn refuse_capture(stream: sys::cudaStream_t) -> Result<()> {
    const NONE: sys::CUstreamCaptureStatus =
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut capture = NONE;
    let is_capturing = driver()?.is_capturing;
    // SAFETY: the caller vouches for the stream, and `capture` is a valid place.
    let status = unsafe { is_capturing(stream, &mut capture) };
    match check_driver(status, "cuStreamIsCapturing") {
        Ok(()) if capture == NONE => Ok(()),
        Ok(()) => Err(Error::StreamCapturing),
        // The legacy stream, while a stream that it would wait for is in capture.
        Err(Error::Cuda { code: Status::cudaErrorStreamCaptureImplicit, .. }) => {
            Err(Error::StreamCapturing)
        }
        Err(error) => Err(error),
    }
}

/// # Safety
///
/// As for [`refuse_capture`].
pub(crate) unsafe fn stream_synchronize(stream: sys::cudaStream_t) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the stream.
    check(unsafe { sys::cudaStreamSynchronize(stream) }, "cudaStreamSynchronize")
}

/// # Safety
///
/// As for [`refuse_capture`].
pub(crate) unsafe fn stream_query(stream: sys::cudaStream_t) -> Result<bool> {
    let _relaxed = RelaxedCapture::begin();
    let query = driver()?.stream_query;
    // SAFETY: the caller vouches for the stream.
    ready(check_driver(unsafe { query(stream) }, "cuStreamQuery"))
}

/// # Safety
///
/// As for [`refuse_capture`], and `event` is live.
pub(crate) unsafe fn stream_wait(stream: sys::cudaStream_t, event: sys::cudaEvent_t) -> Result<()> {
    // SAFETY: the caller vouches for both.
    let status = unsafe { sys::cudaStreamWaitEvent(stream, event, 0) };
    check(status, "cudaStreamWaitEvent")
}

/// Which way a copy goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From host memory to device memory.
    Up,
    /// From device memory to host memory.
    Down,
}

/// # Safety
///
/// - As for [`refuse_capture`].
/// - Both ranges are valid, in the memory that `direction` says, `from` for reads and `to` for
///   writes; `from` is initialised in stream order. The device memory is of the stream's device.
/// - Until the copy has finished in stream order, both stay allocated, nothing else writes either,
///   and nothing reads `to`.
#[inline]
pub(crate) unsafe fn memcpy(
    direction: Direction,
    to: *mut u8,
    from: *const u8,
    bytes: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let driver = driver()?;
    match direction {
        Direction::Up => {
            // SAFETY: the caller vouches for the ranges and the stream.
            let status =
                unsafe { (driver.memcpy_h2d)(to.addr() as u64, from.cast(), bytes, stream) };
            check_driver(status, "cuMemcpyHtoDAsync")
        }
        Direction::Down => {
            // SAFETY: the caller vouches for the ranges and the stream.
            let status =
                unsafe { (driver.memcpy_d2h)(to.cast(), from.addr() as u64, bytes, stream) };
            check_driver(status, "cuMemcpyDtoHAsync")
        }
    }
}

/// # Safety
///
/// As for [`memcpy`].
pub(crate) unsafe fn memset_d8(
    to: *mut u8,
    value: u8,
    bytes: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { sys::cudaMemsetAsync(to.cast(), value.into(), bytes, stream) };
    check(status, "cudaMemsetAsync")
}

/// # Safety
///
/// As for [`memcpy`], and `to` is a multiple of 2.
pub(crate) unsafe fn memset_d16(
    to: *mut u8,
    value: u16,
    count: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let memset = driver()?.memset_d16;
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { memset(to.addr() as u64, value, count, stream) };
    check_driver(status, "cuMemsetD16Async")
}

/// # Safety
///
/// As for [`memcpy`], and `to` is a multiple of 4.
pub(crate) unsafe fn memset_d32(
    to: *mut u8,
    value: u32,
    count: usize,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let memset = driver()?.memset_d32;
    // SAFETY: the caller vouches for the range and the stream.
    let status = unsafe { memset(to.addr() as u64, value, count, stream) };
    check_driver(status, "cuMemsetD32Async")
}

// ---- events ---------------------------------------------------------------------------------------

/// A new event of the current device.
pub(crate) fn event_create(flags: u32) -> Result<sys::cudaEvent_t> {
    let mut event = ptr::null_mut();
    // SAFETY: `event` is a valid place.
    let status = unsafe { sys::cudaEventCreateWithFlags(&mut event, flags) };
    check(status, "cudaEventCreateWithFlags")?;
    Ok(event)
}

/// # Safety
///
/// `event` is one that [`event_create`] gave, and is not used again.
pub(crate) unsafe fn event_destroy(event: sys::cudaEvent_t) -> Result<()> {
    // SAFETY: the caller vouches for the event.
    check(unsafe { sys::cudaEventDestroy(event) }, "cudaEventDestroy")
}

/// # Safety
///
/// As for [`stream_wait`], and both are of one device.
#[inline]
pub(crate) unsafe fn event_record(
    event: sys::cudaEvent_t,
    stream: sys::cudaStream_t,
) -> Result<()> {
    let record = driver()?.event_record;
    // SAFETY: the caller vouches for both.
    check_driver(unsafe { record(event, stream) }, "cuEventRecord")
}

/// # Safety
///
/// `event` is live.
pub(crate) unsafe fn event_query(event: sys::cudaEvent_t) -> Result<bool> {
    let _relaxed = RelaxedCapture::begin();
    let query = driver()?.event_query;
    // SAFETY: the caller vouches for the event.
    ready(check_driver(unsafe { query(event) }, "cuEventQuery"))
}

/// # Safety
///
/// `event` is live.
pub(crate) unsafe fn event_synchronize(event: sys::cudaEvent_t) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    let synchronize = driver()?.event_synchronize;
    // SAFETY: the caller vouches for the event.
    check_driver(unsafe { synchronize(event) }, "cuEventSynchronize")
}

/// Milliseconds from one event to another.
///
/// # Safety
///
/// Both are live, and of one device.
pub(crate) unsafe fn event_elapsed(from: sys::cudaEvent_t, to: sys::cudaEvent_t) -> Result<f32> {
    let _relaxed = RelaxedCapture::begin();
    let mut milliseconds = 0.0;
    // SAFETY: the caller vouches for both, and `milliseconds` is a valid place.
    let status = unsafe { sys::cudaEventElapsedTime(&mut milliseconds, from, to) };
    check(status, "cudaEventElapsedTime")?;
    Ok(milliseconds)
}

// ---- kernels --------------------------------------------------------------------------------------

/// Loads an image into the current context.
///
/// # Safety
///
/// `image` is a whole fat binary, or PTX that ends with a NUL.
pub(crate) unsafe fn module_load(image: &[u8]) -> Result<sys::CUmodule> {
    let _relaxed = RelaxedCapture::begin();
    let driver = driver()?;
    let mut module = ptr::null_mut();
    // SAFETY: the caller vouches for the image, and `module` is a valid place.
    let status = unsafe { (driver.module_load)(&mut module, image.as_ptr().cast()) };
    check_driver(status, "cuModuleLoadData")?;
    Ok(module)
}

/// # Safety
///
/// `module` is one that [`module_load`] gave, unloaded once, and no kernel of it runs.
pub(crate) unsafe fn module_unload(module: sys::CUmodule) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the module.
    check_driver(unsafe { (driver()?.module_unload)(module) }, "cuModuleUnload")
}

/// # Safety
///
/// `module` is live.
pub(crate) unsafe fn module_function(
    module: sys::CUmodule,
    name: &CStr,
) -> Result<sys::CUfunction> {
    let driver = driver()?;
    let mut function = ptr::null_mut();
    // SAFETY: the caller vouches for the module, the name is NUL-terminated, `function` a valid place.
    let status = unsafe { (driver.module_function)(&mut function, module, name.as_ptr()) };
    check_driver(status, "cuModuleGetFunction")?;
    Ok(function)
}

/// Launches a kernel of one-dimensional blocks in a grid of two dimensions.
///
/// # Safety
///
/// `function`'s context is current, `stream` is one of it, `parameters` are the kernel's, each
/// a valid address of a value of its type, and what the kernel does is as for [`memcpy`].
pub(crate) unsafe fn launch(
    function: sys::CUfunction,
    [x, y]: [u32; 2],
    threads: u32,
    parameters: &mut [*mut c_void],
    stream: sys::cudaStream_t,
) -> Result<()> {
    let launch = driver()?.launch;
    let parameters = parameters.as_mut_ptr();
    // SAFETY: the caller vouches for everything; the parameters are copied before the call returns
    // (CUDA Driver API, `cuLaunchKernel`).
    let status =
        unsafe { launch(function, x, y, 1, threads, 1, 1, 0, stream, parameters, ptr::null_mut()) };
    check_driver(status, "cuLaunchKernel")
}

// ---- graphs of one kernel -------------------------------------------------------------------------

/// A kernel of one-dimensional blocks in a grid of two dimensions, as the node of a graph.
pub(crate) fn kernel_node(
    function: sys::CUfunction,
    [x, y]: [u32; 2],
    threads: u32,
    parameters: &mut [*mut c_void],
) -> sys::CUDA_KERNEL_NODE_PARAMS_v2 {
    sys::CUDA_KERNEL_NODE_PARAMS_v2 {
        func: function,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        kernelParams: parameters.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        // The current one.
        ctx: ptr::null_mut(),
    }
}

/// A new graph without nodes.
pub(crate) fn graph_create() -> Result<sys::CUgraph> {
    let create = driver()?.graph_create;
    let mut graph = ptr::null_mut();
    // SAFETY: `graph` is a valid place.
    check_driver(unsafe { create(&mut graph, 0) }, "cuGraphCreate")?;
    Ok(graph)
}

/// # Safety
///
/// `graph` is one that [`graph_create`] gave, and is not used again, nor are its nodes.
pub(crate) unsafe fn graph_destroy(graph: sys::CUgraph) -> Result<()> {
    let destroy = driver()?.graph_destroy;
    // SAFETY: the caller vouches for the graph.
    check_driver(unsafe { destroy(graph) }, "cuGraphDestroy")
}

/// # Safety
///
/// `graph` is live and used by no other thread. `kernel`'s function is of the current context, and its parameters are
/// each a valid address of a value of its type; they are copied ("CUDA Driver API, `cuGraphAddKernelNode`").
pub(crate) unsafe fn graph_add_kernel(
    graph: sys::CUgraph,
    kernel: &sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> Result<sys::CUgraphNode> {
    let add = driver()?.graph_add_kernel;
    let mut node = ptr::null_mut();
    // SAFETY: `node` is a valid place, and no dependencies are none; the caller vouches for the rest.
    let status = unsafe { add(&mut node, graph, ptr::null(), 0, kernel) };
    check_driver(status, "cuGraphAddKernelNode")?;
    Ok(node)
}

/// # Safety
///
/// `graph` is live and used by no other thread.
pub(crate) unsafe fn graph_instantiate(graph: sys::CUgraph) -> Result<sys::CUgraphExec> {
    let _relaxed = RelaxedCapture::begin();
    let instantiate = driver()?.graph_instantiate;
    let mut exec = ptr::null_mut();
    // Without flags, what is launched has the priority of the stream ("CUDA Driver API,
    // `CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY`").
    // SAFETY: `exec` is a valid place, and the caller vouches for the graph.
    check_driver(unsafe { instantiate(&mut exec, graph, 0) }, "cuGraphInstantiateWithFlags")?;
    Ok(exec)
}

/// # Safety
///
/// `exec` is one that [`graph_instantiate`] gave, and is not used again. It may still be running: its memory goes when
/// that is over ("CUDA Driver API, `cuGraphExecDestroy`").
pub(crate) unsafe fn graph_exec_destroy(exec: sys::CUgraphExec) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    let destroy = driver()?.graph_exec_destroy;
    // SAFETY: the caller vouches for the graph.
    check_driver(unsafe { destroy(exec) }, "cuGraphExecDestroy")
}

/// Sets what the next launches of a graph do; what was launched before stays as it was ("CUDA Driver API,
/// `cuGraphExecKernelNodeSetParams`").
///
/// # Safety
///
/// `exec` is live, used by no other thread, and made of a graph that is live and has `node`; `kernel` is as for
/// [`graph_add_kernel`].
pub(crate) unsafe fn graph_set_kernel(
    exec: sys::CUgraphExec,
    node: sys::CUgraphNode,
    kernel: &sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> Result<()> {
    let set = driver()?.graph_set_kernel;
    // SAFETY: the caller vouches for everything.
    check_driver(unsafe { set(exec, node, kernel) }, "cuGraphExecKernelNodeSetParams")
}

/// # Safety
///
/// `exec` is live and used by no other thread, `stream` is one of its context, and what its kernel does is as for
/// [`memcpy`].
pub(crate) unsafe fn graph_launch(exec: sys::CUgraphExec, stream: sys::cudaStream_t) -> Result<()> {
    let launch = driver()?.graph_launch;
    // SAFETY: the caller vouches for both.
    check_driver(unsafe { launch(exec, stream) }, "cuGraphLaunch")
}
