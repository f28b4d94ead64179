//! Pseudo-random numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::settings;

/// A pseudo-random number from the seed in `CUDART_SIM_SEED`.
pub(crate) fn random() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    if STATE.load(Ordering::Relaxed) == 0 {
        let seed = settings::seed();
        // The first thread sets the seed.
        let _ = STATE.compare_exchange(0, seed, Ordering::Relaxed, Ordering::Relaxed);
    }
    // The algorithm is SplitMix64 by Steele, Lea and Flood.
    let mut z = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
