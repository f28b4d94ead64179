//! Counts of the things that are alive.

use std::sync::atomic::{AtomicI64, Ordering};

/// The kinds that are counted. Instantiated graphs count as graphs.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Device,
    Pinned,
    Stream,
    Event,
    Graph,
}

static LIVE: [AtomicI64; 5] = [const { AtomicI64::new(0) }; 5];

pub(crate) fn born(kind: Kind) {
    LIVE[kind as usize].fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn died(kind: Kind) {
    LIVE[kind as usize].fetch_sub(1, Ordering::SeqCst);
}

/// How many things of the kind with this number are alive.
pub(crate) fn count(kind: usize) -> Option<i64> {
    LIVE.get(kind).map(|live| live.load(Ordering::SeqCst))
}
