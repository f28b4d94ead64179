//! Calls that allocate, release and register memory.

use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::status::check;
use crate::error::Result;
use crate::sys;

/// Allocates memory of the current device.
pub(crate) fn malloc(bytes: usize) -> Result<*mut u8> {
    let _relaxed = RelaxedCapture::begin();
    let mut address = ptr::null_mut();
    // SAFETY: `address` is a valid place.
    let status = unsafe { sys::cudaMalloc(&mut address, bytes) };
    check(status, "cudaMalloc")?;
    Ok(address.cast())
}

/// Releases device memory.
///
/// # Safety
///
/// - `address` came from [`malloc`] in the current context.
/// - It is freed once.
/// - Nothing uses it.
pub(crate) unsafe fn free(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaFree(address.cast()) }, "cudaFree")
}

/// Allocates pinned host memory, which is not zeroed.
pub(crate) fn host_alloc(bytes: usize, flags: u32) -> Result<*mut u8> {
    let _relaxed = RelaxedCapture::begin();
    let mut address = ptr::null_mut();
    // SAFETY: `address` is a valid place.
    let status = unsafe { sys::cudaHostAlloc(&mut address, bytes, flags) };
    check(status, "cudaHostAlloc")?;
    Ok(address.cast())
}

/// Releases pinned host memory.
///
/// # Safety
///
/// - `address` came from [`host_alloc`].
/// - It is freed once.
/// - Nothing uses it.
pub(crate) unsafe fn free_host(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaFreeHost(address.cast()) }, "cudaFreeHost")
}

/// Pins pages of host memory.
///
/// # Safety
///
/// The pages are mapped. They stay so until [`host_unregister`] succeeds.
#[cfg(unix)]
pub(crate) unsafe fn host_register(address: *mut u8, bytes: usize, flags: u32) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the pages.
    let status = unsafe { sys::cudaHostRegister(address.cast(), bytes, flags) };
    check(status, "cudaHostRegister")
}

/// Unpins pages of host memory.
///
/// # Safety
///
/// - `address` was registered.
/// - Nothing is in flight from or to it.
#[cfg(unix)]
pub(crate) unsafe fn host_unregister(address: *mut u8) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    // SAFETY: the caller vouches for the address.
    check(unsafe { sys::cudaHostUnregister(address.cast()) }, "cudaHostUnregister")
}

/// Returns the address of pinned host memory for kernels of the current device.
pub(crate) fn host_device_ptr(address: *mut u8) -> Result<*mut u8> {
    let mut mapped = ptr::null_mut();
    // SAFETY: `mapped` is a valid place. An address outside mapped memory returns an error status.
    let status = unsafe { sys::cudaHostGetDevicePointer(&mut mapped, address.cast(), 0) };
    check(status, "cudaHostGetDevicePointer")?;
    Ok(mapped.cast())
}
