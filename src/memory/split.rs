//! Ranges that are cut: at multiples of a size, or at given bounds.

use std::ops::Range;

/// The size of a hugepage on x86-64, and on aarch64 with pages of 4 KB.
pub(crate) const HUGEPAGE: usize = 2 << 20;

/// Cuts a range at the multiples of `size`.
#[inline]
pub(crate) fn split_by(range: Range<usize>, size: usize) -> SplitBy {
    SplitBy { rest: range, size }
}

/// The parts of a range, in order. None is empty.
pub(crate) struct SplitBy {
    rest: Range<usize>,
    size: usize,
}

impl Iterator for SplitBy {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        let Range { start, end } = self.rest;
        if start >= end {
            return None;
        }
        // Copies take this path, without a division, if one registration covers all.
        let stop = match end <= self.size {
            true => end,
            false => end.min((start / self.size + 1).saturating_mul(self.size)),
        };
        self.rest.start = stop;
        Some(start..stop)
    }
}

/// Cuts a range at the bounds that lie within it. The bounds are sorted.
#[inline]
pub(crate) fn split_at(range: Range<usize>, bounds: &[usize]) -> SplitAt<'_> {
    // Copies take this path, without a search, if one registration covers all.
    let passed = match bounds {
        [] => 0,
        bounds => bounds.partition_point(|bound| *bound <= range.start),
    };
    SplitAt { rest: range, bounds: &bounds[passed..] }
}

/// The parts of a range between bounds, in order. None is empty.
pub(crate) struct SplitAt<'b> {
    rest: Range<usize>,
    /// The bounds beyond the beginning of the rest.
    bounds: &'b [usize],
}

impl Iterator for SplitAt<'_> {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        let Range { start, end } = self.rest;
        if start >= end {
            return None;
        }
        let stop = match self.bounds {
            [bound, later @ ..] if *bound < end => {
                self.bounds = later;
                *bound
            }
            _ => end,
        };
        self.rest.start = stop;
        Some(start..stop)
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    const MAX: usize = usize::MAX;

    #[test]
    fn a_range_is_cut_at_multiples_of_the_size_and_nowhere_else() {
        for (range, expected) in [
            (0..1, &[0, 1][..]),
            (0..10, &[0, 10]),
            (9..10, &[9, 10]),
            (10..20, &[10, 20]),
            (9..11, &[9, 10, 10, 11]),
            (0..30, &[0, 10, 10, 20, 20, 30]),
            (7..33, &[7, 10, 10, 20, 20, 30, 30, 33]),
            (5..5, &[]),
            (MAX - 7..MAX, &[MAX - 7, MAX - 5, MAX - 5, MAX]),
        ] {
            let bounds = split_by(range, 10).flat_map(|range| [range.start, range.end]);
            assert_eq!(bounds.collect::<Vec<_>>(), expected);
        }
        assert!(split_by(3..MAX, MAX).eq(iter::once(3..MAX)));
    }

    #[test]
    fn a_range_is_cut_at_the_bounds_within_it_and_nowhere_else() {
        for (range, bounds, expected) in [
            (0..10, &[][..], &[0, 10][..]),
            (3..MAX, &[], &[3, MAX]),
            (0..10, &[10], &[0, 10]),
            (10..20, &[10], &[10, 20]),
            (9..11, &[10], &[9, 10, 10, 11]),
            (0..30, &[5, 6, 20, 40], &[0, 5, 5, 6, 6, 20, 20, 30]),
            (6..20, &[5, 6, 20, 40], &[6, 20]),
            (50..60, &[5, 6, 20, 40], &[50, 60]),
            (7..7, &[5, 7, 9], &[]),
        ] {
            let found = split_at(range, bounds).flat_map(|range| [range.start, range.end]);
            assert_eq!(found.collect::<Vec<_>>(), expected);
        }
    }
}
