//! Which transfers of a stream have finished, answered without asking the driver.
//!
//! A stream has two counters. `submitted` counts tickets taken, `completed` is the watermark: every
//! transfer with a ticket at or below it has finished. A transfer goes through three steps, always in
//! this order, whichever threads share the stream:
//!
//! 1. enqueue the copy;
//! 2. take a ticket, `submitted.fetch_add(1)`;
//! 3. record an event behind it.
//!
//! Whoever sees the event of ticket `t` finished raises `completed` to `t`. That is right for every
//! other transfer at or below `t` too, because a stream runs in order:
//!
//! | copy with ticket `u <= t` | ticket `t` | event of `t` |
//! |---|---|---|
//! | enqueued before `u` was taken (1, 2) | taken after `u` (the counter) | recorded after `t` was taken (2, 3) |
//!
//! A copy or an event that went into a stream's capture did not run, and the table says nothing
//! about it: [`EnteredStream::record`](crate::stream::stream::EnteredStream::record) refuses to be the
//! third step then.
//!
//! Taking the ticket before the copy, or after the event, breaks the table's first or last column. The
//! read-modify-writes of `submitted` are `AcqRel`, so that the order of tickets is an order of the calls
//! around them; `completed` is raised with `Release` and read with `Acquire`, so that whoever finds a
//! transfer finished may touch its memory. `tests/models/ticket_model.rs` runs this file under loom and shows
//! what goes wrong without each of these.

use crate::sync::{AtomicU64, Mutex, Ordering};

/// The counters of one stream.
#[derive(Debug)]
pub(crate) struct Tickets {
    submitted: AtomicU64,
    completed: AtomicU64,
}

impl Tickets {
    pub(crate) fn new() -> Tickets {
        Tickets { submitted: AtomicU64::new(0), completed: AtomicU64::new(0) }
    }

    /// Enqueues work and records an event behind it, in the order that the proof needs. The answer is
    /// the ticket that the event answers for. On an error nothing may be concluded about the work: it
    /// may be queued, and no event stands behind it.
    #[inline]
    pub(crate) fn submit<E>(
        &self,
        enqueue: impl FnOnce() -> Result<(), E>,
        record: impl FnOnce() -> Result<(), E>,
    ) -> Result<u64, E> {
        enqueue()?;
        let ticket = self.take();
        record()?;
        Ok(ticket)
    }

    /// Tickets begin at 1: 0 is below every watermark.
    #[inline]
    pub(crate) fn take(&self) -> u64 {
        self.submitted.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The newest ticket. Read *before* the stream is synchronised: that covers all tickets up to it.
    pub(crate) fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Acquire)
    }

    /// Raises the watermark: the event of `ticket`, or the whole stream up to it, was seen finished.
    pub(crate) fn complete(&self, ticket: u64) {
        // Not `fetch_max`, which ThreadSanitizer does not see; and where another thread was ahead, nothing
        // is written.
        let mut seen = self.completed.load(Ordering::Relaxed);
        while seen < ticket {
            let raised = self.completed.compare_exchange_weak(
                seen,
                ticket,
                Ordering::Release,
                Ordering::Relaxed,
            );
            match raised {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Whether the transfer of `ticket` is known to have finished. `false` means: not known.
    #[inline]
    pub(crate) fn is_complete(&self, ticket: u64) -> bool {
        self.completed.load(Ordering::Acquire) >= ticket
    }
}

/// The ticket of one record, or *lazy*: the stream may use the memory from now on, and no event has been
/// recorded behind that yet. A lazy stamp is never complete; whoever needs to know resolves it, once.
#[derive(Debug)]
pub(crate) struct TicketCell {
    /// 0 while lazy.
    ticket: AtomicU64,
    resolving: Mutex<()>,
}

impl TicketCell {
    pub(crate) fn open() -> TicketCell {
        TicketCell { ticket: AtomicU64::new(0), resolving: Mutex::new(()) }
    }

    /// Makes the stamp that of `ticket`.
    #[inline]
    pub(crate) fn set(&mut self, ticket: u64) {
        // Exclusive access orders this; `get_mut` would say so, but loom's atomics have none.
        self.ticket.store(ticket, Ordering::Relaxed);
    }

    /// Makes the stamp lazy.
    #[inline]
    pub(crate) fn set_open(&mut self) {
        self.set(0);
    }

    #[inline]
    pub(crate) fn ticket(&self) -> Option<u64> {
        Some(self.ticket.load(Ordering::Acquire)).filter(|ticket| *ticket != 0)
    }

    /// The ticket; a lazy stamp first gets one, with an event recorded now. The event covers everything
    /// that was enqueued before this call, hence all that the lazy stamp stood for. Threads that come
    /// at once record once.
    pub(crate) fn resolve<E>(
        &self,
        tickets: &Tickets,
        record: impl FnOnce() -> Result<(), E>,
    ) -> Result<u64, E> {
        if let Some(ticket) = self.ticket() {
            return Ok(ticket);
        }
        let _resolving = self.resolving.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(ticket) = self.ticket() {
            return Ok(ticket);
        }
        let ticket = tickets.submit(|| Ok(()), record)?;
        self.ticket.store(ticket, Ordering::Release);
        Ok(ticket)
    }
}
