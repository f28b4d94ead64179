//! Pages that are registered with CUDA, as one or in several pieces of one size.
//!
//! The driver may refuse to register much memory at once, so smaller pieces are tried. CUDA refuses
//! a copy that spans two registrations ("CUDA Driver API, Memory Management", `cuMemcpyAsync`).
//! Copies are therefore cut at [`registration_size`](Registered::registration_size).

use std::alloc::Layout;
use std::iter;
use std::ops::Range;
use std::ptr::NonNull;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::{Error, Result};
use crate::memory::pages::Mapping;
use crate::memory::split::split_by;
use crate::sys::cudaError;

/// The sizes of pieces, tried in turn if the whole cannot be registered.
///
/// They are multiples of a hugepage, so that no hugepage lies in two pieces.
const REGISTRATION_SIZES: [usize; 2] = [1 << 30, 64 << 20];

/// The registration sizes to try for `bytes` bytes. `usize::MAX` stands for a single registration.
fn sizes(bytes: usize) -> impl Iterator<Item = usize> {
    iter::once(usize::MAX).chain(REGISTRATION_SIZES.into_iter().filter(move |size| *size < bytes))
}

/// Owned pages, registered with CUDA. Dropping the value unregisters and unmaps them.
pub(crate) struct Registered {
    mapping: Mapping,
    registration_size: usize,
    context: &'static Context,
}

/// Why an attempt to register failed.
struct Failed {
    error: Error,
    /// `true` if pages may still be registered.
    leaves_pages: bool,
}

impl Registered {
    /// Maps and registers zeroed memory. `context` is the current context.
    ///
    /// The error is that of the last attempt.
    pub(crate) fn new(layout: Layout, flags: u32, context: &'static Context) -> Result<Registered> {
        let no_pages = Error::Cuda { code: cudaError::cudaErrorMemoryAllocation, call: "mmap" };
        let mut mapping = Mapping::new(layout).ok_or(no_pages.clone())?;
        mapping.touch();
        let mut last = no_pages;
        for size in sizes(mapping.bytes()) {
            match register(&mapping, size, flags) {
                Ok(()) => return Ok(Registered { mapping, registration_size: size, context }),
                Err(Failed { error, leaves_pages: false }) => last = error,
                Err(Failed { error, leaves_pages: true }) => {
                    mapping.leak();
                    return Err(error);
                }
            }
        }
        Err(last)
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.mapping.address()
    }

    /// The bytes that each registration covers, from the first byte on.
    ///
    /// `usize::MAX` if one registration covers all.
    pub(crate) fn registration_size(&self) -> usize {
        self.registration_size
    }
}

// SAFETY: the pages belong to the value alone, and can be unregistered and unmapped on any thread.
unsafe impl Send for Registered {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for Registered {}

impl Drop for Registered {
    fn drop(&mut self) {
        if fork::forked() {
            return self.mapping.leak();
        }
        // The runtime finds registrations by their address, so a failure to enter is ignored.
        let _current = self.context.enter();
        // Pages that may still be registered stay mapped.
        if !unregister(&self.mapping, split_by(0..self.mapping.bytes(), self.registration_size)) {
            self.mapping.leak();
        }
    }
}

/// Registers a mapping in pieces of `size` bytes. On failure it unregisters them again.
fn register(mapping: &Mapping, size: usize, flags: u32) -> std::result::Result<(), Failed> {
    for (number, range) in split_by(0..mapping.bytes(), size).enumerate() {
        // SAFETY: the piece lies within the mapping.
        let address = unsafe { mapping.address().add(range.start) }.as_ptr();
        // SAFETY: the pages are mapped. They are unmapped only once they are not registered.
        let Err(error) = (unsafe { calls::memory::host_register(address, range.len(), flags) })
        else {
            continue;
        };
        // The error may come from earlier asynchronous work, and the pages be registered.
        // SAFETY: no copy has used the pages yet.
        let gone = match unsafe { calls::memory::host_unregister(address) } {
            Ok(())
            | Err(Error::Cuda {
                code:
                    cudaError::cudaErrorHostMemoryNotRegistered
                    | cudaError::cudaErrorInvalidValue
                    | cudaError::cudaErrorNotSupported,
                ..
            }) => true,
            Err(_) => false,
        };
        let before = unregister(mapping, split_by(0..mapping.bytes(), size).take(number));
        return Err(Failed { error, leaves_pages: !(before && gone) });
    }
    Ok(())
}

/// Unregisters all given pieces, even if some of them fail. `false` if one may still be registered.
fn unregister(mapping: &Mapping, ranges: impl Iterator<Item = Range<usize>>) -> bool {
    let mut gone = true;
    for range in ranges {
        // SAFETY: the piece lies within the mapping.
        let address = unsafe { mapping.address().add(range.start) }.as_ptr();
        // SAFETY: the piece is registered. The memory is dropped after its transfers have finished,
        // and leaked otherwise.
        gone &= unsafe { calls::memory::host_unregister(address) }.is_ok();
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_is_tried_first_and_then_smaller_registrations() {
        const MIB: usize = 1 << 20;
        for (bytes, expected) in [
            (4096, &[usize::MAX][..]),
            (64 * MIB, &[usize::MAX]),
            (64 * MIB + 4096, &[usize::MAX, 64 * MIB]),
            (1024 * MIB, &[usize::MAX, 64 * MIB]),
            (3000 * MIB, &[usize::MAX, 1024 * MIB, 64 * MIB]),
        ] {
            assert_eq!(sizes(bytes).collect::<Vec<_>>(), expected);
        }
    }
}
