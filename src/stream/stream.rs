//! Streams: queues of work on a device, which run in order.
//!
//! A [`Stream`] is a handle, and a clone is cheap. Any number of threads may send work through it.
//! All clones share the two counters of [`ticket`](crate::stream::ticket). By these counters,
//! buffers know which transfers have finished.
//!
//! Each buffer keeps handles of the streams that it was last used on. Dropping the last handle
//! destroys the CUDA stream, or drops the owner of a borrowed one.

use std::any::Any;
use std::fmt;
use std::mem;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crate::cuda::calls;
use crate::cuda::calls::context::Entered;
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
/// On [`Device::Cpu`], each call does its work before it returns.
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
#[doc(alias = "cudaStream_t")]
#[doc(alias = "queue")]
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
    gather_graph: Mutex<StreamGraph>,
    ownership: Ownership,
}

enum Ownership {
    Owned,
    // The caller's owner, if there is one. It keeps the stream alive.
    Borrowed(Option<Arc<dyn Any + Send + Sync>>),
}

// SAFETY: any number of threads may use a stream of the runtime at once. The owner of a borrowed
// one is `Send` and `Sync` by its type, and so is the graph's lock.
unsafe impl Send for CudaStream {}
// SAFETY: as for `Send`.
unsafe impl Sync for CudaStream {}

// Only the owner of a borrowed stream is not known to be unwind safe. It is kept and dropped, and
// never looked at.
impl UnwindSafe for CudaStream {}
impl RefUnwindSafe for CudaStream {}

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
            // The owner is not dropped either: it may destroy the stream.
            if let Ownership::Borrowed(owner) = &mut self.ownership {
                mem::forget(owner.take());
            }
            return;
        }
        match &mut self.ownership {
            Ownership::Owned => {
                // The call is made in the stream's own context, because another one that is current
                // may be broken and make it fail. If entering fails, the call is tried all the
                // same.
                let _current = self.context.ensure_current();
                // SAFETY: the last handle is gone. Destroying a stream does not wait for its work,
                // and lets the work finish ("CUDA Runtime API, `cudaStreamDestroy`").
                let destroyed = unsafe { calls::stream::destroy(self.raw) };
                // No caller could act on the error.
                let _ = destroyed;
            }
            Ownership::Borrowed(owner) => {
                // This may run while another stream is entered, and the owner's drop may make
                // another context current. That context replaces the one that is entered here, and
                // is popped with `_current`. If entering fails, the owner is leaked.
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
    /// Creates a non-blocking stream.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] for a device that cannot be used, or an error of the driver.
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

    /// Creates a stream with a priority, flags and a wait policy.
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
                // Only bits that have a name.
                let flags = options.flags & StreamFlags::all();
                Some(CudaStream {
                    raw: calls::stream::create(flags.bits(), options.priority)?,
                    context,
                    gather_graph: Mutex::default(),
                    ownership: Ownership::Owned,
                })
            }
        };
        Ok(Stream::of(device, cuda, options.wait))
    }

    /// Borrows a stream that other code made. This crate never destroys it.
    ///
    /// The crate keeps `owner` until no buffer, event or handle refers to the stream.
    ///
    /// A null pointer and 1 mean the legacy stream of `device`. The per-thread stream (2) is
    /// refused, because it is a different stream on each thread.
    ///
    /// Make one handle for each raw stream and clone it. Two handles made from one raw stream do
    /// not share their knowledge of finished work.
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
    /// - Assume that a buffer last used on it was returned to a pool or exported as a tensor, and
    ///   that the stream was being captured or the driver returned errors at that time. Without an
    ///   owner, the stream then also outlives that pool or tensor.
    /// - Nobody captures it, or makes it join a capture by waiting for an event of that capture,
    ///   while a buffer, group or ring last used on it is in use by any call, or is given back to
    ///   its pool. See [`as_raw`](Self::as_raw).
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Error, Stream};
    ///
    /// /// For a plugin that gets a stream with each call.
    /// ///
    /// /// # Safety
    /// ///
    /// /// `raw` is a live stream of `device` and is not being captured. It stays so until the
    /// /// buffer is dropped or used on another stream.
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
    /// // SAFETY: the CPU has no CUDA streams, so the call is refused.
    /// let result = unsafe { upload(&mut buffer, std::ptr::null_mut(), Device::Cpu) };
    /// assert!(matches!(result, Err(Error::InvalidStream { .. })));
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
            gather_graph: Mutex::default(),
            ownership: Ownership::Borrowed(owner),
        };
        Ok(Stream::of(device, Some(cuda), WaitPolicy::DeviceDefault))
    }

    fn of(device: Device, cuda: Option<CudaStream>, wait: WaitPolicy) -> Stream {
        Stream(Arc::new(Inner { device, tickets: Tickets::new(), wait, cuda }))
    }

    /// The raw CUDA stream, borrowed from this handle. Null on the CPU.
    ///
    /// The pointer is valid while any handle to the stream lives. Code that uses it must ensure two
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
    /// // A kernel launch, cuBLAS and PyTorch's `ExternalStream` take it.
    /// let raw = stream.as_raw();
    /// assert_eq!(raw.is_null(), stream.device() == Device::Cpu);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn as_raw(&self) -> sys::cudaStream_t {
        self.0.cuda.as_ref().map_or(ptr::null_mut(), |cuda| cuda.raw)
    }

    /// The device of the stream.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// fn scratch(bytes: usize, stream: &Stream) -> cpu_gpu_buffer::Result<CpuGpuBuffer<u8>> {
    ///     CpuGpuBuffer::new(bytes, stream.device())
    /// }
    /// assert_eq!(scratch(100, &Stream::new(Device::Cpu)?)?.device(), Device::Cpu);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// Waits until all work that was sent to the stream before this call has finished.
    ///
    /// # Errors
    ///
    /// [`Error::StreamCapturing`], or an error of the driver, which may come from earlier work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let mut ids = CpuGpuBuffer::<i64>::new(1000, stream.device())?;
    /// let mut lengths = CpuGpuBuffer::<i32>::new(8, stream.device())?;
    /// ids.copy_to_gpu(.., &stream)?;
    /// lengths.copy_to_gpu(.., &stream)?;
    /// stream.synchronize()?; // one wait: no later access asks the driver
    /// assert!(ids.try_cpu_mut()?.is_some() && lengths.try_cpu_mut()?.is_some());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        let Some(entered) = self.enter()? else {
            return Ok(());
        };
        entered.refuse_capture()?;
        if self.0.wait == WaitPolicy::Block {
            return self.synchronize_asleep(entered);
        }
        // This is read before the call, because the call may not wait for work that is sent later.
        let submitted = self.tickets().submitted();
        // SAFETY: the handle keeps the stream, and it is entered.
        unsafe { calls::stream::synchronize(entered.raw) }?;
        self.tickets().complete(submitted);
        Ok(())
    }

    /// Waits for the stream while the thread sleeps.
    ///
    /// CUDA lets a thread sleep for an event, but not for a stream. So this records an event.
    fn synchronize_asleep(&self, entered: EnteredStream<'_>) -> Result<()> {
        let event = EventHandle::new(entered.context, self.event_flags())?;
        let ticket = self.tickets().submit(|| Ok(()), || entered.record(&event))?;
        drop(entered);
        if !self.tickets().is_complete(ticket) {
            event.synchronize()?;
            self.tickets().complete(ticket);
        }
        Ok(())
    }

    /// Returns `true` if all work of the stream has finished.
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
    ///         println!("{stream:?} is idle");
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

    /// Returns `true` if both are clones of one handle.
    #[inline]
    pub(crate) fn is(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Flags for an event without a time stamp, which is waited for by this stream's policy.
    pub(crate) fn event_flags(&self) -> EventFlags {
        match self.0.wait {
            WaitPolicy::DeviceDefault => EventFlags::DISABLE_TIMING,
            WaitPolicy::Block => EventFlags::DISABLE_TIMING | EventFlags::BLOCKING_SYNC,
        }
    }

    /// Prepares this thread for calls on the stream. Returns `None` on the CPU.
    #[inline]
    pub(crate) fn enter(&self) -> Result<Option<EnteredStream<'_>>> {
        let Some(CudaStream { raw, context, .. }) = &self.0.cuda else {
            return Ok(None);
        };
        let current = match raw.addr() {
            // The legacy stream is that of the current context. A call on it may drop an owner that
            // makes another context current, so the context is entered even if it is current.
            0 | LEGACY => Some(context.enter()?),
            _ => context.ensure_current()?,
        };
        Ok(Some(EnteredStream { stream: self, raw: *raw, context, _current: current }))
    }
}

/// A CUDA stream in a thread that has the stream's context current.
pub(crate) struct EnteredStream<'a> {
    stream: &'a Stream,
    raw: sys::cudaStream_t,
    context: &'static Context,
    _current: Option<Entered>,
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

    /// Locks the graph for gathers on this stream. Returns `None` while another thread uses it.
    pub(crate) fn gather_graph(&self) -> Option<MutexGuard<'a, StreamGraph>> {
        match self.stream.0.cuda.as_ref()?.gather_graph.try_lock() {
            Ok(graph) => Some(graph),
            Err(TryLockError::Poisoned(poison)) => Some(poison.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Returns [`Error::StreamCapturing`] if work sent to the stream would go into a graph.
    #[inline]
    pub(crate) fn refuse_capture(&self) -> Result<()> {
        // SAFETY: the handle keeps the stream, and it is entered.
        unsafe { calls::stream::refuse_capture(self.raw) }
    }

    /// Records `event`, which is of this stream's device, behind all earlier work.
    ///
    /// Another thread may have begun a capture since the last check. The event and earlier work
    /// then went into a graph and did not run. A later event's ticket would count them as finished.
    /// So this checks the stream again after recording. It cannot notice a capture that has ended
    /// by then. The conditions of [`Stream::from_raw`] and [`Stream::as_raw`] exclude that.
    #[inline]
    pub(crate) fn record(&self, event: &EventHandle) -> Result<()> {
        // SAFETY: the handles keep both, they are of one device, and the stream is entered.
        unsafe { calls::event::record(event.raw(), self.raw) }?;
        self.refuse_capture()
    }

    /// Makes later work of the stream wait for `event`. The calling thread does not wait.
    pub(crate) fn wait(&self, event: &EventHandle) -> Result<()> {
        // SAFETY: the handles keep both, and the stream is entered.
        unsafe { calls::stream::wait(self.raw, event.raw()) }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream(device={}, raw={:p})", self.device(), self.as_raw())
    }
}
