//! The plan of a group's copy: ranges to join, and the path for the ranges that remain.
//!
//! Ranges are joined if they touch or overlap, or if padding alone is between them. So are ranges
//! with few bytes between them, if these bytes may be copied as well. The remaining ranges take
//! single copies, or kernels that read or write mapped host memory. The measurements behind this
//! are in docs/benchmarks.md, "Groups".

use std::ops::Range;

/// The mean length of ranges, in bytes, from which the copy engines move them.
///
/// From there on the kernel is no faster (H100, docs/benchmarks.md, "Groups"). Copy engines leave
/// the multiprocessors to kernels.
const COPY_ENGINE_BYTES: usize = 96 << 10;

/// The most bytes between two ranges that are copied as well, to save a range.
///
/// Their transfer takes as long as one more copy costs the caller. If a kernel moves the ranges, it
/// is also the most bytes between ranges of one member, in all.
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
/// keeps them apart. `by_kernel` says that a kernel would move many ranges.
pub(crate) fn join(
    ranges: &mut Vec<CopyRange>,
    by_kernel: bool,
    between: impl Fn(&CopyRange, &CopyRange) -> Option<usize>,
) {
    // A member may have any number of ranges. A kernel moves them at about the cost of one copy, so
    // the bytes between them are worth one copy in all. Without it each range costs a copy.
    let mut left = if by_kernel { CARRY } else { usize::MAX };
    ranges.dedup_by(|next, range| {
        let within_a_member = range.members.end - 1 == next.members.start;
        let most = if within_a_member { left.min(CARRY) } else { CARRY };
        let carried = between(range, next).filter(|carried| *carried <= most);
        if let Some(carried) = carried {
            if within_a_member {
                left -= carried;
            }
            // The next one may end within this one.
            range.bytes.end = range.bytes.end.max(next.bytes.end);
            range.members.end = next.members.end;
        }
        carried.is_some()
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
        join(&mut ranges, true, apart);
        assert_eq!(ranges, [range(0..20), range(21..22)]);
    }

    /// Rows of one member, in order, and the bytes between two ranges.
    fn rows(rows: impl IntoIterator<Item = usize>, row: usize) -> Vec<CopyRange> {
        let range = |at: usize| CopyRange { bytes: at * row..(at + 1) * row, members: 0..1 };
        rows.into_iter().map(range).collect()
    }

    fn gap(one: &CopyRange, next: &CopyRange) -> usize {
        next.bytes.start.saturating_sub(one.bytes.end)
    }

    fn apart(one: &CopyRange, next: &CopyRange) -> Option<usize> {
        Some(gap(one, next)).filter(|gap| *gap == 0)
    }

    #[test]
    fn a_thousand_scattered_rows_stay_as_they_are_and_each_of_them_twice_is_as_once() {
        let scattered = || (0..1000).map(|row| row * 3);
        let mut once = rows(scattered(), 16);
        join(&mut once, true, apart);
        assert_eq!(once, rows(scattered(), 16));
        let mut twice = rows(scattered().flat_map(|row| [row, row]), 16);
        join(&mut twice, true, apart);
        assert_eq!(twice, once);
        let mut all = rows(0..3000, 16);
        join(&mut all, true, apart);
        assert_eq!(all, [CopyRange { bytes: 0..48_000, members: 0..1 }]);
    }

    #[test]
    fn what_lies_between_ranges_of_one_member_is_worth_one_copy_in_all_if_a_kernel_moves_them() {
        // 1 KB each, with 3 KB between them.
        let scattered = || rows((0..1000).map(|row| row * 4), 1 << 10);
        let mut ranges = scattered();
        join(&mut ranges, true, |one, next| Some(gap(one, next)));
        let joined = CARRY / (3 << 10);
        assert_eq!(ranges[0].bytes, 0..(joined * 4 + 1) << 10);
        assert_eq!(ranges[1..], scattered()[joined + 1..]);
        // By copies, each range that is saved is worth that much.
        let mut ranges = scattered();
        join(&mut ranges, false, |one, next| Some(gap(one, next)));
        assert_eq!(ranges.len(), 1);
        // So is each member.
        let mut ranges = scattered();
        for (member, range) in ranges.iter_mut().enumerate() {
            range.members = member..member + 1;
        }
        join(&mut ranges, true, |one, next| Some(gap(one, next)));
        assert_eq!(ranges, [CopyRange { bytes: 0..3997 << 10, members: 0..1000 }]);
    }

    #[test]
    fn any_ranges_are_joined_to_those_that_cover_the_same_bytes() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for round in 0..500 {
            // Members of 100 bytes, with 20 bytes of padding behind each.
            let mut ranges: Vec<_> = (0..random(60))
                .map(|_| {
                    let (member, start) = (random(8), random(100));
                    let bytes =
                        member * 120 + start..member * 120 + start + 1 + random(100 - start);
                    CopyRange { bytes, members: member..member + 1 }
                })
                .collect();
            ranges.sort_unstable_by_key(|range| range.bytes.start);
            let padding = |at: usize| at % 120 >= 100;
            let mut covered = [false; 960];
            ranges.iter().for_each(|range| covered[range.bytes.clone()].fill(true));
            join(&mut ranges, round % 2 == 0, |one, next| {
                (one.bytes.end..next.bytes.start).all(padding).then_some(0)
            });
            let mut after = [false; 960];
            for range in &ranges {
                assert!(!after[range.bytes.clone()].contains(&true), "bytes are moved twice");
                after[range.bytes.clone()].fill(true);
                assert_eq!(range.members.start, range.bytes.start / 120);
                assert_eq!(range.members.end, range.bytes.end.div_ceil(120));
            }
            for at in (0..960).filter(|at| !padding(*at)) {
                assert_eq!(after[at], covered[at], "byte {at} of round {round}");
            }
            for neighbours in ranges.windows(2) {
                let mut between = neighbours[0].bytes.end..neighbours[1].bytes.start;
                assert!(!between.all(padding), "{neighbours:?} are not joined");
            }
        }
    }

    #[test]
    fn neighbours_are_joined_where_what_lies_between_may_be_moved_and_is_short() {
        let range = |bytes: Range<usize>, members| CopyRange { bytes, members };
        let all =
            || vec![range(0..100, 0..1), range(256..300, 1..2), range(600_000..600_004, 4..5)];

        let mut none = all();
        join(&mut none, true, |_, _| None);
        assert_eq!(none, all());

        let mut near = all();
        join(&mut near, true, |one, next| Some(gap(one, next)));
        assert_eq!(near, [range(0..300, 0..2), range(600_000..600_004, 4..5)]);

        let mut padding = all();
        join(&mut padding, true, |_, _| Some(0));
        assert_eq!(padding, [range(0..600_004, 0..5)]);
    }
}
