//! The table of the driver's own functions.
//!
//! It holds the functions that the runtime lacks, and those that cost less than the runtime's own.
//! On an H100 with driver 580:
//!
//! - Asking if a stream is in capture takes 21 ns instead of 59 ns.
//! - Exchanging the capture mode takes 11 ns instead of 47 ns.
//! - A copy of 4 KB takes 0.1 us less.
//!
//! The runtime looks the functions up, so `libcuda` is never linked. Handles are the same in both
//! ("CUDA Runtime API, Interactions with the CUDA Driver API").

use std::ffi::{CStr, c_void};
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use crate::cuda::status::check;
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::cudaError as Status;

/// The function type inside a `PFN_` type of the headers, which is an `Option`.
pub(crate) trait Nullable {
    type Function;
}

impl<F> Nullable for Option<F> {
    type Function = F;
}

/// Declares the table of functions.
///
/// A row has the field's name and its versioned type from the headers. Then follow the name and the
/// version to ask the driver for.
macro_rules! driver {
    ($(#[$doc:meta])* $($name:ident: $type:ty = entry($symbol:expr, $version:expr);)*) => {
        $(#[$doc])*
        pub(crate) struct Driver {
            $(pub(crate) $name: <$type as Nullable>::Function,)*
        }

        /// Asks the driver for each function. Returns `None` if it lacks one.
        fn table() -> Result<Option<Driver>> {
            $(let $name: $type = entry($symbol, $version)?;)*
            Ok((|| Some(Driver { $($name: $name?,)* }))())
        }
    };
}

driver! {
    /// Functions that every driver since CUDA 12.0 has.
    device_get: sys::PFN_cuDeviceGet_v2000 = entry(c"cuDeviceGet", 2000);
    primary_retain: sys::PFN_cuDevicePrimaryCtxRetain_v7000 = entry(c"cuDevicePrimaryCtxRetain", 7000);
    primary_release: sys::PFN_cuDevicePrimaryCtxRelease_v11000 = entry(c"cuDevicePrimaryCtxRelease", 11000);
    current: sys::PFN_cuCtxGetCurrent_v4000 = entry(c"cuCtxGetCurrent", 4000);
    push: sys::PFN_cuCtxPushCurrent_v4000 = entry(c"cuCtxPushCurrent", 4000);
    pop: sys::PFN_cuCtxPopCurrent_v4000 = entry(c"cuCtxPopCurrent", 4000);
    module_load: sys::PFN_cuModuleLoadData_v2000 = entry(c"cuModuleLoadData", 2000);
    module_unload: sys::PFN_cuModuleUnload_v2000 = entry(c"cuModuleUnload", 2000);
    module_function: sys::PFN_cuModuleGetFunction_v2000 = entry(c"cuModuleGetFunction", 2000);
    launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel", 4000);
    memset_d16: sys::PFN_cuMemsetD16Async_v3020 = entry(c"cuMemsetD16Async", 3020);
    memset_d32: sys::PFN_cuMemsetD32Async_v3020 = entry(c"cuMemsetD32Async", 3020);
    memcpy_h2d: sys::PFN_cuMemcpyHtoDAsync_v3020 = entry(c"cuMemcpyHtoDAsync", 3020);
    memcpy_d2h: sys::PFN_cuMemcpyDtoHAsync_v3020 = entry(c"cuMemcpyDtoHAsync", 3020);
    pointer_attribute: sys::PFN_cuPointerGetAttribute_v4000 = entry(c"cuPointerGetAttribute", 4000);
    exchange_capture_mode: sys::PFN_cuThreadExchangeStreamCaptureMode_v10010 = entry(c"cuThreadExchangeStreamCaptureMode", 10010);
    is_capturing: sys::PFN_cuStreamIsCapturing_v10000 = entry(c"cuStreamIsCapturing", 10000);
    stream_query: sys::PFN_cuStreamQuery_v2000 = entry(c"cuStreamQuery", 2000);
    event_record: sys::PFN_cuEventRecord_v2000 = entry(c"cuEventRecord", 2000);
    event_query: sys::PFN_cuEventQuery_v2000 = entry(c"cuEventQuery", 2000);
    event_synchronize: sys::PFN_cuEventSynchronize_v2000 = entry(c"cuEventSynchronize", 2000);
    graph_create: sys::PFN_cuGraphCreate_v10000 = entry(c"cuGraphCreate", 10000);
    graph_destroy: sys::PFN_cuGraphDestroy_v10000 = entry(c"cuGraphDestroy", 10000);
    graph_add_kernel: sys::PFN_cuGraphAddKernelNode_v12000 = entry(c"cuGraphAddKernelNode", 12000);
    graph_instantiate: sys::PFN_cuGraphInstantiateWithFlags_v11040 = entry(c"cuGraphInstantiateWithFlags", 11040);
    graph_exec_destroy: sys::PFN_cuGraphExecDestroy_v10000 = entry(c"cuGraphExecDestroy", 10000);
    graph_set_kernel: sys::PFN_cuGraphExecKernelNodeSetParams_v12000 = entry(c"cuGraphExecKernelNodeSetParams", 12000);
    graph_launch: sys::PFN_cuGraphLaunch_v10000 = entry(c"cuGraphLaunch", 10000);
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// Returns the table of functions. The first call loads it.
#[inline]
pub(crate) fn driver() -> Result<&'static Driver> {
    match DRIVER.get() {
        Some(driver) => Ok(driver),
        None => load_driver(),
    }
}

#[cold]
fn load_driver() -> Result<&'static Driver> {
    let driver = table()?.ok_or_else(|| Error::Unavailable {
        reason: "the driver lacks a function that CUDA 12.0 has".into(),
    })?;
    Ok(DRIVER.get_or_init(|| driver))
}

/// Returns the driver's function `name` with the signature `F`, or `None` if the driver lacks it.
///
/// `version` is the version of CUDA that `F` is declared for.
pub(crate) fn entry<F>(name: &CStr, version: u32) -> Result<Option<F>> {
    const { assert!(size_of::<Option<F>>() == size_of::<*mut c_void>()) };
    let mut address = ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    let flags = u64::from(sys::cudaGetDriverEntryPointFlags::cudaEnableLegacyStream.0);
    // SAFETY: `name` ends with a NUL. `address` and `found` are valid places.
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
        // Runtimes before 12.5 have this call alone. It returns the newest signature that the
        // runtime's own version knows. For these functions it is the same one.
        // SAFETY: as above.
        status =
            unsafe { sys::cudaGetDriverEntryPoint(name.as_ptr(), &mut address, flags, &mut found) };
    }
    check(status, "cudaGetDriverEntryPoint")?;
    // SAFETY: `F` is a C function pointer, and `None` is null. By the assertion, `Option<F>` is as
    // large as an address. The driver gave the address for the name and version of `F`'s
    // declaration in its headers.
    Ok(unsafe { mem::transmute_copy::<*mut c_void, Option<F>>(&address) })
}
