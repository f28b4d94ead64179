//! Streams by their handles, and the rules between them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudart_sys::cudaStreamCaptureMode as Mode;
use cudart_sys::cudaStreamCaptureStatus;
use parking_lot::{Mutex, MutexGuard};

use crate::capture::{Mark, this_thread};
use crate::live::{self, Kind};
use crate::queue::{Point, Stream};
use crate::status::{Result, Status};
use crate::{context, settings};

struct Handles {
    streams: BTreeMap<usize, Arc<Stream>>,
    /// Those that were destroyed or given up, and may still have work.
    ending: Vec<Arc<Stream>>,
    legacy: BTreeMap<usize, Arc<Stream>>,
}

static HANDLES: Mutex<Handles> =
    Mutex::new(Handles { streams: BTreeMap::new(), ending: Vec::new(), legacy: BTreeMap::new() });

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
    live::born(Kind::Stream);
    handle
}

/// Destroys a stream. Its work still runs, and the caller does not wait.
pub(crate) fn destroy(handle: usize) -> Result {
    give_up(handle).ok_or(Status::cudaErrorInvalidResourceHandle)?;
    live::died(Kind::Stream);
    Ok(())
}

/// Ends a stream that a broken context refuses to destroy, and that still counts as live. Its
/// thread ends after its work. `None` if there is no such stream.
pub(crate) fn give_up(handle: usize) -> Option<()> {
    let mut handles = handles();
    let stream = handles.streams.remove(&handle)?;
    stream.close();
    handles.ending.retain(|stream| !stream.end().is_reached());
    handles.ending.push(stream);
    Some(())
}

/// The stream of a handle. The handles 0 and 1 are the legacy stream of the current device.
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

/// The points that new work on this stream waits for.
///
/// The legacy stream and the blocking streams of its device wait for each other ("CUDA Runtime API,
/// Stream synchronization behavior").
pub(crate) fn others_first(stream: &Arc<Stream>) -> Result<Vec<Point>> {
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

/// True if a stream is in capture. `device` selects the legacy stream.
///
/// For the legacy stream this is an error while a blocking stream is in capture. That capture
/// continues ("CUDA Runtime API, `cudaStreamIsCapturing`").
pub(crate) fn capture_status(handle: usize, device: usize) -> Result<cudaStreamCaptureStatus> {
    const NONE: cudaStreamCaptureStatus = cudaStreamCaptureStatus::cudaStreamCaptureStatusNone;
    if handle <= 1 && handles().blocking(device).any(|stream| stream.capture_status() != NONE) {
        return Err(Status::cudaErrorStreamCaptureImplicit);
    }
    Ok(stream(handle)?.capture_status())
}

/// Begins a call that CUDA prohibits during capture.
///
/// The call invalidates the captures that the mode of this thread protects ("CUDA Runtime API,
/// `cudaThreadExchangeStreamCaptureMode`").
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

/// The live and the destroyed streams of a device.
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

/// Waits for the current device if [`settings::waiting`] has at least this value. This ends no
/// capture.
pub(crate) fn wait_from(setting: u32) {
    if settings::waiting() >= setting {
        let (live, ending) = streams_of(context::current_device());
        live.iter().chain(&ending).for_each(|stream| stream.end().wait());
    }
}

/// The rules between streams.
impl Stream {
    /// Queues work. In a capture the work becomes part of the graph, which never runs here.
    pub(crate) fn enqueue(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) -> Result<Point> {
        let before = others_first(self)?;
        let mut queue = self.room();
        if let Some(mark) = queue.valid_capture()? {
            mark.add();
            return Ok(Point { stream: Arc::clone(self), position: 0 });
        }
        Ok(self.push(queue, before, work))
    }

    /// Orders later work after a point of another stream.
    pub(crate) fn wait_for(self: &Arc<Self>, point: Point) -> Result {
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
    pub(crate) fn not_in_capture(&self) -> Result {
        self.not_implicitly()?;
        match self.queue().capture() {
            None => Ok(()),
            Some(mark) => {
                mark.capture.invalidate();
                Err(Status::cudaErrorStreamCaptureUnsupported)
            }
        }
    }

    /// Refuses the legacy stream while a blocking stream of its device is in capture.
    ///
    /// The attempt invalidates that capture ("CUDA Runtime API, `cudaErrorStreamCaptureImplicit`").
    pub(crate) fn not_implicitly(&self) -> Result {
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
}
