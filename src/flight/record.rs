//! What a buffer remembers of one kind of use: the stream, the ticket, and the event that answers for it.
//!
//! A record is *idle*, or it *stands* for work on a stream. Standing, it is finished once the stream's
//! watermark has reached its ticket, which costs one load to see, or once its event has. A record whose
//! event could not be recorded is lazy: the work may be queued, so it stands, and the event is recorded
//! when somebody asks.

use crate::error::Result;
use crate::stream::event::EventHandle;
use crate::stream::stream::{EnteredStream, Stream, WaitPolicy};
use crate::stream::ticket::TicketCell;

pub(crate) struct Record {
    pending: bool,
    // The stream of the last use, kept for the next one. It is there where the record stands, and
    // so is the event of its wait policy, which answers for it.
    stream: Option<Stream>,
    events: Events,
    ticket_cell: TicketCell,
}

/// An event for each wait policy, made when a stream of that policy is first used: a record whose
/// streams alternate makes no event for each use.
#[derive(Default)]
struct Events {
    device_default: Option<EventHandle>,
    blocking: Option<EventHandle>,
}

impl Events {
    #[inline]
    fn of(&self, stream: &Stream) -> Option<&EventHandle> {
        match stream.wait_policy() {
            WaitPolicy::DeviceDefault => self.device_default.as_ref(),
            WaitPolicy::Block => self.blocking.as_ref(),
        }
    }

    /// Makes sure that there is one for the stream.
    fn make(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let stream = entered.stream();
        let event = match stream.wait_policy() {
            WaitPolicy::DeviceDefault => &mut self.device_default,
            WaitPolicy::Block => &mut self.blocking,
        };
        if event.is_none() {
            *event = Some(EventHandle::new(entered, stream.event_flags())?);
        }
        Ok(())
    }
}

impl Record {
    pub(crate) fn idle() -> Record {
        Record {
            pending: false,
            stream: None,
            events: Events::default(),
            ticket_cell: TicketCell::open(),
        }
    }

    /// The work that stands, unless it is known to have finished. Asks nobody.
    #[inline]
    fn pending_work(&self) -> Option<(&Stream, &EventHandle)> {
        if !self.pending {
            return None;
        }
        let stream = self.stream.as_ref()?;
        let event = self.events.of(stream)?;
        match self.ticket_cell.ticket() {
            Some(ticket) if stream.tickets().is_complete(ticket) => None,
            _ => Some((stream, event)),
        }
    }

    /// Makes sure that an event stands behind the work, and gives its ticket.
    fn ticket(&self, stream: &Stream, event: &EventHandle) -> Result<u64> {
        self.ticket_cell.resolve(stream.tickets(), || {
            let Some(entered) = stream.enter()? else {
                return Ok(());
            };
            entered.refuse_capture()?;
            entered.record(event)
        })
    }

    /// Whether the work is known to have finished, without asking anybody.
    #[inline]
    pub(crate) fn is_known_finished(&self) -> bool {
        self.pending_work().is_none()
    }

    /// Asks for the event, if there is one yet, so that what has finished is known to have.
    pub(crate) fn poll(&self) -> Result<()> {
        match self.pending_work() {
            Some(_) if self.ticket_cell.ticket().is_some() => self.is_finished().map(drop),
            _ => Ok(()),
        }
    }

    /// Whether it stands for all that the stream is sent from now on.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.pending && self.ticket_cell.ticket().is_none()
    }

    /// Lazy work ends here: an event is recorded behind it now. Where it cannot be, the record stays lazy.
    #[inline]
    pub(crate) fn close_with_event(&self) {
        if let Some((stream, event)) = self.pending_work()
            && self.is_open()
        {
            let _ = self.ticket(stream, event);
        }
    }

    /// Whether the work has finished.
    pub(crate) fn is_finished(&self) -> Result<bool> {
        let Some((stream, event)) = self.pending_work() else {
            return Ok(true);
        };
        let ticket = self.ticket(stream, event)?;
        let finished = event.is_complete()?;
        if finished {
            stream.tickets().complete(ticket);
        }
        Ok(finished)
    }

    /// Waits until the work has finished.
    #[inline]
    pub(crate) fn wait(&self) -> Result<()> {
        match self.pending_work() {
            None => Ok(()),
            Some((stream, event)) => self.wait_for(stream, event),
        }
    }

    #[cold]
    fn wait_for(&self, stream: &Stream, event: &EventHandle) -> Result<()> {
        let ticket = self.ticket(stream, event)?;
        event.synchronize()?;
        stream.tickets().complete(ticket);
        Ok(())
    }

    /// Makes what is sent to the stream from now on wait for the work.
    #[inline]
    pub(crate) fn order_before(&self, entered: &EnteredStream<'_>) -> Result<()> {
        match self.pending_work() {
            Some((other, event)) if !other.is(entered.stream()) => {
                self.ticket(other, event)?;
                entered.wait(event)
            }
            _ => Ok(()),
        }
    }

    /// The record stands, lazily, for all that is sent to the stream from now on, and no longer for what
    /// it stood for: order that before first.
    pub(crate) fn open_on(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let stream = entered.stream();
        // Before anything changes, since this may fail.
        self.events.make(entered)?;
        self.pending = true;
        self.ticket_cell.set_open();
        if self.stream.as_ref().is_none_or(|known| !known.is(stream)) {
            // Dropped last: with the last handle of a borrowed stream goes its owner, which may panic.
            let _before = self.stream.replace(stream.clone());
        }
        Ok(())
    }

    /// Enqueues a transfer on the stream that the record then stands for. Whatever this answers after the
    /// transfer was tried, it is treated as in flight.
    #[inline]
    pub(crate) fn submit(
        &mut self,
        entered: &EnteredStream<'_>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.open_on(entered)?;
        self.submit_open(entered, enqueue)
    }

    /// [`submit`](Self::submit), where the record stands for the stream already.
    #[inline]
    pub(crate) fn submit_open(
        &mut self,
        entered: &EnteredStream<'_>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        debug_assert!(self.is_open(), "it is not open on this stream");
        let event = self.events.of(entered.stream()).expect("made by `open_on`");
        let ticket = entered.stream().tickets().submit(enqueue, || entered.record(event))?;
        self.ticket_cell.set(ticket);
        Ok(())
    }

    /// The record stands for nothing: another one, enqueued after it, answers for its work.
    #[inline]
    pub(crate) fn supersede(&mut self) {
        self.pending = false;
    }
}
