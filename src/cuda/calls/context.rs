//! Devices and contexts.

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr;

#[cfg(feature = "dlpack")]
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
pub(crate) fn current() -> Result<sys::CUcontext> {
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
pub(crate) fn synchronize() -> Result<()> {
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
