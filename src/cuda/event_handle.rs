//! An owned event of the runtime.

use bitflags::bitflags;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::Result;
use crate::sys;

bitflags! {
    /// Flags of `cudaEventCreateWithFlags`.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct EventFlags: u32 {
        /// A thread that waits for the event sleeps instead of spinning.
        const BLOCKING_SYNC = sys::cudaEventBlockingSync;
        /// The event takes no time stamp and is cheaper.
        const DISABLE_TIMING = sys::cudaEventDisableTiming;
    }
}

/// An event of the runtime that is destroyed with this value.
pub(crate) struct EventHandle {
    raw: sys::cudaEvent_t,
    context: &'static Context,
}

// SAFETY: any thread may use an event of the runtime, and several may at once.
unsafe impl Send for EventHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for EventHandle {}

impl EventHandle {
    /// Makes an event of `context`, which must be current.
    pub(crate) fn new(context: &'static Context, flags: EventFlags) -> Result<EventHandle> {
        let raw = calls::event::create(flags.bits())?;
        Ok(EventHandle { raw, context })
    }

    pub(crate) fn raw(&self) -> sys::cudaEvent_t {
        self.raw
    }

    /// Returns `true` if the event is complete.
    pub(crate) fn is_complete(&self) -> Result<bool> {
        // In another context the query could return an error of that context.
        let _current = self.context.ensure_current()?;
        // SAFETY: the event lives as long as this value.
        unsafe { calls::event::query(self.raw) }
    }

    /// Waits for the event.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = self.context.ensure_current()?;
        // SAFETY: as above.
        unsafe { calls::event::synchronize(self.raw) }
    }

    /// Returns the milliseconds since `earlier`, an event of the same device.
    pub(crate) fn since(&self, earlier: &EventHandle) -> Result<f32> {
        let _current = self.context.ensure_current()?;
        // SAFETY: both events are live and of one device.
        unsafe { calls::event::elapsed(earlier.raw, self.raw) }
    }
}

impl Drop for EventHandle {
    fn drop(&mut self) {
        if fork::forked() {
            return;
        }
        // The call is made in the event's own context, because another one that is current may be
        // broken and make it fail. If entering fails, the call is tried all the same.
        let _current = self.context.ensure_current();
        // SAFETY: this value owns the event, and nothing uses it later. An event may be destroyed
        // before it is complete ("CUDA Runtime API, `cudaEventDestroy`").
        let destroyed = unsafe { calls::event::destroy(self.raw) };
        // No caller could act on the error.
        let _ = destroyed;
    }
}
