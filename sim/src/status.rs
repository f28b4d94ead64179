//! Statuses, and results of the C functions.

use cudart_sys::cudaError;

pub(crate) type Status = cudaError;
pub(crate) type Result<T = (), E = Status> = std::result::Result<T, E>;

/// Writes a result through the pointer of a C caller.
pub(crate) fn put<T>(place: *mut T, value: T) -> Result {
    if place.is_null() {
        return Err(Status::cudaErrorInvalidValue);
    }
    // SAFETY: the pointer is not null. C callers pass pointers that are valid for writes.
    unsafe { place.write(value) };
    Ok(())
}
