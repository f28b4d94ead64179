//! Statistics about slots.
//!
//! No claim and no release depends on them, so the loom models do not follow them. The size of a
//! growth depends on the number of growths, which changes under the growth lock.
//!
//! A *slow claim* is one that did not take the first slot that it found at home. [`slots`](super)
//! defines the words *home* and *lane*.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// A claim at home recounts all slots if its word's count of releases is a multiple of this.
const RELEASES_PER_RECOUNT: u64 = 1 << 14;
/// The most words that a slow claim reads for a recount, on average.
///
/// With this many words or fewer, each slow claim recounts all slots.
const WORDS_PER_SLOW_CLAIM: usize = 128;

/// The statistics of all lanes together.
pub(super) struct Stats {
    growths: AtomicUsize,
    high_water: AtomicUsize,
}

impl Stats {
    pub(super) fn new() -> Stats {
        Stats { growths: AtomicUsize::new(0), high_water: AtomicUsize::new(0) }
    }

    pub(super) fn count_growth(&self) {
        self.growths.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn growths(&self) -> usize {
        self.growths.load(Ordering::Relaxed)
    }

    /// Raises the high-water mark to `taken` slots, if it is lower.
    pub(super) fn raise_high_water(&self, taken: usize) {
        self.high_water.fetch_max(taken, Ordering::Relaxed);
    }

    pub(super) fn high_water(&self) -> usize {
        self.high_water.load(Ordering::Relaxed)
    }
}

/// The statistics of one lane.
pub(super) struct LaneStats {
    /// The number of slow claims.
    slow_claims: AtomicUsize,
    /// The number of claims that returned a slot that was not ready.
    busy_claims: AtomicUsize,
}

impl LaneStats {
    pub(super) fn new() -> LaneStats {
        LaneStats { slow_claims: AtomicUsize::new(0), busy_claims: AtomicUsize::new(0) }
    }

    /// Counts a slow claim. Returns `true` if this claim must recount all slots.
    ///
    /// `words` is the number of words of all segments.
    pub(super) fn count_slow_claim(&self, words: usize) -> bool {
        let earlier_claims = self.slow_claims.fetch_add(1, Ordering::Relaxed);
        earlier_claims.is_multiple_of(words.div_ceil(WORDS_PER_SLOW_CLAIM))
    }

    pub(super) fn count_busy_claim(&self) {
        self.busy_claims.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn busy_claims(&self) -> usize {
        self.busy_claims.load(Ordering::Relaxed)
    }
}

/// The number of free slots of a word at the last recount by a claim at home, or after the last
/// slow claim if that is later.
///
/// Assume that all claims since then were at this home, and left at least this many slots free.
/// Then no more slots are taken than at that time. A claim that leaves fewer recounts all slots.
pub(super) struct LowMark(AtomicU32);

impl LowMark {
    pub(super) fn new() -> LowMark {
        LowMark(AtomicU32::new(u32::MAX))
    }

    /// Returns `true` if a claim at home that left `free` slots free must recount all slots.
    ///
    /// `releases` is the word's count of releases.
    #[inline]
    pub(super) fn is_recount_due(&self, free: u32, releases: u64) -> bool {
        free < self.0.load(Ordering::Relaxed) || releases.is_multiple_of(RELEASES_PER_RECOUNT)
    }

    /// Sets the mark to the present number of free slots.
    pub(super) fn reset(&self, free: u32) {
        self.0.store(free, Ordering::Relaxed);
    }
}
