//! Tickets of a stream, which show finished transfers without a call of the driver.
//!
//! A stream has two counters. `submitted` counts the tickets taken. `completed` is the watermark:
//! every transfer with a ticket at or below it has finished. Each transfer takes three steps,
//! always in this order, on whichever thread:
//!
//! 1. enqueue the copy;
//! 2. take a ticket, `submitted.fetch_add(1)`;
//! 3. record an event behind it.
//!
//! A thread that sees the event of ticket `t` finished raises `completed` to `t`. That is right for
//! every other transfer at or below `t` too, because a stream runs in order:
//!
//! | copy with ticket `u <= t` | ticket `t` | event of `t` |
//! |---|---|---|
//! | enqueued before `u` was taken (1, 2) | taken after `u` (the counter) | recorded after `t` was taken (2, 3) |
//!
//! A copy or an event that went into a stream's capture did not run. The table does not cover it:
//! [`EnteredStream::record`](crate::stream::stream::EnteredStream::record) fails the third step
//! then.
//!
//! A ticket taken before the copy, or after the event, breaks the table's first or last column.
//!
//! The read-modify-writes of `submitted` are `AcqRel`. So the order of tickets is also an order of
//! the calls around them. `completed` is raised with `Release` and read with `Acquire`. So a thread
//! that finds a transfer finished may touch its memory. `tests/models/ticket_model.rs` runs this
//! file under loom, and fails without each of these orderings.

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

    /// Enqueues work and records an event behind it, in the order that the proof needs. Returns the
    /// event's ticket.
    ///
    /// After an error, the work may be queued without an event behind it.
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

    /// Takes the next ticket. Tickets begin at 1, so 0 is below every watermark.
    #[inline]
    pub(crate) fn take(&self) -> u64 {
        self.submitted.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The newest ticket.
    ///
    /// The caller reads it before it synchronizes or queries the stream. If the stream is then
    /// finished, so is every ticket up to this one.
    pub(crate) fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Acquire)
    }

    /// Raises the watermark to `ticket`, if it is lower.
    ///
    /// The caller has seen that the ticket's event, or the whole stream, is finished.
    pub(crate) fn complete(&self, ticket: u64) {
        // ThreadSanitizer does not see `fetch_max`, so this is a loop. If another thread was ahead,
        // it writes nothing.
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

    /// Returns `true` if the transfer of `ticket` is known to be finished.
    #[inline]
    pub(crate) fn is_complete(&self, ticket: u64) -> bool {
        self.completed.load(Ordering::Acquire) >= ticket
    }
}

/// The ticket of one record, if it has one.
///
/// A cell without a ticket is *open*. The stream may still use the memory, and no event is recorded
/// behind that use yet. [`resolve`](Self::resolve) gives an open cell a ticket, once.
#[derive(Debug)]
pub(crate) struct TicketCell {
    /// 0 while open.
    ticket: AtomicU64,
    resolving: Mutex<()>,
}

impl TicketCell {
    pub(crate) fn open() -> TicketCell {
        TicketCell { ticket: AtomicU64::new(0), resolving: Mutex::new(()) }
    }

    /// Sets the ticket.
    #[inline]
    pub(crate) fn set(&mut self, ticket: u64) {
        // Exclusive access orders this store. `get_mut` would say so, but loom's atomics lack it.
        self.ticket.store(ticket, Ordering::Relaxed);
    }

    /// Makes the cell open.
    #[inline]
    pub(crate) fn set_open(&mut self) {
        self.set(0);
    }

    /// The ticket, or `None` if the cell is open.
    #[inline]
    pub(crate) fn ticket(&self) -> Option<u64> {
        Some(self.ticket.load(Ordering::Acquire)).filter(|ticket| *ticket != 0)
    }

    /// Returns the ticket. If the cell is open, first takes a ticket and records an event.
    ///
    /// The event covers all work that was enqueued before this call. Concurrent calls record one
    /// event. On error the cell stays open.
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
