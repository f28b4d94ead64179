//! Slots that threads claim and release without locks.
//!
//! They are the core of the pool, and do not depend on the values that they hold.
//!
//! The algorithm is a bitmap allocator that is spread over cache lines. A set bit is a free slot.
//! Each word has few slots, and no other word is in its cache lines. Threads are spread over
//! *lanes* by their numbers. The lane selects the word in which a thread searches first, its
//! *home*. So threads that claim and release one slot after another touch different cache lines.
//!
//! A claim clears a bit by compare-and-swap, and a release sets it again. The word is the whole
//! state of its slots, so there is no ABA problem and no memory to reclaim. Segments of slots are
//! only appended, to a fixed array of pointers. So a slot never moves.
//!
//! A word has three fields, which change together:
//!
//! | bits | field |
//! |---|---|
//! | 0 to 31 | the free slots |
//! | 32 | the pool is closed |
//! | 33 to 63 | the releases of slots of this word, modulo 2^31 |
//!
//! # The races
//!
//! | one thread | another thread | result |
//! |---|---|---|
//! | claims slot `s` | claims `s` | One compare-and-swap fails, and its thread looks again. |
//! | claims `s` (`AcqRel`) | released `s` (`Release`) | The claim sees all that the last holder did. Each change of a word is a read-modify-write, so the claim is in the release's sequence. Changes of other bits in between do not matter. |
//! | reads the value in slot `s` | claims `s` | This cannot happen: only the holder of `s` reads its value. |
//! | looks through the words | appends a segment | The pointer is stored (`Release`) once the segment is complete, and read with `Acquire`. |
//! | finds no free slot | releases a slot that was looked at before, and claims a later one | The words are read again. Their counts of releases have changed, and the search goes on. |
//! | finds no free slot, and begins to grow | does so, too | One lock orders them. The second thread finds what the first one appended. |
//! | closes the pool | releases `s` | If the bit is set first, the closing thread takes the slot. Otherwise the releasing thread finds the word closed, and takes it. |
//!
//! # Lifetime
//!
//! Each slot owns a reference of its segment. A claim moves the reference into the [`Lease`], and a
//! release moves it back. Neither touches a count. Closing drops the references of the slots that
//! are free then. A lease that finds its word closed drops its own reference. So a segment lives as
//! long as the pool or one lease of it, and no longer.
//!
//! # Promises
//!
//! - A slot has at most one lease at a time. Only a release makes it free again, so a forgotten
//!   lease costs its slot.
//! - [`claim`](Slots::claim) and release are lock-free. A thread that is stopped anywhere blocks no
//!   other. If one thread has to begin again, another one has made progress. Growing takes a lock,
//!   and happens only after a claim found no free slot.
//! - `claim` returns `None` only if there was a moment during the call at which no slot was free.
//!   Each slot was leased then, or another claim was looking at it. A claim looks at one slot at a
//!   time. So if there are at least as many slots as all threads together hold and want, no thread
//!   gets `None`. A slot may be free again when `claim` returns. (A claim may overlook 2^31 or more
//!   releases of one word between two readings, because their count wraps.)
//!
//! Not promised:
//!
//! - Slots are not claimed in the order of their releases. A thread may get none while other
//!   threads keep claiming the slots that become free.
//! - While other threads work, `available` and the statistics need not be those of one moment.

mod segment;
mod stats;

use std::ptr;
// For hints and statistics. Correctness does not depend on them, so the models do not follow them.
use std::sync::atomic::AtomicUsize;

use crate::sync::{Arc, AtomicPtr, Mutex, MutexGuard, Ordering, thread_number};
pub(crate) use segment::{Lease, Segment};
use segment::{Padded, Word};
use stats::{LaneStats, Stats};

/// The maximum number of segments. A pool that doubles each time uses few of them.
const SEGMENTS: usize = 256;
/// The most slots that a claim looks at in its home before it scans all words.
///
/// The scan looks at this many slots, at most, before it takes one that is not ready.
const PROBES: usize = 4;

/// The state of one lane.
///
/// Threads share a lane if their numbers are equal modulo the number of lanes.
struct Lane {
    /// The word at which the next scan of this lane starts.
    scan_start: AtomicUsize,
    stats: LaneStats,
}

/// The position of a word: the number of its segment, and its number in the segment.
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

/// The lease of a slot that was just claimed.
pub(crate) enum Claim<S> {
    /// The slot was ready.
    Ready(Lease<S>),
    /// Neither this slot nor any other that the claim looked at was ready.
    Busy(Lease<S>),
}

/// A growing set of slots.
pub(crate) struct Slots<S: Send + Sync> {
    /// One reference to each segment. The pointers after the last segment are null.
    segments: [AtomicPtr<Segment<S>>; SEGMENTS],
    /// The number of the newest segment, which contains the homes. It often has most of the slots.
    /// Any other segment would be correct, too.
    newest: AtomicUsize,
    /// The number of lanes is a power of two.
    lanes: Box<[Padded<Lane>]>,
    /// Held by the thread that appends a segment.
    growing: Mutex<()>,
    stats: Stats,
}

impl<S: Send + Sync> Slots<S> {
    /// Makes an empty set, for about `threads` threads at once.
    pub(crate) fn new(threads: usize) -> Slots<S> {
        let lane = |number| {
            Padded(Lane {
                // The word after the home.
                scan_start: AtomicUsize::new(WordIndex { segment: 0, word: number + 1 }.pack()),
                stats: LaneStats::new(),
            })
        };
        Slots {
            segments: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            newest: AtomicUsize::new(0),
            lanes: (0..threads.max(1).next_power_of_two()).map(lane).collect(),
            growing: Mutex::new(()),
            stats: Stats::new(),
        }
    }

    #[inline]
    fn segment(&self, number: usize) -> Option<&Segment<S>> {
        let pointer = self.segments.get(number)?.load(Ordering::Acquire);
        // SAFETY: the pointer is null, or it was stored after the segment was complete. The
        // reference in `segments` keeps the segment alive while `self` is borrowed.
        unsafe { pointer.as_ref() }
    }

    fn segments(&self) -> impl Iterator<Item = &Segment<S>> {
        (0..).map_while(|number| self.segment(number))
    }

    fn words(&self) -> impl Iterator<Item = &Word> {
        self.segments().flat_map(Segment::words)
    }

    /// The number of the calling thread's lane.
    #[inline]
    fn lane_number(&self) -> usize {
        thread_number() & (self.lanes.len() - 1)
    }

    fn lane(&self) -> &Lane {
        &self.lanes[self.lane_number()].0
    }

    /// Returns the position if it has a word, and the position of the next word otherwise.
    ///
    /// The first word of all comes after the last one.
    fn wrap(&self, WordIndex { segment, word }: WordIndex) -> WordIndex {
        match self.segment(segment) {
            Some(found) if word < found.word_count() => WordIndex { segment, word },
            Some(_) if self.segment(segment + 1).is_some() => {
                WordIndex { segment: segment + 1, word: 0 }
            }
            _ => WordIndex { segment: 0, word: 0 },
        }
    }

    /// Makes the lease of a slot that was just claimed and is kept.
    #[inline]
    fn lease(&self, segment: usize, slot: usize) -> Lease<S> {
        let pointer = self.segments[segment].load(Ordering::Relaxed);
        // SAFETY: the slot owned this reference while it was free, and the claim took it over.
        let segment = unsafe { Arc::from_raw(pointer.cast_const()) };
        // SAFETY: the slot was just claimed, and the reference is its own.
        unsafe { Lease::new(segment, slot) }
    }

    /// Claims a slot, and prefers one that is `ready`.
    ///
    /// Looks at a few slots. If none of them is ready, claims one that is not. Returns `None` only
    /// if there was a moment during the call at which no slot was free.
    ///
    /// A claim holds one slot at a time, because a second one could make another thread find none.
    #[inline]
    pub(crate) fn claim(&self, ready: impl Fn(&S) -> bool) -> Option<Claim<S>> {
        let mut number = self.newest.load(Ordering::Relaxed);
        let segment = match self.segment(number) {
            Some(segment) => segment,
            // The number may become visible to this thread before the segment does.
            None => {
                number = 0;
                self.segment(0)?
            }
        };
        let home =
            WordIndex { segment: number, word: self.lane_number() & (segment.word_count() - 1) };
        let mut seen = None;
        if let Some((slot, bits)) = segment.claim(home.word, 0) {
            // SAFETY: the slot was claimed above, and is released below.
            if ready(unsafe { segment.peek(slot) }) {
                let word = segment.word(home.word);
                if word.is_recount_due(bits) {
                    word.set_low_mark();
                    self.recount();
                }
                return Some(Claim::Ready(self.lease(number, slot)));
            }
            segment.release(slot);
            seen = Some(slot);
        }
        self.claim_slow(home, seen, &ready)
    }

    /// Continues [`claim`](Self::claim) if the first look at home found no ready slot.
    ///
    /// `seen` is the slot that was looked at, or `None` if home has no free slot.
    #[cold]
    fn claim_slow(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<Claim<S>> {
        let mut claimed = self.probe(home, seen, ready);
        while claimed.is_none() {
            if self.was_empty() {
                return None;
            }
            // This takes the first free slot, ready or not. Two threads that choose again could
            // take each other's choice away forever.
            claimed = self.scan_all(home, None, &|_| true).map(|claim| match claim {
                Claim::Ready(lease) if !ready(&lease) => Claim::Busy(lease),
                claim => claim,
            });
        }
        // The mark assumes that all claims were at home, so it starts again.
        self.segment(home.segment)?.word(home.word).set_low_mark();
        let words: usize = self.segments().map(Segment::word_count).sum();
        if self.lane().stats.count_slow_claim(words) {
            self.recount();
        }
        claimed
    }

    /// Looks at a few more slots at home, and then scans all words.
    ///
    /// Returns `None` if it found no free slot, or if other threads claimed its choice first.
    fn probe(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<Claim<S>> {
        let segment = self.segment(home.segment)?;
        let mut passed = seen.map_or(0, |slot| segment.mask(slot));
        for _ in 1..PROBES {
            let Some((slot, _)) = segment.claim(home.word, passed) else { break };
            // SAFETY: the slot was claimed above, and is released below.
            if ready(unsafe { segment.peek(slot) }) {
                return Some(Claim::Ready(self.lease(home.segment, slot)));
            }
            segment.release(slot);
            passed |= segment.mask(slot);
        }
        self.scan_all(home, seen, ready)
    }

    /// Scans all words once, from the lane's `scan_start`, and claims a slot.
    ///
    /// Claims the first ready slot, or else the first of the few slots that it looked at. `seen` is
    /// a slot at home that is known not to be ready. Returns `None` if it found no free slot, or if
    /// another thread claimed its choice first.
    fn scan_all(
        &self,
        home: WordIndex,
        seen: Option<usize>,
        ready: &dyn Fn(&S) -> bool,
    ) -> Option<Claim<S>> {
        let scan_start = &self.lane().scan_start;
        let start = self.wrap(WordIndex::unpack(scan_start.load(Ordering::Relaxed)));
        let (mut index, mut turn, mut probes) = (start, None, 0);
        loop {
            let segment = self.segment(index.segment)?;
            let found = match seen.filter(|_| index == home) {
                Some(slot) => Some(slot),
                None => match segment.claim(index.word, 0) {
                    // SAFETY: the slot was claimed above, and is released below.
                    Some((slot, _)) if ready(unsafe { segment.peek(slot) }) => {
                        scan_start.store(index.next().pack(), Ordering::Relaxed);
                        return Some(Claim::Ready(self.lease(index.segment, slot)));
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
            Claim::Busy(self.lease(index.segment, slot))
        })
    }

    /// Returns `true` if there was a moment during the call at which no slot was free.
    ///
    /// This is a double collect, as in "Atomic Snapshots of Shared Memory" by Afek, Attiya, Dolev,
    /// Gafni, Merritt and Shavit.
    ///
    /// The words are read twice, one after the other. Assume that no slot was free either time, and
    /// that none was released in between. Then no word changed from its first reading to its
    /// second. So from the end of the first round to the beginning of the second, all words were as
    /// they were read.
    pub(crate) fn was_empty(&self) -> bool {
        let round = || {
            self.words().try_fold(0, |releases, word| {
                word.releases_if_empty().map(|of_word| releases + of_word)
            })
        };
        round().is_some_and(|first| round() == Some(first))
    }

    /// Makes a segment of the values, to be appended.
    ///
    /// Returns `None` if there are no values, or no memory for the segment.
    pub(crate) fn prepare(&self, slots: Vec<S>) -> Option<Segment<S>> {
        Segment::new(slots, self.lanes.len())
    }

    /// Appends a segment to slots that no other thread uses.
    pub(crate) fn append(&mut self, segment: Segment<S>) {
        self.publish(segment);
    }

    /// Takes the growth lock.
    ///
    /// The holder claims again before it appends, because another thread may have appended slots.
    pub(crate) fn lock_growth(&self) -> Growth<'_, S> {
        let lock = self.growing.lock().unwrap_or_else(|poison| poison.into_inner());
        Growth { slots: self, _lock: lock }
    }

    /// Stores a segment, and returns its number.
    ///
    /// The caller holds the growth lock, or borrows the slots exclusively.
    fn publish(&self, segment: Segment<S>) -> usize {
        let count = segment.len();
        let number = self.segments().count();
        let pointer = Arc::into_raw(Arc::new(segment));
        for _ in 0..count {
            // SAFETY: the pointer came from `Arc::into_raw`, and that reference still exists.
            unsafe { Arc::increment_strong_count(pointer) };
        }
        self.segments[number].store(pointer.cast_mut(), Ordering::Release);
        self.newest.store(number, Ordering::Relaxed);
        number
    }

    /// Returns `true` if no more segments can be appended.
    pub(crate) fn is_full(&self) -> bool {
        self.segments().count() == SEGMENTS
    }

    /// Counts the slots that are taken, for the high-water mark.
    ///
    /// A slow claim recounts, or one of several if there are many words. A claim at home recounts
    /// if it leaves fewer free slots than the home's [`LowMark`](stats::LowMark). In between, slots
    /// of other words are only released. So if one thread claims and each slow claim recounts, no
    /// peak is missed. With several threads, marks can hide a peak. So claims at home also recount
    /// after a fixed number of releases.
    #[cold]
    fn recount(&self) {
        self.stats.raise_high_water(self.total().saturating_sub(self.available()));
    }

    /// The number of slots.
    pub(crate) fn total(&self) -> usize {
        self.segments().map(Segment::len).sum()
    }

    /// The number of free slots. Each word is read at a moment of its own.
    pub(crate) fn available(&self) -> usize {
        self.words().map(|word| word.available() as usize).sum()
    }

    /// Adds one to [`busy_claims`](Self::busy_claims).
    pub(crate) fn count_busy_claim(&self) {
        self.lane().stats.count_busy_claim();
    }

    /// The number of claims that returned a slot that was not ready.
    pub(crate) fn busy_claims(&self) -> usize {
        self.lanes.iter().map(|lane| lane.0.stats.busy_claims()).sum()
    }

    /// The number of times that slots were appended because none was free.
    pub(crate) fn growths(&self) -> usize {
        self.stats.growths()
    }

    /// The largest number of taken slots in any recount.
    pub(crate) fn high_water(&self) -> usize {
        self.stats.high_water()
    }
}

/// The growth lock. One thread at a time holds it.
pub(crate) struct Growth<'s, S: Send + Sync> {
    slots: &'s Slots<S>,
    _lock: MutexGuard<'s, ()>,
}

impl<S: Send + Sync> Growth<'_, S> {
    /// Like [`Slots::claim`].
    pub(crate) fn claim(&self, ready: impl Fn(&S) -> bool) -> Option<Claim<S>> {
        self.slots.claim(ready)
    }

    /// Appends a segment, and returns the lease of its first slot.
    pub(crate) fn append(&self, segment: Segment<S>) -> Lease<S> {
        // This comes before other threads see the segment. They could claim all its slots.
        segment.claim_slot(0);
        let number = self.slots.publish(segment);
        self.slots.stats.count_growth();
        self.slots.recount();
        self.slots.lease(number, 0)
    }
}

impl<S: Send + Sync> Drop for Slots<S> {
    /// Closes every word, and drops the references of the slots that are free.
    ///
    /// A segment's values are dropped with its last reference. A lease drops its own.
    fn drop(&mut self) {
        let mut segments = [const { None }; SEGMENTS];
        for (pointer, kept) in self.segments.iter().zip(&mut segments) {
            let pointer = pointer.load(Ordering::Relaxed).cast_const();
            if pointer.is_null() {
                break;
            }
            // SAFETY: `publish` stored this reference in `segments`. The slots are being dropped,
            // and this loop takes each reference once.
            let segment = unsafe { Arc::from_raw(pointer) };
            for word in segment.words() {
                for _ in 0..word.close() {
                    // SAFETY: a free slot owned this reference. The word is closed, so no thread
                    // can claim the slot and drop the reference, too.
                    unsafe { Arc::decrement_strong_count(pointer) };
                }
            }
            *kept = Some(segment);
        }
        // Dropping a value may panic, so this comes after all words are closed. The other segments
        // are still dropped then.
        drop(segments);
    }
}
