//! The context behind a CUDA device.
//!
//! The first use of a CUDA device retains its primary context, which the runtime and every other
//! library in the process share. It also loads the kernels. Loading waits for the whole device, so
//! it must not happen at the first fill: the device may be held up by work that depends on the
//! caller. A context stays for the life of the process.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::calls;
use crate::cuda::fork;
use crate::cuda::kernels::Kernels;
use crate::error::Result;
use crate::sys;

/// A CUDA device in use: its primary context, and the kernels loaded into it.
pub(crate) struct Context {
    handle: sys::CUcontext,
    pub(crate) kernels: Kernels,
    keeps_memory: AtomicBool,
}
// SAFETY: a context may be used from any thread, and by several at once ("CUDA Driver API, Context
// Management"); the handles are never changed.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

impl Context {
    /// Makes the context this thread's current one while the answer lives.
    #[inline]
    pub(crate) fn enter(&self) -> Result<calls::context::Entered> {
        fork::refuse_child()?;
        // SAFETY: the primary context was retained and is never released.
        unsafe { calls::context::enter(self.handle) }
    }

    /// Makes the context current where it is not: enough where nothing makes another one current meanwhile.
    #[inline]
    pub(crate) fn ensure_current(&self) -> Result<Option<calls::context::Entered>> {
        fork::refuse_child()?;
        match calls::context::current()? == self.handle {
            true => Ok(None),
            false => self.enter().map(Some),
        }
    }

    /// Keeps the driver's chunk of device memory, from which it cuts small allocations, by one that
    /// is never freed. Without it, a lone small allocation makes and releases a chunk. The context
    /// is current.
    pub(crate) fn keep_memory(&self) {
        // Most calls find it set, and write nothing.
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

pub(crate) fn make(ordinal: u32) -> Result<Context> {
    let handle = calls::context::retain_primary(ordinal)?;
    // SAFETY: the line above retained it.
    let kernels = unsafe { calls::context::enter(handle) }.and_then(|_current| Kernels::load());
    match kernels {
        Ok(kernels) => Ok(Context { handle, kernels, keeps_memory: AtomicBool::new(false) }),
        Err(error) => {
            // What went wrong first is what the caller should hear.
            let _ = calls::context::release_primary(ordinal);
            Err(error)
        }
    }
}
