//! Statistics about slots.
//!
//! They do not change which slot a claim returns, so the loom models do not follow them. One
//! decision uses them: the pool computes the size of its next segment from the number of growths,
//! which changes only under the growth lock.
//!
//! A *quick* claim takes the first slot that it finds at home. Any other claim is *slow*. A
//! *recount* counts the taken slots of all words and raises the high-water mark. [`slots`](super)
//! defines the words *home* and *lane*.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// A quick claim recounts all slots if its word's count of releases is a multiple of this.
const RELEASES_PER_RECOUNT: u64 = 1 << 14;
/// Of each `words / WORDS_PER_SLOW_CLAIM` slow claims of a lane, rounded up, one recounts all
/// slots.
///
/// A recount reads all words. So a slow claim reads at most this many words on average.
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
    /// The number of slow claims that returned a slot.
    slow_claims: AtomicUsize,
    /// The number of claims whose slot was not ready when the pool handed it out.
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

/// A number of free slots of one word, set by each recount of a quick claim and at the end of each
/// slow claim whose home the word is.
///
/// As long as claims are quick claims of this word that leave at least this many slots free, no
/// more slots are taken in all than when the mark was set. A claim that leaves fewer recounts. The
/// mark begins above every number, so that the first claim recounts.
pub(super) struct LowMark(AtomicU32);

impl LowMark {
    pub(super) fn new() -> LowMark {
        LowMark(AtomicU32::new(u32::MAX))
    }

    /// Returns `true` if a quick claim that left `free` slots free must recount all slots.
    ///
    /// `releases` is the word's count of releases.
    #[inline]
    pub(super) fn is_recount_due(&self, free: u32, releases: u64) -> bool {
        free < self.0.load(Ordering::Relaxed) || releases.is_multiple_of(RELEASES_PER_RECOUNT)
    }

    /// Sets the mark to the present number of free slots.
    pub(super) fn set(&self, free: u32) {
        self.0.store(free, Ordering::Relaxed);
    }
}
