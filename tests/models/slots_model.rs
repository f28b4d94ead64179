//! Model checks of the slots of a pool.
//!
//! loom runs the shipped `src/slots/mod.rs` through every relevant interleaving. The same models fail if
//! an ordering or a step is broken. The content of a slot is one of loom's cells, which fails if two
//! threads access it without an order. This covers the whole promise of a pool: there is one holder
//! at a time, and it sees the writes of the previous one.

#![allow(dead_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::cell::UnsafeCell;
use loom::thread;

/// Stands in for `src/sync.rs`: loom's primitives, with a switch that breaks one use.
mod sync {
    use std::cell::Cell;
    use std::sync::atomic::Ordering::SeqCst;

    pub(crate) use loom::sync::atomic::Ordering;
    pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};

    std::thread_local! {
        /// Loom runs all threads of a model in the thread of its test.
        pub(crate) static BROKEN: Cell<u8> = const { Cell::new(NOTHING) };
    }
    pub(crate) const NOTHING: u8 = 0;
    pub(crate) const CLAIM: u8 = 1;
    pub(crate) const RELEASE: u8 = 2;
    pub(crate) const CLOSE: u8 = 3;
    pub(crate) const PUBLISH: u8 = 4;
    pub(crate) const FIND_SEGMENT: u8 = 5;
    pub(crate) const COUNT: u8 = 6;
    pub(crate) const CLAIM_UNSEEN: u8 = 7;

    fn is_broken(this: u8) -> bool {
        BROKEN.get() == this
    }

    fn ordering(this: u8, shipped: Ordering) -> Ordering {
        if is_broken(this) { Ordering::Relaxed } else { shipped }
    }

    /// Loom's atomic, and beside it the newest value, for looks that decide nothing.
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64, std::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value), value.into())
        }
        pub(crate) fn compare_exchange_weak(
            &self,
            seen: u64,
            value: u64,
            shipped: Ordering,
            failed: Ordering,
        ) -> Result<u64, u64> {
            let order = match shipped {
                Ordering::AcqRel if is_broken(CLAIM_UNSEEN) => Ordering::Acquire,
                Ordering::AcqRel => ordering(CLAIM, shipped),
                Ordering::Release => ordering(RELEASE, shipped),
                other => panic!("{other:?} is neither a claim's nor a release's"),
            };
            let changed = self.0.compare_exchange_weak(seen, value, order, failed);
            changed.inspect(|_| self.1.store(value, SeqCst))
        }
        pub(crate) fn swap(&self, value: u64, shipped: Ordering) -> u64 {
            let before = self.0.swap(value, ordering(CLOSE, shipped));
            self.1.store(value, SeqCst);
            before
        }
        pub(crate) fn load(&self, shipped: Ordering) -> u64 {
            match shipped {
                // Only the search for a moment without free slots loads so. Without the count of
                // releases it is a plain second look.
                Ordering::Acquire if is_broken(COUNT) => u64::from(self.0.load(shipped) as u32),
                Ordering::Acquire => self.0.load(shipped),
                // A look before a compare-and-swap, which fails if the look was stale. Loom takes
                // the other threads' loads into account only if a thread's first access is no load.
                _ => self.0.fetch_or(0, shipped),
            }
        }
    }

    pub(crate) fn load_for_stats(word: &AtomicU64) -> u64 {
        word.1.load(SeqCst)
    }

    pub(crate) struct AtomicPtr<T>(loom::sync::atomic::AtomicPtr<T>);

    impl<T> AtomicPtr<T> {
        pub(crate) fn new(value: *mut T) -> AtomicPtr<T> {
            AtomicPtr(loom::sync::atomic::AtomicPtr::new(value))
        }
        pub(crate) fn load(&self, shipped: Ordering) -> *mut T {
            self.0.load(ordering(FIND_SEGMENT, shipped))
        }
        pub(crate) fn store(&self, value: *mut T, shipped: Ordering) {
            self.0.store(value, ordering(PUBLISH, shipped));
        }
    }

    /// Runs a unit test of the shipped files. Each has one thread.
    pub(crate) fn run(test: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.max_branches = 1 << 20;
        builder.check(test);
    }

    loom::thread_local! {
        static NUMBER: std::cell::Cell<usize> = std::cell::Cell::new(0);
    }

    /// The number that [`act_as`] set, or 0.
    pub(crate) fn thread_number() -> usize {
        NUMBER.with(std::cell::Cell::get)
    }

    /// Makes the word of this number the calling thread's home.
    pub(crate) fn act_as(number: usize) {
        NUMBER.with(|this| this.set(number));
    }
}

#[path = "../../src/slots/mod.rs"]
mod slots;

use slots::{Claim, Lease, Slots};
use sync::Arc;

/// The value in a slot.
struct Held(Arc<Cell>);

struct Cell(UnsafeCell<u32>);

// SAFETY: loom reports two threads that touch the cell without an order.
unsafe impl Sync for Cell {}

impl Held {
    fn new() -> Held {
        Held(Arc::new(Cell(UnsafeCell::new(0))))
    }

    fn touch(&self) {
        // SAFETY: loom checks that no other thread does so at the same time.
        self.0.0.with_mut(|held| unsafe { *held += 1 });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.touch();
    }
}

type Pool = Arc<Slots<Held>>;

fn pool(count: usize, words: usize) -> Pool {
    let mut slots = Slots::new(words);
    if count > 0 {
        slots.append(slots.prepare((0..count).map(|_| Held::new()).collect()).unwrap());
    }
    Arc::new(slots)
}

fn claim(pool: &Pool) -> Option<Lease<Held>> {
    pool.claim(|_| true).map(kept)
}

fn kept(claim: Claim<Held>) -> Lease<Held> {
    match claim {
        Claim::Ready(lease) | Claim::Busy(lease) => lease,
    }
}

/// Does as the pool does: looks for a slot, then looks again under the lock, and grows.
fn claim_or_grow(pool: &Pool, made: impl FnOnce(usize) -> Vec<Held>) -> Lease<Held> {
    claim(pool).unwrap_or_else(|| {
        let growth = pool.lock_growth();
        match growth.claim(|_| true) {
            Some(claim) => kept(claim),
            None => growth.append(pool.prepare(made(pool.total())).unwrap()),
        }
    })
}

/// Claims a slot and releases it, if one is free.
fn visit(pool: &Pool) -> bool {
    claim(pool).inspect(|held| held.touch()).is_some()
}

fn at_rest(pool: &Pool, total: usize) {
    assert_eq!((pool.available(), pool.total()), (total, total), "a slot is lost");
}

/// Three threads claim two slots in one word.
fn three_threads() {
    let pool = pool(2, 1);
    let others: [_; 2] = std::array::from_fn(|_| {
        let pool = Arc::clone(&pool);
        thread::spawn(move || visit(&pool))
    });
    visit(&pool);
    for other in others {
        other.join().unwrap();
    }
    at_rest(&pool, 2);
}

/// Two threads claim two slots, each in a word of its own. A thread holds one at a time, so one
/// slot is always left.
fn as_many_slots_as_are_held() {
    let pool = pool(2, 2);
    let other = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || assert!(visit(&pool), "told that none is free"))
    };
    assert!(visit(&pool), "told that none is free");
    other.join().unwrap();
    at_rest(&pool, 2);
}

/// One thread holds one slot or the other, and never both. Another looks for a moment without a
/// free slot.
fn never_empty() {
    let pool = pool(2, 2);
    let other = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || {
            for word in [0, 1, 0, 1] {
                sync::act_as(word);
                visit(&pool);
            }
        })
    };
    assert!(!pool.was_empty(), "told that none is free");
    other.join().unwrap();
}

/// Two threads find at the same time that a pool has no slots.
fn growth() {
    let pool = pool(0, 2);
    let grow = |pool: &Pool| {
        let made = |total| {
            assert_eq!(total, 0, "it grew twice");
            vec![Held::new(), Held::new()]
        };
        claim_or_grow(pool, made).touch();
    };
    let other = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || grow(&pool))
    };
    grow(&pool);
    other.join().unwrap();
    at_rest(&pool, 2);
    assert_eq!(pool.growths(), 1);
}

/// One thread grows the pool while another claims and releases.
fn growth_beside_a_claim() {
    let pool = pool(0, 1);
    let taking = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || visit(&pool))
    };
    let lease = claim_or_grow(&pool, |_| vec![Held::new()]);
    lease.touch();
    drop(lease);
    taking.join().unwrap();
    at_rest(&pool, pool.growths());
}

/// One thread grows the pool while a second claims and releases, and a third releases.
fn growth_beside_others() {
    let pool = pool(1, 1);
    let held = claim(&pool).unwrap();
    held.touch();
    let releasing = thread::spawn(move || drop(held));
    let taking = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || visit(&pool))
    };
    let lease = claim_or_grow(&pool, |_| vec![Held::new()]);
    lease.touch();
    drop(lease);
    releasing.join().unwrap();
    taking.join().unwrap();
    at_rest(&pool, 1 + pool.growths());
}

/// The pool is dropped while its slots are released. Each value is dropped once, after its last
/// holder.
fn closing() {
    let pool = pool(2, 1);
    let [first, second] = [claim(&pool).unwrap(), claim(&pool).unwrap()];
    first.touch();
    let other = thread::spawn(move || {
        second.touch();
        drop(second);
    });
    let third = thread::spawn(move || drop(first));
    drop(pool);
    other.join().unwrap();
    third.join().unwrap();
}

/// Two threads at once release a slot that is not ready, to look at others. Each has to end.
fn choosing() {
    let pool = pool(2, 2);
    let choose = |pool: &Pool| match pool.claim(|_| false).expect("told that none is free") {
        Claim::Ready(_) => panic!("no slot is ready"),
        Claim::Busy(lease) => lease.touch(),
    };
    let other = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || choose(&pool))
    };
    choose(&pool);
    other.join().unwrap();
    at_rest(&pool, 2);
}

/// Growth in the wrong order: the segment is published before its values are made.
fn published_before_it_is_made() {
    let pool = pool(0, 1);
    let other = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || visit(&pool))
    };
    let making = Held::new();
    let made = pool.prepare(vec![Held(Arc::clone(&making.0))]).unwrap();
    drop(pool.lock_growth().append(made));
    making.touch();
    other.join().unwrap();
}

/// Runs a model with one use broken.
fn run(broken: u8, model: fn()) -> Result<(), String> {
    sync::BROKEN.set(broken);
    let mut builder = loom::model::Builder::new();
    let is = |other: fn()| std::ptr::fn_addr_eq(model, other);
    builder.preemption_bound = if is(never_empty) {
        // The search for a moment without free slots is short. It takes many changes of thread to
        // fail.
        None
    } else if is(growth_beside_others) {
        // Three threads take long. The two models of growth with two threads go further.
        Some(2)
    } else {
        Some(3)
    };
    let result = catch_unwind(AssertUnwindSafe(|| builder.check(model)));
    sync::BROKEN.set(sync::NOTHING);
    result.map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"").to_string(),
    })
}

#[test]
fn three_threads_never_share_a_slot_and_lose_none() {
    run(sync::NOTHING, three_threads).unwrap();
}

#[test]
fn nobody_is_told_that_none_is_free_while_one_is() {
    run(sync::NOTHING, as_many_slots_as_are_held).unwrap();
    run(sync::NOTHING, never_empty).unwrap();
}

#[test]
fn threads_that_find_no_slots_at_once_grow_once() {
    run(sync::NOTHING, growth).unwrap();
}

#[test]
fn growing_beside_claims_and_releases_loses_nothing() {
    run(sync::NOTHING, growth_beside_a_claim).unwrap();
    run(sync::NOTHING, growth_beside_others).unwrap();
}

#[test]
fn a_pool_that_goes_takes_each_slot_after_its_last_holder() {
    run(sync::NOTHING, closing).unwrap();
}

#[test]
fn choosing_among_slots_takes_none_from_others() {
    run(sync::NOTHING, choosing).unwrap();
}

/// Expects the model to fail, and for this reason.
#[track_caller]
fn fails(broken: u8, model: fn(), reason: &str) {
    let message = run(broken, model).unwrap_err();
    assert!(message.contains(reason), "{message}");
}

#[test]
fn a_relaxed_release_fails() {
    fails(sync::RELEASE, three_threads, "Causality violation");
}

#[test]
fn a_relaxed_claim_fails() {
    fails(sync::CLAIM, three_threads, "Causality violation");
}

#[test]
fn a_relaxed_closing_fails() {
    fails(sync::CLOSE, closing, "Causality violation");
}

#[test]
fn a_relaxed_publication_of_a_segment_fails() {
    fails(sync::PUBLISH, growth_beside_others, "Causality violation");
    fails(sync::FIND_SEGMENT, growth_beside_others, "Causality violation");
}

#[test]
fn a_segment_published_before_it_is_made_fails() {
    fails(sync::NOTHING, published_before_it_is_made, "Causality violation");
}

#[test]
fn a_second_look_without_the_count_of_releases_fails() {
    fails(sync::COUNT, never_empty, "told that none is free");
}

#[test]
fn a_claim_that_is_not_seen_with_what_came_before_it_fails() {
    fails(sync::CLAIM_UNSEEN, never_empty, "told that none is free");
}
