//! Streams as threads, events, and stream capture.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cudart_sys::cudaStreamCaptureMode as Mode;
use cudart_sys::cudaStreamCaptureStatus;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::context;
use crate::control::{self, Kind};
use crate::{Result, Status};

type Work = Box<dyn FnOnce() + Send>;

/// A stream: a queue, and a thread that works it off in order, late.
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Does not wait for the legacy stream, nor the legacy stream for it.
    pub(crate) non_blocking: bool,
    pub(crate) priority: i32,
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    submitted: u64,
    done: u64,
    capture: Option<Capture>,
    closed: bool,
}

struct Capture {
    mode: Mode,
    valid: bool,
    /// As `this_thread` says.
    thread: usize,
}

/// A point in a stream's work.
#[derive(Clone)]
pub(crate) struct Point {
    stream: Arc<Stream>,
    position: u64,
}

impl Point {
    fn is_reached(&self) -> bool {
        self.stream.queue().done >= self.position
    }

    /// Waits, for a call that returns only when its work is done.
    pub(crate) fn wait_for(self) -> Result {
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
    pub(crate) fn new(device: usize, non_blocking: bool, priority: i32) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            device,
            non_blocking,
            priority,
            queue: Mutex::default(),
            moved: Condvar::new(),
        });
        let worker = Arc::clone(&stream);
        thread::spawn(move || worker.work_off());
        stream
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    fn work_off(&self) {
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
            match control::random() % 16 {
                0 => thread::sleep(Duration::from_micros(control::random() % 300)),
                1..4 => thread::yield_now(),
                _ => {}
            }
            work();
            self.queue().done += 1;
            self.moved.notify_all();
        }
    }

    /// Queues work behind what is there. While the stream is in capture, work goes into the graph instead,
    /// which nobody runs here.
    pub(crate) fn enqueue(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) -> Result<Point> {
        self.enqueue_behind(None, work)
    }

    /// As [`enqueue`](Self::enqueue), and behind a point of another stream.
    fn enqueue_behind(
        self: &Arc<Self>,
        point: Option<Point>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<Point> {
        let mut others = others_first(self);
        others.extend(point);
        let mut queue = self.queue();
        if let Some(capture) = &queue.capture {
            return match capture.valid {
                true => Ok(Point { stream: Arc::clone(self), position: 0 }),
                false => Err(Status::cudaErrorStreamCaptureInvalidated),
            };
        }
        let (device, breaks) = (self.device, context::breaks(self.device));
        queue.work.push_back(Box::new(move || {
            // Also where the context broke, and what runs there comes to its end.
            others.iter().for_each(Point::wait);
            // A broken context begins nothing any more.
            if context::sticky(device).is_none() && context::breaks(device) == breaks {
                work();
            }
        }));
        queue.submitted += 1;
        let position = queue.submitted;
        drop(queue);
        self.moved.notify_all();
        Ok(Point { stream: Arc::clone(self), position })
    }

    /// Behind everything that was queued so far.
    pub(crate) fn end(self: &Arc<Self>) -> Point {
        Point { stream: Arc::clone(self), position: self.queue().submitted }
    }

    pub(crate) fn is_idle(self: &Arc<Self>) -> Result<bool> {
        self.not_in_capture()?;
        Ok(self.end().is_reached())
    }

    pub(crate) fn synchronize(self: &Arc<Self>) -> Result {
        self.not_in_capture()?;
        self.end().wait();
        Ok(())
    }

    /// Asking a stream in capture how far it is ends the capture.
    fn not_in_capture(&self) -> Result {
        match &mut self.queue().capture {
            None => Ok(()),
            Some(capture) => {
                capture.valid = false;
                Err(Status::cudaErrorStreamCaptureUnsupported)
            }
        }
    }

    pub(crate) fn is_capturing(&self) -> bool {
        self.queue().capture.is_some()
    }

    pub(crate) fn begin_capture(&self, mode: Mode) -> Result {
        let mut queue = self.queue();
        if queue.capture.is_some() {
            return Err(Status::cudaErrorIllegalState);
        }
        queue.capture = Some(Capture { mode, valid: true, thread: this_thread() });
        Ok(())
    }

    pub(crate) fn end_capture(&self) -> Result {
        match self.queue().capture.take() {
            None => Err(Status::cudaErrorIllegalState),
            Some(capture) if !capture.valid => Err(Status::cudaErrorStreamCaptureInvalidated),
            Some(_) => Ok(()),
        }
    }

    fn close(&self) {
        self.queue().closed = true;
        self.moved.notify_all();
    }
}

// ---- handles ----

struct Handles {
    streams: BTreeMap<usize, Arc<Stream>>,
    /// Those that were destroyed and may still have work.
    ending: Vec<Arc<Stream>>,
    legacy: BTreeMap<usize, Arc<Stream>>,
    events: BTreeMap<usize, Arc<Mutex<Event>>>,
}

static HANDLES: Mutex<Handles> = Mutex::new(Handles {
    streams: BTreeMap::new(),
    ending: Vec::new(),
    legacy: BTreeMap::new(),
    events: BTreeMap::new(),
});

fn handles() -> MutexGuard<'static, Handles> {
    HANDLES.lock()
}

/// Handles are numbers that are never used again, so that a stale one is found out.
pub(crate) fn next_handle() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1_0000);
    NEXT.fetch_add(16, Ordering::Relaxed)
}

pub(crate) fn create(device: usize, non_blocking: bool, priority: i32) -> usize {
    let handle = next_handle();
    handles().streams.insert(handle, Stream::new(device, non_blocking, priority));
    control::born(Kind::Stream);
    handle
}

/// The stream lets its work finish, and the caller does not wait.
pub(crate) fn destroy(handle: usize) -> Result {
    let mut handles = handles();
    let stream = handles.streams.remove(&handle);
    let stream = stream.ok_or(Status::cudaErrorInvalidResourceHandle)?;
    stream.close();
    handles.ending.retain(|stream| !stream.end().is_reached());
    handles.ending.push(stream);
    drop(handles);
    control::died(Kind::Stream);
    Ok(())
}

/// A broken context refuses to destroy the stream, which nobody uses any more: its thread ends.
pub(crate) fn give_up(handle: usize) {
    if let Some(stream) = handles().streams.get(&handle) {
        stream.close();
    }
}

/// The stream of a handle; of 0 and 1, the legacy stream of the current device.
pub(crate) fn stream(handle: usize) -> Result<Arc<Stream>> {
    if handle > 1 {
        let found = handles().streams.get(&handle).cloned();
        return found.ok_or(Status::cudaErrorInvalidResourceHandle);
    }
    let device = context::current_device();
    let mut handles = handles();
    let legacy = handles.legacy.entry(device).or_insert_with(|| Stream::new(device, false, 0));
    Ok(Arc::clone(legacy))
}

/// What work on this stream waits for: the legacy stream waits for the blocking streams of its device, and
/// they for it ("CUDA Runtime API, Stream synchronization behavior").
fn others_first(stream: &Arc<Stream>) -> Vec<Point> {
    if stream.non_blocking {
        return Vec::new();
    }
    let handles = handles();
    let legacy = handles.legacy.get(&stream.device);
    let is_legacy = legacy.is_some_and(|legacy| Arc::ptr_eq(legacy, stream));
    match (is_legacy, legacy) {
        (true, _) => {
            let blocking = handles.streams.values();
            let blocking =
                blocking.filter(|other| !other.non_blocking && other.device == stream.device);
            blocking.map(Stream::end).collect()
        }
        (false, Some(legacy)) => vec![legacy.end()],
        (false, None) => Vec::new(),
    }
}

/// Whether a stream that the legacy stream would wait for is in capture.
fn legacy_is_blocked(device: usize) -> bool {
    let handles = handles();
    let mut blocking = handles.streams.values().filter(|other| !other.non_blocking);
    blocking.any(|other| other.device == device && other.is_capturing())
}

/// Whether a stream is in capture; the legacy stream is that of `device`.
pub(crate) fn capture_status(handle: usize, device: usize) -> Result<cudaStreamCaptureStatus> {
    if handle <= 1 && legacy_is_blocked(device) {
        return Err(Status::cudaErrorStreamCaptureImplicit);
    }
    Ok(match stream(handle)?.is_capturing() {
        true => cudaStreamCaptureStatus::cudaStreamCaptureStatusActive,
        false => cudaStreamCaptureStatus::cudaStreamCaptureStatusNone,
    })
}

/// The calling thread. Unlike the standard library's, it can be asked for in destructors of thread-locals.
fn this_thread() -> usize {
    // SAFETY: no arguments.
    unsafe { libc::pthread_self() as usize }
}

/// A call that CUDA prohibits during capture: it ends the captures that this thread's mode does not allow it
/// beside ("CUDA Runtime API, `cudaThreadExchangeStreamCaptureMode`").
pub(crate) fn prohibited(mode: Mode) -> Result {
    if mode == Mode::cudaStreamCaptureModeRelaxed {
        return Ok(());
    }
    let this = this_thread();
    let mut ended = false;
    for stream in handles().streams.values() {
        if let Some(capture) = &mut stream.queue().capture {
            let concerns = match capture.mode {
                Mode::cudaStreamCaptureModeGlobal => {
                    capture.thread == this || mode == Mode::cudaStreamCaptureModeGlobal
                }
                Mode::cudaStreamCaptureModeThreadLocal => capture.thread == this,
                _ => false,
            };
            if concerns {
                capture.valid = false;
                ended = true;
            }
        }
    }
    match ended {
        true => Err(Status::cudaErrorStreamCaptureUnsupported),
        false => Ok(()),
    }
}

/// Waits for all that was sent to a device.
pub(crate) fn synchronize_device(device: usize) -> Result {
    let (streams, ending): (Vec<_>, Vec<_>) = {
        let handles = handles();
        let streams = handles.streams.values().chain(handles.legacy.values());
        (streams.cloned().collect(), handles.ending.clone())
    };
    for stream in streams.iter().filter(|stream| stream.device == device) {
        stream.synchronize()?;
    }
    for stream in ending.iter().filter(|stream| stream.device == device) {
        stream.end().wait();
    }
    Ok(())
}

// ---- events ----

#[derive(Default)]
pub(crate) struct Event {
    device: usize,
    timing: bool,
    point: Option<Point>,
    captured: bool,
    reached_at: Arc<Mutex<Option<Instant>>>,
}

pub(crate) fn create_event(device: usize, timing: bool) -> usize {
    let handle = next_handle();
    let event = Event { device, timing, ..Event::default() };
    handles().events.insert(handle, Arc::new(Mutex::new(event)));
    control::born(Kind::Event);
    handle
}

pub(crate) fn destroy_event(handle: usize) -> Result {
    let event = handles().events.remove(&handle);
    event.ok_or(Status::cudaErrorInvalidResourceHandle)?;
    control::died(Kind::Event);
    Ok(())
}

fn event(handle: usize) -> Result<Arc<Mutex<Event>>> {
    let found = handles().events.get(&handle).cloned();
    found.ok_or(Status::cudaErrorInvalidResourceHandle)
}

fn lock(event: &Mutex<Event>) -> MutexGuard<'_, Event> {
    event.lock()
}

pub(crate) fn record(handle: usize, stream: &Arc<Stream>) -> Result {
    let event = event(handle)?;
    let mut event = lock(&event);
    if event.device != stream.device {
        return Err(Status::cudaErrorInvalidResourceHandle);
    }
    event.captured = stream.is_capturing();
    let reached_at = Arc::new(Mutex::new(None));
    event.reached_at = Arc::clone(&reached_at);
    let point = stream.enqueue(move || {
        *reached_at.lock() = Some(Instant::now());
    })?;
    event.point = Some(point);
    Ok(())
}

/// The point that an event stands for; `None` where it was never recorded, and so is complete.
fn point(handle: usize) -> Result<Option<(Point, usize)>> {
    let event = event(handle)?;
    let event = lock(&event);
    match event.captured {
        true => Err(Status::cudaErrorCapturedEvent),
        false => Ok(event.point.clone().map(|point| (point, event.device))),
    }
}

pub(crate) fn query_event(handle: usize) -> Result {
    match point(handle)? {
        Some((_, device)) if context::sticky(device).is_some() => {
            context::sticky(device).map_or(Ok(()), Err)
        }
        Some((point, _)) if !point.is_reached() => Err(Status::cudaErrorNotReady),
        _ => Ok(()),
    }
}

pub(crate) fn synchronize_event(handle: usize) -> Result {
    if let Some((point, device)) = point(handle)? {
        point.wait();
        context::sticky(device).map_or(Ok(()), Err)?;
    }
    Ok(())
}

pub(crate) fn wait_event(stream: &Arc<Stream>, handle: usize) -> Result {
    match point(handle) {
        // A wait of a stream outside the capture for an event inside it.
        Err(Status::cudaErrorCapturedEvent) => Err(Status::cudaErrorStreamCaptureIsolation),
        Err(error) => Err(error),
        Ok(None) => Ok(()),
        Ok(Some((point, _))) => stream.enqueue_behind(Some(point), || ()).map(drop),
    }
}

pub(crate) fn elapsed(from: usize, to: usize) -> Result<f32> {
    let mut instants = Vec::new();
    for handle in [from, to] {
        query_event(handle)?;
        let event = event(handle)?;
        let event = lock(&event);
        if !event.timing {
            return Err(Status::cudaErrorInvalidResourceHandle);
        }
        let reached_at = *event.reached_at.lock();
        instants.push(reached_at.ok_or(Status::cudaErrorInvalidResourceHandle)?);
    }
    let seconds = match instants[1].checked_duration_since(instants[0]) {
        Some(time) => time.as_secs_f32(),
        None => -instants[0].duration_since(instants[1]).as_secs_f32(),
    };
    Ok(seconds * 1e3)
}
