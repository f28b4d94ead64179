//! Events by their handles.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::capture::Mark;
use crate::context;
use crate::live::{self, Kind};
use crate::queue::{Point, Stream};
use crate::status::{Result, Status};
use crate::stream::{next_handle, others_first};

static EVENTS: Mutex<BTreeMap<usize, Arc<Mutex<Event>>>> = Mutex::new(BTreeMap::new());

#[derive(Default)]
pub(crate) struct Event {
    device: usize,
    timing: bool,
    recorded: Recorded,
    reached_at: Arc<Mutex<Option<Instant>>>,
}

/// The work that an event refers to.
#[derive(Clone, Default)]
enum Recorded {
    /// It was never recorded, and so is complete.
    #[default]
    Never,
    At(Point),
    InCapture(Mark),
}

pub(crate) fn create(device: usize, timing: bool) -> usize {
    let handle = next_handle();
    let event = Event { device, timing, ..Event::default() };
    EVENTS.lock().insert(handle, Arc::new(Mutex::new(event)));
    live::born(Kind::Event);
    handle
}

pub(crate) fn destroy(handle: usize) -> Result {
    let event = EVENTS.lock().remove(&handle);
    event.ok_or(Status::cudaErrorInvalidResourceHandle)?;
    live::died(Kind::Event);
    Ok(())
}

fn event(handle: usize) -> Result<Arc<Mutex<Event>>> {
    let found = EVENTS.lock().get(&handle).cloned();
    found.ok_or(Status::cudaErrorInvalidResourceHandle)
}

pub(crate) fn record(handle: usize, stream: &Arc<Stream>) -> Result {
    let event = event(handle)?;
    let mut event = event.lock();
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

/// The point that an event refers to.
///
/// An event in a capture has no point. The call then ends the capture ("CUDA C++ Programming Guide,
/// Prohibited and Unhandled Operations"). The error is the one of an H200.
fn point(handle: usize) -> Result<Option<(Point, usize)>> {
    let event = event(handle)?;
    let event = event.lock();
    match &event.recorded {
        Recorded::Never => Ok(None),
        Recorded::At(point) => Ok(Some((point.clone(), event.device))),
        Recorded::InCapture(mark) => {
            mark.capture.invalidate();
            Err(Status::cudaErrorInvalidValue)
        }
    }
}

pub(crate) fn query(handle: usize) -> Result {
    match point(handle)? {
        Some((_, device)) if context::sticky(device).is_some() => {
            context::sticky(device).map_or(Ok(()), Err)
        }
        Some((point, _)) if !point.is_reached() => Err(Status::cudaErrorNotReady),
        _ => Ok(()),
    }
}

pub(crate) fn synchronize(handle: usize) -> Result {
    if let Some((point, device)) = point(handle)? {
        point.wait();
        context::sticky(device).map_or(Ok(()), Err)?;
    }
    Ok(())
}

pub(crate) fn wait(stream: &Arc<Stream>, handle: usize) -> Result {
    let event = event(handle)?;
    let recorded = event.lock().recorded.clone();
    match recorded {
        Recorded::Never => Ok(()),
        Recorded::At(point) => stream.wait_for(point),
        Recorded::InCapture(mark) => stream.join(mark),
    }
}

pub(crate) fn elapsed(from: usize, to: usize) -> Result<f32> {
    let mut instants = Vec::new();
    for handle in [from, to] {
        query(handle)?;
        let event = event(handle)?;
        let event = event.lock();
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
