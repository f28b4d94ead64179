//! Slots that threads take and give back without locks: the core of the pool, which knows nothing of what
//! a slot holds.
//!
//! The algorithm is a bitmap allocator spread over cache lines. A set bit is a free slot. Words lie in
//! cache lines of their own with few slots each, and each thread begins at a word of its own, its *home*:
//! threads that take and give back one slot after another touch no line of each other's. A claim clears a
//! bit by compare-and-swap, a release sets it again; the word is the whole state, so there is no ABA and
//! nothing to reclaim. Segments of slots are only appended, to a fixed array of pointers, and so the place
//! of a slot never changes.
//!
//! A word has three fields, which change together:
//!
//! | bits | field |
//! |---|---|
//! | 0 to 31 | the free slots |
//! | 32 | the pool is gone |
//! | 33 to 63 | how often a slot of this word was released, modulo 2^31 |
//!
//! # The races
//!
//! | while one thread | another | and so |
//! |---|---|---|
//! | claims slot `s` | claims `s` | one compare-and-swap fails and looks again |
//! | claims `s` (`AcqRel`) | released `s` (`Release`) | it sees all that the last holder did: every change of a word is a read-modify-write, so the claim is in the release's sequence whatever other bits changed in between |
//! | reads what slot `s` holds | claims `s` | nobody reads a slot that he has not claimed |
//! | looks through the words | appends a segment | the pointer is stored (`Release`) when the segment is whole, and read with `Acquire` |
//! | finds no free slot | releases a slot that was looked at before, and claims one that comes after | the words are read again: their counts of releases tell, and the search goes on |
//! | finds no free slot and begins to grow | does so too | one lock: the second finds what the first appended |
//! | closes the pool | releases `s` | either the bit is set first, and the closing takes the slot; or the releasing finds the word closed, and takes it |
//!
//! # Lifetime
//!
//! Each slot owns a reference of its segment. A claim moves it into the [`Lease`], a release moves it back:
//! no count is touched. Closing drops the references of the slots that are free then, a lease that finds
//! its word closed its own. So a segment lives as long as the pool or one lease of it, and no longer.
//!
//! # What is promised
//!
//! - No two leases of a slot at a time, and none without its release, unless the lease is forgotten.
//! - `claim` and release are lock-free: a thread that is stopped anywhere holds up nobody, and where one has to
//!   begin again, another has got on. `claim_or_grow` locks, but is asked only where there was nothing to claim.
//! - `claim` answers "none" only if at some moment during the call no slot was free: each was leased, or being
//!   looked at by another claim, which looks at one at a time. So where there are as many slots as all threads
//!   together hold and want, nobody is told that there is none. That moment is past when it answers. (It would take
//!   a multiple of 2^31 releases of one word, between two readings of it, to be deceived.)
//! - Not promised: that a thread gets the slot that was released first, or ever gets one while others keep
//!   taking what comes free; that `available` and the figures are those of one moment while others work.

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr;
// Hints and figures, on which nothing rests: the models do not follow them.
use std::sync::atomic::{AtomicU32, AtomicUsize};

use crate::sync::{Arc, AtomicPtr, AtomicU64, Mutex, Ordering, load_for_stats, thread_number};

/// Slots of one word.
const WIDTH: usize = 32;
const CLOSED: u64 = 1 << WIDTH;
/// One release more. The count runs over into nothing.
const RELEASE: u64 = CLOSED << 1;
/// Doubling fills few of them, but segments may have to be smaller.
const SEGMENTS: usize = 256;
/// Slots that a claim looks at, at home and elsewhere, before it settles for one that is not ready.
const PROBES: usize = 4;
/// Releases of a word between two claims at home that count all slots.
const RECOUNT: u64 = 1 << 14;
/// With so many words, each claim away from home counts all slots; with more of them, fewer do.
const QUICKLY_COUNTED: usize = 128;

/// In cache lines of its own: two, since processors fetch them in pairs.
#[repr(align(128))]
struct Padded<T>(T);

struct Word {
    bits: AtomicU64,
    /// The slot of the word whose turn it is.
    turn: AtomicU32,
    /// The fewest free slots that a claim at home left here since the last claim away from it.
    low: AtomicU32,
}

impl Word {
    fn set_low(&self) {
        let free = free(load_for_stats(&self.bits));
        self.low.store(free.count_ones(), Ordering::Relaxed);
    }
}

fn free(bits: u64) -> u32 {
    bits as u32
}

/// What threads of one number, modulo the number of lanes, share.
struct Lane {
    /// Where this lane goes on when its home has nothing ready.
    scan_start: AtomicUsize,
    /// Its claims away from home.
    elsewhere: AtomicUsize,
    /// Claims that had to do with a slot that was not ready.
    not_ready: AtomicUsize,
}

/// Slots that come and go together. Slot `i` has bit `i / words` of word `i % words`.
pub(crate) struct Segment<S> {
    /// 1 << `shift` of them.
    words: Box<[Padded<Word>]>,
    shift: u32,
    /// Padded, as neighbours belong to different words, and so to different threads.
    slots: Box<[Padded<UnsafeCell<S>>]>,
}

// SAFETY: what a slot holds is touched by the holder of its lease alone, and by whoever drops the segment,
// which nobody else has then.
unsafe impl<S: Send + Sync> Send for Segment<S> {}
// SAFETY: as for `Send`.
unsafe impl<S: Send + Sync> Sync for Segment<S> {}

impl<S> Segment<S> {
    /// All slots free. `None` where there is no memory for it.
    fn new(slots: Vec<S>, lanes: usize) -> Option<Segment<S>> {
        let count = slots.len();
        let spread = 1 << count.min(lanes).checked_ilog2()?;
        let words = count.div_ceil(WIDTH).next_power_of_two().max(spread);
        let word = |at: usize| {
            let slots = count.saturating_sub(at).div_ceil(words);
            Padded(Word {
                bits: AtomicU64::new((1 << slots) - 1),
                turn: AtomicU32::new(0),
                low: AtomicU32::new(u32::MAX),
            })
        };
        let slots = slots.into_iter().map(|slot| Padded(UnsafeCell::new(slot)));
        Some(Segment {
            words: boxed((0..words).map(word))?,
            shift: words.ilog2(),
            slots: boxed(slots)?,
        })
    }

    /// A slot's word and its bit there.
    #[inline]
    fn word_of(&self, slot: usize) -> (&Word, u32) {
        (&self.words[slot & (self.words.len() - 1)].0, (slot >> self.shift) as u32)
    }

    /// Claims the free slot of a word whose turn comes first, of those whose bits are not to be `passed` over. The
    /// answer is the slot, and the word since.
    #[inline]
    fn claim(&self, at: usize, passed: u32) -> Option<(usize, u64)> {
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

    /// Claims this very slot, if it is free.
    fn claim_slot(&self, slot: usize) -> bool {
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

    /// What the slot holds.
    ///
    /// # Safety
    ///
    /// The caller has claimed the slot, and does not give it back while it looks.
    #[inline]
    unsafe fn peek(&self, slot: usize) -> &S {
        // SAFETY: the caller is its only holder.
        unsafe { &*self.slots[slot].0.get() }
    }

    /// Gives back a slot that was only looked at, of a pool that is there.
    fn release(&self, slot: usize) {
        let (word, bit) = self.word_of(slot);
        release(&word.bits, bit);
    }

    /// It is the turn of the slot behind this one, which was claimed to be kept.
    #[inline]
    fn pass_turn(&self, slot: usize) {
        let (word, bit) = self.word_of(slot);
        word.turn.store((bit + 1) % WIDTH as u32, Ordering::Relaxed);
    }
}

/// A slice of so many; `None` where there is no memory for it.
fn boxed<T>(items: impl ExactSizeIterator<Item = T>) -> Option<Box<[T]>> {
    let mut all = Vec::new();
    all.try_reserve_exact(items.len()).ok()?;
    all.extend(items);
    Some(all.into_boxed_slice())
}

/// One step of a word.
#[inline]
fn change(word: &AtomicU64, seen: u64, next: u64, order: Ordering) -> Result<(), u64> {
    word.compare_exchange_weak(seen, next, order, Ordering::Relaxed).map(drop)
}

/// What became of a release.
#[derive(Debug, PartialEq, Eq)]
enum Released {
    /// The slot is free.
    Free,
    /// The pool is gone, and the slot with it.
    Closed,
    /// The slot was free already: this release has no lease behind it, and changed nothing.
    Twice,
}

/// Gives a slot back. From the moment that its bit is set the segment may be gone: nothing but the word is
/// borrowed here, and nothing is touched after.
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

/// A slot that was claimed, given back when this is dropped.
pub(crate) struct Lease<S> {
    /// The slot's reference.
    segment: ManuallyDrop<Arc<Segment<S>>>,
    slot: u32,
}

impl<S> Deref for Lease<S> {
    type Target = S;

    #[inline]
    fn deref(&self) -> &S {
        // SAFETY: the lease is the only one of its slot.
        unsafe { &*self.segment.slots[self.slot as usize].0.get() }
    }
}

impl<S> DerefMut for Lease<S> {
    #[inline]
    fn deref_mut(&mut self) -> &mut S {
        // SAFETY: the lease is the only one of its slot, and borrowed exclusively.
        unsafe { &mut *self.segment.slots[self.slot as usize].0.get() }
    }
}

impl<S> Lease<S> {
    /// Gives the slot back. Where the pool is gone, the answer is the slot's share in the segment, to be dropped.
    ///
    /// # Safety
    ///
    /// Called once, and the value is neither used nor dropped any more.
    #[inline]
    pub(crate) unsafe fn release(&mut self) -> Option<Arc<Segment<S>>> {
        let (word, bit) = self.segment.word_of(self.slot as usize);
        match release(&word.bits, bit) {
            // The reference is the slot's again.
            Released::Free => None,
            // SAFETY: once, as the caller vouches.
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
        // SAFETY: the end of the value, which comes once.
        drop(unsafe { self.release() });
    }
}

/// A word: its segment's number, and its own in the segment.
#[derive(Clone, Copy, PartialEq, Eq)]
struct WordIndex {
    segment: usize,
    word: usize,
}

impl WordIndex {
    const BITS: u32 = SEGMENTS.next_power_of_two().trailing_zeros();

    fn next(self) -> WordIndex {
        WordIndex { word: self.word + 1, ..self }
    }

    fn pack(self) -> usize {
        self.word << WordIndex::BITS | self.segment
    }

    fn unpack(packed: usize) -> WordIndex {
        WordIndex { segment: packed % (1 << WordIndex::BITS), word: packed >> WordIndex::BITS }
    }
}

/// A growing set of slots.
pub(crate) struct Slots<S: Send + Sync> {
    /// A reference of each segment; null behind the last.
    segments: [AtomicPtr<Segment<S>>; SEGMENTS],
    /// The number of the last segment, which is where homes are: it has most of the slots. Any other would do.
    newest: AtomicUsize,
    /// A power of two of them.
    lanes: Box<[Padded<Lane>]>,
    /// Locked by whoever appends a segment.
    growing: Mutex<()>,
    growths: AtomicUsize,
    high_water: AtomicUsize,
}

impl<S: Send + Sync> Slots<S> {
    /// No slots yet, for about as many threads at once.
    pub(crate) fn new(threads: usize) -> Slots<S> {
        let lane = |number| {
            Padded(Lane {
                // Behind its home.
                scan_start: AtomicUsize::new(WordIndex { segment: 0, word: number + 1 }.pack()),
                elsewhere: AtomicUsize::new(0),
                not_ready: AtomicUsize::new(0),
            })
        };
        Slots {
            segments: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            newest: AtomicUsize::new(0),
            lanes: (0..threads.max(1).next_power_of_two()).map(lane).collect(),
            growing: Mutex::new(()),
            growths: AtomicUsize::new(0),
            high_water: AtomicUsize::new(0),
        }
    }

    #[inline]
    fn segment(&self, number: usize) -> Option<&Segment<S>> {
        let pointer = self.segments.get(number)?.load(Ordering::Acquire);
        // SAFETY: null, or stored when the segment was whole; the pool's reference keeps it.
        unsafe { pointer.as_ref() }
    }

    fn segments(&self) -> impl Iterator<Item = &Segment<S>> {
        (0..).map_while(|number| self.segment(number))
    }

    fn words(&self) -> impl Iterator<Item = &Word> {
        self.segments().flat_map(|segment| segment.words.iter().map(|word| &word.0))
    }

    /// The calling thread's lane, by its number.
    #[inline]
    fn lane(&self) -> usize {
        thread_number() & (self.lanes.len() - 1)
    }

    /// The place, or where the words go on behind the last of a segment, and of all.
    fn wrap(&self, WordIndex { segment, word }: WordIndex) -> WordIndex {
        match self.segment(segment) {
            Some(found) if word < found.words.len() => WordIndex { segment, word },
            Some(_) if self.segment(segment + 1).is_some() => {
                WordIndex { segment: segment + 1, word: 0 }
            }
            _ => WordIndex { segment: 0, word: 0 },
        }
    }

    /// The lease of a slot that was just claimed to be kept.
    #[inline]
    fn lease(&self, segment: usize, slot: usize) -> Lease<S> {
        let pointer = self.segments[segment].load(Ordering::Relaxed);
        // SAFETY: the slot's own reference, which the claim hands over.
        let segment = unsafe { Arc::from_raw(pointer.cast_const()) };
        segment.pass_turn(slot);
        Lease { segment: ManuallyDrop::new(segment), slot: slot as u32 }
    }

    /// Claims a slot, and says whether it was `ready`: one that is, if there is one among the few at home and
    /// elsewhere that are looked at; otherwise the one whose turn it is. `None` only if at some moment no slot
    /// was free.
    ///
    /// Claims one slot at a time, however many it looks at: a second one could be what another thread finds
    /// missing.
    #[inline]
    pub(crate) fn claim(&self, ready: impl Fn(&S) -> bool) -> Option<(Lease<S>, bool)> {
        let mut number = self.newest.load(Ordering::Relaxed);
        let segment = match self.segment(number) {
            Some(segment) => segment,
            // Known to be there, and not seen yet.
            None => {
                number = 0;
                self.segment(0)?
            }
        };
        let home = WordIndex { segment: number, word: self.lane() & (segment.words.len() - 1) };
        let mut seen = None;
        if let Some((slot, bits)) = segment.claim(home.word, 0) {
            // SAFETY: claimed above, and given back below.
            if ready(unsafe { segment.peek(slot) }) {
                let word = &segment.words[home.word].0;
                let low = word.low.load(Ordering::Relaxed);
                if free(bits).count_ones() < low || (bits / RELEASE).is_multiple_of(RECOUNT) {
                    word.set_low();
                    self.count();
                }
                return Some((self.lease(number, slot), true));
            }
            segment.release(slot);
            seen = Some(slot);
        }
        self.claim_elsewhere(home, seen, &ready)
    }

    /// What [`claim`](Self::claim) does when home has nothing, or when the slot there that was looked at first is
    /// not ready.
    #[cold]
    fn claim_elsewhere(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<(Lease<S>, bool)> {
        let mut claimed = self.probe_home(home, seen, ready);
        while claimed.is_none() {
            if self.was_empty() {
                return None;
            }
            // The first that comes: two threads that only look could take each other's choice away for ever.
            claimed = self.scan_all(home, None, &|_| true).map(|(lease, _)| {
                let ready = ready(&lease);
                (lease, ready)
            });
        }
        // The most that home held does not tell any more whether there were ever more.
        self.segment(home.segment)?.words[home.word].0.set_low();
        let elsewhere = self.lanes[self.lane()].0.elsewhere.fetch_add(1, Ordering::Relaxed);
        let words: usize = self.segments().map(|segment| segment.words.len()).sum();
        if elsewhere.is_multiple_of(words.div_ceil(QUICKLY_COUNTED)) {
            self.count();
        }
        claimed
    }

    /// Looks at some more slots at home, and then at some elsewhere. `None` also where others were quicker.
    fn probe_home(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<(Lease<S>, bool)> {
        let segment = self.segment(home.segment)?;
        let bit = |slot| 1 << segment.word_of(slot).1;
        let mut passed = seen.map_or(0, bit);
        for _ in 1..PROBES {
            let Some((slot, _)) = segment.claim(home.word, passed) else { break };
            // SAFETY: claimed above, and given back below.
            if ready(unsafe { segment.peek(slot) }) {
                return Some((self.lease(home.segment, slot), true));
            }
            segment.release(slot);
            passed |= bit(slot);
        }
        self.scan_all(home, seen, ready)
    }

    /// Looks through the words, once around from where the lane stopped the last time. At home a slot was `seen`
    /// that is not ready.
    fn scan_all(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<(Lease<S>, bool)> {
        let scan_start = &self.lanes[self.lane()].0.scan_start;
        let start = self.wrap(WordIndex::unpack(scan_start.load(Ordering::Relaxed)));
        let (mut index, mut turn, mut probes) = (start, None, 0);
        loop {
            let segment = self.segment(index.segment)?;
            let found = match seen.filter(|_| index == home) {
                Some(slot) => Some(slot),
                None => match segment.claim(index.word, 0) {
                    // SAFETY: claimed above, and given back below.
                    Some((slot, _)) if ready(unsafe { segment.peek(slot) }) => {
                        scan_start.store(index.next().pack(), Ordering::Relaxed);
                        return Some((self.lease(index.segment, slot), true));
                    }
                    Some((slot, _)) => {
                        segment.release(slot);
                        Some(slot)
                    }
                    None => None,
                },
            };
            if let Some(slot) = found {
                turn = turn.or(Some((index, slot)));
                probes += 1;
                if probes == PROBES {
                    break;
                }
            }
            index = self.wrap(index.next());
            if index == start {
                break;
            }
        }
        let (index, slot) = turn?;
        self.segment(index.segment)?.claim_slot(slot).then(|| {
            scan_start.store(index.next().pack(), Ordering::Relaxed);
            (self.lease(index.segment, slot), false)
        })
    }

    /// Counts the slots that are taken.
    ///
    /// Where one thread claims, this sees the most that are. Each claim away from home counts, and each at home that
    /// leaves fewer free than any since; in between, slots are only given back.
    #[cold]
    fn count(&self) {
        let taken = self.total().saturating_sub(self.available());
        self.high_water.fetch_max(taken, Ordering::Relaxed);
    }

    /// Whether there was a moment at which no slot was free: a double collect, as in "Atomic Snapshots of Shared
    /// Memory" by Afek, Attiya, Dolev, Gafni, Merritt and Shavit.
    ///
    /// The words are read twice, one after the other. Where no slot was free either time and none was
    /// released in between, no word changed from its first reading to its second; so all of them stood as they
    /// were read from the end of the first round to the beginning of the second.
    pub(crate) fn was_empty(&self) -> bool {
        let round = || {
            self.words().try_fold(0, |releases, word| {
                let bits = word.bits.load(Ordering::Acquire);
                (free(bits) == 0).then(|| releases + bits / RELEASE)
            })
        };
        round().is_some_and(|first| round() == Some(first))
    }

    /// A segment to be appended, of one slot at least. `None` where there is no memory for it.
    pub(crate) fn prepare(&self, slots: Vec<S>) -> Option<Segment<S>> {
        Segment::new(slots, self.lanes.len())
    }

    /// As [`claim`](Self::claim), but where nothing is free, appends what `make` makes, which is told how many
    /// slots there are. Of several threads that find nothing, one does.
    pub(crate) fn claim_or_grow<E>(
        &self,
        ready: impl Fn(&S) -> bool,
        make: impl FnOnce(usize) -> Result<Segment<S>, E>,
    ) -> Result<(Lease<S>, bool), E> {
        let _growing = self.growing.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(claimed) = self.claim(&ready) {
            return Ok(claimed);
        }
        let segment = make(self.total())?;
        // Before others see it: what was made for this thread is not for them to take.
        segment.claim_slot(0);
        let number = self.append(segment);
        self.growths.fetch_add(1, Ordering::Relaxed);
        self.count();
        Ok((self.lease(number, 0), true))
    }

    /// Appends a segment, whose number is the answer: the first, or under the lock.
    pub(crate) fn append(&self, segment: Segment<S>) -> usize {
        let count = segment.slots.len();
        let number = self.segments().count();
        let pointer = Arc::into_raw(Arc::new(segment));
        for _ in 0..count {
            // SAFETY: of an Arc that is kept.
            unsafe { Arc::increment_strong_count(pointer) };
        }
        self.segments[number].store(pointer.cast_mut(), Ordering::Release);
        self.newest.store(number, Ordering::Relaxed);
        number
    }

    /// Whether no segment can be appended any more.
    pub(crate) fn is_full(&self) -> bool {
        self.segments().count() == SEGMENTS
    }

    pub(crate) fn total(&self) -> usize {
        self.segments().map(|segment| segment.slots.len()).sum()
    }

    /// The free slots, each word at its moment.
    pub(crate) fn available(&self) -> usize {
        self.words().map(|word| free(load_for_stats(&word.bits)).count_ones() as usize).sum()
    }

    /// Counts a claim that had to do with a slot that was not ready.
    pub(crate) fn count_not_ready(&self) {
        self.lanes[self.lane()].0.not_ready.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn not_ready(&self) -> usize {
        self.lanes.iter().map(|lane| lane.0.not_ready.load(Ordering::Relaxed)).sum()
    }

    /// How often slots were appended because none was free.
    pub(crate) fn growths(&self) -> usize {
        self.growths.load(Ordering::Relaxed)
    }

    /// The most slots that were seen to be taken at once.
    pub(crate) fn high_water(&self) -> usize {
        self.high_water.load(Ordering::Relaxed)
    }
}

impl<S: Send + Sync> Drop for Slots<S> {
    /// Closes every word: what is free goes now, what is not with its lease.
    fn drop(&mut self) {
        let mut segments = [const { None }; SEGMENTS];
        for (pointer, kept) in self.segments.iter().zip(&mut segments) {
            let pointer = pointer.load(Ordering::Relaxed).cast_const();
            if pointer.is_null() {
                break;
            }
            // SAFETY: the pool's own reference, given up here.
            let segment = unsafe { Arc::from_raw(pointer) };
            for word in &segment.words {
                // `Acquire`: what the last holders did is seen by whoever drops the slots.
                let bits = word.0.bits.swap(CLOSED, Ordering::AcqRel);
                for _ in 0..free(bits).count_ones() {
                    // SAFETY: a reference of a slot that was free; nobody can claim it any more.
                    unsafe { Arc::decrement_strong_count(pointer) };
                }
            }
            *kept = Some(segment);
        }
        // When all are closed, since what a slot holds may panic when it is dropped. The others go all the same.
        drop(segments);
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
