//! Pages that are registered with CUDA: as one, or, where so much cannot be registered at once, in pieces of one size.
//!
//! CUDA refuses a copy that spans two registrations ("CUDA Driver API, Memory Management", `cuMemcpyAsync`), so
//! whoever copies asks for the pieces.

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

/// The sizes of pieces that are tried, in turn, where the whole cannot be registered. Multiples of a hugepage, which
/// then lies in one of them.
const REGISTRATION_SIZES: [usize; 2] = [1 << 30, 64 << 20];

/// What so many bytes are registered by, in turn: as one, which is `usize::MAX`, and in pieces that are smaller.
fn sizes(bytes: usize) -> impl Iterator<Item = usize> {
    iter::once(usize::MAX).chain(REGISTRATION_SIZES.into_iter().filter(move |size| *size < bytes))
}

/// Registered pages of this value's own.
pub(crate) struct Registered {
    mapping: Mapping,
    registration_size: usize,
    context: &'static Context,
}

/// Why an attempt to register failed.
struct Failed {
    error: Error,
    /// Pages may still be registered.
    leaves_pages: bool,
}

impl Registered {
    /// Zeroed memory of a layout, in the current context, which is `context`. The error is that of
    /// the last attempt.
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

    /// The bytes that one registration covers, from the first byte on; `usize::MAX` where one covers all.
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
        // The addresses say enough, should the context not be had.
        let _current = self.context.enter();
        // With the context broken, the pages stay as they are.
        if !unregister(&self.mapping, split_by(0..self.mapping.bytes(), self.registration_size)) {
            self.mapping.leak();
        }
    }
}

/// Registers a mapping in pieces: all, or, as far as can be known, none.
fn register(mapping: &Mapping, size: usize, flags: u32) -> std::result::Result<(), Failed> {
    for (number, range) in split_by(0..mapping.bytes(), size).enumerate() {
        // SAFETY: the piece lies within the mapping.
        let address = unsafe { mapping.address().add(range.start) }.as_ptr();
        // SAFETY: the pages are mapped, and unmapped only when they are known not to be registered.
        let Err(error) = (unsafe { calls::memory::host_register(address, range.len(), flags) })
        else {
            continue;
        };
        // The error may be that of earlier work, and the pages registered all the same.
        // SAFETY: nothing was copied from or to them yet.
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

/// Unregisters pieces that are registered, each of them whatever becomes of the others; `false` where one may still be.
fn unregister(mapping: &Mapping, ranges: impl Iterator<Item = Range<usize>>) -> bool {
    let mut gone = true;
    for range in ranges {
        // SAFETY: the piece lies within the mapping.
        let address = unsafe { mapping.address().add(range.start) }.as_ptr();
        // SAFETY: registered, and nothing is in flight: whoever drops the memory saw its transfers finish.
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
