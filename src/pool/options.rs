//! Options of a pool, and how it grows.

use std::num::NonZeroUsize;

use crate::memory::options::{BufferOptions, HostFlags, Pinning};

/// Options of a [`BufferPool`](crate::BufferPool).
///
/// ```
/// use cpu_gpu_buffer::{BufferPool, Device, Error, PoolOptions};
///
/// let options = PoolOptions { max_buffers: Some(2), ..Default::default() };
/// let pool = BufferPool::<u8>::with_options(100, Device::auto(), 1, options)?;
/// let (first, second) = (pool.acquire()?, pool.acquire()?);
/// assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 2 }));
/// # drop((first, second));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct PoolOptions {
    /// The maximum number of buffers. Default: `None`, no limit.
    ///
    /// `acquire` does not wait for a buffer to come back. The guide shows how to wait ("Pools").
    pub max_buffers: Option<usize>,
    /// The number of buffers that the pool adds when all are acquired. Default:
    /// [`PoolGrowth::Double`].
    pub growth: PoolGrowth,
    /// The pinning of the host sides. Default: [`Pinning::Preferred`].
    pub pinning: Pinning,
    /// The flags of pinned host sides. Default: `PORTABLE` and `MAPPED`. `READ_ONLY` is refused.
    pub host_flags: HostFlags,
    /// If `true`, both sides of a buffer read as zeroes each time that it is acquired. Default:
    /// `false`.
    ///
    /// Without it, a buffer has the contents that its last holder left. With it, a side is zeroed
    /// when it is first used. The first use of the host side waits for the transfers that the last
    /// holder left queued, even if that use is a copy.
    pub zeroed: bool,
}

impl Default for PoolOptions {
    fn default() -> PoolOptions {
        let BufferOptions { pinning, host_flags } = BufferOptions::default();
        PoolOptions {
            max_buffers: None,
            growth: PoolGrowth::Double,
            pinning,
            host_flags,
            zeroed: false,
        }
    }
}

/// The number of buffers that a pool adds when all are acquired.
///
/// The pool adds fewer if there is no memory for them, and never exceeds
/// [`max_buffers`](PoolOptions::max_buffers). A pool that has grown 128 times adds at least an
/// eighth of its buffers.
///
/// ```
/// use std::num::NonZeroUsize;
///
/// use cpu_gpu_buffer::{BufferPool, Device, PoolGrowth, PoolOptions};
///
/// for (growth, total) in [(PoolGrowth::Double, 8), (PoolGrowth::By(NonZeroUsize::MIN), 5)] {
///     let options = PoolOptions { growth, ..Default::default() };
///     let pool = BufferPool::<u8>::with_options(100, Device::auto(), 4, options)?;
///     let held = (0..5).map(|_| pool.acquire()).collect::<Vec<_>>();
///     assert_eq!(pool.total(), total);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum PoolGrowth {
    /// Doubles the pool. Adds at most 16 MiB to each side, or an eighth of the pool if that is
    /// more, and at least one buffer.
    #[default]
    Double,
    /// Adds this many buffers.
    By(NonZeroUsize),
}

impl PoolGrowth {
    /// The most bytes that doubling adds to a side, unless an eighth of the pool is more.
    const BOUND: usize = 16 << 20;

    /// The number of steps that may add less than an eighth. A pool has room for 255 steps.
    const SMALL_STEPS: usize = 128;

    /// The number of buffers to add to `total` buffers of `bytes` bytes each, after `steps` steps.
    pub(super) fn step(self, total: usize, bytes: usize, steps: usize) -> usize {
        // Steps of an eighth reach any number of buffers before the room for steps ends.
        let least = total / 8;
        match self {
            PoolGrowth::Double => {
                let bound = Self::BOUND.checked_div(bytes).unwrap_or(usize::MAX);
                total.min(bound.max(least)).max(1)
            }
            PoolGrowth::By(count) if steps < Self::SMALL_STEPS => count.get(),
            PoolGrowth::By(count) => count.get().max(least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubling_is_bounded_by_16_mib_or_an_eighth_of_the_pool() {
        const MB: usize = 1 << 20;
        for (total, bytes, expected) in [
            (0, 100, 1),
            (1, 100, 1),
            (64, 100, 64),
            (1 << 20, 0, 1 << 20),
            (4, 4 * MB, 4),
            (33, 11 * MB / 10, 14),
            (8, 4 * MB, 4),
            (3, 100 * MB, 1),
            (80, 100 * MB, 10),
        ] {
            assert_eq!(PoolGrowth::Double.step(total, bytes, 0), expected, "{total} of {bytes}");
        }
        let by = PoolGrowth::By(NonZeroUsize::new(3).unwrap());
        assert_eq!([by.step(0, 1, 0), by.step(100, 100 * MB, 127)], [3, 3]);
    }

    #[test]
    fn a_pool_reaches_any_number_of_buffers_within_255_steps() {
        for growth in [PoolGrowth::Double, PoolGrowth::By(NonZeroUsize::MIN)] {
            let total = (0..255).fold(1, |total, steps| total + growth.step(total, 1 << 30, steps));
            assert!(total > 1 << 20, "{growth:?}: {total}");
        }
    }
}
