//! Whether this process is a forked child of one that used CUDA.
//!
//! CUDA does not survive `fork`, and registered memory is not inherited: what was made before must
//! neither be used nor freed in the child. A handler that runs in the child sets a flag, so that a use
//! costs one load and no system call.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

static FORKED: AtomicBool = AtomicBool::new(false);

/// Called before the first use of CUDA.
#[cfg(unix)]
pub(crate) fn watch() -> Result<()> {
    use std::sync::OnceLock;

    extern "C" fn in_child() {
        FORKED.store(true, Ordering::Relaxed);
    }

    static WATCHED: OnceLock<i32> = OnceLock::new();
    let status = WATCHED.get_or_init(|| {
        // SAFETY: the handler does nothing but store to an atomic, which is async-signal-safe, and it
        // lives as long as the program.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) }
    });
    match status {
        0 => Ok(()),
        _ => Err(Error::Unavailable { reason: "pthread_atfork failed for want of memory".into() }),
    }
}

#[cfg(not(unix))]
pub(crate) fn watch() -> Result<()> {
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
