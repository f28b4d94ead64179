//! Detects a forked child of a process that used CUDA.
//!
//! CUDA does not survive `fork`, and a child does not inherit registered memory. The child must
//! neither use nor free values that were made before the fork. A handler that runs in the child
//! sets a flag. So a check costs one load and no system call.
//!
//! Seen with a driver of CUDA 13.0:
//!
//! - If `cuInit` succeeded in the parent, it fails in the child with status 3. A call of
//!   `cudaGetDeviceCount` in the parent is enough for that.
//! - If `cuInit` failed in the parent, it may crash the child.
//! - Asking the driver for its version initializes nothing.
//!
//! So the child of a process in which CUDA never worked does not ask again. It inherits the reason.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use crate::error::{Error, Result};

static FORKED: AtomicBool = AtomicBool::new(false);
/// Set once an [`ask`] has succeeded. It is never cleared.
static WORKED: AtomicBool = AtomicBool::new(false);
/// The number of threads inside [`ask`].
static ASKING: AtomicU32 = AtomicU32::new(0);
/// Why the last failed [`ask`] of this process failed. A child inherits its value.
static FAILED: AtomicPtr<Failure> = AtomicPtr::new(ptr::null_mut());
/// The parent's `FAILED` at the fork, in a child that is not [`forked`].
static INHERITED: AtomicPtr<Failure> = AtomicPtr::new(ptr::null_mut());

/// A reason that is never freed, because a child may be reading it.
struct Failure {
    reason: String,
    /// Keeps the failure before this one reachable for a leak detector.
    _before: *mut Failure,
}

/// Asks CUDA for its devices by `question`, and remembers the result for children.
///
/// The first use of CUDA in a process asks this before it makes any other call. In a child that
/// must not use CUDA, this returns the error of [`refuse_heir`] and does not ask. The results
/// decide how children behave that are forked later:
///
/// - If a question has succeeded, a child is [`forked`].
/// - If none has finished and one is running, a child is [`forked`].
/// - If all that finished have failed, a child inherits the last error.
///
/// An error of `question` must have its whole text, because a child makes no call to complete it.
pub(crate) fn ask<T>(question: impl FnOnce() -> Result<T>) -> Result<T> {
    refuse_heir()?;
    watch()?;
    // A child that is forked during the question cannot know how far it got.
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

/// Stores the reason of a failed question in `FAILED`.
fn remember(reason: &str) {
    let before = FAILED.load(Ordering::SeqCst);
    // SAFETY: `before` is null, or a failure that was leaked below.
    if unsafe { before.as_ref() }.is_none_or(|known| known.reason != reason) {
        // A failure is leaked only if its reason differs from the last one.
        let failure = Failure { reason: reason.into(), _before: before };
        FAILED.store(Box::leak(Box::new(failure)), Ordering::SeqCst);
    }
}

/// Registers the handler for children. Must run before the first use of CUDA.
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

    // A child could find a lock held, so this is a flag. Registering the handler twice does no
    // harm.
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if WATCHED.load(Ordering::SeqCst) {
        return Ok(());
    }
    // SAFETY: the handler only loads and stores atomics, which is async-signal-safe. It lives as
    // long as the program.
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

/// Returns `true` in a child of a process that had used CUDA, or was just asking for its devices.
#[inline]
pub(crate) fn forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// Returns [`Error::Forked`] if this process is [`forked`].
#[inline]
pub(crate) fn refuse_child() -> Result<()> {
    match forked() {
        false => Ok(()),
        true => Err(Error::Forked),
    }
}

/// Like [`refuse_child`], and also refuses a child that inherited a failure of CUDA.
///
/// The error has the parent's reason. This takes no lock and makes no call.
pub(crate) fn refuse_heir() -> Result<()> {
    refuse_child()?;
    // SAFETY: the pointer is null, or a failure that `remember` leaked in the parent.
    match unsafe { INHERITED.load(Ordering::Relaxed).as_ref() } {
        None => Ok(()),
        Some(failure) => Err(Error::Unavailable { reason: failure.reason.clone() }),
    }
}
