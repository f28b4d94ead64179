//! A pool of buffers of one shape, which reuses their memory.
//!
//! All buffers of one segment share a slab of host memory and one of device memory. A pooled buffer
//! is an ordinary buffer. Its storage lies in a slot of the pool.
//!
//! The storage keeps its records when it is acquired and when it is returned. So the in-flight rule
//! of [`storage`](crate::buffer::storage) holds across holders. Returning a buffer never waits, and
//! a slot may be acquired while its last transfer is still queued. The new holder waits only if its
//! access requires that.
//!
//! [`slots`](crate::slots) describes how threads share the slots.

use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use bytemuck::Pod;

use crate::buffer::buffer::CpuGpuBuffer;
use crate::buffer::handle::StorageHandle;
use crate::buffer::side_layout::SideLayout;
use crate::buffer::storage::Storage;
use crate::cuda::fork;
use crate::device::Device;
use crate::element::DType;
use crate::error::{Error, Result, Side};
use crate::flight::left_behind::{LeftBehindCount, reclaim_before_allocating};
#[cfg(feature = "dlpack")]
use crate::flight::left_behind::{is_any_left_behind, reclaim};
use crate::memory::options::BufferOptions;
use crate::pool::options::PoolOptions;
use crate::shape::Shape;
use crate::slots::{Claim, Lease, Segment, Slots};

/// Statistics of a pool, which help to choose its size.
///
/// A pool always counts them. This takes about a tenth of the time of acquiring and returning a
/// buffer.
///
/// ```
/// use cpu_gpu_buffer::{BufferPool, Device, PoolStats};
///
/// /// Returns `true` if a pool that begins with `buffers` buffers would not have grown.
/// fn suffices(stats: PoolStats, buffers: usize) -> bool {
///     stats.high_water <= buffers
/// }
/// let pool = BufferPool::<u8>::new(10, Device::Cpu, 1)?;
/// drop((pool.acquire()?, pool.acquire()?));
/// let stats = pool.stats();
/// assert_eq!((stats.growths, stats.in_flight), (1, 0));
/// assert!(suffices(stats, 2) && !suffices(stats, 1));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolStats {
    /// The number of buffers that can be acquired without growing.
    pub available: usize,
    /// The number of buffers of the pool, acquired or not.
    pub total: usize,
    /// The number of buffers with pinned host sides.
    pub pinned: usize,
    /// The number of buffers with pageable host sides. On [`Device::Cpu`] all buffers are pageable.
    ///
    /// A pool with [`Pinning::Preferred`](crate::Pinning::Preferred) has both kinds if it grew when
    /// no more memory could be pinned. [`pinning_error`](CpuGpuBuffer::pinning_error) of a buffer
    /// gives the reason.
    pub pageable: usize,
    /// The largest number of buffers that was counted as acquired at the same time.
    ///
    /// It is exact if one thread acquires, from up to 4,096 buffers. If several threads acquire, it
    /// may miss a peak that is over within some thousand acquisitions. A buffer that changes hands
    /// during the count may be counted twice.
    pub high_water: usize,
    /// The number of times that the pool grew.
    pub growths: usize,
    /// The number of times that `acquire` or `try_acquire` returned a possibly busy buffer.
    ///
    /// It counts since the pool was made. It is not the number of transfers, or of buffers, in
    /// flight now. The pool prefers buffers with transfers that are known to be finished. If this
    /// number grows with each step of a program, all buffers that the pool looked at may have had
    /// queued transfers. A larger pool could then save waits.
    pub in_flight: usize,
}

/// Buffers of one shape on one device, shared by any number of threads.
///
/// [`acquire`](Self::acquire) returns an ordinary [`CpuGpuBuffer`]. Dropping the buffer returns it
/// to the pool, even after a resize. Neither waits for a transfer. If a transfer of the last holder
/// is still queued, the buffer tracks it, and waits when its host side is accessed.
///
/// After [`gpu_on`](CpuGpuBuffer::gpu_on), returning a buffer records an event. So the next holder
/// does not wait for later work on that stream. During a capture of the stream no event can be
/// recorded. The pool then prefers other buffers.
///
/// A clone of a pool is a handle of the same pool. Pool and buffers may be dropped in any order, on
/// any thread. The last buffer of an allocation frees it, and waits as the drop of a buffer does. A
/// forgotten buffer is lost to the pool, and its allocation is never freed.
///
/// ```
/// use cpu_gpu_buffer::{BufferPool, Device, Stream};
///
/// let device = Device::auto();
/// let stream = Stream::new(device)?;
/// let pool = BufferPool::<f32>::new([32, 64], device, 4)?;
/// for step in 0..100 {
///     let mut batch = pool.acquire()?;
///     batch.cpu_mut()?[..64].fill(step as f32);
///     batch.copy_to_gpu(..1, &stream)?;
///     // Returned to the pool. Its next user waits for the copy if it must.
/// }
/// assert_eq!((pool.available(), pool.total()), (4, 4));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
///
/// # Memory
///
/// The first buffers of a pool share one allocation for each side. The buffers that one growth adds
/// share one, too. Each buffer begins at a multiple of 256 bytes, or of the element's alignment if
/// that is more.
///
/// A returned buffer keeps handles of the streams of its last transfers. It releases a handle when
/// it is used on another stream, or with its memory. The last handle releases the stream or its
/// owner. So if an owner keeps the pool alive, the pool keeps the owner alive, too. If two owners
/// panic while a pool is dropped, the process aborts, as it does for the elements of a `Vec`.
///
/// Dropping the pool can leak an allocation. This happens if a buffer in it was returned during a
/// capture of its [`gpu_on`](CpuGpuBuffer::gpu_on) stream, and was not acquired since.
pub struct BufferPool<T: Pod> {
    inner: Arc<Inner>,
    // A holder on one thread reads the elements that a holder on another thread wrote. So the pool
    // has the bounds of a `Mutex`: it needs `T: Send`.
    elements: PhantomData<Mutex<T>>,
}

struct Inner {
    slots: Slots<Storage>,
    side_layout: SideLayout,
    device: Device,
    options: PoolOptions,
    /// The number of buffers with pinned host sides.
    pinned: AtomicUsize,
    left_behind_count: LeftBehindCount,
}

// A panic leaves a pool as an error does: a slot is claimed or free, and its storage keeps its
// records.
impl<T: Pod> UnwindSafe for BufferPool<T> {}
impl<T: Pod> RefUnwindSafe for BufferPool<T> {}

impl<T: Pod> Clone for BufferPool<T> {
    fn clone(&self) -> Self {
        BufferPool { inner: Arc::clone(&self.inner), elements: PhantomData }
    }
}

impl<T: Pod> BufferPool<T> {
    /// Makes a pool of `buffers` zeroed buffers, pinned if possible, that grows without a limit.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::new`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// // Allocates nothing until the first buffer is acquired.
    /// let pool = BufferPool::<f32>::new([32, 64], Device::auto(), 0)?;
    /// assert_eq!(pool.total(), 0);
    /// let buffer = pool.acquire()?;
    /// assert_eq!((pool.total(), buffer.shape()), (1, &[32, 64][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(shape: impl Into<Shape>, device: Device, buffers: usize) -> Result<Self> {
        Self::with_options(shape, device, buffers, PoolOptions::default())
    }

    /// Makes a pool of `buffers` buffers with `options`.
    ///
    /// # Errors
    ///
    /// - As for [`CpuGpuBuffer::with_options`].
    /// - [`Error::PoolExhausted`] if `buffers` is more than `max_buffers`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device, PoolOptions};
    ///
    /// // The next holder does not see the contents.
    /// let options = PoolOptions { zeroed: true, ..Default::default() };
    /// let pool = BufferPool::<u8>::with_options(16, Device::auto(), 1, options)?;
    /// pool.acquire()?.cpu_mut()?.fill(7);
    /// assert_eq!(pool.acquire()?.cpu()?, [0; 16]);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn with_options(
        shape: impl Into<Shape>,
        device: Device,
        buffers: usize,
        options: PoolOptions,
    ) -> Result<Self> {
        let side_layout = SideLayout::of::<T>(shape.into())?;
        options.host_flags.refuse_read_only()?;
        if let Some(max_buffers) = options.max_buffers.filter(|most| *most < buffers) {
            return Err(Error::PoolExhausted { max_buffers });
        }
        if let (Device::Cuda(ordinal), 1..) = (device, side_layout.layout.size()) {
            // An unusable device is an error even if nothing is allocated yet.
            Device::cuda(ordinal)?;
        }
        let mut inner = Inner {
            slots: Slots::new(threads()),
            side_layout,
            device,
            options,
            pinned: AtomicUsize::new(0),
            left_behind_count: LeftBehindCount::default(),
        };
        if buffers > 0 {
            reclaim_before_allocating(inner.side_layout.layout.size(), device);
            let segment = inner.segment(buffers)?;
            inner.slots.append(segment);
        }
        Ok(BufferPool { inner: Arc::new(inner), elements: PhantomData })
    }

    /// Acquires a buffer of the pool's shape. Grows the pool if none is left.
    ///
    /// This looks at a few buffers, and prefers one with no transfer in flight. If all of them may
    /// be in flight, it queries an event of one (`cudaEventQuery`) and returns that one, in flight
    /// or not. It never waits for a transfer. [`PoolGrowth`](crate::PoolGrowth) says by how much
    /// the pool grows.
    ///
    /// Growing allocates. With [`Pinning::Preferred`](crate::Pinning::Preferred), the new memory is
    /// pageable if no more can be pinned. If one side cannot be allocated, freeing the other waits
    /// for the device.
    ///
    /// With the feature `dlpack`, this waits for the devices in two cases. The wait gives back
    /// memory that is left behind: a tensor or its consumer's work outlived the buffer.
    ///
    /// - No buffer is left, and buffers of this pool are left behind.
    /// - There is no memory to grow, and anything is left behind.
    ///
    /// # Errors
    ///
    /// On error the pool is unchanged.
    ///
    /// - [`Error::PoolExhausted`] if all buffers are acquired, and the pool may not grow.
    /// - [`Error::OutOfMemory`] or [`Error::PinningUnavailable`] if not even one buffer can be
    ///   added.
    /// - An error of the driver.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device, Stream};
    ///
    /// let stream = Stream::new(Device::auto())?;
    /// let pool = BufferPool::<u8>::new(1 << 16, stream.device(), 2)?;
    /// std::thread::scope(|scope| {
    ///     for worker in 0..4 {
    ///         let (pool, stream) = (&pool, &stream);
    ///         scope.spawn(move || {
    ///             let mut batch = pool.acquire()?; // grows if more than two are out at once
    ///             batch.cpu_mut()?.fill(worker);
    ///             batch.copy_to_gpu(.., stream)
    ///         });
    ///     }
    /// });
    /// assert!(pool.total() <= 4 && pool.available() == pool.total());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn acquire(&self) -> Result<CpuGpuBuffer<T>> {
        self.inner.refuse_child()?;
        match self.inner.slots.claim(Storage::is_known_ready) {
            Some(Claim::Ready(slot)) => Ok(self.buffer(slot)),
            claim => self.acquire_otherwise(claim),
        }
    }

    /// Continues [`acquire`](Self::acquire) without a ready slot: with a busy one, or with none.
    #[cold]
    fn acquire_otherwise(&self, claim: Option<Claim<Storage>>) -> Result<CpuGpuBuffer<T>> {
        let claim = match claim {
            Some(claim) => claim,
            None => self.inner.claim_or_grow()?,
        };
        match claim {
            Claim::Ready(slot) => Ok(self.buffer(slot)),
            Claim::Busy(slot) => {
                slot.poll()?;
                Ok(self.busy_buffer(slot))
            }
        }
    }

    /// Acquires a buffer of the pool's shape if one is left.
    ///
    /// This is [`acquire`](Self::acquire) without growing and without a query of the driver. It
    /// takes no lock, allocates nothing and calls no CUDA.
    ///
    /// `None` means that there was a moment during the call at which no buffer was free. Each was
    /// acquired, or another thread was looking at it. So if the pool has as many buffers as all
    /// threads together hold and want, the result is never `None`.
    ///
    /// With the feature `dlpack`, a buffer that is left behind cannot be acquired. `acquire`,
    /// `dlpack::reclaim` and any allocation for a CUDA device give it back.
    ///
    /// In the forked child of a process that used CUDA, the result for a CUDA device is `None`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 1)?;
    /// let held = pool.try_acquire();
    /// assert!(held.is_some() && pool.try_acquire().is_none());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn try_acquire(&self) -> Option<CpuGpuBuffer<T>> {
        self.inner.refuse_child().ok()?;
        match self.inner.slots.claim(Storage::is_known_ready)? {
            Claim::Ready(slot) => Some(self.buffer(slot)),
            Claim::Busy(slot) => Some(self.busy_buffer(slot)),
        }
    }

    /// Makes the buffer of a slot that was not ready when it was claimed.
    ///
    /// Counts the claim as busy if the slot is still not ready.
    #[cold]
    fn busy_buffer(&self, slot: Lease<Storage>) -> CpuGpuBuffer<T> {
        if !slot.is_known_ready() {
            self.inner.slots.count_busy_claim();
        }
        self.buffer(slot)
    }

    /// Makes the buffer of a slot.
    #[inline]
    fn buffer(&self, mut slot: Lease<Storage>) -> CpuGpuBuffer<T> {
        let Inner { side_layout, options, .. } = &*self.inner;
        slot.reset_for_reuse(side_layout, options.zeroed);
        CpuGpuBuffer::stored(StorageHandle::from_pool(slot))
    }

    /// The number of buffers that can be acquired without growing.
    ///
    /// While other threads work, this is an estimate.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 3)?;
    /// let held = pool.acquire()?;
    /// assert_eq!(pool.available(), 2);
    /// std::mem::forget(held); // lost to the pool, and no race
    /// assert_eq!(pool.available(), 2);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn available(&self) -> usize {
        self.inner.slots.available()
    }

    /// The number of buffers of the pool, acquired or not.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 4)?;
    /// let held = (0..5).map(|_| pool.acquire()).collect::<Vec<_>>();
    /// assert_eq!(pool.total(), 8); // the fifth `acquire` doubled the pool
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn total(&self) -> usize {
        self.inner.slots.total()
    }

    /// Statistics of the pool.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 2)?;
    /// let held = [pool.acquire()?, pool.acquire()?, pool.acquire()?];
    /// drop(held);
    /// let stats = pool.stats();
    /// assert_eq!((stats.available, stats.total, stats.high_water, stats.growths), (4, 4, 3, 1));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn stats(&self) -> PoolStats {
        let Inner { slots, pinned, .. } = &*self.inner;
        // This is read before the total, so that growth in between makes the total larger and not
        // smaller. Growth counts pinned buffers before it adds them, so `pinned` may still exceed
        // the total.
        let pinned = pinned.load(Ordering::Relaxed);
        let total = slots.total();
        PoolStats {
            available: slots.available(),
            total,
            pinned: pinned.min(total),
            pageable: total.saturating_sub(pinned),
            high_water: slots.high_water(),
            growths: slots.growths(),
            in_flight: slots.busy_claims(),
        }
    }

    /// The dimensions of the pool's buffers, outermost first.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new([4, 4], Device::Cpu, 1)?;
    /// pool.acquire()?.resize(3)?; // undone when the buffer is acquired again
    /// assert_eq!(pool.acquire()?.shape(), pool.shape());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape(&self) -> &[usize] {
        self.inner.side_layout.shape.dims()
    }

    /// The device of the pool's buffers.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device, Stream};
    ///
    /// let pool = BufferPool::<u8>::new([4, 4], Device::auto(), 1)?;
    /// let streams = [Stream::new(pool.device())?, Stream::new(pool.device())?];
    /// assert!(streams.iter().all(|stream| stream.device() == pool.device()));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn device(&self) -> Device {
        self.inner.device
    }
}

impl Inner {
    /// Allocates a segment of `count` buffers.
    fn segment(&self, count: usize) -> Result<Segment<Storage>> {
        let PoolOptions { pinning, host_flags, .. } = self.options;
        let options = BufferOptions { pinning, host_flags };
        let left_behind = Some(&self.left_behind_count);
        let storages =
            Storage::allocate_many(self.side_layout, count, self.device, options, left_behind)?;
        // The storages share a slab, so all of them are pinned or none is.
        let are_pinned = storages.first().is_some_and(Storage::is_pinned);
        let segment = self.slots.prepare(storages).ok_or(Error::OutOfMemory {
            side: Side::Host,
            bytes: count * size_of::<Storage>(),
            device: self.device,
        })?;
        if are_pinned {
            self.pinned.fetch_add(count, Ordering::Relaxed);
        }
        Ok(segment)
    }

    /// Claims a slot after a claim found none free. Grows the pool if none comes back.
    ///
    /// First takes back buffers of this pool that are left behind. After an error, tries again if
    /// that took some back: other threads may have claimed them, and left them behind again.
    fn claim_or_grow(&self) -> Result<Claim<Storage>> {
        loop {
            // This is read before the search for slots. If none is left behind now, `Acquire` makes
            // the slots of those that came back visible to the search.
            let left_behind = self.left_behind_count.load(Ordering::Acquire) > 0;
            let came_back = left_behind && reclaim().is_ok();
            match self.claim_or_append() {
                Err(Error::OutOfMemory { .. } | Error::PinningUnavailable { .. })
                    if is_any_left_behind() && reclaim().is_ok() =>
                {
                    // Memory of other buffers came back.
                    return self.claim_or_append();
                }
                Err(_) if came_back => {}
                claim => return claim,
            }
        }
    }

    /// Claims a slot under the growth lock, and grows the pool if none is free.
    fn claim_or_append(&self) -> Result<Claim<Storage>> {
        let growth = self.slots.lock_growth();
        if let Some(claim) = growth.claim(Storage::is_known_ready) {
            return Ok(claim);
        }
        let segment = self.grow(self.slots.total())?;
        Ok(Claim::Ready(growth.append(segment)))
    }

    /// Allocates the next segment for a pool of `total` buffers.
    ///
    /// It has as many buffers as the options say. If they cannot be allocated, it has half as many,
    /// and so on. The caller holds the growth lock, so this reclaims nothing.
    fn grow(&self, total: usize) -> Result<Segment<Storage>> {
        let room = self.options.max_buffers.map_or(usize::MAX, |most| most.saturating_sub(total));
        if room == 0 || self.slots.is_full() {
            return Err(Error::PoolExhausted { max_buffers: total });
        }
        let (bytes, steps) = (self.side_layout.layout.pad_to_align().size(), self.slots.growths());
        let mut count = self.options.growth.step(total, bytes, steps).min(room);
        loop {
            match self.segment(count) {
                Err(
                    Error::OutOfMemory { .. }
                    | Error::PinningUnavailable { .. }
                    | Error::InvalidShape { .. },
                ) if count > 1 => count /= 2,
                made => return made,
            }
        }
    }

    /// Returns [`Error::Forked`] in a child process, which has no memory of a CUDA device's pool.
    #[inline]
    fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }
}

/// Without the feature, there are no tensors to leave a buffer behind.
#[cfg(not(feature = "dlpack"))]
fn is_any_left_behind() -> bool {
    false
}

#[cfg(not(feature = "dlpack"))]
fn reclaim() -> Result<()> {
    Ok(())
}

/// The number of threads to expect. With more threads, a pool is slower and still correct.
fn threads() -> usize {
    const AT_LEAST: usize = 16;
    // The number is kept, because the standard library reads files for it.
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from).max(AT_LEAST))
}

impl<T: Pod> fmt::Debug for BufferPool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = DType::of::<T>().map_or(type_name::<T>(), DType::name);
        write!(
            f,
            "BufferPool(shape={:?}, dtype={dtype}, device={}, available={} of {})",
            self.inner.side_layout.shape,
            self.device(),
            self.available(),
            self.total()
        )
    }
}
