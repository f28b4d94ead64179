//! The primitives under [`ticket`](crate::stream::ticket) and [`slots`](crate::slots), in one place
//! so that their models (`tests/models`) can put loom's in their stead.

use std::cell::Cell;
use std::sync::atomic;

pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
pub(crate) use std::sync::{Arc, Mutex, MutexGuard};

/// A look at a word that decides nothing, for figures: the models do not follow it.
#[inline]
pub(crate) fn load_for_stats(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

/// A number of this thread's own, counted from 0 in the order in which threads first ask.
#[inline]
pub(crate) fn thread_number() -> usize {
    static NEXT: atomic::AtomicUsize = atomic::AtomicUsize::new(0);
    thread_local! {
        // Without a destructor, so that it can be asked in other thread-locals' destructors.
        static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    NUMBER.with(|number| match number.get() {
        usize::MAX => {
            let new = NEXT.fetch_add(1, Ordering::Relaxed);
            number.set(new);
            new
        }
        known => known,
    })
}

/// Runs a unit test, which the models run under loom.
#[cfg(test)]
pub(crate) fn run(test: impl Fn() + Send + Sync + 'static) {
    test();
}
