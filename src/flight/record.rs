//! The record of one kind of work: its stream, its ticket and its event.
//!
//! An idle record covers no work. Any other record covers work on one stream. The work is known to
//! be finished once the stream's watermark reaches the record's ticket. Reading the watermark is
//! one load. If it is lower, the record queries its event or waits for it.
//!
//! A record that covers work and has no ticket is *open*. Its event is not recorded yet, so the
//! record also covers work that is sent to the stream later. [`Record::submit`] opens the record,
//! enqueues a transfer and closes the record. A record that was opened by [`Record::open_on`] alone
//! stays open until `is_finished`, `wait`, `order_before` or `close_if_open` closes it. If
//! recording the event fails, the record stays open, because the work may be queued.

use std::{mem, ptr};

use crate::cuda::context::Context;
use crate::cuda::event_handle::EventHandle;
use crate::error::{Result, reserve};
use crate::stream::options::WaitPolicy;
use crate::stream::stream::{EnteredStream, Stream};
use crate::stream::ticket::TicketCell;

/// The record of one kind of work.
pub(crate) struct Record {
    /// The record covers work, which may be finished. Only [`supersede`](Self::supersede) clears
    /// this.
    covers_work: bool,
    /// The stream of the newest work. It stays here after the work, because the next work often
    /// uses the same stream. If `covers_work`, the stream and the event for its wait policy exist.
    stream: Option<Stream>,
    /// The events of that stream's device.
    events: Events,
    /// The events of other devices. Pinned memory is portable, so streams of several devices may
    /// use one host side (`buffer/between`).
    other_events: Vec<Events>,
    ticket_cell: TicketCell,
}

/// The events of one device: one for each wait policy.
///
/// The first stream of a policy makes its event. A record keeps its events when streams of
/// different policies alternate.
#[derive(Default)]
struct Events {
    /// The device's context. `None` until the first event was asked for.
    context: Option<&'static Context>,
    device_default: Option<EventHandle>,
    blocking: Option<EventHandle>,
}

impl Events {
    /// Returns the event for the stream's wait policy.
    #[inline]
    fn for_stream(&self, stream: &Stream) -> Option<&EventHandle> {
        match stream.wait_policy() {
            WaitPolicy::DeviceDefault => self.device_default.as_ref(),
            WaitPolicy::Block => self.blocking.as_ref(),
        }
    }

    /// Returns `true` if these are the context's events, or nobody's yet.
    #[inline]
    fn are_of(&self, context: &'static Context) -> bool {
        self.context.is_none_or(|known| ptr::eq(known, context))
    }

    /// Makes the event for the stream's wait policy, if there is none. The stream is of these
    /// events' device.
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
            covers_work: false,
            stream: None,
            events: Events::default(),
            other_events: Vec::new(),
            ticket_cell: TicketCell::open(),
        }
    }

    /// Returns the stream and the event of the work, or `None` if it is known to be finished.
    ///
    /// Calls no CUDA.
    #[inline]
    fn pending_work(&self) -> Option<(&Stream, &EventHandle)> {
        if !self.covers_work {
            return None;
        }
        let stream = self.stream.as_ref()?;
        let event = self.events.for_stream(stream)?;
        match self.ticket_cell.ticket() {
            Some(ticket) if stream.tickets().is_complete(ticket) => None,
            _ => Some((stream, event)),
        }
    }

    /// Returns the ticket of the work. If the record is open, records its event first.
    ///
    /// `stream` and `event` come from [`pending_work`](Self::pending_work).
    fn close(&self, stream: &Stream, event: &EventHandle) -> Result<u64> {
        self.ticket_cell.resolve(stream.tickets(), || {
            // Records are opened on streams of CUDA alone. The CPU's have nothing to record.
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

    /// Queries the event and raises the watermark if the work is finished.
    ///
    /// Does nothing if the record is open or the work is known to be finished.
    pub(crate) fn poll(&self) -> Result<()> {
        match self.pending_work() {
            Some(_) if self.ticket_cell.ticket().is_some() => self.is_finished().map(drop),
            _ => Ok(()),
        }
    }

    /// Returns `true` if the record is open: it also covers work that is sent to the stream later.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.covers_work && self.ticket_cell.ticket().is_none()
    }

    /// Closes the record if it is open. If recording the event fails, the record stays open.
    ///
    /// The caller checks [`is_open`](Self::is_open) if a failure matters.
    #[inline]
    pub(crate) fn close_if_open(&self) {
        if let Some((stream, event)) = self.pending_work()
            && self.is_open()
        {
            let _ = self.close(stream, event);
        }
    }

    /// Returns `true` if the work is finished. Does not wait.
    ///
    /// If that is not known, queries the event. An open record is closed first.
    pub(crate) fn is_finished(&self) -> Result<bool> {
        let Some((stream, event)) = self.pending_work() else {
            return Ok(true);
        };
        let ticket = self.close(stream, event)?;
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
            Some((stream, event)) => self.wait_for_event(stream, event),
        }
    }

    #[cold]
    fn wait_for_event(&self, stream: &Stream, event: &EventHandle) -> Result<()> {
        let ticket = self.close(stream, event)?;
        event.synchronize()?;
        stream.tickets().complete(ticket);
        Ok(())
    }

    /// Makes later work of `entered` wait for the work of this record.
    ///
    /// The calling thread does not wait. On the record's own stream the order holds already.
    #[inline]
    pub(crate) fn order_before(&self, entered: &EnteredStream<'_>) -> Result<()> {
        match self.pending_work() {
            Some((stream, event)) if !stream.is(entered.stream()) => {
                self.close(stream, event)?;
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

    /// Makes the event on a device that the present events are not of. The present ones move to
    /// `other_events`, since a device's event cannot be recorded on a stream of another device
    /// ("CUDA Runtime API, `cudaEventRecord`").
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
        // The exchange comes last. If making the event fails, the record still covers the work of
        // the present events.
        others[index].make(entered)?;
        mem::swap(&mut self.events, &mut others[index]);
        Ok(())
    }

    /// Opens the record on the stream, so that it covers work that is sent there later.
    ///
    /// The caller has ordered the stream after the record's earlier work. So the new event also
    /// covers that work. On error the record still covers its earlier work.
    pub(crate) fn open_on(&mut self, entered: &EnteredStream<'_>) -> Result<()> {
        let stream = entered.stream();
        // This can fail, so it comes before all changes.
        self.make_event(entered)?;
        self.covers_work = true;
        self.ticket_cell.set_open();
        if self.stream.as_ref().is_none_or(|current| !current.is(stream)) {
            // The old stream is dropped after all changes. If this is the last handle of a borrowed
            // stream, its owner is dropped, too, and may panic.
            let _replaced = self.stream.replace(stream.clone());
        }
        Ok(())
    }

    /// Opens the record on the stream, enqueues a transfer there, and records the event behind it.
    ///
    /// If `enqueue` ran, the record covers the transfer, even if this returns an error.
    #[inline]
    pub(crate) fn submit(
        &mut self,
        entered: &EnteredStream<'_>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.open_on(entered)?;
        self.submit_open(entered, enqueue)
    }

    /// Like [`submit`](Self::submit), for a record that is open on the stream already.
    #[inline]
    pub(crate) fn submit_open(
        &mut self,
        entered: &EnteredStream<'_>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        debug_assert!(self.is_open(), "it is not open on this stream");
        let event = self.events.for_stream(entered.stream()).expect("made by `open_on`");
        let ticket = entered.stream().tickets().submit(enqueue, || entered.record(event))?;
        self.ticket_cell.set(ticket);
        Ok(())
    }

    /// Makes the record idle.
    ///
    /// The caller ensures that nothing needs the record any more. One of these holds: another
    /// record covers later work, which is ordered after this work; this work is finished; or the
    /// side is marked as unknown, so that its next use waits for the devices (`flight/exports`).
    #[inline]
    pub(crate) fn supersede(&mut self) {
        self.covers_work = false;
    }
}
