//! Calls that allocate, release and register memory.

use std::ops::Range;
use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::driver::driver;
use crate::cuda::status::{check, check_driver};
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::cudaError as Status;

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

/// Returns the addresses of the pinned host memory around an address: one registration, or one
/// allocation. `None` if the address is not pinned.
///
/// The runtime's `cudaPointerGetAttributes` is not used: its struct differs between versions.
pub(crate) fn pinned_range(address: *mut u8) -> Result<Option<Range<usize>>> {
    type Attribute = sys::CUpointer_attribute;
    const CALL: &str = "cuPointerGetAttribute";
    let (driver, address) = (driver()?, address.addr() as u64);
    let mut kind = sys::CUmemorytype(0);
    let attribute = Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: `kind` is a valid place of the attribute's type. Any address may be asked about.
    let status = unsafe { (driver.pointer_attribute)((&raw mut kind).cast(), attribute, address) };
    match check_driver(status, CALL) {
        // The status for memory that CUDA does not know.
        Err(Error::Cuda { code: Status::cudaErrorInvalidValue, .. }) => return Ok(None),
        known => known?,
    }
    if kind != sys::CUmemorytype::CU_MEMORYTYPE_HOST {
        return Ok(None);
    }
    let mut start = 0u64;
    let attribute = Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR;
    // SAFETY: `start` is a valid place of the attribute's type.
    let status = unsafe { (driver.pointer_attribute)((&raw mut start).cast(), attribute, address) };
    check_driver(status, CALL)?;
    let mut bytes = 0usize;
    let attribute = Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE;
    // SAFETY: `bytes` is a valid place of the attribute's type.
    let status = unsafe { (driver.pointer_attribute)((&raw mut bytes).cast(), attribute, address) };
    check_driver(status, CALL)?;
    let start = start as usize;
    Ok(Some(start..start + bytes))
}
