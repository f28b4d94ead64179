//! The record of one kind of use: the stream, the ticket, and the event that answers for them.
//!
//! A record is *idle*, or it is *pending*: it stands for work on a stream. Pending work is finished
//! once the stream's watermark reaches its ticket, which is one load, or once its event completes.
//! A record is *open* while it has no event. It then stands for everything that the stream is
//! given, and the event is recorded when somebody asks. A record also stays open if recording its
//! event failed, because the work may be queued.

use std::{mem, ptr};

use crate::cuda::context::Context;
use crate::cuda::event_handle::EventHandle;
use crate::error::{Result, reserve};
use crate::stream::options::WaitPolicy;
use crate::stream::stream::{EnteredStream, Stream};
use crate::stream::ticket::TicketCell;

/// The last use of one kind.
pub(crate) struct Record {
    pending: bool,
    // The stream of the last use, kept for the next one. A pending record has a stream, and the
    // event of that stream's wait policy.
    stream: Option<Stream>,
    /// The events of that stream's device.
    events: Events,
    /// The events of other devices, which streams of these devices used before.
    other_events: Vec<Events>,
    ticket_cell: TicketCell,
}

/// The events of one device: one for each wait policy, made when a stream of that policy is first
/// used. A record reuses its events when streams alternate.
#[derive(Default)]
struct Events {
    /// The device's context. `None` until there is an event.
    context: Option<&'static Context>,
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

    #[inline]
    fn are_of(&self, context: &'static Context) -> bool {
        self.context.is_none_or(|known| ptr::eq(known, context))
    }

    /// Makes the event for the stream, if there is none. The stream is of these events' device.
    fn make(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let stream = entered.stream();
        self.context = Some(entered.context());
        let event = match stream.wait_policy() {
            WaitPolicy::DeviceDefault => &mut self.device_default,
            WaitPolicy::Block => &mut self.blocking,
        };
        if event.is_none() {
            *event = Some(EventHandle::new(entered.context(), stream.event_flags())?);
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
            other_events: Vec::new(),
            ticket_cell: TicketCell::open(),
        }
    }

    /// The stream and the event of the pending work, or `None` if the work is known to be finished.
    /// Calls no CUDA.
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

    /// The ticket of the work. Records its event first if the record is open.
    fn ticket(&self, stream: &Stream, event: &EventHandle) -> Result<u64> {
        self.ticket_cell.resolve(stream.tickets(), || {
            let Some(entered) = stream.enter()? else {
                return Ok(());
            };
            entered.refuse_capture()?;
            entered.record(event)
        })
    }

    /// Returns `true` if the work is known to be finished. Calls no CUDA.
    #[inline]
    pub(crate) fn is_known_finished(&self) -> bool {
        self.pending_work().is_none()
    }

    /// Queries the event, if there is one, so that finished work is known to be finished.
    pub(crate) fn poll(&self) -> Result<()> {
        match self.pending_work() {
            Some(_) if self.ticket_cell.ticket().is_some() => self.is_finished().map(drop),
            _ => Ok(()),
        }
    }

    /// Returns `true` if the record stands for everything that the stream is given from now on.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.pending && self.ticket_cell.ticket().is_none()
    }

    /// Ends open use by recording an event. If that fails, the record stays open.
    #[inline]
    pub(crate) fn close_with_event(&self) {
        if let Some((stream, event)) = self.pending_work()
            && self.is_open()
        {
            let _ = self.ticket(stream, event);
        }
    }

    /// Returns `true` if the work is finished. Queries the event.
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

    /// Waits until the work is finished.
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

    /// Orders everything that the stream is given from now on after the work.
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

    /// Returns `true` if the last use was on this stream.
    pub(crate) fn is_on(&self, stream: &Stream) -> bool {
        self.stream.as_ref().is_some_and(|known| known.is(stream))
    }

    /// Makes the event for the stream. The events of the record then are those of its device.
    fn make_event(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        if self.events.are_of(entered.context()) {
            return self.events.make(entered);
        }
        self.make_event_of_other_device(entered)
    }

    /// The events of the device before are kept. A device's event cannot be recorded on a stream of
    /// another one ("CUDA Runtime API, `cudaEventRecord`").
    #[cold]
    fn make_event_of_other_device(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let others = &mut self.other_events;
        let known = others.iter().position(|events| events.are_of(entered.context()));
        let index = match known {
            Some(index) => index,
            None => {
                reserve(others, 1, entered.stream().device())?;
                others.push(Events::default());
                others.len() - 1
            }
        };
        // Exchanged last: until then the record may stand for work of the device before.
        others[index].make(entered)?;
        mem::swap(&mut self.events, &mut others[index]);
        Ok(())
    }

    /// Stands for everything that the stream is given from now on, and no longer for earlier work.
    /// The caller has ordered the stream after that work.
    pub(crate) fn open_on(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let stream = entered.stream();
        // Before anything changes, because it can fail.
        self.make_event(entered)?;
        self.pending = true;
        self.ticket_cell.set_open();
        if self.stream.as_ref().is_none_or(|known| !known.is(stream)) {
            // Dropped last: the last handle of a borrowed stream drops the owner, which may panic.
            let _before = self.stream.replace(stream.clone());
        }
        Ok(())
    }

    /// Enqueues a copy on the stream, and stands for it. Once the copy was tried, it counts as in
    /// flight, whatever this returns.
    #[inline]
    pub(crate) fn submit(
        &mut self,
        entered: &EnteredStream<'_>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.open_on(entered)?;
        self.submit_open(entered, enqueue)
    }

    /// As [`submit`](Self::submit), for a record that is open on the stream already.
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

    /// Becomes idle, because another record answers for the work: its own work comes later in
    /// stream order.
    #[inline]
    pub(crate) fn supersede(&mut self) {
        self.pending = false;
    }
}
