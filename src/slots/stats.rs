//! Figures about slots. Nothing rests on them, so the loom models do not follow them.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Releases of a word between two claims at home that count all slots.
const RECOUNT: u64 = 1 << 14;
/// Up to this number of words, each claim away from home counts all slots. With more words, fewer
/// claims do.
const QUICKLY_COUNTED: usize = 128;

/// The figures of all threads together.
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

    /// Notes that `taken` slots were taken at once.
    pub(super) fn raise_high_water(&self, taken: usize) {
        self.high_water.fetch_max(taken, Ordering::Relaxed);
    }

    pub(super) fn high_water(&self) -> usize {
        self.high_water.load(Ordering::Relaxed)
    }
}

/// The figures of one lane.
pub(super) struct LaneStats {
    /// Claims away from home.
    elsewhere: AtomicUsize,
    /// Claims that returned a slot that was not ready.
    not_ready: AtomicUsize,
}

impl LaneStats {
    pub(super) fn new() -> LaneStats {
        LaneStats { elsewhere: AtomicUsize::new(0), not_ready: AtomicUsize::new(0) }
    }

    /// Counts a claim away from home. Returns whether it is this claim's turn to count all slots,
    /// which lie in `words` words.
    pub(super) fn count_elsewhere(&self, words: usize) -> bool {
        let elsewhere = self.elsewhere.fetch_add(1, Ordering::Relaxed);
        elsewhere.is_multiple_of(words.div_ceil(QUICKLY_COUNTED))
    }

    pub(super) fn count_not_ready(&self) {
        self.not_ready.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn not_ready(&self) -> usize {
        self.not_ready.load(Ordering::Relaxed)
    }
}

/// The fewest free slots that claims at home left in a word, since the last claim away from it.
///
/// As long as a claim leaves no fewer, no more slots are taken at once than before.
pub(super) struct LowMark(AtomicU32);

impl LowMark {
    pub(super) fn new() -> LowMark {
        LowMark(AtomicU32::new(u32::MAX))
    }

    /// Whether the claim that left `free` slots has to count all slots. `releases` is the word's
    /// count of releases.
    #[inline]
    pub(super) fn is_count_due(&self, free: u32, releases: u64) -> bool {
        free < self.0.load(Ordering::Relaxed) || releases.is_multiple_of(RECOUNT)
    }

    pub(super) fn set(&self, free: u32) {
        self.0.store(free, Ordering::Relaxed);
    }
}
