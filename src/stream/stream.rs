//! Streams: queues of work on a device, which run in order.
//!
//! A [`Stream`] is a handle, cheap to clone, that any number of threads may send work through. Beside
//! the CUDA stream it holds the two counters of [`ticket`](crate::stream::ticket), which tell buffers what has
//! finished. Each buffer keeps a handle of the streams that it was last used on; the CUDA stream is
//! destroyed with the last handle, and a borrowed one's owner is let go then.

use std::any::Any;
use std::fmt;
use std::mem;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::devices::context;
use crate::cuda::event_handle::{EventFlags, EventHandle};
use crate::cuda::fork;
use crate::cuda::kernel_graph::StreamGraph;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::stream::options::{StreamFlags, StreamOptions, WaitPolicy};
use crate::stream::ticket::Tickets;
use crate::sys;

/// A handle to a queue of work that runs in order on one device.
///
/// On [`Device::Cpu`] work is done when the call that sends it returns.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
///
/// let stream = Stream::new(Device::Cpu)?;
/// let mut buffer = CpuGpuBuffer::<f32>::new(16, Device::Cpu)?;
/// buffer.copy_to_gpu(..4, &stream)?;
/// stream.synchronize()?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    device: Device,
    tickets: Tickets,
    wait: WaitPolicy,
    // `None` on the CPU.
    cuda: Option<CudaStream>,
}

struct CudaStream {
    raw: sys::cudaStream_t,
    context: &'static Context,
    gather: Mutex<StreamGraph>,
    ownership: Ownership,
}

enum Ownership {
    Owned,
    // Keeps the real stream alive, where the caller gave something that does.
    Borrowed(Option<Arc<dyn Any + Send + Sync>>),
}

// SAFETY: the runtime's streams may be used from any thread, by several at once; the owner of a borrowed
// one is `Send` and `Sync` by its type, and so is the graph's lock.
unsafe impl Send for CudaStream {}
// SAFETY: as for `Send`.
unsafe impl Sync for CudaStream {}

// The other parts must not rely on the promises above.
const _: () = {
    const fn send_and_sync<P: Send + Sync>() {}
    send_and_sync::<(Mutex<StreamGraph>, &Context, Option<Arc<dyn Any + Send + Sync>>)>();
};

/// `cudaStreamLegacy` and `cudaStreamPerThread`, which the headers define as casts.
const LEGACY: usize = 1;
const PER_THREAD: usize = 2;

impl Drop for CudaStream {
    fn drop(&mut self) {
        if fork::forked() {
            // Nor does the owner of a borrowed stream hear of it, who may destroy the stream.
            if let Ownership::Borrowed(owner) = &mut self.ownership {
                mem::forget(owner.take());
            }
            return;
        }
        match &mut self.ownership {
            Ownership::Owned => {
                // Its own context: a broken one would refuse to destroy the stream. The handle says
                // enough, should the context not be had.
                let _current = self.context.ensure_current();
                // SAFETY: the last handle is gone. Destroying a stream does not wait for its work, and lets
                // the work finish (CUDA Runtime API, `cudaStreamDestroy`).
                let destroyed = unsafe { calls::stream::destroy(self.raw) };
                // Nobody could act on the error, and there is nothing left to give back.
                let _ = destroyed;
            }
            Ownership::Borrowed(owner) => {
                // The owner is let go in the middle of another stream's work, and may make another context
                // current. What it makes current takes the place of this entry, and goes with it.
                let owner = owner.take();
                match self.context.enter() {
                    Ok(_current) => drop(owner),
                    Err(_) => mem::forget(owner),
                }
            }
        }
    }
}

impl Stream {
    /// A new non-blocking stream.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] for a device that cannot be used, or an error of the driver's.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let device = Device::auto();
    /// let (uploads, kernels) = (Stream::new(device)?, Stream::new(device)?);
    /// assert_eq!(uploads.device(), kernels.device());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(device: Device) -> Result<Stream> {
        Stream::with_options(device, StreamOptions::default())
    }

    /// A new stream with a priority, flags and a wait policy of its own.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream, StreamOptions};
    ///
    /// // Its kernels go before those of streams with the priority 0.
    /// let options = StreamOptions { priority: -5, ..Default::default() };
    /// let urgent = Stream::with_options(Device::auto(), options)?;
    /// assert!(urgent.is_idle()?);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(device: Device, options: StreamOptions) -> Result<Stream> {
        let cuda = match device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => {
                let context = context(ordinal)?;
                let _current = context.enter()?;
                // No bits but those that have a name.
                let flags = options.flags & StreamFlags::all();
                Some(CudaStream {
                    raw: calls::stream::create(flags.bits(), options.priority)?,
                    context,
                    gather: Mutex::default(),
                    ownership: Ownership::Owned,
                })
            }
        };
        Ok(Stream::of(device, cuda, options.wait))
    }

    /// A handle to a stream that somebody else made, which is never destroyed by this crate. `owner`
    /// is kept until no buffer, event or handle remembers the stream.
    ///
    /// The legacy stream (a null pointer, or 1) is accepted and means that of `device`; the per-thread
    /// stream (2) is refused, since it is a different stream on each thread. Two handles that were made
    /// from one raw stream do not know of each other's watermark; clone one handle instead.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidStream`] for the per-thread stream and for [`Device::Cpu`], or
    /// [`Error::Unavailable`].
    ///
    /// # Safety
    ///
    /// - `raw` is a stream of `device`'s primary context.
    /// - It stays live while `owner` is kept. Without an owner, it stays live while any handle to
    ///   it, any event recorded on it, or any buffer, group or ring last used on it lives.
    /// - Without an owner, it also outlives a pool to which such a buffer was given back, and a
    ///   tensor that was made of such a buffer, if at that time the stream was being captured or
    ///   the driver returned errors.
    /// - Nobody captures it, or makes it join a capture by waiting for an event of that capture,
    ///   while a buffer, group or ring last used on it is in use by any call, or is given back to
    ///   its pool. See [`as_raw`](Self::as_raw).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Stream};
    ///
    /// /// For a plugin that is handed a stream with each call.
    /// ///
    /// /// # Safety
    /// ///
    /// /// `raw` is a live stream of `device`, not being captured, and stays so until the buffer is gone or used elsewhere.
    /// unsafe fn upload(
    ///     buffer: &mut CpuGpuBuffer<f32>,
    ///     raw: cpu_gpu_buffer::sys::cudaStream_t,
    ///     device: Device,
    /// ) -> cpu_gpu_buffer::Result<()> {
    ///     // SAFETY: the caller vouches for the stream.
    ///     let stream = unsafe { Stream::from_raw(raw, device, None) }?;
    ///     buffer.copy_to_gpu(.., &stream)
    /// }
    /// # let mut buffer = CpuGpuBuffer::new(4, Device::Cpu)?;
    /// // SAFETY: the CPU has no such streams, and that is the answer.
    /// let answer = unsafe { upload(&mut buffer, std::ptr::null_mut(), Device::Cpu) };
    /// assert!(matches!(answer, Err(Error::InvalidStream { .. })));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub unsafe fn from_raw(
        raw: sys::cudaStream_t,
        device: Device,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Stream> {
        let Device::Cuda(ordinal) = device else {
            return Err(Error::InvalidStream { reason: "the CPU has no CUDA streams" });
        };
        if raw.addr() == PER_THREAD {
            return Err(Error::InvalidStream {
                reason: "the per-thread stream is a different stream on each thread",
            });
        }
        let cuda = CudaStream {
            raw,
            context: context(ordinal)?,
            gather: Mutex::default(),
            ownership: Ownership::Borrowed(owner),
        };
        Ok(Stream::of(device, Some(cuda), WaitPolicy::DeviceDefault))
    }

    fn of(device: Device, cuda: Option<CudaStream>, wait: WaitPolicy) -> Stream {
        Stream(Arc::new(Inner { device, tickets: Tickets::new(), wait, cuda }))
    }

    /// The stream as the CUDA runtime knows it, borrowed from this handle; null on the CPU.
    ///
    /// The pointer is valid while any handle to the stream lives. Code that uses it owes two
    /// things:
    ///
    /// - Nobody destroys the stream.
    /// - Nobody begins to capture the stream while another thread uses a buffer, group or ring on
    ///   it. Waiting for an event that was recorded in a capture begins one, too. Work sent to a
    ///   stream that is being captured goes into a graph instead of running.
    ///
    /// Calls of this crate return [`Error::StreamCapturing`] if the stream is being captured when
    /// they begin or right after they have sent their work. They cannot notice a capture that
    /// begins and ends between.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// // What a kernel launch, cuBLAS or PyTorch's `ExternalStream` takes.
    /// let raw = stream.as_raw();
    /// assert_eq!(raw.is_null(), stream.device() == Device::Cpu);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_raw(&self) -> sys::cudaStream_t {
        self.0.cuda.as_ref().map_or(ptr::null_mut(), |cuda| cuda.raw)
    }

    /// The device whose work it queues.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// fn scratch(bytes: usize, stream: &Stream) -> cpu_gpu_buffer::Result<CpuGpuBuffer<u8>> {
    ///     CpuGpuBuffer::new(bytes, stream.device()) // where the stream's work is
    /// }
    /// assert_eq!(scratch(100, &Stream::new(Device::Cpu)?)?.device(), Device::Cpu);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// Waits until everything that was sent to the stream before this call has finished.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver's, which may be that of earlier work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ids = CpuGpuBuffer::<i64>::new(1000, stream.device())?;
    /// let mut lengths = CpuGpuBuffer::<i32>::new(8, stream.device())?;
    /// ids.copy_to_gpu(.., &stream)?;
    /// lengths.copy_to_gpu(.., &stream)?;
    /// stream.synchronize()?; // one wait: neither buffer has to ask the driver any more
    /// assert!(ids.try_cpu_mut()?.is_some() && lengths.try_cpu_mut()?.is_some());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        if self.0.cuda.is_some() && self.0.wait == WaitPolicy::Block {
            return self.record()?.synchronize();
        }
        let Some(entered) = self.enter()? else {
            return Ok(());
        };
        entered.refuse_capture()?;
        // Before the call: what is submitted while it waits, it does not wait for.
        let submitted = self.tickets().submitted();
        // SAFETY: the handle keeps the stream, and it is entered.
        unsafe { calls::stream::synchronize(entered.raw) }?;
        self.tickets().complete(submitted);
        Ok(())
    }

    /// Whether everything that was sent to the stream has finished.
    ///
    /// # Errors
    ///
    /// As for [`synchronize`](Self::synchronize).
    ///
    /// ```
    /// use cpu_gpu_buffer::{Device, Stream};
    ///
    /// let streams = [Stream::new(Device::auto())?, Stream::new(Device::auto())?];
    /// for stream in &streams {
    ///     if stream.is_idle()? {
    ///         println!("{stream:?} has nothing to do");
    ///     }
    /// }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn is_idle(&self) -> Result<bool> {
        let Some(entered) = self.enter()? else {
            return Ok(true);
        };
        entered.refuse_capture()?;
        let submitted = self.tickets().submitted();
        // SAFETY: as in `synchronize`.
        let idle = unsafe { calls::stream::query(entered.raw) }?;
        if idle {
            self.tickets().complete(submitted);
        }
        Ok(idle)
    }

    #[inline]
    pub(crate) fn tickets(&self) -> &Tickets {
        &self.0.tickets
    }

    pub(crate) fn wait_policy(&self) -> WaitPolicy {
        self.0.wait
    }

    /// Whether both are handles of one stream.
    #[inline]
    pub(crate) fn is(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Flags of an event that a thread waits for under this stream's policy, and takes no time of.
    pub(crate) fn event_flags(&self) -> EventFlags {
        match self.0.wait {
            WaitPolicy::DeviceDefault => EventFlags::DISABLE_TIMING,
            WaitPolicy::Block => EventFlags::DISABLE_TIMING | EventFlags::BLOCKING_SYNC,
        }
    }

    /// Makes calls on the stream possible in this thread; `None` on the CPU.
    #[inline]
    pub(crate) fn enter(&self) -> Result<Option<EnteredStream<'_>>> {
        let Some(CudaStream { raw, context, .. }) = &self.0.cuda else {
            return Ok(None);
        };
        let current = match raw.addr() {
            // The legacy stream is that of the current context. What it is given may let go an owner who makes
            // another one current.
            0 | LEGACY => Some(context.enter()?),
            _ => context.ensure_current()?,
        };
        Ok(Some(EnteredStream { stream: self, raw: *raw, context, _current: current }))
    }
}

/// A CUDA stream in a thread whose current context is one that calls on the stream can be made with.
pub(crate) struct EnteredStream<'a> {
    stream: &'a Stream,
    raw: sys::cudaStream_t,
    context: &'static Context,
    _current: Option<calls::context::Entered>,
}

impl<'a> EnteredStream<'a> {
    pub(crate) fn stream(&self) -> &'a Stream {
        self.stream
    }

    pub(crate) fn context(&self) -> &'static Context {
        self.context
    }

    pub(crate) fn raw(&self) -> sys::cudaStream_t {
        self.raw
    }

    /// The graph by which this stream's gathers are launched; `None` while another thread is at it.
    pub(crate) fn gather_graph(&self) -> Option<MutexGuard<'a, StreamGraph>> {
        match self.stream.0.cuda.as_ref()?.gather.try_lock() {
            Ok(graph) => Some(graph),
            Err(TryLockError::Poisoned(poison)) => Some(poison.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// An error where what is sent to the stream would go into a graph instead of running.
    #[inline]
    pub(crate) fn refuse_capture(&self) -> Result<()> {
        // SAFETY: the handle keeps the stream, and it is entered.
        unsafe { calls::stream::refuse_capture(self.raw) }
    }

    /// Records `event`, which is of this stream's device, behind what was sent so far.
    ///
    /// Another thread may have begun to capture the stream since it was asked about. The event, and
    /// work sent before it, then went into a graph and never ran, but a later event's ticket would
    /// say that they had. So the stream is asked once more. A capture that has ended by then is not
    /// noticed, and is the caller's to prevent.
    #[inline]
    pub(crate) fn record(&self, event: &EventHandle) -> Result<()> {
        // SAFETY: the handles keep both, they are of one device, and the stream is entered.
        unsafe { calls::event::record(event.raw(), self.raw) }?;
        self.refuse_capture()
    }

    /// Makes what is sent from now on wait for `event`.
    pub(crate) fn wait(&self, event: &EventHandle) -> Result<()> {
        // SAFETY: the handles keep both, and the stream is entered.
        unsafe { calls::stream::wait(self.raw, event.raw()) }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("device", &self.device())
            .field("raw", &self.as_raw())
            .finish_non_exhaustive()
    }
}
