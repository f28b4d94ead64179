//! Events: points in the work of a stream.
//!
//! A recorded event takes a ticket of its stream, as a transfer does. When the event is seen
//! finished, the stream's watermark rises. Then all buffers know that their earlier transfers on
//! that stream have finished, too.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cuda::event_handle::{EventFlags, EventHandle};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::stream::options::WaitPolicy;
use crate::stream::stream::Stream;

/// A point in the work of a stream, made by [`Stream::record`].
///
/// It is complete once all earlier work of the stream has finished.
///
/// ```
/// use cpu_gpu_buffer::{Device, Stream};
///
/// let stream = Stream::new(Device::Cpu)?;
/// let before = stream.record()?;
/// let after = stream.record()?;
/// after.synchronize()?;
/// println!("took {:?}", after.elapsed_since(&before)?);
/// let of_a_thread = after.clone(); // the same event
/// std::thread::spawn(move || of_a_thread.synchronize()).join().unwrap()?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[doc(alias = "cudaEvent_t")]
#[doc(alias = "fence")]
#[derive(Clone)]
pub struct Event(Kind);

#[derive(Clone)]
enum Kind {
    Cpu(Instant),
    // Clones share the event of the runtime.
    Cuda { handle: Arc<EventHandle>, stream: Stream, ticket: u64 },
}

impl Stream {
    /// Records an event behind all earlier work of the stream.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<f32>::new(256, stream.device())?;
    /// buffer.fill_gpu(1.0, &stream)?;
    /// let filled = stream.record()?;
    /// buffer.copy_to_cpu(.., &stream)?;
    /// filled.synchronize()?; // the fill has finished; the copy may still run
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaEventRecord")]
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
        Ok(Event(Kind::Cuda { handle: Arc::new(handle), stream: self.clone(), ticket }))
    }

    /// Makes later work of the stream wait for `event`, which may be of another device.
    ///
    /// The calling thread does not wait, unless this is a stream of the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let (producer, consumer) = (Stream::new(Device::auto())?, Stream::new(Device::auto())?);
    /// // ... launch kernels on `producer` ...
    /// consumer.wait(&producer.record()?)?;
    /// // ... launch kernels on `consumer` that read their results ...
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaStreamWaitEvent")]
    pub fn wait(&self, event: &Event) -> Result<()> {
        let Kind::Cuda { handle, .. } = &event.0 else {
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

impl Event {
    /// The device of the stream that the event was recorded on.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let event = Stream::new(Device::auto())?.record()?;
    /// assert_eq!(event.device(), Device::auto());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        match &self.0 {
            Kind::Cpu(_) => Device::Cpu,
            Kind::Cuda { stream, .. } => stream.device(),
        }
    }

    /// Returns `true` if all work before the event has finished.
    ///
    /// # Errors
    ///
    /// An error of `cudaEventQuery`, which may come from earlier work.
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
    ///     polls += 1; // do something else meanwhile
    /// }
    /// println!("finished after {polls} polls");
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaEventQuery")]
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

    /// Waits until all work before the event has finished.
    ///
    /// # Errors
    ///
    /// An error of `cudaEventSynchronize`, which may come from earlier work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let event = stream.record()?;
    /// event.synchronize()?; // does not wait for work that is sent after `record`
    /// assert!(event.is_complete()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaEventSynchronize")]
    pub fn synchronize(&self) -> Result<()> {
        if let Kind::Cuda { handle, stream, ticket } = &self.0
            && !stream.tickets().is_complete(*ticket)
        {
            handle.synchronize()?;
            stream.tickets().complete(*ticket);
        }
        Ok(())
    }

    /// Returns the time on the device between two events. Waits for both.
    ///
    /// The resolution is about half a microsecond.
    ///
    /// # Errors
    ///
    /// - [`Error::DeviceMismatch`] for events of two devices.
    /// - [`Error::EventOrder`] if `earlier` is the later one.
    /// - An error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut buffer = CpuGpuBuffer::<u8>::new(1 << 20, stream.device())?;
    /// let before = stream.record()?;
    /// buffer.copy_to_gpu(.., &stream)?;
    /// let after = stream.record()?;
    /// println!("1 MiB in {:?}", after.elapsed_since(&before)?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[doc(alias = "cudaEventElapsedTime")]
    pub fn elapsed_since(&self, earlier: &Event) -> Result<Duration> {
        match (&earlier.0, &self.0) {
            (Kind::Cpu(from), Kind::Cpu(to)) => {
                to.checked_duration_since(*from).ok_or(Error::EventOrder)
            }
            (Kind::Cuda { handle: from, .. }, Kind::Cuda { handle: to, .. })
                if earlier.device() == self.device() =>
            {
                // The watermark is not enough here. An event is recorded after its ticket is taken.
                // So it may still be unrecorded when the event of a later ticket is finished.
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
        // This makes no call, because an event may be printed in a panic or after a fork.
        let known_complete = match &self.0 {
            Kind::Cpu(_) => true,
            Kind::Cuda { stream, ticket, .. } => stream.tickets().is_complete(*ticket),
        };
        write!(f, "Event(device={}, known_complete={known_complete})", self.device())
    }
}
