//! Sides that are lent to tensors of other libraries.
//!
//! The consumer of a tensor uses the side on any thread and any stream. Its work may run long after
//! the tensor is gone. The consumer names one stream, when it gets the tensor, and that stream may
//! be destroyed by the time that the tensor is dropped. Only a wait for every device covers all of
//! a consumer's work:
//!
//! | tensors of a side | an operation on that side |
//! |---|---|
//! | some live | returns [`Error::Exported`] |
//! | all are gone, and their work on a CUDA device is *unknown* | first waits for the devices, once |
//! | all are gone, and their work is finished | does what it always does |
//!
//! The buffer and its tensors own the storage together. The last one that is dropped decides:
//!
//! | dropped last | work of consumers | storage |
//! |---|---|---|
//! | the buffer | finished | is released, or returns to its pool |
//! | the buffer | unknown | is [left behind](crate::flight::left_behind) |
//! | a tensor | unknown or finished | is left behind; on the CPU it is released |
//!
//! Dropping a tensor calls no CUDA. Dropping a buffer that was lent waits for nothing. Both may
//! happen in these places, in which a wait would be wrong or forbidden:
//!
//! - In a host function, from which CUDA must not be called.
//! - Under a lock that queued work waits for, for example Python's.
//! - During a capture, which a wait for the device ends ("CUDA C++ Programming Guide, Prohibited
//!   and Unhandled Operations").
//! - In a forked child.
//! - After the runtime's end.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cuda::devices;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::flight::left_behind::{ExportedStorage, leave_behind};

/// The state that a storage and the tensors of its sides share.
pub(crate) struct Exports {
    device: Device,
    host: SideLoans,
    gpu: SideLoans,
    /// The storage, once its buffer is gone.
    left_behind: OnceLock<Box<dyn ExportedStorage>>,
}

#[derive(Default)]
struct SideLoans {
    /// The tensors that live.
    living: AtomicUsize,
    /// The side was lent, and nobody has waited for the devices since.
    unknown: AtomicBool,
}

impl SideLoans {
    /// `Acquire`: a thread that finds no tensor sees the writes of the consumers.
    fn is_lent(&self) -> bool {
        self.living.load(Ordering::Acquire) > 0
    }

    fn is_unknown(&self) -> bool {
        self.unknown.load(Ordering::Acquire)
    }
}

impl Exports {
    pub(crate) fn new(device: Device) -> Exports {
        Exports {
            device,
            host: SideLoans::default(),
            gpu: SideLoans::default(),
            left_behind: OnceLock::new(),
        }
    }

    fn loans(&self, side: Side) -> &SideLoans {
        match side {
            Side::Host => &self.host,
            Side::Device => &self.gpu,
        }
    }

    pub(crate) fn is_lent(&self, side: Side) -> bool {
        self.loans(side).is_lent()
    }

    /// Lends a side to a tensor. The caller has the buffer exclusively, so no
    /// [`wait_for_consumers`](Self::wait_for_consumers) runs at the same time.
    pub(crate) fn lend(self: &Arc<Self>, side: Side) -> Loan {
        self.mark_unknown(side);
        self.loans(side).living.fetch_add(1, Ordering::Relaxed);
        Loan { exports: Arc::clone(self), side: Some(side) }
    }

    /// Work that no record stands for may be queued on this side. As for [`lend`](Self::lend).
    pub(crate) fn mark_unknown(&self, side: Side) {
        self.loans(side).unknown.store(self.device != Device::Cpu, Ordering::Relaxed);
    }

    /// Lends the memory alone. Nothing guards the side: the caller does.
    pub(crate) fn lend_unguarded(self: &Arc<Self>) -> Loan {
        Loan { exports: Arc::clone(self), side: None }
    }

    /// Returns an error if a tensor of one of the sides lives.
    fn refuse_lent(&self, sides: &[Side]) -> Result<()> {
        match sides.iter().find(|side| self.is_lent(**side)) {
            Some(side) => Err(Error::Exported { side: *side }),
            None => Ok(()),
        }
    }

    /// Waits until no consumer uses these sides.
    #[cold]
    pub(crate) fn wait_for_consumers(&self, sides: &[Side]) -> Result<()> {
        self.refuse_lent(sides)?;
        if sides.iter().any(|side| self.loans(*side).is_unknown()) {
            // Before the wait: it covers only what was queued by then.
            let over = [&self.host, &self.gpu].map(|loans| !loans.is_lent());
            devices::synchronize_all()?;
            for (loans, over) in [&self.host, &self.gpu].into_iter().zip(over) {
                if over {
                    loans.unknown.store(false, Ordering::Release);
                }
            }
        }
        Ok(())
    }

    /// Returns `true` if the work of consumers on these sides is finished. Does not wait. Returns
    /// an error if a tensor of one of them lives.
    #[cold]
    pub(crate) fn are_consumers_done(&self, sides: &[Side]) -> Result<bool> {
        self.refuse_lent(sides)?;
        Ok(!sides.iter().any(|side| self.loans(*side).is_unknown()))
    }

    /// Returns `true` if no tensor lives and all work of consumers is finished.
    #[cold]
    pub(crate) fn is_idle(&self) -> bool {
        [&self.host, &self.gpu].iter().all(|loans| !loans.is_lent() && !loans.is_unknown())
    }

    /// Takes the storage of a buffer that is dropped. The last owner releases it.
    #[cold]
    pub(crate) fn buffer_dropped(mut self: Arc<Self>, storage: Box<dyn ExportedStorage>) {
        let alone = Arc::get_mut(&mut self).is_some();
        if alone && self.is_idle() {
            return drop(storage);
        }
        // Its streams may be gone when it is released.
        if !storage.close_or_leak() {
            return drop(storage);
        }
        if alone {
            return leave_behind(storage);
        }
        // Nobody else sets it: a buffer is dropped once.
        let _ = self.left_behind.set(storage);
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        if let Some(storage) = self.left_behind.take() {
            leave_behind(storage);
        }
    }
}

/// A tensor's share in a storage.
pub(crate) struct Loan {
    exports: Arc<Exports>,
    /// The side that is guarded while the tensor lives.
    side: Option<Side>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(side) = self.side {
            // Before the share is given up: the last owner finds nothing lent.
            self.exports.loans(side).living.fetch_sub(1, Ordering::Release);
        }
    }
}
