//! Allocating, releasing and registering memory.

use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::status::check;
use crate::error::Result;
use crate::sys;

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
