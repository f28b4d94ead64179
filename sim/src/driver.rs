//! The driver's functions that the runtime hands out.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use cudart_sys::{
    CUcontext, CUdevice_v1, CUdeviceptr_v2, CUevent, CUfunction, CUmemorytype, CUmodule,
    CUpointer_attribute, CUresult, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus,
    cudaMemcpyKind, cudaStreamCaptureMode,
};

use crate::memory::Target;
use crate::status::{Result, Status, put};
use crate::{context, control, event, kernel, memory, settings, stream, work};

/// Counts a call of the driver and may make it fail. Driver calls leave no last error.
pub(crate) fn call(name: &'static str, body: impl FnOnce() -> Result) -> CUresult {
    CUresult(control::run(name, body).map_or(0, |status| status.0))
}

/// The handle of a context, which encodes its device.
fn handle(device: usize) -> CUcontext {
    ptr::without_provenance_mut((device + 1) * 16)
}

fn device_of(handle: CUcontext) -> Result<usize> {
    match (handle.addr() / 16).checked_sub(1) {
        Some(device) if device < settings::device_count() => Ok(device),
        _ => Err(Status::cudaErrorDeviceUninitialized),
    }
}

unsafe extern "C" fn device_get(place: *mut CUdevice_v1, ordinal: c_int) -> CUresult {
    call("cuDeviceGet", || {
        context::is_active(usize::try_from(ordinal).unwrap_or(usize::MAX))?;
        put(place, ordinal)
    })
}

unsafe extern "C" fn primary_retain(place: *mut CUcontext, device: CUdevice_v1) -> CUresult {
    call("cuDevicePrimaryCtxRetain", || {
        context::activate(device as usize)?;
        put(place, handle(device as usize))
    })
}

unsafe extern "C" fn primary_release(device: CUdevice_v1) -> CUresult {
    call("cuDevicePrimaryCtxRelease", || context::is_active(device as usize).map(drop))
}

unsafe extern "C" fn primary_state(
    device: CUdevice_v1,
    flags: *mut c_uint,
    active: *mut c_int,
) -> CUresult {
    call("cuDevicePrimaryCtxGetState", || {
        put(flags, 0)?;
        put(active, context::is_active(device as usize)?.into())
    })
}

unsafe extern "C" fn get_current(place: *mut CUcontext) -> CUresult {
    call("cuCtxGetCurrent", || put(place, context::current().map_or(ptr::null_mut(), handle)))
}

unsafe extern "C" fn push(new: CUcontext) -> CUresult {
    call("cuCtxPushCurrent", || {
        context::push(device_of(new)?);
        Ok(())
    })
}

unsafe extern "C" fn pop(place: *mut CUcontext) -> CUresult {
    call("cuCtxPopCurrent", || match context::pop() {
        Some(device) => put(place, handle(device)),
        None => Err(Status::cudaErrorDeviceUninitialized),
    })
}

/// Fat binaries begin with this word.
const FATBIN: u32 = 0xba55_ed50;

unsafe extern "C" fn module_load(place: *mut CUmodule, image: *const c_void) -> CUresult {
    call("cuModuleLoadData", || {
        let device = context::current().ok_or(Status::cudaErrorDeviceUninitialized)?;
        context::sticky(device).map_or(Ok(()), Err)?;
        stream::prohibited(context::capture_mode())?;
        stream::wait_from(1);
        // SAFETY: an image is longer than a word.
        let begin: [u8; 4] = unsafe { image.cast::<[u8; 4]>().read() };
        let is_text = begin.iter().all(|byte| byte.is_ascii());
        if u32::from_ne_bytes(begin) != FATBIN && !is_text {
            return Err(Status::cudaErrorInvalidKernelImage);
        }
        put(place, ptr::without_provenance_mut(32))
    })
}

unsafe extern "C" fn module_unload(_module: CUmodule) -> CUresult {
    call("cuModuleUnload", || stream::prohibited(context::capture_mode()))
}

unsafe extern "C" fn module_function(
    place: *mut CUfunction,
    _module: CUmodule,
    name: *const c_char,
) -> CUresult {
    call("cuModuleGetFunction", || {
        // SAFETY: the caller of a C function passes NUL-terminated names.
        let name = unsafe { CStr::from_ptr(name) };
        put(place, kernel::function(name)?)
    })
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn launch(
    function: CUfunction,
    blocks: c_uint,
    blocks_y: c_uint,
    _blocks_z: c_uint,
    threads: c_uint,
    _threads_y: c_uint,
    _threads_z: c_uint,
    _shared: c_uint,
    on: CUstream,
    parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> CUresult {
    call("cuLaunchKernel", || {
        // A launch wants the context of its stream.
        let device = current()?;
        let on = stream::stream(on.addr())?;
        if on.device != device {
            return Err(Status::cudaErrorInvalidResourceHandle);
        }
        // SAFETY: the caller guarantees the parameters.
        let kernel = unsafe { kernel::kernel(function, [blocks, blocks_y], threads, parameters) }?;
        kernel(&on)
    })
}

/// An asynchronous memset of the driver. It needs an aligned range, and no current context.
fn memset(name: &'static str, to: u64, unit: &[u8], count: usize, on: CUstream) -> CUresult {
    call(name, || {
        let (to, bytes) = (to as usize, count * unit.len());
        let on = stream::stream(on.addr())?;
        if !to.is_multiple_of(unit.len()) || !Target::of(to, bytes).is_reached_from(on.device) {
            return Err(Status::cudaErrorInvalidValue);
        }
        context::sticky(on.device).map_or(Ok(()), Err)?;
        work::repeat(to, bytes, unit.repeat(1024), &on)
    })
}

unsafe extern "C" fn memset_d16(
    to: CUdeviceptr_v2,
    value: u16,
    count: usize,
    on: CUstream,
) -> CUresult {
    memset("cuMemsetD16Async", to, &value.to_ne_bytes(), count, on)
}

unsafe extern "C" fn memset_d32(
    to: CUdeviceptr_v2,
    value: c_uint,
    count: usize,
    on: CUstream,
) -> CUresult {
    memset("cuMemsetD32Async", to, &value.to_ne_bytes(), count, on)
}

// Functions that the runtime has, too. The driver's need a current context, while the runtime's
// make one. Exchanging the capture mode needs none ("CUDA Driver API", of each).

/// Some context is current, and it is not broken.
pub(crate) fn current() -> Result<usize> {
    let device = context::current().ok_or(Status::cudaErrorDeviceUninitialized)?;
    context::sticky(device).map_or(Ok(device), Err)
}

unsafe extern "C" fn exchange_capture_mode(mode: *mut CUstreamCaptureMode) -> CUresult {
    call("cuThreadExchangeStreamCaptureMode", || {
        if mode.is_null() {
            return Err(Status::cudaErrorInvalidValue);
        }
        // SAFETY: the pointer is not null. C callers pass pointers that are valid for reads.
        let new = unsafe { mode.read() };
        let before = context::exchange_capture_mode(cudaStreamCaptureMode(new.0));
        put(mode, CUstreamCaptureMode(before.0))
    })
}

unsafe extern "C" fn is_capturing(on: CUstream, place: *mut CUstreamCaptureStatus) -> CUresult {
    call("cuStreamIsCapturing", || {
        let device = current()?;
        put(place, CUstreamCaptureStatus(stream::capture_status(on.addr(), device)?.0))
    })
}

unsafe extern "C" fn memcpy_h2d(
    to: CUdeviceptr_v2,
    from: *const c_void,
    bytes: usize,
    on: CUstream,
) -> CUresult {
    call("cuMemcpyHtoDAsync", || {
        current()?;
        let kind = cudaMemcpyKind::cudaMemcpyHostToDevice;
        work::copy(to as usize, from.addr(), bytes, kind, on)
    })
}

unsafe extern "C" fn memcpy_d2h(
    to: *mut c_void,
    from: CUdeviceptr_v2,
    bytes: usize,
    on: CUstream,
) -> CUresult {
    call("cuMemcpyDtoHAsync", || {
        current()?;
        let kind = cudaMemcpyKind::cudaMemcpyDeviceToHost;
        work::copy(to.addr(), from as usize, bytes, kind, on)
    })
}

unsafe extern "C" fn stream_query(on: CUstream) -> CUresult {
    call("cuStreamQuery", || {
        current()?;
        stream::query(on.addr())
    })
}

unsafe extern "C" fn event_record(event: CUevent, on: CUstream) -> CUresult {
    call("cuEventRecord", || {
        current()?;
        event::record(event.addr(), &stream::stream(on.addr())?)
    })
}

unsafe extern "C" fn event_query(event: CUevent) -> CUresult {
    call("cuEventQuery", || {
        stream::prohibited(context::capture_mode())?;
        event::query(event.addr())
    })
}

unsafe extern "C" fn event_synchronize(event: CUevent) -> CUresult {
    call("cuEventSynchronize", || {
        stream::prohibited(context::capture_mode())?;
        event::synchronize(event.addr())
    })
}

/// Answers for pinned host memory alone. All else is memory that CUDA does not know.
unsafe extern "C" fn pointer_attribute(
    place: *mut c_void,
    attribute: CUpointer_attribute,
    address: CUdeviceptr_v2,
) -> CUresult {
    call("cuPointerGetAttribute", || {
        current()?;
        let range = memory::pinned_range(address as usize);
        let (base, bytes) = range.ok_or(Status::cudaErrorInvalidValue)?;
        match attribute {
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE => {
                put(place.cast(), CUmemorytype::CU_MEMORYTYPE_HOST)
            }
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR => {
                put(place.cast(), base as CUdeviceptr_v2)
            }
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE => put(place.cast(), bytes),
            _ => Err(Status::cudaErrorNotSupported),
        }
    })
}

/// A table of functions by name.
///
/// A row names the function type of the driver's headers, which the compiler checks.
macro_rules! entry_points {
    ($($name:ident: $function:ident $(as $type:ident)?;)*) => {
        $($(const _: cudart_sys::$type = Some($function);)?)*

        /// The address of a function by its name, if it is simulated here.
        pub(crate) fn entry_point(name: &std::ffi::CStr) -> Option<*const std::ffi::c_void> {
            match name.to_str().ok()? {
                $(stringify!($name) => Some($function as *const std::ffi::c_void),)*
                _ => None,
            }
        }
    };
}
pub(crate) use entry_points;

entry_points! {
    cuDeviceGet: device_get as PFN_cuDeviceGet_v2000;
    cuDevicePrimaryCtxRetain: primary_retain as PFN_cuDevicePrimaryCtxRetain_v7000;
    cuDevicePrimaryCtxRelease: primary_release as PFN_cuDevicePrimaryCtxRelease_v11000;
    cuDevicePrimaryCtxGetState: primary_state as PFN_cuDevicePrimaryCtxGetState_v7000;
    cuCtxGetCurrent: get_current as PFN_cuCtxGetCurrent_v4000;
    cuCtxPushCurrent: push as PFN_cuCtxPushCurrent_v4000;
    cuCtxPopCurrent: pop as PFN_cuCtxPopCurrent_v4000;
    cuModuleLoadData: module_load as PFN_cuModuleLoadData_v2000;
    cuModuleUnload: module_unload as PFN_cuModuleUnload_v2000;
    cuModuleGetFunction: module_function as PFN_cuModuleGetFunction_v2000;
    cuLaunchKernel: launch as PFN_cuLaunchKernel_v4000;
    cuMemsetD16Async: memset_d16 as PFN_cuMemsetD16Async_v3020;
    cuMemsetD32Async: memset_d32 as PFN_cuMemsetD32Async_v3020;
    cuThreadExchangeStreamCaptureMode: exchange_capture_mode as PFN_cuThreadExchangeStreamCaptureMode_v10010;
    cuMemcpyHtoDAsync: memcpy_h2d as PFN_cuMemcpyHtoDAsync_v3020;
    cuMemcpyDtoHAsync: memcpy_d2h as PFN_cuMemcpyDtoHAsync_v3020;
    cuStreamIsCapturing: is_capturing as PFN_cuStreamIsCapturing_v10000;
    cuStreamQuery: stream_query as PFN_cuStreamQuery_v2000;
    cuEventRecord: event_record as PFN_cuEventRecord_v2000;
    cuEventQuery: event_query as PFN_cuEventQuery_v2000;
    cuPointerGetAttribute: pointer_attribute as PFN_cuPointerGetAttribute_v4000;
    cuEventSynchronize: event_synchronize as PFN_cuEventSynchronize_v2000;
}
