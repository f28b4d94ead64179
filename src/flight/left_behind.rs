//! Storage that is left behind: its buffer and tensors are gone, and consumers may still use it.
//!
//! `reclaim` waits for every device and then gives the storage back. If the wait fails, the
//! storage stays in the list.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
#[cfg(feature = "dlpack")]
use std::{
    any::Any,
    collections::VecDeque,
    sync::Mutex,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::device::Device;
#[cfg(feature = "dlpack")]
use crate::{
    cuda::{devices, fork},
    error::Result,
};

/// The number of a pool's buffers that are left behind.
pub(crate) type LeftBehindCount = Arc<AtomicUsize>;

/// Takes back what is left behind, before `bytes` are allocated on `device`. The caller holds no
/// lock, because this waits for the devices. If it fails, the next allocation tries again.
pub(crate) fn reclaim_before_allocating(bytes: usize, device: Device) {
    #[cfg(feature = "dlpack")]
    if bytes > 0 && device != Device::Cpu {
        let _ = reclaim();
    }
    let _ = (bytes, device);
}

/// The storage of a buffer that tensors may outlive.
#[cfg(feature = "dlpack")]
pub(crate) trait ExportedStorage: Send + Sync {
    fn device(&self) -> Device;

    /// Ends open use by recording events. Returns `false` if that failed for memory that no pool
    /// owns. The memory is leaked then.
    fn close_or_leak(&self) -> bool;

    /// The count of the pool that owns the storage.
    fn left_behind_count(&self) -> Option<&LeftBehindCount>;

    /// Gives a pool's storage back, and calls no CUDA. The caller drops the returned value later,
    /// without a lock. The devices were waited for.
    fn give_back(self: Box<Self>) -> Box<dyn Any + Send>;
}

/// The storage of CUDA devices that is left behind, the oldest first.
#[cfg(feature = "dlpack")]
struct LeftBehind {
    /// How many left the list, ever.
    drained: usize,
    storages: VecDeque<Box<dyn ExportedStorage>>,
}

#[cfg(feature = "dlpack")]
static LEFT_BEHIND: Mutex<LeftBehind> =
    Mutex::new(LeftBehind { drained: 0, storages: VecDeque::new() });

/// True if the list has entries. Most programs never have one, and take no lock to learn that.
#[cfg(feature = "dlpack")]
static ANY: AtomicBool = AtomicBool::new(false);

#[cfg(feature = "dlpack")]
fn with_left_behind<R>(change: impl FnOnce(&mut LeftBehind) -> R) -> R {
    let mut left_behind = LEFT_BEHIND.lock().unwrap_or_else(|poison| poison.into_inner());
    let result = change(&mut left_behind);
    ANY.store(!left_behind.storages.is_empty(), Ordering::Release);
    result
}

/// Leaves storage to [`reclaim`]. On the CPU and in a forked child it is dropped at once: a thread
/// of the parent may have held the lock when it forked.
#[cfg(feature = "dlpack")]
pub(crate) fn leave_behind(storage: Box<dyn ExportedStorage>) {
    match storage.device() {
        Device::Cuda(_) if !fork::forked() => with_left_behind(|left_behind| {
            if let Some(of_pool) = storage.left_behind_count() {
                of_pool.fetch_add(1, Ordering::Relaxed);
            }
            left_behind.storages.push_back(storage);
        }),
        _ => drop(storage),
    }
}

/// Returns `true` if anything is left behind, by any buffer.
#[cfg(feature = "dlpack")]
pub(crate) fn is_any_left_behind() -> bool {
    ANY.load(Ordering::Acquire)
}

/// Waits for the devices, releases what is left behind, and gives pools their buffers back. See
/// [`dlpack::reclaim`](crate::dlpack::reclaim).
///
/// The caller holds no lock: this waits for the devices, and owners of borrowed streams may be
/// dropped.
#[cfg(feature = "dlpack")]
pub(crate) fn reclaim() -> Result<()> {
    fork::refuse_child()?;
    if !is_any_left_behind() {
        return Ok(());
    }
    // The wait covers the entries up to here. They stay in the list until it is over, so that other
    // threads see them and wait, too.
    let end = with_left_behind(|left_behind| {
        let count = left_behind.storages.len();
        (count > 0).then(|| left_behind.drained + count)
    });
    let Some(end) = end else {
        return Ok(());
    };
    devices::synchronize_all()?;
    let rest: Vec<_> = with_left_behind(|left_behind| {
        // Another thread may have drained some of them.
        let covered = end.saturating_sub(left_behind.drained);
        left_behind.drained += covered;
        // Under the lock: a thread that finds the list empty finds the slots in their pools.
        left_behind.storages.drain(..covered).map(give_back).collect()
    });
    drop(rest);
    Ok(())
}

#[cfg(feature = "dlpack")]
fn give_back(storage: Box<dyn ExportedStorage>) -> Box<dyn Any + Send> {
    let of_pool = storage.left_behind_count().cloned();
    let rest = storage.give_back();
    // After the slot is free. `Release`: a thread that reads the new count finds the slot.
    if let Some(of_pool) = of_pool {
        of_pool.fetch_sub(1, Ordering::Release);
    }
    rest
}
