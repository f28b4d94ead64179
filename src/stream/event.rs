//! Events: points in the work of a stream.
//!
//! An event that a user records takes a ticket of its stream like a transfer does, so that seeing it
//! finished tells every buffer on that stream that its earlier transfers are too.

use std::fmt;
use std::time::{Duration, Instant};

use crate::cuda::event_handle::{EventFlags, EventHandle};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::stream::options::WaitPolicy;
use crate::stream::stream::Stream;

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

impl Stream {
    /// An event behind everything that was sent to the stream so far.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver's.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new(256, stream.device())?;
    /// buffer.fill_gpu(1.0, &stream)?;
    /// let filled = stream.record()?;
    /// buffer.copy_to_cpu(.., &stream)?;
    /// filled.synchronize()?; // the fill is over; the copy need not be
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn record(&self) -> Result<Event> {
        let Some(entered) = self.enter()? else {
            return Ok(Event(Kind::Cpu(Instant::now())));
        };
        entered.refuse_capture()?;
        let flags = match self.wait_policy() {
            WaitPolicy::DeviceDefault => EventFlags::empty(),
            WaitPolicy::Block => EventFlags::BLOCKING_SYNC,
        };
        let handle = EventHandle::new(entered.context(), flags)?;
        let ticket = self.tickets().submit(|| Ok(()), || entered.record(&handle))?;
        let stream = self.clone();
        Ok(Event(Kind::Cuda { handle, stream, ticket }))
    }

    /// Makes what is sent to the stream from now on wait for `event`, which may be of another device.
    /// The calling thread does not wait, unless this is a stream of the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver's.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let (producer, consumer) = (Stream::new(Device::auto())?, Stream::new(Device::auto())?);
    /// // ... kernels on `producer`, whose results kernels on `consumer` read:
    /// consumer.wait(&producer.record()?)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn wait(&self, event: &Event) -> Result<()> {
        let Some(handle) = event.handle() else {
            return Ok(());
        };
        match self.enter()? {
            None => event.synchronize(),
            Some(entered) => {
                entered.refuse_capture()?;
                entered.wait(handle)
            }
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("device", &self.device()).finish_non_exhaustive()
    }
}
