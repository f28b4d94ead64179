//! Sides that are lent to tensors of other libraries: when they may be touched again, and who lets the memory go.
//!
//! A consumer of a tensor touches its side as it likes, on any thread and any stream, and what it has queued may run
//! long after it let the tensor go. It names a stream once, when it gets the tensor; by the time that it lets go of it
//! that stream may be destroyed. So nothing less than waiting for every device covers a consumer's work:
//!
//! | tensors of a side | whatever touches that side |
//! |---|---|
//! | live | is refused |
//! | are all gone, and their work is *unknown*: that of a CUDA device's side | first waits for the devices, once |
//! | are all gone, and known to be over | does what it always does |
//!
//! The storage belongs to the buffer and its tensors together, whichever goes last:
//!
//! | last goes | with the work of consumers | and the storage |
//! |---|---|---|
//! | the buffer | known to be over | goes as any other: is released, or goes back to its pool |
//! | the buffer | unknown | is *left behind* |
//! | a tensor | unknown, or not | is left behind; on the CPU it goes |
//!
//! What is left behind is released by [`reclaim`], which waits for the devices first. Where that fails, it stays.
//!
//! Letting a tensor go calls no CUDA, and letting a buffer go that is lent, or was, waits for nothing. A tensor may go
//! anywhere: in a host function, where CUDA may not be called; under a lock that queued work waits for, such as Python's;
//! during somebody's capture, which waiting for a device ends ("CUDA C++ Programming Guide, Prohibited and Unhandled
//! Operations"); in a forked child; after the runtime's end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::buffer::storage::StorageHandle;
use crate::cuda::device;
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result, Side};

/// What a storage and the tensors of its sides share.
pub(crate) struct Exports {
    device: Device,
    host: SideLoans,
    gpu: SideLoans,
    /// The storage, once its buffer is gone.
    left_behind: OnceLock<StorageHandle>,
}

#[derive(Default)]
struct SideLoans {
    /// Tensors that live.
    living: AtomicUsize,
    /// It was lent, and nobody has waited for the devices since.
    unknown: AtomicBool,
}

impl SideLoans {
    /// `Acquire`: what consumers wrote is seen by whoever finds that none is left.
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

    /// Lends a side to a tensor. Only the holder of the buffer does, who has it exclusively: not while anybody
    /// [settles](Self::wait_for_consumers).
    pub(crate) fn lend(self: &Arc<Self>, side: Side) -> Loan {
        self.mark_unknown(side);
        self.loans(side).living.fetch_add(1, Ordering::Relaxed);
        Loan { exports: Arc::clone(self), side: Some(side) }
    }

    /// Work on this side may be queued that no record stands for. As for [`lend`](Self::lend).
    pub(crate) fn mark_unknown(&self, side: Side) {
        self.loans(side).unknown.store(self.device != Device::Cpu, Ordering::Relaxed);
    }

    /// Lends the memory and nothing else: the side is guarded by whoever asked for it.
    pub(crate) fn lend_unguarded(self: &Arc<Self>) -> Loan {
        Loan { exports: Arc::clone(self), side: None }
    }

    /// An error where a side is lent.
    fn refuse_lent(&self, sides: &[Side]) -> Result<()> {
        match sides.iter().find(|side| self.is_lent(**side)) {
            Some(side) => Err(Error::Exported { side: *side }),
            None => Ok(()),
        }
    }

    /// Sees to it that no consumer uses these sides any more.
    #[cold]
    pub(crate) fn wait_for_consumers(&self, sides: &[Side]) -> Result<()> {
        self.refuse_lent(sides)?;
        if sides.iter().any(|side| self.loans(*side).is_unknown()) {
            // Before the wait, which covers what was queued by then.
            let over = [&self.host, &self.gpu].map(|loans| !loans.is_lent());
            device::synchronize_all()?;
            for (loans, over) in [&self.host, &self.gpu].into_iter().zip(over) {
                if over {
                    loans.unknown.store(false, Ordering::Release);
                }
            }
        }
        Ok(())
    }

    /// Whether no consumer is known to use these sides, without waiting; an error where one is lent.
    #[cold]
    pub(crate) fn are_consumers_done(&self, sides: &[Side]) -> Result<bool> {
        self.refuse_lent(sides)?;
        Ok(!sides.iter().any(|side| self.loans(*side).is_unknown()))
    }

    /// Whether no consumer is known to use either side, lent or not.
    #[cold]
    pub(crate) fn is_idle(&self) -> bool {
        [&self.host, &self.gpu].iter().all(|loans| !loans.is_lent() && !loans.is_unknown())
    }

    /// The buffer goes, and leaves its storage to whoever goes last.
    #[cold]
    pub(crate) fn buffer_dropped(mut self: Arc<Self>, handle: StorageHandle) {
        let alone = Arc::get_mut(&mut self).is_some();
        if alone && self.is_idle() {
            return drop(handle);
        }
        // The streams that it was used on may be gone when it goes.
        handle.close_with_event();
        if handle.abandon_if_open() {
            return drop(handle);
        }
        if alone {
            return leave_behind(handle);
        }
        // Nobody else sets it: a storage parts once.
        let _ = self.left_behind.set(handle);
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        if let Some(handle) = self.left_behind.take() {
            leave_behind(handle);
        }
    }
}

/// A tensor's share in a storage.
pub(crate) struct Loan {
    exports: Arc<Exports>,
    /// The side that is guarded as long as the tensor lives.
    side: Option<Side>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(side) = self.side {
            // Before the share itself: who has it alone finds nothing lent.
            self.exports.loans(side).living.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Storages of CUDA devices that consumers may still be using, in the order in which they were left behind.
struct LeftBehind {
    /// How many were before the first of them.
    drained: usize,
    handles: VecDeque<StorageHandle>,
}

static LEFT_BEHIND: Mutex<LeftBehind> =
    Mutex::new(LeftBehind { drained: 0, handles: VecDeque::new() });

/// Whether there is any: most programs have none, ever, and take no lock to learn that.
static ANY: AtomicBool = AtomicBool::new(false);

fn with_left_behind<R>(change: impl FnOnce(&mut LeftBehind) -> R) -> R {
    let mut left_behind = LEFT_BEHIND.lock().unwrap_or_else(|poison| poison.into_inner());
    let result = change(&mut left_behind);
    ANY.store(!left_behind.handles.is_empty(), Ordering::Release);
    result
}

/// Leaves a storage to [`reclaim`], where CUDA has to do with it. In a forked child it goes as any other does: the lock
/// may never come free there.
fn leave_behind(handle: StorageHandle) {
    match handle.device() {
        Device::Cuda(_) if !fork::forked() => with_left_behind(|left_behind| {
            if let Some(of_pool) = handle.left_behind_count() {
                of_pool.fetch_add(1, Ordering::Relaxed);
            }
            left_behind.handles.push_back(handle);
        }),
        _ => drop(handle),
    }
}

/// Whether anything is left behind, by any buffer.
pub(crate) fn is_any_left_behind() -> bool {
    ANY.load(Ordering::Acquire)
}

/// Releases what tensors left behind, and gives buffers of pools back: see [`dlpack::reclaim`](crate::dlpack::reclaim).
///
/// Not to be called under a lock: it waits for the devices, and owners of foreign streams may go with what it releases.
pub(crate) fn reclaim() -> Result<()> {
    fork::refuse_child()?;
    if !is_any_left_behind() {
        return Ok(());
    }
    // What comes behind these the wait need not cover. They stay until it is over, for other threads that want them.
    let end = with_left_behind(|left_behind| {
        (!left_behind.handles.is_empty()).then(|| left_behind.drained + left_behind.handles.len())
    });
    let Some(end) = end else {
        return Ok(());
    };
    device::synchronize_all()?;
    let rest: Vec<_> = with_left_behind(|left_behind| {
        // Other threads may have been here.
        let covered = end.saturating_sub(left_behind.drained);
        left_behind.drained += covered;
        // Under the lock: who finds nothing left behind finds the slots in their pools.
        let give_back = |handle: StorageHandle| {
            let of_pool = handle.left_behind_count().cloned();
            let rest = handle.give_back();
            // After the slot is free. `Release`: a thread that finds none left behind finds the
            // slot.
            if let Some(of_pool) = of_pool {
                of_pool.fetch_sub(1, Ordering::Release);
            }
            rest
        };
        left_behind.handles.drain(..covered).map(give_back).collect()
    });
    drop(rest);
    Ok(())
}
