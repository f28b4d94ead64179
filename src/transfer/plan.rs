//! The plan of a group's copy: ranges to join, and the path for the ranges that remain.
//!
//! Ranges that touch or overlap, or have padding alone between them, are joined. So are ranges with few bytes between them, if
//! these bytes may be copied as well. The remaining ranges take single copies, or one kernel that
//! reads or writes mapped host memory. The measurements behind this are in docs/benchmarks.md,
//! "Groups".

use std::ops::Range;

/// The mean length of ranges, in bytes, from which the copy engines move them.
///
/// From there on the kernel is no faster (H100, docs/benchmarks.md, "Groups"). Copy engines leave
/// the multiprocessors to kernels.
const COPY_ENGINE_BYTES: usize = 96 << 10;

/// The most bytes between two ranges that are copied as well, to save a range.
///
/// Their transfer takes as long as one more copy costs the caller.
const CARRY: usize = 96 << 10;

/// A range of bytes that one copy moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    /// Offsets in the slab of either side.
    pub(crate) bytes: Range<usize>,
    /// The members that the bytes belong to.
    pub(crate) members: Range<usize>,
}

/// The mechanism that moves ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyPath {
    /// A copy for each range, by the copy engines.
    Copies,
    /// One kernel that reads or writes mapped host memory.
    Kernel,
}

/// Chooses the cheaper path for `ranges` ranges of `bytes` bytes in total.
///
/// `mapped` says that kernels reach the host side.
pub(crate) fn choose_path(ranges: usize, bytes: usize, mapped: bool) -> CopyPath {
    match mapped && ranges > 1 && bytes < ranges * COPY_ENGINE_BYTES {
        true => CopyPath::Kernel,
        false => CopyPath::Copies,
    }
}

/// Joins neighbours among ranges that are sorted by their offsets.
///
/// `between` returns the number of unrequested bytes that joining two ranges would copy. `None`
/// keeps them apart.
pub(crate) fn join(
    ranges: &mut Vec<CopyRange>,
    between: impl Fn(&CopyRange, &CopyRange) -> Option<usize>,
) {
    ranges.dedup_by(|next, range| {
        let joined = between(range, next).is_some_and(|carried| carried <= CARRY);
        if joined {
            // The next one may end within this one.
            range.bytes.end = range.bytes.end.max(next.bytes.end);
            range.members.end = next.members.end;
        }
        joined
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_or_long_ones_go_by_the_copy_engines_and_short_ones_by_a_kernel() {
        for (ranges, bytes, mapped, expected) in [
            (1, 4, true, CopyPath::Copies),
            (2, 8, true, CopyPath::Kernel),
            (2, 8, false, CopyPath::Copies),
            (16, 16 * 8192, true, CopyPath::Kernel),
            (16, 16 * COPY_ENGINE_BYTES - 1, true, CopyPath::Kernel),
            (16, 16 * COPY_ENGINE_BYTES, true, CopyPath::Copies),
            (0, 0, true, CopyPath::Copies),
        ] {
            assert_eq!(
                choose_path(ranges, bytes, mapped),
                expected,
                "{ranges} of {bytes}, {mapped}"
            );
        }
    }

    #[test]
    fn ranges_of_one_member_are_joined_where_they_touch_or_overlap() {
        let range = |bytes: Range<usize>| CopyRange { bytes, members: 0..1 };
        let mut ranges: Vec<_> =
            [0..10, 0..4, 4..8, 10..12, 11..20, 21..22, 21..22].map(range).to_vec();
        let gap = |one: &CopyRange, next: &CopyRange| {
            next.bytes.start.checked_sub(one.bytes.end).filter(|gap| *gap > 0)
        };
        join(&mut ranges, |one, next| match gap(one, next) {
            None => Some(0),
            Some(_) => None,
        });
        assert_eq!(ranges, [range(0..20), range(21..22)]);
    }

    #[test]
    fn neighbours_are_joined_where_what_lies_between_may_be_moved_and_is_short() {
        let range = |bytes: Range<usize>, members| CopyRange { bytes, members };
        let all =
            || vec![range(0..100, 0..1), range(256..300, 1..2), range(600_000..600_004, 4..5)];
        let gap = |one: &CopyRange, next: &CopyRange| next.bytes.start - one.bytes.end;

        let mut none = all();
        join(&mut none, |_, _| None);
        assert_eq!(none, all());

        let mut near = all();
        join(&mut near, |one, next| Some(gap(one, next)));
        assert_eq!(near, [range(0..300, 0..2), range(600_000..600_004, 4..5)]);

        let mut padding = all();
        join(&mut padding, |_, _| Some(0));
        assert_eq!(padding, [range(0..600_004, 0..5)]);
    }
}
