//! Owned pages that are registered with CUDA, as one or in several
//! [pieces](crate::memory::registration).

use std::alloc::Layout;
use std::ptr::NonNull;

use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::{Error, Result};
use crate::memory::pages::Mapping;
use crate::memory::registration::{Failed, Pieces};
use crate::sys::cudaError;

/// Owned pages, registered with CUDA. Dropping the value unregisters and unmaps them.
pub(crate) struct Registered {
    mapping: Mapping,
    pieces: Pieces,
    context: &'static Context,
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
        for pieces in Pieces::ways(mapping.address(), mapping.bytes()) {
            // SAFETY: the pages are mapped, and nothing uses them. They are unmapped only once they
            // are not registered.
            match unsafe { pieces.register(flags) } {
                Ok(()) => return Ok(Registered { mapping, pieces, context }),
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

    /// The offsets at which a registration ends and the next begins.
    pub(crate) fn bounds(&self) -> Box<[usize]> {
        self.pieces.bounds()
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
        // SAFETY: the pieces are registered. The memory is dropped after its transfers have
        // finished, and leaked otherwise.
        if !unsafe { self.pieces.unregister() } {
            // Pages that may still be registered stay mapped.
            self.mapping.leak();
        }
    }
}
