//! Stream capture.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cudart_sys::cudaStreamCaptureMode as Mode;

/// A capture. One stream began it, and those that wait for its events join it ("CUDA C++
/// Programming Guide, Cross-stream Dependencies and Events").
pub(crate) struct Capture {
    pub(crate) mode: Mode,
    /// The thread that began it, as in `this_thread`.
    pub(crate) thread: usize,
    /// The address of the stream that began it, which alone can end it.
    pub(crate) origin: usize,
    pub(crate) valid: AtomicBool,
    pub(crate) ended: AtomicBool,
    /// How much was captured, in all its streams.
    pub(crate) nodes: AtomicU64,
}

impl Capture {
    /// The capture can only be ended from now on ("CUDA C++ Programming Guide, Invalidation").
    pub(crate) fn invalidate(&self) {
        self.valid.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_valid(&self) -> bool {
        self.valid.load(Ordering::SeqCst)
    }
}

/// A point in a capture.
#[derive(Clone)]
pub(crate) struct Mark {
    pub(crate) capture: Arc<Capture>,
    /// The numbers of all work before this point.
    pub(crate) before: BTreeSet<u64>,
}

impl Mark {
    pub(crate) fn is_of(&self, capture: &Arc<Capture>) -> bool {
        Arc::ptr_eq(&self.capture, capture)
    }

    /// Adds one node.
    pub(crate) fn add(&mut self) {
        self.before.insert(self.capture.nodes.fetch_add(1, Ordering::SeqCst));
    }
}

/// The calling thread. Destructors of thread-locals may call this, unlike the standard library's
/// function.
pub(crate) fn this_thread() -> usize {
    // SAFETY: no arguments.
    unsafe { libc::pthread_self() as usize }
}
