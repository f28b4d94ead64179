//! Halves that are lent to tensors of other libraries: when they may be touched again, and who lets the memory go.
//!
//! A consumer of a tensor touches its half as it likes, on any thread and any stream, and what it has queued may run
//! long after it let the tensor go. It names a stream once, when it gets the tensor; by the time that it lets go of it
//! that stream may be destroyed. So nothing less than waiting for every device covers a consumer's work:
//!
//! | tensors of a half | whatever touches that half |
//! |---|---|
//! | live | is refused |
//! | are all gone, and their work is *unknown*: that of a CUDA device's half | first waits for the devices, once |
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

use crate::device::{self, Device};
use crate::error::{Error, Result, Side};
use crate::fork;
use crate::storage::Home;

/// What a storage and the tensors of its halves share.
pub(crate) struct Exports {
    device: Device,
    host: Half,
    gpu: Half,
    /// The storage, once its buffer is gone.
    left: OnceLock<Home>,
}

#[derive(Default)]
struct Half {
    /// Tensors that live.
    living: AtomicUsize,
    /// It was lent, and nobody has waited for the devices since.
    unknown: AtomicBool,
}

impl Half {
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
        Exports { device, host: Half::default(), gpu: Half::default(), left: OnceLock::new() }
    }

    fn half(&self, side: Side) -> &Half {
        match side {
            Side::Host => &self.host,
            Side::Device => &self.gpu,
        }
    }

    pub(crate) fn is_lent(&self, side: Side) -> bool {
        self.half(side).is_lent()
    }

    /// Lends a half to a tensor. Only the holder of the buffer does, who has it exclusively: not while anybody
    /// [settles](Self::settle).
    pub(crate) fn lend(self: &Arc<Self>, side: Side) -> Loan {
        self.distrust(side);
        self.half(side).living.fetch_add(1, Ordering::Relaxed);
        Loan { exports: Arc::clone(self), side: Some(side) }
    }

    /// Work on this side may be queued that no record stands for. As for [`lend`](Self::lend).
    pub(crate) fn distrust(&self, side: Side) {
        self.half(side).unknown.store(self.device != Device::Cpu, Ordering::Relaxed);
    }

    /// Lends the memory and nothing else: the half is guarded by whoever asked for it.
    pub(crate) fn lend_unguarded(self: &Arc<Self>) -> Loan {
        Loan { exports: Arc::clone(self), side: None }
    }

    /// An error where a half is lent.
    fn refuse_lent(&self, sides: &[Side]) -> Result<()> {
        match sides.iter().find(|side| self.is_lent(**side)) {
            Some(side) => Err(Error::Exported { side: *side }),
            None => Ok(()),
        }
    }

    /// Sees to it that no consumer uses these halves any more.
    #[cold]
    pub(crate) fn settle(&self, sides: &[Side]) -> Result<()> {
        self.refuse_lent(sides)?;
        if sides.iter().any(|side| self.half(*side).is_unknown()) {
            // Before the wait, which covers what was queued by then.
            let over = [&self.host, &self.gpu].map(|half| !half.is_lent());
            device::synchronize_all()?;
            for (half, over) in [&self.host, &self.gpu].into_iter().zip(over) {
                if over {
                    half.unknown.store(false, Ordering::Release);
                }
            }
        }
        Ok(())
    }

    /// Whether no consumer is known to use these halves, without waiting; an error where one is lent.
    #[cold]
    pub(crate) fn is_settled(&self, sides: &[Side]) -> Result<bool> {
        self.refuse_lent(sides)?;
        Ok(!sides.iter().any(|side| self.half(*side).is_unknown()))
    }

    /// Whether no consumer is known to use either half, lent or not.
    #[cold]
    pub(crate) fn is_idle(&self) -> bool {
        [&self.host, &self.gpu].iter().all(|half| !half.is_lent() && !half.is_unknown())
    }

    /// The buffer goes, and leaves its storage to whoever goes last.
    #[cold]
    pub(crate) fn part(mut self: Arc<Self>, home: Home) {
        let alone = Arc::get_mut(&mut self).is_some();
        if alone && self.is_idle() {
            return drop(home);
        }
        // The streams that it was used on may be gone when it goes.
        home.close();
        if home.abandon_where_open() {
            return drop(home);
        }
        if alone {
            return leave_behind(home);
        }
        // Nobody else sets it: a storage parts once.
        let _ = self.left.set(home);
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        if let Some(home) = self.left.take() {
            leave_behind(home);
        }
    }
}

/// A tensor's share in a storage.
pub(crate) struct Loan {
    exports: Arc<Exports>,
    /// The half that is guarded as long as the tensor lives.
    side: Option<Side>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(side) = self.side {
            // Before the share itself: who has it alone finds nothing lent.
            self.exports.half(side).living.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Storages of CUDA devices that consumers may still be using, in the order in which they were left behind.
struct Left {
    /// How many were before the first of them.
    gone: usize,
    homes: VecDeque<Home>,
}

static LEFT: Mutex<Left> = Mutex::new(Left { gone: 0, homes: VecDeque::new() });

/// Whether there is any: most programs have none, ever, and take no lock to learn that.
static ANY: AtomicBool = AtomicBool::new(false);

fn left<R>(change: impl FnOnce(&mut Left) -> R) -> R {
    let mut left = LEFT.lock().unwrap_or_else(|poison| poison.into_inner());
    let result = change(&mut left);
    ANY.store(!left.homes.is_empty(), Ordering::Release);
    result
}

/// Leaves a storage to [`reclaim`], where CUDA has to do with it. In a forked child it goes as any other does: the lock
/// may never come free there.
fn leave_behind(home: Home) {
    match home.device() {
        Device::Cuda(_) if !fork::forked() => left(|left| {
            if let Some(of_pool) = home.left_behind() {
                of_pool.fetch_add(1, Ordering::Relaxed);
            }
            left.homes.push_back(home);
        }),
        _ => drop(home),
    }
}

/// Whether anything is left behind, by any buffer.
pub(crate) fn is_any_left() -> bool {
    ANY.load(Ordering::Acquire)
}

/// Releases what tensors left behind, and gives buffers of pools back: see [`dlpack::reclaim`](crate::dlpack::reclaim).
///
/// Not to be called under a lock: it waits for the devices, and owners of foreign streams may go with what it releases.
pub(crate) fn reclaim() -> Result<()> {
    fork::refuse_child()?;
    if !is_any_left() {
        return Ok(());
    }
    // What comes behind these the wait need not cover. They stay until it is over, for other threads that want them.
    let end = left(|left| (!left.homes.is_empty()).then(|| left.gone + left.homes.len()));
    let Some(end) = end else {
        return Ok(());
    };
    device::synchronize_all()?;
    let rest: Vec<_> = left(|left| {
        // Other threads may have been here.
        let covered = end.saturating_sub(left.gone);
        left.gone += covered;
        // Under the lock: who finds nothing left behind finds the slots in their pools.
        let give_back = |home: Home| {
            let of_pool = home.left_behind().cloned();
            let rest = home.give_back();
            // After the slot is free. `Release`: a thread that finds none left behind finds the
            // slot.
            if let Some(of_pool) = of_pool {
                of_pool.fetch_sub(1, Ordering::Release);
            }
            rest
        };
        left.homes.drain(..covered).map(give_back).collect()
    });
    drop(rest);
    Ok(())
}
