//! Events: points in the work of a stream.
//!
//! An event that a user records takes a ticket of its stream like a transfer does, so that seeing it
//! finished tells every buffer on that stream that its earlier transfers are too.

use std::fmt;
use std::time::{Duration, Instant};

use bitflags::bitflags;

use crate::cuda::calls;
use crate::cuda::device::Context;
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::stream::stream::{EnteredStream, Stream, WaitPolicy};
use crate::sys;

bitflags! {
    /// How an event is made: `cudaEventCreateWithFlags`.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct EventFlags: u32 {
        /// Waiting for the event yields the thread instead of spinning.
        const BLOCKING_SYNC = sys::cudaEventBlockingSync;
        /// The event takes no time stamp, which makes it cheaper.
        const DISABLE_TIMING = sys::cudaEventDisableTiming;
    }
}

/// An event of the runtime's, destroyed with the value.
pub(crate) struct EventHandle {
    raw: sys::cudaEvent_t,
    context: &'static Context,
}

// SAFETY: the runtime's events may be used from any thread, by several at once.
unsafe impl Send for EventHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for EventHandle {}

impl EventHandle {
    /// An event of the device whose stream is entered.
    pub(crate) fn new(entered: &EnteredStream<'_>, flags: EventFlags) -> Result<EventHandle> {
        // The entry has the stream's context current.
        let raw = calls::event::create(flags.bits())?;
        Ok(EventHandle { raw, context: entered.context() })
    }

    pub(crate) fn raw(&self) -> sys::cudaEvent_t {
        self.raw
    }

    pub(crate) fn is_complete(&self) -> Result<bool> {
        // Its own context: another one might answer with an error of its own.
        let _current = self.context.ensure_current()?;
        // SAFETY: the event is destroyed with the value, not before.
        unsafe { calls::event::query(self.raw) }
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = self.context.ensure_current()?;
        // SAFETY: as above.
        unsafe { calls::event::synchronize(self.raw) }
    }

    /// Milliseconds since `earlier`, an event of the same device.
    fn since(&self, earlier: &EventHandle) -> Result<f32> {
        let _current = self.context.ensure_current()?;
        // SAFETY: both are live, and of one device.
        unsafe { calls::event::elapsed(earlier.raw, self.raw) }
    }
}

impl Drop for EventHandle {
    fn drop(&mut self) {
        if fork::forked() {
            return;
        }
        // Its own context: a broken one would refuse to destroy the event. The handle says enough,
        // should the context not be had.
        let _current = self.context.ensure_current();
        // SAFETY: the value owns the event, and this is its end. An event may be destroyed before it
        // has finished (CUDA Runtime API, `cudaEventDestroy`).
        let destroyed = unsafe { calls::event::destroy(self.raw) };
        // Nobody could act on the error, and there is nothing left to give back.
        let _ = destroyed;
    }
}

/// A point in the work of a stream, made by [`Stream::record`]: it is complete when everything that was
/// sent to the stream before it is.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream};
///
/// let stream = Stream::new(Device::Cpu)?;
/// let before = stream.record()?;
/// let after = stream.record()?;
/// after.synchronize()?;
/// println!("took {:?}", after.elapsed_since(&before)?);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct Event(Kind);

enum Kind {
    Cpu(Instant),
    Cuda { handle: EventHandle, stream: Stream, ticket: u64 },
}

impl Event {
    pub(crate) fn record(stream: &Stream) -> Result<Event> {
        let Some(entered) = stream.enter()? else {
            return Ok(Event(Kind::Cpu(Instant::now())));
        };
        entered.refuse_capture()?;
        let flags = match stream.wait_policy() {
            WaitPolicy::DeviceDefault => EventFlags::empty(),
            WaitPolicy::Block => EventFlags::BLOCKING_SYNC,
        };
        let handle = EventHandle::new(&entered, flags)?;
        let ticket = stream.tickets().submit(|| Ok(()), || entered.record(&handle))?;
        let stream = stream.clone();
        Ok(Event(Kind::Cuda { handle, stream, ticket }))
    }

    /// The device whose stream it was recorded on.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let event = Stream::new(Device::auto())?.record()?;
    /// assert_eq!(event.device(), Device::auto()); // whose streams may take its time
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        match &self.0 {
            Kind::Cpu(_) => Device::Cpu,
            Kind::Cuda { stream, .. } => stream.device(),
        }
    }

    pub(crate) fn handle(&self) -> Option<&EventHandle> {
        match &self.0 {
            Kind::Cpu(_) => None,
            Kind::Cuda { handle, .. } => Some(handle),
        }
    }

    /// Whether everything before the event has finished.
    ///
    /// # Errors
    ///
    /// An error of `cudaEventQuery`, which may be that of earlier work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<u8>::new(1 << 20, stream.device())?;
    /// buffer.copy_to_gpu(.., &stream)?;
    /// let copied = stream.record()?;
    /// let mut polls = 0;
    /// while !copied.is_complete()? {
    ///     polls += 1; // time for something else
    /// }
    /// println!("there after {polls} looks");
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_complete(&self) -> Result<bool> {
        match &self.0 {
            Kind::Cpu(_) => Ok(true),
            Kind::Cuda { handle, stream, ticket } => {
                let complete = stream.tickets().is_complete(*ticket) || handle.is_complete()?;
                if complete {
                    stream.tickets().complete(*ticket);
                }
                Ok(complete)
            }
        }
    }

    /// Waits until everything before the event has finished.
    ///
    /// # Errors
    ///
    /// An error of `cudaEventSynchronize`, which may be that of earlier work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let event = stream.record()?;
    /// event.synchronize()?; // not for what the stream is sent from here on
    /// assert!(event.is_complete()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        if let Kind::Cuda { handle, stream, ticket } = &self.0
            && !stream.tickets().is_complete(*ticket)
        {
            handle.synchronize()?;
            stream.tickets().complete(*ticket);
        }
        Ok(())
    }

    /// The time between two events as the device saw it, to about half a microsecond; waits for both.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceMismatch`] for events of two devices, [`Error::EventOrder`] where `earlier`
    /// is the later one, or an error of the driver's.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<u8>::new(1 << 20, stream.device())?;
    /// let before = stream.record()?;
    /// buffer.copy_to_gpu(.., &stream)?;
    /// let after = stream.record()?;
    /// println!("1 MB in {:?}", after.elapsed_since(&before)?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn elapsed_since(&self, earlier: &Event) -> Result<Duration> {
        match (&earlier.0, &self.0) {
            (Kind::Cpu(from), Kind::Cpu(to)) => {
                to.checked_duration_since(*from).ok_or(Error::EventOrder)
            }
            (Kind::Cuda { handle: from, .. }, Kind::Cuda { handle: to, .. })
                if earlier.device() == self.device() =>
            {
                // Not by the watermark: an event is recorded after its ticket is taken, and so may
                // still be to come when a later ticket's event is seen finished.
                from.synchronize()?;
                to.synchronize()?;
                Duration::try_from_secs_f64(f64::from(to.since(from)?) / 1e3)
                    .map_err(|_| Error::EventOrder)
            }
            _ => Err(Error::DeviceMismatch { expected: self.device(), actual: earlier.device() }),
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("device", &self.device()).finish_non_exhaustive()
    }
}
