//! Whether this process is a forked child of one that used CUDA.
//!
//! CUDA does not survive `fork`, and registered memory is not inherited: values made before a fork
//! must neither be used nor freed in the child. A handler that runs in the child sets a flag, so
//! that a use costs one load and no system call.
//!
//! Measured with a driver of CUDA 13.0: after `cuInit` has succeeded, and be it for
//! `cudaGetDeviceCount` alone, it fails in the child (3). After it has failed it may crash the
//! child. So the child of a process in which CUDA never worked does not ask again: it inherits the
//! status. Asking the driver for its version initializes nothing.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use crate::error::{Error, Result};

static FORKED: AtomicBool = AtomicBool::new(false);
/// Whether the first question to CUDA has ever been answered with a device.
static WORKED: AtomicBool = AtomicBool::new(false);
/// How many threads are asking right now.
static ASKING: AtomicU32 = AtomicU32::new(0);
/// Why the first question last failed in this process, and in the one that it was forked from.
static FAILED: AtomicPtr<Failure> = AtomicPtr::new(ptr::null_mut());
static INHERITED: AtomicPtr<Failure> = AtomicPtr::new(ptr::null_mut());

/// Never freed, since a child may be reading it.
struct Failure {
    reason: String,
    /// The one before, which a leak detector finds by this.
    _before: *mut Failure,
}

/// Asks the first question to CUDA, whose answer decides about children forked from now on. An
/// error has its whole text when the question returns: a child makes no call for it.
pub(crate) fn ask<T>(question: impl FnOnce() -> Result<T>) -> Result<T> {
    refuse_heir()?;
    watch()?;
    // A child that is forked meanwhile cannot know how far the question came.
    ASKING.fetch_add(1, Ordering::SeqCst);
    let answer = question();
    match &answer {
        Ok(_) => WORKED.store(true, Ordering::SeqCst),
        Err(Error::Unavailable { reason }) => remember(reason),
        Err(error) => remember(&error.to_string()),
    }
    ASKING.fetch_sub(1, Ordering::SeqCst);
    answer
}

fn remember(reason: &str) {
    let before = FAILED.load(Ordering::SeqCst);
    // SAFETY: null, or a failure that was leaked below.
    if unsafe { before.as_ref() }.is_none_or(|known| known.reason != reason) {
        // The same reason is not leaked again.
        let failure = Failure { reason: reason.into(), _before: before };
        FAILED.store(Box::leak(Box::new(failure)), Ordering::SeqCst);
    }
}

/// Called before the first use of CUDA.
#[cfg(unix)]
fn watch() -> Result<()> {
    extern "C" fn in_child() {
        let failed = FAILED.load(Ordering::SeqCst);
        if WORKED.load(Ordering::SeqCst) || failed.is_null() && ASKING.load(Ordering::SeqCst) != 0 {
            FORKED.store(true, Ordering::Relaxed);
        } else {
            INHERITED.store(failed, Ordering::Relaxed);
        }
    }

    // Not a lock, which a child could find held. A handler that is registered twice does no harm.
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if WATCHED.load(Ordering::SeqCst) {
        return Ok(());
    }
    // SAFETY: the handler only loads and stores atomics, which is async-signal-safe, and it lives
    // as long as the program.
    match unsafe { libc::pthread_atfork(None, None, Some(in_child)) } {
        0 => WATCHED.store(true, Ordering::SeqCst),
        _ => {
            let reason = "pthread_atfork failed for want of memory".into();
            return Err(Error::Unavailable { reason });
        }
    }
    Ok(())
}

#[cfg(not(unix))]
fn watch() -> Result<()> {
    Ok(())
}

/// In the child of a process that had used CUDA before it forked.
#[inline]
pub(crate) fn forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

#[inline]
pub(crate) fn refuse_child() -> Result<()> {
    match forked() {
        false => Ok(()),
        true => Err(Error::Forked),
    }
}

/// [`refuse_child`], also in a child of a process in which CUDA never worked, whose reason it
/// returns. It takes no lock, and makes no call.
pub(crate) fn refuse_heir() -> Result<()> {
    refuse_child()?;
    // SAFETY: null, or a failure that `remember` leaked in the parent.
    match unsafe { INHERITED.load(Ordering::Relaxed).as_ref() } {
        None => Ok(()),
        Some(failure) => Err(Error::Unavailable { reason: failure.reason.clone() }),
    }
}
