//! Streams as queues, each with a thread that works it off.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use cudart_sys::cudaStreamCaptureMode as Mode;
use cudart_sys::cudaStreamCaptureStatus;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::capture::{Capture, Mark, this_thread};
use crate::context;
use crate::random::random;
use crate::status::{Result, Status};

type Work = Box<dyn FnOnce() + Send>;

/// How much a stream's queue holds. CUDA does not document it; about as much is usual.
const MOST_QUEUED: usize = 1024;

/// A stream: a queue of work and the thread that runs it, in order and late.
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Does not wait for the legacy stream, nor the legacy stream for it.
    pub(crate) non_blocking: bool,
    pub(crate) priority: i32,
    pub(crate) legacy: bool,
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Default)]
pub(crate) struct Queue {
    work: VecDeque<Work>,
    submitted: u64,
    done: u64,
    capture: Option<Mark>,
    closed: bool,
}

impl Queue {
    /// The capture that the stream is in. Streams that joined one leave it when it ends.
    pub(crate) fn capture(&mut self) -> Option<&mut Mark> {
        if self.capture.as_ref().is_some_and(|mark| mark.capture.ended.load(Ordering::SeqCst)) {
            self.capture = None;
        }
        self.capture.as_mut()
    }

    /// The same as [`capture`](Self::capture), with an error for an invalid capture.
    pub(crate) fn valid_capture(&mut self) -> Result<Option<&mut Mark>> {
        match self.capture() {
            Some(mark) if !mark.capture.is_valid() => {
                Err(Status::cudaErrorStreamCaptureInvalidated)
            }
            mark => Ok(mark),
        }
    }
}

/// A point in a stream's work.
#[derive(Clone)]
pub(crate) struct Point {
    pub(crate) stream: Arc<Stream>,
    pub(crate) position: u64,
}

impl Point {
    pub(crate) fn is_reached(&self) -> bool {
        self.stream.queue().done >= self.position
    }

    /// Waits, for a call that returns only when its work is done.
    pub(crate) fn wait_until_done(self) -> Result {
        self.wait();
        context::sticky(self.stream.device).map_or(Ok(()), Err)
    }

    pub(crate) fn wait(&self) {
        let mut queue = self.stream.queue();
        while queue.done < self.position {
            self.stream.moved.wait(&mut queue);
        }
    }
}

impl Stream {
    pub(crate) fn new(
        device: usize,
        non_blocking: bool,
        priority: i32,
        legacy: bool,
    ) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            device,
            non_blocking,
            priority,
            legacy,
            queue: Mutex::default(),
            moved: Condvar::new(),
        });
        let worker = Arc::clone(&stream);
        thread::spawn(move || worker.work_off());
        stream
    }

    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    pub(crate) fn work_off(&self) {
        loop {
            let mut queue = self.queue();
            let work = loop {
                match queue.work.pop_front() {
                    Some(work) => break work,
                    None if queue.closed => return,
                    None => {
                        self.moved.wait(&mut queue);
                    }
                }
            };
            drop(queue);
            // Mostly a moment, at times long enough for other threads to get far ahead.
            match random() % 16 {
                0 => thread::sleep(Duration::from_micros(random() % 300)),
                1..4 => thread::yield_now(),
                _ => {}
            }
            work();
            self.queue().done += 1;
            self.moved.notify_all();
        }
    }

    /// Waits for space in the queue: "any CUDA API call may block [...] for [...] unavailability of
    /// internal resources" ("CUDA Runtime API, API synchronization behavior").
    pub(crate) fn room(&self) -> MutexGuard<'_, Queue> {
        let mut queue = self.queue();
        while queue.work.len() >= MOST_QUEUED {
            self.moved.wait(&mut queue);
        }
        queue
    }

    /// Queues work outside a capture.
    pub(crate) fn push(
        self: &Arc<Self>,
        mut queue: MutexGuard<'_, Queue>,
        before: Vec<Point>,
        work: impl FnOnce() + Send + 'static,
    ) -> Point {
        let (device, breaks) = (self.device, context::breaks(self.device));
        queue.work.push_back(Box::new(move || {
            // This also ends if a context breaks, since running work ends then.
            before.iter().for_each(Point::wait);
            // A broken context begins nothing any more.
            if context::sticky(device).is_none() && context::breaks(device) == breaks {
                work();
            }
        }));
        queue.submitted += 1;
        let position = queue.submitted;
        drop(queue);
        self.moved.notify_all();
        Point { stream: Arc::clone(self), position }
    }

    /// Orders later work after a point of a capture. The stream joins that capture.
    pub(crate) fn join(self: &Arc<Self>, event: Mark) -> Result {
        if self.legacy {
            event.capture.invalidate();
            return Err(Status::cudaErrorStreamCaptureImplicit);
        }
        if event.capture.ended.load(Ordering::SeqCst) {
            return Err(Status::cudaErrorInvalidValue);
        }
        if !event.capture.is_valid() {
            return Err(Status::cudaErrorStreamCaptureInvalidated);
        }
        let mut queue = self.queue();
        match queue.valid_capture()? {
            Some(mark) if mark.is_of(&event.capture) => mark.before.extend(event.before),
            Some(mark) => {
                mark.capture.invalidate();
                event.capture.invalidate();
                return Err(Status::cudaErrorStreamCaptureMerge);
            }
            None => queue.capture = Some(event),
        }
        Ok(())
    }

    /// Behind everything that was queued so far.
    pub(crate) fn end(self: &Arc<Self>) -> Point {
        Point { stream: Arc::clone(self), position: self.queue().submitted }
    }

    pub(crate) fn capture_status(&self) -> cudaStreamCaptureStatus {
        match self.queue().capture() {
            None => cudaStreamCaptureStatus::cudaStreamCaptureStatusNone,
            Some(mark) if mark.capture.is_valid() => {
                cudaStreamCaptureStatus::cudaStreamCaptureStatusActive
            }
            Some(_) => cudaStreamCaptureStatus::cudaStreamCaptureStatusInvalidated,
        }
    }

    pub(crate) fn begin_capture(self: &Arc<Self>, mode: Mode) -> Result {
        if self.legacy {
            return Err(Status::cudaErrorStreamCaptureUnsupported);
        }
        let mut queue = self.queue();
        if queue.capture().is_some() {
            return Err(Status::cudaErrorIllegalState);
        }
        let capture = Arc::new(Capture {
            mode,
            thread: this_thread(),
            origin: Arc::as_ptr(self).addr(),
            valid: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            nodes: AtomicU64::new(0),
        });
        queue.capture = Some(Mark { capture, before: BTreeSet::new() });
        Ok(())
    }

    pub(crate) fn end_capture(self: &Arc<Self>) -> Result {
        let mut queue = self.queue();
        let Some(mark) = queue.capture() else {
            return Err(Status::cudaErrorIllegalState);
        };
        let capture = &mark.capture;
        if capture.origin != Arc::as_ptr(self).addr() {
            capture.invalidate();
            return Err(Status::cudaErrorStreamCaptureUnmatched);
        }
        if capture.mode != Mode::cudaStreamCaptureModeRelaxed && capture.thread != this_thread() {
            // The capture ends in this case, too, as on an H200.
            capture.ended.store(true, Ordering::SeqCst);
            return Err(Status::cudaErrorStreamCaptureWrongThread);
        }
        capture.ended.store(true, Ordering::SeqCst);
        if !capture.is_valid() {
            return Err(Status::cudaErrorStreamCaptureInvalidated);
        }
        // All work of joined streams must come before the end.
        match capture.nodes.load(Ordering::SeqCst) == mark.before.len() as u64 {
            true => Ok(()),
            false => Err(Status::cudaErrorStreamCaptureUnjoined),
        }
    }

    pub(crate) fn close(&self) {
        self.queue().closed = true;
        self.moved.notify_all();
    }
}
