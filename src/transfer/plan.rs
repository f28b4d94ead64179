//! How ranges of one slab are best moved to the same places in the other: which go as one, and by what.
//!
//! Ranges with nothing but padding between them are one. So are ranges between which lie bytes that may be carried
//! along, if there are not too many. What is left goes by single copies, or by one kernel that reads or writes mapped
//! host memory.
//!
//! Measured on an H100 (PCIe 5), the caller's time and the time until done, in us, for 16 ranges of 8 KB: one kernel
//! 2.2 to 3.9 and 12; single copies 25 to 38 and 49; `cudaMemcpyBatchAsync` 17 and 49, which never wins and is not used;
//! one copy of all, where they are one range, 2.0 to 2.4 and 11. Two ranges: one kernel 2.0 to 3.2 and 8.5 to 10, two
//! copies 3.4 to 5.1 and 11 to 12. With 64 KB each, sixteen are done in 30 by the kernel and in 62 by copies; at about
//! 100 KB each they meet.

use std::ops::Range;

/// Ranges of so many bytes on average, and more, are moved by the copy engines, which leave the multiprocessors
/// alone: the kernel is no faster.
const COPY_ENGINE_BYTES: usize = 96 << 10;

/// So many bytes are carried along rather than make another range: what a copy costs the caller is what they take.
const CARRY: usize = 96 << 10;

/// Bytes that are moved as one, and the members that they touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) bytes: Range<usize>,
    pub(crate) members: Range<usize>,
}

/// What moves pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyPath {
    /// One after another, by the copy engines.
    Copies,
    /// By one kernel that looks at mapped host memory.
    Kernel,
}

/// What is cheapest for so many pieces of so many bytes together, where a kernel can look at the host side or not.
pub(crate) fn choose_path(ranges: usize, bytes: usize, mapped: bool) -> CopyPath {
    match mapped && ranges > 1 && bytes < ranges * COPY_ENGINE_BYTES {
        true => CopyPath::Kernel,
        false => CopyPath::Copies,
    }
}

/// Joins neighbours among pieces, each of one member, in the order of their places. `between` says how many bytes lie
/// between one piece and the next that would be moved without having been asked for: `None` where they may not be.
pub(crate) fn join(
    ranges: &mut Vec<CopyRange>,
    between: impl Fn(&CopyRange, &CopyRange) -> Option<usize>,
) {
    ranges.dedup_by(|next, range| {
        let joined = between(range, next).is_some_and(|carried| carried <= CARRY);
        if joined {
            range.bytes.end = next.bytes.end;
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
