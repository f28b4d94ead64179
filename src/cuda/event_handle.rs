//! An event of the runtime, owned.

use bitflags::bitflags;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::Result;
use crate::sys;

bitflags! {
    /// How an event is made: `cudaEventCreateWithFlags`.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct EventFlags: u32 {
        /// Waiting for the event yields the thread instead of spinning.
        const BLOCKING_SYNC = sys::cudaEventBlockingSync;
        /// The event takes no time stamp, which makes it cheaper.
        const DISABLE_TIMING = sys::cudaEventDisableTiming;
    }
}

/// An event of the runtime's, destroyed with the value.
pub(crate) struct EventHandle {
    raw: sys::cudaEvent_t,
    context: &'static Context,
}

// SAFETY: the runtime's events may be used from any thread, by several at once.
unsafe impl Send for EventHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for EventHandle {}

impl EventHandle {
    /// A new event of `context`, which is current.
    pub(crate) fn new(context: &'static Context, flags: EventFlags) -> Result<EventHandle> {
        let raw = calls::event::create(flags.bits())?;
        Ok(EventHandle { raw, context })
    }

    pub(crate) fn raw(&self) -> sys::cudaEvent_t {
        self.raw
    }

    pub(crate) fn is_complete(&self) -> Result<bool> {
        // Its own context: another one might answer with an error of its own.
        let _current = self.context.ensure_current()?;
        // SAFETY: the event is destroyed with the value, not before.
        unsafe { calls::event::query(self.raw) }
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = self.context.ensure_current()?;
        // SAFETY: as above.
        unsafe { calls::event::synchronize(self.raw) }
    }

    /// Milliseconds since `earlier`, an event of the same device.
    pub(crate) fn since(&self, earlier: &EventHandle) -> Result<f32> {
        let _current = self.context.ensure_current()?;
        // SAFETY: both are live, and of one device.
        unsafe { calls::event::elapsed(earlier.raw, self.raw) }
    }
}

impl Drop for EventHandle {
    fn drop(&mut self) {
        if fork::forked() {
            return;
        }
        // Its own context: a broken one would refuse to destroy the event. The handle says enough,
        // should the context not be had.
        let _current = self.context.ensure_current();
        // SAFETY: the value owns the event, and this is its end. An event may be destroyed before it
        // has finished (CUDA Runtime API, `cudaEventDestroy`).
        let destroyed = unsafe { calls::event::destroy(self.raw) };
        // Nobody could act on the error, and there is nothing left to give back.
        let _ = destroyed;
    }
}
