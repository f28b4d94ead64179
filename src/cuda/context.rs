//! The context behind a CUDA device.
//!
//! The first use of a CUDA device retains its primary context. The runtime and every other library
//! in the process share this context. It stays for the life of the process.
//!
//! The first use also loads the kernels. Loading waits for the whole device, so it must not happen
//! at the first fill. By then the device may be held up by work that depends on the caller.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::calls;
use crate::cuda::fork;
use crate::cuda::kernels::Kernels;
use crate::cuda::peers::Peers;
use crate::error::Result;
use crate::sys;

/// The primary context of a CUDA device and the kernels loaded into it.
pub(crate) struct Context {
    handle: sys::CUcontext,
    ordinal: u32,
    pub(crate) kernels: Kernels,
    keeps_memory: AtomicBool,
    peers: Peers,
}
// SAFETY: any thread may use a context, and several may at once ("CUDA Driver API, Context
// Management"). The handles never change.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

impl Context {
    /// Makes the context current for this thread until the result is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Result<calls::context::Entered> {
        fork::refuse_child()?;
        // SAFETY: the primary context was retained and is never released.
        unsafe { calls::context::enter(self.handle) }
    }

    /// Like [`enter`](Self::enter), but makes no call if the context is current already.
    ///
    /// It suffices if nothing makes another context current meanwhile.
    #[inline]
    pub(crate) fn ensure_current(&self) -> Result<Option<calls::context::Entered>> {
        fork::refuse_child()?;
        match calls::context::current()? == self.handle {
            true => Ok(None),
            false => self.enter().map(Some),
        }
    }

    /// Lets this context use memory of another device directly, if the hardware can. The context
    /// must be current.
    pub(crate) fn enable_peer(&self, peer: u32) {
        self.peers.enable(self.ordinal, peer);
    }

    /// Keeps the chunk of device memory that the driver cuts small allocations from.
    ///
    /// One small allocation that is never freed keeps it. Without it, a lone small allocation makes
    /// and releases a chunk. The context must be current.
    pub(crate) fn keep_memory(&self) {
        // Most calls find the flag set and write nothing.
        if self.keeps_memory.load(Ordering::Relaxed)
            || self.keeps_memory.swap(true, Ordering::Relaxed)
        {
            return;
        }
        if calls::memory::malloc(1).is_err() {
            self.keeps_memory.store(false, Ordering::Relaxed);
        }
    }
}

/// Retains the primary context of a device and loads the kernels into it.
pub(crate) fn make(ordinal: u32) -> Result<Context> {
    let handle = calls::context::retain_primary(ordinal)?;
    // SAFETY: the line above retained the context.
    let kernels = unsafe { calls::context::enter(handle) }.and_then(|_current| Kernels::load());
    match kernels {
        Ok(kernels) => Ok(Context {
            handle,
            ordinal,
            kernels,
            keeps_memory: AtomicBool::new(false),
            peers: Peers::default(),
        }),
        Err(error) => {
            // The caller gets the first error.
            let _ = calls::context::release_primary(ordinal);
            Err(error)
        }
    }
}
