//! Calls that load and launch kernels.

use std::ffi::{CStr, c_void};
use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::driver::driver;
use crate::cuda::status::check_driver;
use crate::error::Result;
use crate::sys;

/// Loads an image into the current context.
///
/// # Safety
///
/// `image` is a whole fat binary or PTX that ends with a NUL.
pub(crate) unsafe fn load(image: &[u8]) -> Result<sys::CUmodule> {
    let _relaxed = RelaxedCapture::begin();
    let driver = driver()?;
    let mut module = ptr::null_mut();
    // SAFETY: the caller vouches for the image, and `module` is a valid place.
    let status = unsafe { (driver.module_load)(&mut module, image.as_ptr().cast()) };
    check_driver(status, "cuModuleLoadData")?;
    Ok(module)
}

/// Unloads a module.
///
/// # Safety
///
/// - `module` came from [`load`].
/// - It is unloaded once.
/// - None of its kernels runs.
pub(crate) unsafe fn unload(module: sys::CUmodule) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the module.
    check_driver(unsafe { (driver()?.module_unload)(module) }, "cuModuleUnload")
}

/// Returns the kernel of a module by its name.
///
/// # Safety
///
/// `module` is live.
pub(crate) unsafe fn function(module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction> {
    let driver = driver()?;
    let mut function = ptr::null_mut();
    // SAFETY: the caller vouches for the module. `name` ends with a NUL, and `function` is a valid
    // place.
    let status = unsafe { (driver.module_function)(&mut function, module, name.as_ptr()) };
    check_driver(status, "cuModuleGetFunction")?;
    Ok(function)
}

/// Launches a kernel of one-dimensional blocks in a grid of two dimensions.
///
/// # Safety
///
/// - The context of `function` is current.
/// - `stream` belongs to that context.
/// - `parameters` are those of the kernel.
/// - Each is the valid address of a value of its type.
/// - The work of the kernel meets the conditions of [`memcpy`](super::copy::memcpy).
pub(crate) unsafe fn launch(
    function: sys::CUfunction,
    [x, y]: [u32; 2],
    threads: u32,
    parameters: &mut [*mut c_void],
    stream: sys::cudaStream_t,
) -> Result<()> {
    let launch = driver()?.launch;
    let parameters = parameters.as_mut_ptr();
    // SAFETY: the caller vouches for everything. The parameters are copied before the call returns
    // ("CUDA Driver API, `cuLaunchKernel`").
    let status =
        unsafe { launch(function, x, y, 1, threads, 1, 1, 0, stream, parameters, ptr::null_mut()) };
    check_driver(status, "cuLaunchKernel")
}
