//! Streams as threads, events, and stream capture.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cudart_sys::cudaStreamCaptureMode as Mode;
use cudart_sys::cudaStreamCaptureStatus;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::context;
use crate::control::{self, Kind};
use crate::{Result, Status};

type Work = Box<dyn FnOnce() + Send>;

/// How much a stream's queue holds. CUDA does not document it; about as much is usual.
const MOST_QUEUED: usize = 1024;

/// A stream: a queue, and a thread that works it off in order, late.
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Does not wait for the legacy stream, nor the legacy stream for it.
    pub(crate) non_blocking: bool,
    pub(crate) priority: i32,
    legacy: bool,
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    submitted: u64,
    done: u64,
    capture: Option<Mark>,
    closed: bool,
}

/// A capture. One stream began it, and those that wait for its events join it ("CUDA C++
/// Programming Guide, Cross-stream Dependencies and Events").
struct Capture {
    mode: Mode,
    /// As `this_thread` says.
    thread: usize,
    /// The address of the stream that began it, which alone can end it.
    origin: usize,
    valid: AtomicBool,
    ended: AtomicBool,
    /// How much was captured, in all its streams.
    nodes: AtomicU64,
}

impl Capture {
    /// The capture can only be ended from now on ("CUDA C++ Programming Guide, Invalidation").
    fn invalidate(&self) {
        self.valid.store(false, Ordering::SeqCst);
    }

    fn is_valid(&self) -> bool {
        self.valid.load(Ordering::SeqCst)
    }
}

/// A point in a capture.
#[derive(Clone)]
struct Mark {
    capture: Arc<Capture>,
    /// What comes before it, by number.
    before: BTreeSet<u64>,
}

impl Mark {
    fn is_of(&self, capture: &Arc<Capture>) -> bool {
        Arc::ptr_eq(&self.capture, capture)
    }

    /// One more piece of work.
    fn add(&mut self) {
        self.before.insert(self.capture.nodes.fetch_add(1, Ordering::SeqCst));
    }
}

impl Queue {
    /// The capture that the stream is in. Streams that joined one leave it when it ends.
    fn capture(&mut self) -> Option<&mut Mark> {
        if self.capture.as_ref().is_some_and(|mark| mark.capture.ended.load(Ordering::SeqCst)) {
            self.capture = None;
        }
        self.capture.as_mut()
    }

    /// As [`capture`](Self::capture); an error where it is void.
    fn valid_capture(&mut self) -> Result<Option<&mut Mark>> {
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
    stream: Arc<Stream>,
    position: u64,
}

impl Point {
    fn is_reached(&self) -> bool {
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
    fn new(device: usize, non_blocking: bool, priority: i32, legacy: bool) -> Arc<Stream> {
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
        let before = others_first(self)?;
        let mut queue = self.room();
        if let Some(mark) = queue.valid_capture()? {
            mark.add();
            return Ok(Point { stream: Arc::clone(self), position: 0 });
        }
        Ok(self.push(queue, before, work))
    }

    /// The queue, once it has room for more: "any CUDA API call may block [...] for [...]
    /// unavailability of internal resources" ("CUDA Runtime API, API synchronization behavior").
    fn room(&self) -> MutexGuard<'_, Queue> {
        let mut queue = self.queue();
        while queue.work.len() >= MOST_QUEUED {
            self.moved.wait(&mut queue);
        }
        queue
    }

    /// Queues work outside a capture.
    fn push(
        self: &Arc<Self>,
        mut queue: MutexGuard<'_, Queue>,
        before: Vec<Point>,
        work: impl FnOnce() + Send + 'static,
    ) -> Point {
        let (device, breaks) = (self.device, context::breaks(self.device));
        queue.work.push_back(Box::new(move || {
            // Also where the context broke, and what runs there comes to its end.
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

    /// What is sent from now on comes after a point of another stream.
    fn wait_for(self: &Arc<Self>, point: Point) -> Result {
        let mut before = others_first(self)?;
        before.push(point);
        let mut queue = self.room();
        if let Some(mark) = queue.capture() {
            // A dependency across the capture's bounds ("CUDA Runtime API,
            // `cudaErrorStreamCaptureIsolation`").
            mark.capture.invalidate();
            return Err(Status::cudaErrorStreamCaptureIsolation);
        }
        self.push(queue, before, || ());
        Ok(())
    }

    /// What is sent from now on comes after a point of a capture, and so goes into that capture,
    /// too.
    fn join(self: &Arc<Self>, event: Mark) -> Result {
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
        self.not_implicitly()?;
        match self.queue().capture() {
            None => Ok(()),
            Some(mark) => {
                mark.capture.invalidate();
                Err(Status::cudaErrorStreamCaptureUnsupported)
            }
        }
    }

    /// The legacy stream comes after the blocking streams of its device. While one of them is in
    /// capture it cannot be used, and to try ends the capture ("CUDA Runtime API,
    /// `cudaErrorStreamCaptureImplicit`").
    fn not_implicitly(&self) -> Result {
        if !self.legacy {
            return Ok(());
        }
        let mut answer = Ok(());
        let handles = handles();
        for stream in handles.blocking(self.device) {
            if let Some(mark) = stream.queue().capture() {
                mark.capture.invalidate();
                answer = Err(Status::cudaErrorStreamCaptureImplicit);
            }
        }
        answer
    }

    fn capture_status(&self) -> cudaStreamCaptureStatus {
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
            // It is over all the same, as an H200 has it.
            capture.ended.store(true, Ordering::SeqCst);
            return Err(Status::cudaErrorStreamCaptureWrongThread);
        }
        capture.ended.store(true, Ordering::SeqCst);
        if !capture.is_valid() {
            return Err(Status::cudaErrorStreamCaptureInvalidated);
        }
        // What streams that joined did has to come before the end.
        match capture.nodes.load(Ordering::SeqCst) == mark.before.len() as u64 {
            true => Ok(()),
            false => Err(Status::cudaErrorStreamCaptureUnjoined),
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
    handles().streams.insert(handle, Stream::new(device, non_blocking, priority, false));
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
    let legacy =
        handles.legacy.entry(device).or_insert_with(|| Stream::new(device, false, 0, true));
    Ok(Arc::clone(legacy))
}

impl Handles {
    /// The streams that the legacy stream of the device waits for.
    fn blocking(&self, device: usize) -> impl Iterator<Item = &Arc<Stream>> {
        let streams = self.streams.values();
        streams.filter(move |stream| !stream.non_blocking && stream.device == device)
    }
}

/// What work on this stream waits for: the legacy stream waits for the blocking streams of its device, and
/// they for it ("CUDA Runtime API, Stream synchronization behavior").
fn others_first(stream: &Arc<Stream>) -> Result<Vec<Point>> {
    stream.not_implicitly()?;
    if stream.non_blocking {
        return Ok(Vec::new());
    }
    let handles = handles();
    Ok(match stream.legacy {
        true => handles.blocking(stream.device).map(Stream::end).collect(),
        false => handles.legacy.get(&stream.device).map(Stream::end).into_iter().collect(),
    })
}

pub(crate) fn query(handle: usize) -> Result {
    prohibited(context::capture_mode())?;
    match stream(handle)?.is_idle()? {
        true => Ok(()),
        false => Err(Status::cudaErrorNotReady),
    }
}

/// Whether a stream is in capture; the legacy stream is that of `device`. Of that one the question
/// is an error while a stream that it would wait for is in capture, which goes on ("CUDA Runtime
/// API, `cudaStreamIsCapturing`").
pub(crate) fn capture_status(handle: usize, device: usize) -> Result<cudaStreamCaptureStatus> {
    const NONE: cudaStreamCaptureStatus = cudaStreamCaptureStatus::cudaStreamCaptureStatusNone;
    if handle <= 1 && handles().blocking(device).any(|stream| stream.capture_status() != NONE) {
        return Err(Status::cudaErrorStreamCaptureImplicit);
    }
    Ok(stream(handle)?.capture_status())
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
        if let Some(Mark { capture, .. }) = stream.queue().capture() {
            let concerns = match capture.mode {
                Mode::cudaStreamCaptureModeGlobal => {
                    capture.thread == this || mode == Mode::cudaStreamCaptureModeGlobal
                }
                Mode::cudaStreamCaptureModeThreadLocal => capture.thread == this,
                _ => false,
            };
            if concerns {
                capture.invalidate();
                ended = true;
            }
        }
    }
    match ended {
        true => Err(Status::cudaErrorStreamCaptureUnsupported),
        false => Ok(()),
    }
}

/// The streams of a device: those that live, and those that were destroyed.
fn streams_of(device: usize) -> (Vec<Arc<Stream>>, Vec<Arc<Stream>>) {
    let handles = handles();
    let is_there = |stream: &&Arc<Stream>| stream.device == device;
    let live = handles.streams.values().chain(handles.legacy.values()).filter(is_there);
    let ending = handles.ending.iter().filter(is_there);
    (live.cloned().collect(), ending.cloned().collect())
}

/// Waits for all that was sent to a device.
pub(crate) fn synchronize_device(device: usize) -> Result {
    let (live, ending) = streams_of(device);
    live.iter().try_for_each(Stream::synchronize)?;
    ending.iter().for_each(|stream| stream.end().wait());
    Ok(())
}

/// What a call does that waits for the current device from this setting of [`context::waiting`] on.
/// It ends no capture.
pub(crate) fn wait_from(setting: u32) {
    if context::waiting() >= setting {
        let (live, ending) = streams_of(context::current_device());
        live.iter().chain(&ending).for_each(|stream| stream.end().wait());
    }
}

// ---- events ----

#[derive(Default)]
pub(crate) struct Event {
    device: usize,
    timing: bool,
    recorded: Recorded,
    reached_at: Arc<Mutex<Option<Instant>>>,
}

/// What an event stands for.
#[derive(Clone, Default)]
enum Recorded {
    /// It was never recorded, and so is complete.
    #[default]
    Never,
    At(Point),
    InCapture(Mark),
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
    let reached_at = Arc::new(Mutex::new(None));
    event.reached_at = Arc::clone(&reached_at);
    let before = others_first(stream)?;
    let mut queue = stream.room();
    event.recorded = match queue.valid_capture()? {
        Some(mark) => Recorded::InCapture(mark.clone()),
        None => Recorded::At(stream.push(queue, before, move || {
            *reached_at.lock() = Some(Instant::now());
        })),
    };
    Ok(())
}

/// The point that an event stands for. In a capture it is none that is ever reached: to ask for it
/// ends the capture ("CUDA C++ Programming Guide, Prohibited and Unhandled Operations"), and the
/// answer is what an H200 was seen to answer.
fn point(handle: usize) -> Result<Option<(Point, usize)>> {
    let event = event(handle)?;
    let event = lock(&event);
    match &event.recorded {
        Recorded::Never => Ok(None),
        Recorded::At(point) => Ok(Some((point.clone(), event.device))),
        Recorded::InCapture(mark) => {
            mark.capture.invalidate();
            Err(Status::cudaErrorInvalidValue)
        }
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
    let event = event(handle)?;
    let recorded = lock(&event).recorded.clone();
    match recorded {
        Recorded::Never => Ok(()),
        Recorded::At(point) => stream.wait_for(point),
        Recorded::InCapture(mark) => stream.join(mark),
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
