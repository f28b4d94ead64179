//! Model checks of the order between copy, ticket and event.
//!
//! loom runs the shipped `src/stream/ticket.rs` through every relevant interleaving. The same models fail
//! if the order or a memory ordering is broken. The model of CUDA is as weak as the proof allows.
//! Work that one thread enqueues becomes visible to another only through the tickets' own orderings.

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// Stands in for `src/sync.rs`: loom's primitives, with a switch that weakens one use.
mod sync {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::Ordering;
    use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

    pub(crate) static WEAKENED: AtomicU8 = AtomicU8::new(NOTHING);
    pub(crate) const NOTHING: u8 = 0;
    pub(crate) const FETCH_ADD: u8 = 1;
    pub(crate) const RAISE: u8 = 2;
    pub(crate) const LOAD: u8 = 3;

    fn ordering(this: u8, shipped: Ordering) -> Ordering {
        match WEAKENED.load(SeqCst) == this {
            true => Ordering::Relaxed,
            false => shipped,
        }
    }

    #[derive(Debug)]
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }
        pub(crate) fn fetch_add(&self, value: u64, shipped: Ordering) -> u64 {
            self.0.fetch_add(value, ordering(FETCH_ADD, shipped))
        }
        pub(crate) fn compare_exchange_weak(
            &self,
            seen: u64,
            value: u64,
            shipped: Ordering,
            failed: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange_weak(seen, value, ordering(RAISE, shipped), failed)
        }
        pub(crate) fn load(&self, shipped: Ordering) -> u64 {
            self.0.load(ordering(LOAD, shipped))
        }
        pub(crate) fn store(&self, value: u64, shipped: Ordering) {
            self.0.store(value, shipped);
        }
    }
}

#[path = "../../src/stream/ticket.rs"]
mod ticket;

use ticket::{TicketCell, Tickets};

/// A piece of work on the stream, and the host memory that it writes.
struct Copy {
    enqueued: AtomicBool,
    finished: AtomicBool,
    host: UnsafeCell<u32>,
    // Only a thread that sees an event finished is ordered after the device's work.
    running: Mutex<()>,
}

impl Copy {
    fn new() -> Copy {
        Copy {
            enqueued: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            host: UnsafeCell::new(0),
            running: Mutex::new(()),
        }
    }
}

/// One stream with two copies on it, their events, and the shipped counters.
struct Stream {
    tickets: Tickets,
    copies: [Copy; 2],
}

/// An event: it stands for the copies that were enqueued when it was recorded.
#[derive(Clone, std::marker::Copy, Default)]
struct Event([bool; 2]);

type Nothing = std::convert::Infallible;

impl Stream {
    fn new() -> Arc<Stream> {
        Arc::new(Stream { tickets: Tickets::new(), copies: [Copy::new(), Copy::new()] })
    }

    fn enqueue(&self, copy: usize) {
        self.copies[copy].enqueued.store(true, Ordering::Relaxed);
    }

    fn record(&self) -> Event {
        Event([0, 1].map(|copy| self.copies[copy].enqueued.load(Ordering::Relaxed)))
    }

    /// The event is seen finished: the copies that it stands for have run.
    fn finish(&self, event: Event) {
        for (copy, covered) in self.copies.iter().zip(event.0) {
            if !covered {
                continue;
            }
            let _running = copy.running.lock().unwrap();
            if !copy.finished.load(Ordering::Relaxed) {
                // SAFETY: loom checks that no other thread reads.
                copy.host.with_mut(|host| unsafe { *host = 7 });
                copy.finished.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Reads as a thread does that found the copy finished.
    fn look(&self, copy: usize) {
        assert!(self.copies[copy].finished.load(Ordering::Relaxed), "the copy has not run");
        // SAFETY: loom checks that no thread writes.
        self.copies[copy].host.with(|host| assert_eq!(unsafe { *host }, 7));
    }

    /// The three steps, as shipped.
    fn submit(&self, copy: usize) -> (u64, Event) {
        let event = std::cell::Cell::new(Event::default());
        let enqueue = || {
            self.enqueue(copy);
            Ok::<(), Nothing>(())
        };
        let Ok(ticket) = self.tickets.submit(enqueue, || {
            event.set(self.record());
            Ok(())
        });
        (ticket, event.get())
    }

    fn ticket_before_copy(&self, copy: usize) -> (u64, Event) {
        let ticket = self.tickets.take();
        self.enqueue(copy);
        (ticket, self.record())
    }

    fn ticket_after_event(&self, copy: usize) -> (u64, Event) {
        self.enqueue(copy);
        let event = self.record();
        (self.tickets.take(), event)
    }

    fn is_complete(&self, copy: usize, ticket: u64) -> bool {
        let complete = self.tickets.is_complete(ticket);
        if complete {
            self.look(copy);
        }
        complete
    }
}

type Submit = fn(&Stream, usize) -> (u64, Event);

/// Two threads share a stream; one sees its event finish, the other asks only the watermark.
fn threads_on_one_stream(submit: Submit) {
    let stream = Stream::new();
    let other = Arc::clone(&stream);
    let waiter = thread::spawn(move || {
        let (ticket, event) = submit(&other, 0);
        other.finish(event);
        other.tickets.complete(ticket);
        assert!(other.is_complete(0, ticket));
    });
    let (ticket, _) = submit(&stream, 1);
    stream.is_complete(1, ticket);
    waiter.join().unwrap();
    stream.is_complete(1, ticket);
}

/// One thread synchronises the stream while another enqueues.
fn synchronising(submit: Submit) {
    let stream = Stream::new();
    let other = Arc::clone(&stream);
    let synchroniser = thread::spawn(move || {
        // As `Stream::synchronize` does: the counter first.
        let submitted = other.tickets.submitted();
        other.finish(other.record());
        other.tickets.complete(submitted);
    });
    let (ticket, _) = submit(&stream, 0);
    stream.is_complete(0, ticket);
    synchroniser.join().unwrap();
    stream.is_complete(0, ticket);
}

/// A buffer is used twice, and its event is recorded twice. A watermark that stands for the first
/// use must not stand for the second.
fn recording_again(submit: Submit) {
    let stream = Stream::new();
    let other = Arc::clone(&stream);
    let mut cell = TicketCell::open();
    let (first, event) = submit(&stream, 0);
    cell.set(first);
    assert_eq!(cell.ticket(), Some(first));
    let waiter = thread::spawn(move || {
        other.finish(event);
        other.tickets.complete(first);
        other.is_complete(0, first);
    });
    // As a record does: open until the new ticket is known.
    cell.set_open();
    assert_eq!(cell.ticket(), None);
    let (second, event) = submit(&stream, 1);
    cell.set(second);
    assert!(second > first);
    stream.is_complete(0, first);
    stream.is_complete(1, second);
    waiter.join().unwrap();
    stream.finish(event);
    stream.tickets.complete(second);
    assert!(stream.is_complete(1, second));
}

/// An open cell stands for a kernel that was enqueued without a ticket. Two threads that share the
/// buffer ask about it. At the same time a third thread's transfer on the stream comes and
/// finishes.
fn open_records(submit: Submit) {
    let stream = Stream::new();
    let cell = Arc::new((TicketCell::open(), Mutex::new(None)));
    // The kernel, by the thread that holds the buffer.
    stream.enqueue(0);
    assert!(cell.0.ticket().is_none());
    let ask = |stream: &Stream, cell: &(TicketCell, Mutex<Option<Event>>)| {
        let Ok(ticket) = cell.0.resolve(&stream.tickets, || {
            let mut event = cell.1.lock().unwrap();
            assert!(event.is_none(), "recorded twice");
            *event = Some(stream.record());
            Ok::<(), Nothing>(())
        });
        ticket
    };
    let (other, shared) = (Arc::clone(&stream), Arc::clone(&cell));
    let asking = thread::spawn(move || {
        let ticket = ask(&other, &shared);
        other.is_complete(0, ticket);
        let event = shared.1.lock().unwrap().unwrap();
        other.finish(event);
        other.tickets.complete(ticket);
        assert!(other.is_complete(0, ticket));
    });
    let other = Arc::clone(&stream);
    let transferring = thread::spawn(move || {
        let (ticket, event) = submit(&other, 1);
        other.finish(event);
        other.tickets.complete(ticket);
    });
    let ticket = ask(&stream, &cell);
    stream.is_complete(0, ticket);
    asking.join().unwrap();
    transferring.join().unwrap();
    assert_eq!(cell.0.ticket(), Some(ticket));
    assert!(stream.is_complete(0, ticket));
}

/// Runs a model with one use weakened. Models take turns, because they share the switch.
fn run(weakened: u8, model: fn(Submit), submit: Submit) -> Result<(), String> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(|poison| poison.into_inner());
    sync::WEAKENED.store(weakened, std::sync::atomic::Ordering::SeqCst);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    let result = catch_unwind(AssertUnwindSafe(|| builder.check(move || model(submit))));
    sync::WEAKENED.store(sync::NOTHING, std::sync::atomic::Ordering::SeqCst);
    result.map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"").to_string(),
    })
}

const MODELS: [fn(Submit); 4] =
    [threads_on_one_stream, synchronising, recording_again, open_records];

#[test]
fn the_shipped_order_holds() {
    for model in MODELS {
        run(sync::NOTHING, model, Stream::submit).unwrap();
    }
}

/// Expects the model to fail for this reason: a thread takes a copy for finished, and cannot see
/// that it is.
#[track_caller]
fn fails(weakened: u8, model: fn(Submit), submit: Submit) {
    let message = run(weakened, model, submit).unwrap_err();
    assert!(message.contains("the copy has not run"), "{message}");
}

#[test]
fn a_ticket_taken_before_the_copy_fails() {
    fails(sync::NOTHING, threads_on_one_stream, Stream::ticket_before_copy);
    fails(sync::NOTHING, synchronising, Stream::ticket_before_copy);
}

#[test]
fn a_ticket_taken_after_the_event_fails() {
    fails(sync::NOTHING, threads_on_one_stream, Stream::ticket_after_event);
}

#[test]
fn a_relaxed_ticket_counter_fails() {
    fails(sync::FETCH_ADD, threads_on_one_stream, Stream::submit);
}

#[test]
fn a_watermark_raised_relaxed_fails() {
    fails(sync::RAISE, threads_on_one_stream, Stream::submit);
}

#[test]
fn a_watermark_read_relaxed_fails() {
    fails(sync::LOAD, threads_on_one_stream, Stream::submit);
    fails(sync::LOAD, synchronising, Stream::submit);
}
