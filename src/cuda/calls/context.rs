//! Calls on devices and contexts.

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr;

use crate::cuda::capture::RelaxedCapture;
#[cfg(feature = "dlpack")]
use crate::cuda::driver::entry;
use crate::cuda::driver::{Driver, driver};
use crate::cuda::status::{check, check_driver};
#[cfg(feature = "dlpack")]
use crate::error::Error;
use crate::error::Result;
use crate::sys;
#[cfg(feature = "dlpack")]
use crate::sys::cudaError as Status;

/// Returns the number of CUDA devices.
pub(crate) fn device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: `count` is a valid place for an int.
    let status = unsafe { sys::cudaGetDeviceCount(&mut count) };
    check(status, "cudaGetDeviceCount")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Returns the newest version of CUDA that the driver supports, or 0 without a driver.
///
/// Version 13.0 is 13000.
pub(crate) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: `version` is a valid place for an int.
    let status = unsafe { sys::cudaDriverGetVersion(&mut version) };
    check(status, "cudaDriverGetVersion")?;
    Ok(version)
}

/// Retains the primary context of a device, so that it is not destroyed.
///
/// Creates the context if there is none yet.
pub(crate) fn retain_primary(ordinal: u32) -> Result<sys::CUcontext> {
    let driver = driver()?;
    let mut device = 0;
    // SAFETY: `device` is a valid place. An ordinal out of range returns an error status.
    let status = unsafe { (driver.device_get)(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    let mut context = ptr::null_mut();
    // SAFETY: `context` is a valid place, and the driver just gave `device`.
    let status = unsafe { (driver.primary_retain)(&mut context, device) };
    check_driver(status, "cuDevicePrimaryCtxRetain")?;
    Ok(context)
}

/// Undoes one [`retain_primary`].
pub(crate) fn release_primary(ordinal: u32) -> Result<()> {
    let driver = driver()?;
    let mut device = 0;
    // SAFETY: as in `retain_primary`.
    let status = unsafe { (driver.device_get)(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    // SAFETY: the caller retained this device's primary context and no longer uses it.
    check_driver(unsafe { (driver.primary_release)(device) }, "cuDevicePrimaryCtxRelease")
}

/// Returns this thread's current context, or null.
///
/// Without one, most calls of the driver fail. Most calls of the runtime then make the context of
/// device 0 current, even if their arguments belong to another device.
#[inline]
pub(crate) fn current() -> Result<sys::CUcontext> {
    let mut context = ptr::null_mut();
    let current = driver()?.current;
    // SAFETY: `context` is a valid place.
    check_driver(unsafe { current(&mut context) }, "cuCtxGetCurrent")?;
    Ok(context)
}

/// Keeps a context current for this thread. Dropping it restores the one before.
pub(crate) struct Entered {
    driver: &'static Driver,
    // Only the thread that pushed the context may pop it.
    not_send: PhantomData<*const ()>,
}

/// Makes `context` current until the result is dropped.
///
/// Setting the device with `cudaSetDevice` and setting it back would do for most callers. But that
/// creates a context on device 0 in a thread that never chose a device. It also replaces a context
/// that is not the primary one of its device.
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
        // SAFETY: `popped` is a valid place. This value does not leave its thread, and its uses in
        // this crate end in the reverse order of their beginnings. So the call pops the context
        // that `enter` pushed.
        let status = unsafe { (self.driver.pop)(&mut popped) };
        let _ = check_driver(status, "cuCtxPopCurrent");
    }
}

/// Returns `true` if device `ordinal` can use memory of device `peer` directly.
pub(crate) fn can_access_peer(ordinal: u32, peer: u32) -> Result<bool> {
    let mut can = 0;
    // SAFETY: `can` is a valid place. An ordinal out of range returns an error status.
    let status = unsafe { sys::cudaDeviceCanAccessPeer(&mut can, ordinal as c_int, peer as c_int) };
    check(status, "cudaDeviceCanAccessPeer")?;
    Ok(can != 0)
}

/// Lets the current context use memory of device `peer` directly.
pub(crate) fn enable_peer_access(peer: u32) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the call takes no pointers. An ordinal out of range returns an error status.
    let status = unsafe { sys::cudaDeviceEnablePeerAccess(peer as c_int, 0) };
    check(status, "cudaDeviceEnablePeerAccess")
}

/// Returns the free and the total bytes of the current device.
pub(crate) fn memory_info() -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: `free` and `total` are valid places.
    let status = unsafe { sys::cudaMemGetInfo(&mut free, &mut total) };
    check(status, "cudaMemGetInfo")?;
    Ok((free, total))
}

/// Returns `true` if the device has a primary context.
#[cfg(feature = "dlpack")]
pub(crate) fn has_primary(ordinal: u32) -> Result<bool> {
    let device_get = driver()?.device_get;
    let mut device = 0;
    // SAFETY: `device` is a valid place. An ordinal out of range returns an error status.
    let status = unsafe { device_get(&mut device, ordinal as c_int) };
    check_driver(status, "cuDeviceGet")?;
    // Calls are rare, so each one looks the function up.
    let get_state: sys::PFN_cuDevicePrimaryCtxGetState_v7000 =
        entry(c"cuDevicePrimaryCtxGetState", 7000)?;
    let get_state = get_state.ok_or_else(|| Error::Unavailable {
        reason: "the driver lacks cuDevicePrimaryCtxGetState, which CUDA 12.0 has".into(),
    })?;
    let (mut flags, mut active) = (0, 0);
    // SAFETY: `flags` and `active` are valid places, and the driver just gave `device`.
    let status = unsafe { get_state(device, &mut flags, &mut active) };
    check_driver(status, "cuDevicePrimaryCtxGetState")?;
    Ok(active != 0)
}

/// Waits for all work that was sent to the current context.
///
/// Ends each capture of a stream there, regardless of its mode and of this thread's mode. Waiting
/// for a context that encompasses a capture is prohibited ("CUDA C++ Programming Guide, Prohibited
/// and Unhandled Operations"). This was seen with CUDA 13.0 on an H100.
#[cfg(feature = "dlpack")]
pub(crate) fn synchronize() -> Result<()> {
    // Captures in other contexts must not end.
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the call takes no arguments.
    match check(unsafe { sys::cudaDeviceSynchronize() }, "cudaDeviceSynchronize") {
        Err(Error::Cuda { code: Status::cudaErrorStreamCaptureUnsupported, .. }) => {
            Err(Error::StreamCapturing)
        }
        result => result,
    }
}
