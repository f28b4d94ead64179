//! Slots that are appended together, their words, and the lease of one slot.

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
// For the turn, which is a hint. Correctness does not depend on it, so the models do not follow it.
use std::sync::atomic::AtomicU32;

use super::stats::LowMark;
use crate::sync::{Arc, AtomicU64, Ordering, load_for_stats};

/// The number of slots that a word has room for.
const WIDTH: usize = 32;
const CLOSED: u64 = 1 << WIDTH;
/// One release, in the count of releases. The count has the highest bits, so it wraps and changes
/// no others.
const RELEASE: u64 = CLOSED << 1;

/// A value with two cache lines to itself, because processors fetch lines in pairs.
#[repr(align(128))]
pub(super) struct Padded<T>(pub(super) T);

/// The state of up to 32 slots. See the [fields](super) of `bits`.
pub(super) struct Word {
    bits: AtomicU64,
    /// The bit at which the next claim starts its search.
    turn: AtomicU32,
    low_mark: LowMark,
}

impl Word {
    fn new(slots: usize) -> Word {
        Word {
            bits: AtomicU64::new((1 << slots) - 1),
            turn: AtomicU32::new(0),
            low_mark: LowMark::new(),
        }
    }

    /// The number of free slots, for statistics.
    pub(super) fn available(&self) -> u32 {
        free(load_for_stats(&self.bits)).count_ones()
    }

    /// Returns `true` if a claim at home that left the word as `bits` must recount all slots.
    #[inline]
    pub(super) fn is_recount_due(&self, bits: u64) -> bool {
        self.low_mark.is_recount_due(free(bits).count_ones(), bits / RELEASE)
    }

    /// Sets the low mark to the present number of free slots.
    pub(super) fn set_low_mark(&self) {
        self.low_mark.set(self.available());
    }

    /// The count of releases of this word, or `None` if a slot is free.
    pub(super) fn releases_if_empty(&self) -> Option<u64> {
        let bits = self.bits.load(Ordering::Acquire);
        (free(bits) == 0).then_some(bits / RELEASE)
    }

    /// Closes the word. Returns how many slots were free.
    ///
    /// `Acquire` makes the writes of the last holders visible to the thread that drops the slots.
    pub(super) fn close(&self) -> u32 {
        free(self.bits.swap(CLOSED, Ordering::AcqRel)).count_ones()
    }
}

/// The bits of the free slots.
fn free(bits: u64) -> u32 {
    bits as u32
}

/// Slots that are appended and dropped together.
///
/// Slot `i` has bit `i / words` of word `i % words`, for `words` words.
pub(crate) struct Segment<S> {
    words: Box<[Padded<Word>]>,
    /// The number of words is `1 << shift`.
    shift: u32,
    /// The values are padded because neighbours are in different words, which different threads
    /// use.
    slots: Box<[Padded<UnsafeCell<S>>]>,
}

// SAFETY: only the holder of a slot touches its value: a claim that looks at it, or its lease. The
// thread that drops the segment also touches the value. No slot is held then, because each held
// slot keeps a reference to the segment.
unsafe impl<S: Send + Sync> Send for Segment<S> {}
// SAFETY: as for `Send`.
unsafe impl<S: Send + Sync> Sync for Segment<S> {}

impl<S> Segment<S> {
    /// Makes a segment in which all slots are free.
    ///
    /// Returns `None` if there are no slots, or no memory for the segment.
    pub(super) fn new(slots: Vec<S>, lanes: usize) -> Option<Segment<S>> {
        let count = slots.len();
        let spread = 1 << count.min(lanes).checked_ilog2()?;
        let words = count.div_ceil(WIDTH).next_power_of_two().max(spread);
        let word = |at: usize| Padded(Word::new(count.saturating_sub(at).div_ceil(words)));
        let slots = slots.into_iter().map(|slot| Padded(UnsafeCell::new(slot)));
        Some(Segment {
            words: boxed((0..words).map(word))?,
            shift: words.ilog2(),
            slots: boxed(slots)?,
        })
    }

    /// The number of slots.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The number of words, a power of two.
    #[inline]
    pub(super) fn word_count(&self) -> usize {
        self.words.len()
    }

    #[inline]
    pub(super) fn word(&self, at: usize) -> &Word {
        &self.words[at].0
    }

    pub(super) fn words(&self) -> impl Iterator<Item = &Word> {
        self.words.iter().map(|word| &word.0)
    }

    /// The word of a slot, and the number of the slot's bit.
    #[inline]
    fn word_of(&self, slot: usize) -> (&Word, u32) {
        (&self.words[slot & (self.words.len() - 1)].0, (slot >> self.shift) as u32)
    }

    /// The bit of a slot in its word, as a mask.
    pub(super) fn mask(&self, slot: usize) -> u32 {
        1 << self.word_of(slot).1
    }

    /// Claims the next free slot of a word, from the word's turn on.
    ///
    /// Skips the slots in the mask `passed`. Returns the slot, and the word's bits after the claim.
    #[inline]
    pub(super) fn claim(&self, at: usize, passed: u32) -> Option<(usize, u64)> {
        let word = &self.words[at].0;
        let mut seen = word.bits.load(Ordering::Relaxed);
        while free(seen) & !passed != 0 {
            let turn = word.turn.load(Ordering::Relaxed);
            let ahead = (free(seen) & !passed).rotate_right(turn).trailing_zeros();
            let bit = (turn + ahead) % WIDTH as u32;
            let next = seen & !(1 << bit);
            match change(&word.bits, seen, next, Ordering::AcqRel) {
                Ok(()) => return Some((((bit as usize) << self.shift) + at, next)),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Claims this slot. Returns `false` if it is not free.
    pub(super) fn claim_slot(&self, slot: usize) -> bool {
        let (word, bit) = self.word_of(slot);
        let bit = 1 << bit;
        let mut seen = word.bits.load(Ordering::Relaxed);
        while seen & bit != 0 {
            match change(&word.bits, seen, seen & !bit, Ordering::AcqRel) {
                Ok(()) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Borrows the value of a claimed slot.
    ///
    /// # Safety
    ///
    /// - The caller has claimed the slot.
    /// - The caller does not release the slot while the reference lives.
    #[inline]
    pub(super) unsafe fn peek(&self, slot: usize) -> &S {
        // SAFETY: the caller is the only holder of the slot.
        unsafe { &*self.slots[slot].0.get() }
    }

    /// Releases a slot that was only looked at. The caller borrows the pool, so it is not closed.
    pub(super) fn release(&self, slot: usize) {
        let (word, bit) = self.word_of(slot);
        release(&word.bits, bit);
    }

    /// Moves the turn of the word to the bit after this slot, which was claimed and is kept.
    #[inline]
    fn pass_turn(&self, slot: usize) {
        let (word, bit) = self.word_of(slot);
        word.turn.store((bit + 1) % WIDTH as u32, Ordering::Relaxed);
    }
}

/// Collects `items`. Returns `None` if there is no memory for them.
fn boxed<T>(items: impl ExactSizeIterator<Item = T>) -> Option<Box<[T]>> {
    let mut all = Vec::new();
    all.try_reserve_exact(items.len()).ok()?;
    all.extend(items);
    Some(all.into_boxed_slice())
}

/// Changes a word from `seen` to `next`. If that fails, returns the word's present bits.
#[inline]
fn change(word: &AtomicU64, seen: u64, next: u64, order: Ordering) -> Result<(), u64> {
    word.compare_exchange_weak(seen, next, order, Ordering::Relaxed).map(drop)
}

/// The result of a release.
#[derive(Debug, PartialEq, Eq)]
enum Released {
    /// The slot is free.
    Free,
    /// The pool is closed. The slot is not free, and the caller drops the slot's reference.
    Closed,
    /// The slot was free already. The release changed nothing.
    Twice,
}

/// Releases a slot by its bit.
///
/// Once the bit is set, another thread may drop the segment. So this function borrows only the
/// word, and touches nothing after the change.
#[inline]
fn release(word: &AtomicU64, bit: u32) -> Released {
    let bit = 1 << bit;
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        if seen & CLOSED != 0 {
            return Released::Closed;
        }
        if seen & bit != 0 {
            return Released::Twice;
        }
        let next = seen.wrapping_add(RELEASE) | bit;
        match change(word, seen, next, Ordering::Release) {
            Ok(()) => return Released::Free,
            Err(now) => seen = now,
        }
    }
}

/// The exclusive right to one slot. Dropping the lease releases the slot.
pub(crate) struct Lease<S> {
    /// The slot's reference.
    segment: ManuallyDrop<Arc<Segment<S>>>,
    slot: u32,
}

impl<S> Deref for Lease<S> {
    type Target = S;

    #[inline]
    fn deref(&self) -> &S {
        // SAFETY: this lease is the only one of its slot.
        unsafe { &*self.segment.slots[self.slot as usize].0.get() }
    }
}

impl<S> DerefMut for Lease<S> {
    #[inline]
    fn deref_mut(&mut self) -> &mut S {
        // SAFETY: this lease is the only one of its slot, and is borrowed exclusively.
        unsafe { &mut *self.segment.slots[self.slot as usize].0.get() }
    }
}

impl<S> Lease<S> {
    /// Makes the lease of a slot that is kept. The next claim in its word starts after the slot.
    ///
    /// # Safety
    ///
    /// - The caller has just claimed `slot` of `segment`.
    /// - `segment` is the reference that the slot owned while it was free.
    #[inline]
    pub(super) unsafe fn new(segment: Arc<Segment<S>>, slot: usize) -> Lease<S> {
        segment.pass_turn(slot);
        Lease { segment: ManuallyDrop::new(segment), slot: slot as u32 }
    }

    /// Releases the slot. If the pool is closed, returns the slot's reference to the segment.
    ///
    /// The caller drops that reference.
    ///
    /// # Safety
    ///
    /// - The caller does not use the lease after this.
    /// - The caller does not drop the lease.
    #[inline]
    pub(crate) unsafe fn release(&mut self) -> Option<Arc<Segment<S>>> {
        let (word, bit) = self.segment.word_of(self.slot as usize);
        match release(&word.bits, bit) {
            // The slot owns the reference again.
            Released::Free => None,
            // SAFETY: this happens once, as the caller does not use the lease again.
            Released::Closed => Some(unsafe { ManuallyDrop::take(&mut self.segment) }),
            Released::Twice => {
                debug_assert!(false, "a slot was released twice");
                None
            }
        }
    }
}

impl<S> Drop for Lease<S> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the lease is being dropped, and is not used after this.
        drop(unsafe { self.release() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::run;

    fn segment(count: usize, lanes: usize) -> Segment<u8> {
        Segment::new(vec![0; count], lanes).unwrap()
    }

    fn claimed<S>(segment: &Segment<S>) -> Vec<usize> {
        let words = 0..segment.words.len();
        let mut claimed: Vec<usize> = words
            .flat_map(|at| std::iter::from_fn(move || segment.claim(at, 0)))
            .map(|(slot, _)| slot)
            .collect();
        claimed.sort_unstable();
        claimed
    }

    #[test]
    fn the_words_of_a_segment_hold_its_slots_and_no_others() {
        for lanes in [1, 2, 16, 64] {
            for count in (1..=130).chain([512, 513, 1000, 4096, 5000]) {
                run(move || {
                    let segment = segment(count, lanes);
                    assert!(segment.words.len().is_power_of_two());
                    assert_eq!(claimed(&segment), (0..count).collect::<Vec<_>>(), "{lanes}");
                    assert!((0..count).all(|slot| !segment.claim_slot(slot)));
                });
            }
        }
    }

    #[test]
    fn a_second_release_of_a_slot_is_found_out_and_changes_nothing() {
        run(|| {
            let segment = segment(3, 1);
            let (slot, _) = segment.claim(0, 0).unwrap();
            let (word, bit) = segment.word_of(slot);
            assert_eq!(release(&word.bits, bit), Released::Free);
            let before = word.bits.load(Ordering::Relaxed);
            assert_eq!(release(&word.bits, bit), Released::Twice);
            assert_eq!(word.bits.load(Ordering::Relaxed), before);
            assert_eq!(claimed(&segment), [0, 1, 2]);
        });
    }

    #[test]
    fn the_count_of_releases_runs_over_into_nothing() {
        run(|| {
            let word = AtomicU64::new(!(RELEASE - 1) | 0b110);
            assert_eq!(release(&word, 0), Released::Free);
            assert_eq!(word.load(Ordering::Relaxed), 0b111);
        });
    }
}
