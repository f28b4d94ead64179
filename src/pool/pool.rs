//! A pool of buffers of one shape, which hands the same memory out again and again.
//!
//! All buffers of a pool's segment live in one slab of host memory and one of device memory. A pooled buffer
//! is an ordinary buffer whose storage is a slot of the pool's: it carries its records with it, both when it
//! is handed out and when it is given back, so that the in-flight rule of [`storage`](crate::buffer::storage) holds
//! through the pool. Giving a buffer back therefore waits for nothing, and a slot may be handed out while its
//! last transfer is still queued: whoever gets it waits where the rule says so, and not before.
//!
//! The slots themselves, and what threads do to them at once, are [`slots`](crate::slots).

use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
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
use crate::memory::options::BufferOptions;
use crate::memory::options::{HostFlags, Pinning};
use crate::shape::Shape;
use crate::slots::{Lease, Segment, Slots};

/// How a pool is made.
///
/// ```
/// use cpu_gpu_buffer::{BufferPool, Device, Error, PoolOptions};
///
/// let options = PoolOptions { max_buffers: Some(2), ..Default::default() };
/// let pool = BufferPool::<u8>::with_options(100, Device::auto(), 1, options)?;
/// let (first, second) = (pool.acquire()?, pool.acquire()?);
/// assert_eq!(pool.acquire().err(), Some(Error::PoolExhausted { max_buffers: 2 }));
/// # drop((first, second));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolOptions {
    /// The most buffers that there will ever be; without a limit unless given.
    pub max_buffers: Option<usize>,
    /// How many buffers the pool adds when all are out: [`PoolGrowth::Double`] unless given.
    pub growth: PoolGrowth,
    /// Whether the host sides are pinned: [`Pinning::Preferred`] unless given.
    pub pinning: Pinning,
    /// How they are pinned: all flags unless given.
    pub host_flags: HostFlags,
    /// Whether both sides of a buffer are zeroed each time that it is handed out. They are when it is first
    /// used: the host side after the transfers that its last holder left queued, for which its first use waits,
    /// copies included. `false` unless given: a buffer then comes with what its last holder left in it.
    pub zeroed: bool,
}

impl Default for PoolOptions {
    fn default() -> PoolOptions {
        let BufferOptions { pinning, host_flags } = BufferOptions::default();
        PoolOptions {
            max_buffers: None,
            growth: PoolGrowth::Double,
            pinning,
            host_flags,
            zeroed: false,
        }
    }
}

/// How many buffers a pool adds when all are out. It adds fewer if there is no memory for them, and
/// never more than [`max_buffers`](PoolOptions::max_buffers) allows. A pool that has grown 128
/// times adds an eighth of its buffers at least.
///
/// ```
/// use std::num::NonZeroUsize;
///
/// use cpu_gpu_buffer::{BufferPool, Device, PoolGrowth, PoolOptions};
///
/// for (growth, total) in [(PoolGrowth::Double, 8), (PoolGrowth::By(NonZeroUsize::MIN), 5)] {
///     let options = PoolOptions { growth, ..Default::default() };
///     let pool = BufferPool::<u8>::with_options(100, Device::auto(), 4, options)?;
///     let held = (0..5).map(|_| pool.acquire()).collect::<Vec<_>>();
///     assert_eq!(pool.total(), total);
/// }
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum PoolGrowth {
    /// Doubles the pool. Adds at most 16 MiB to each side, or an eighth of the pool if that is
    /// more, and at least one buffer.
    #[default]
    Double,
    /// This many.
    By(NonZeroUsize),
}

impl PoolGrowth {
    /// The most bytes that doubling adds to a side, unless an eighth of the pool is more.
    const BOUND: usize = 16 << 20;

    /// So many steps may be small. A pool has room for 255.
    const SMALL_STEPS: usize = 128;

    /// The buffers to be added to `total` buffers of `bytes` bytes each, after so many steps.
    fn step(self, total: usize, bytes: usize, steps: usize) -> usize {
        // An eighth, so that no pool ever needs more steps than there are.
        let least = total / 8;
        match self {
            PoolGrowth::Double => {
                let bound = Self::BOUND.checked_div(bytes).unwrap_or(usize::MAX);
                total.min(bound.max(least)).max(1)
            }
            PoolGrowth::By(count) if steps < Self::SMALL_STEPS => count.get(),
            PoolGrowth::By(count) => count.get().max(least),
        }
    }
}

/// What a pool has been through, for whoever has to size it. Always counted, which takes about a tenth of what
/// acquiring a buffer and giving it back does.
///
/// ```
/// use cpu_gpu_buffer::{BufferPool, Device, PoolStats};
///
/// /// Whether a pool that begins with so many need never grow.
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
    /// The buffers that could be acquired without growing.
    pub available: usize,
    /// The buffers that there are.
    pub total: usize,
    /// Those whose host sides are pinned.
    pub pinned: usize,
    /// Those whose host sides are pageable. A pool of [`Pinning::Preferred`] has both if it grew
    /// when no more could be pinned; [`pinning_error`](CpuGpuBuffer::pinning_error) of a buffer
    /// says why. On [`Device::Cpu`] all are.
    pub pageable: usize,
    /// The most buffers that were seen to be out at once. Exact where one thread acquires, from up to 4,096 buffers.
    /// Where several do, a peak that is over within some thousand acquisitions may be missed, and a buffer that
    /// changes hands while they are counted may count twice.
    pub high_water: usize,
    /// How often the pool grew.
    pub growths: usize,
    /// Times [`acquire`](BufferPool::acquire) returned a possibly busy buffer.
    pub in_flight: usize,
}

/// Buffers of one shape on one device, handed out and given back by any number of threads.
///
/// What [`acquire`](Self::acquire) gives is an ordinary [`CpuGpuBuffer`]; dropping it gives its place in the
/// pool back, whatever was done to it in between. Nothing waits for that: neither does giving a buffer back
/// wait for the transfers that it has queued, nor does acquiring one. (After [`gpu_on`](CpuGpuBuffer::gpu_on) it records
/// an event: what the stream is sent later has nothing to do with the next holder. While the stream is being captured
/// it cannot, and the buffer is passed over where another one is left.) A buffer that is handed out while a
/// transfer of its last holder's is still queued knows of it, and waits when its host side is looked at.
///
/// Handles are cheap to clone, and mean the same pool. Pool and buffers may be dropped in any order, on any
/// thread: memory is given back with the last buffer in it, which then waits as a buffer's drop does. A buffer
/// that is forgotten costs its place, and keeps the memory around it.
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
///     // Given back with the copy queued.
/// }
/// assert_eq!((pool.available(), pool.total()), (4, 4));
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
///
/// # Memory
///
/// The buffers that a pool begins with, and those that it grows by each time, share one allocation of either
/// side. Each begins at a multiple of 256 bytes, or of the element's alignment where that is more.
///
/// A buffer remembers the streams of its last transfers, also while nobody holds it: a stream that
/// was dropped, or the owner of a foreign one, is let go when the buffer has been used elsewhere,
/// or with the memory. An owner that keeps the pool is therefore kept by it. If two owners panic
/// while a pool is dropped, the process aborts, as it does for the elements of a `Vec`.
///
/// If a buffer was given back while a stream of its [`gpu_on`](CpuGpuBuffer::gpu_on) was being
/// captured, and was not handed out since, dropping the pool leaks the allocation that this buffer
/// shares with others.
pub struct BufferPool<T: Pod> {
    inner: Arc<Inner>,
    // What one thread leaves in a buffer another finds: the pool sends elements between threads.
    elements: PhantomData<Mutex<T>>,
}

struct Inner {
    slots: Slots<Storage>,
    side_layout: SideLayout,
    device: Device,
    options: PoolOptions,
    /// Buffers whose host sides are pinned.
    pinned: AtomicUsize,
    left_behind_count: LeftBehindCount,
}

impl<T: Pod> Clone for BufferPool<T> {
    fn clone(&self) -> Self {
        BufferPool { inner: Arc::clone(&self.inner), elements: PhantomData }
    }
}

impl<T: Pod> BufferPool<T> {
    /// A pool that begins with `buffers` buffers, zeroed and pinned where that works, and grows without a
    /// limit.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::new`].
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// // Nothing is allocated before the first one is asked for.
    /// let pool = BufferPool::<f32>::new([32, 64], Device::auto(), 0)?;
    /// assert_eq!(pool.total(), 0);
    /// let buffer = pool.acquire()?;
    /// assert_eq!((pool.total(), buffer.shape()), (1, &[32, 64][..]));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn new(shape: impl Into<Shape>, device: Device, buffers: usize) -> Result<Self> {
        Self::with_options(shape, device, buffers, PoolOptions::default())
    }

    /// A pool that begins with `buffers` buffers, made as `options` say.
    ///
    /// # Errors
    ///
    /// As for [`CpuGpuBuffer::with_options`], and [`Error::PoolExhausted`] where `buffers` are more than
    /// `max_buffers`.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device, PoolOptions};
    ///
    /// // For contents that the next holder is not to see.
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
        if let Some(max_buffers) = options.max_buffers.filter(|most| *most < buffers) {
            return Err(Error::PoolExhausted { max_buffers });
        }
        if let (Device::Cuda(ordinal), 1..) = (device, side_layout.layout.size()) {
            // Also where nothing is allocated yet.
            Device::cuda(ordinal)?;
        }
        let inner = Inner {
            slots: Slots::new(threads()),
            side_layout,
            device,
            options,
            pinned: AtomicUsize::new(0),
            left_behind_count: LeftBehindCount::default(),
        };
        if buffers > 0 {
            reclaim_before_allocating(inner.side_layout.layout.size(), device);
            inner.slots.append(inner.segment(buffers)?);
        }
        Ok(BufferPool { inner: Arc::new(inner), elements: PhantomData })
    }

    /// A buffer of the pool's shape. If none is left, the pool grows as [`PoolGrowth`] says.
    /// ([`Pinning::Preferred`] grows by pageable memory if no more can be pinned.)
    ///
    /// Prefers a buffer whose host side is not in flight. Where all of the few that it looks at may
    /// be, it asks the driver about one (`cudaEventQuery`), and hands that out, in flight or not.
    /// It waits for no transfer. (If tensors of the feature `dlpack` left buffers of this pool
    /// behind and no other is left, it waits for the devices to have them back; and once more if
    /// memory is short and other buffers left theirs behind.) Growing takes what
    /// allocating takes; where it fails, giving the other side back waits for the device.
    ///
    /// # Errors
    ///
    /// [`Error::PoolExhausted`] where all buffers are out and there may be no more, [`Error::OutOfMemory`] or
    /// [`Error::PinningUnavailable`] where not a single one more could be made, or an error of the driver's.
    /// The pool is as it was.
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
    ///             let mut batch = pool.acquire()?; // there are two, and it grows where four are out at once
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
            Some((slot, true)) => Ok(self.buffer(slot, true)),
            claimed => self.acquire_otherwise(claimed),
        }
    }

    #[cold]
    fn acquire_otherwise(
        &self,
        claimed: Option<(Lease<Storage>, bool)>,
    ) -> Result<CpuGpuBuffer<T>> {
        let (slot, ready) = match claimed {
            Some(claimed) => claimed,
            None => self.inner.claim_or_grow()?,
        };
        if !ready {
            slot.poll()?;
        }
        Ok(self.buffer(slot, ready))
    }

    /// A buffer of the pool's shape, if one is left: [`acquire`](Self::acquire) without growing and without
    /// asking the driver. It takes no lock, allocates nothing and calls no CUDA.
    ///
    /// `None` means that at some moment during the call each buffer was out, or being looked at by another thread that
    /// acquires; so where there are as many as all threads together hold and want, it is never the answer. By now
    /// one may have been given back. Buffers that tensors of the feature `dlpack` left behind stay out until something else has
    /// them back: `acquire`, `dlpack::reclaim`, or whatever allocates for a CUDA device. In the forked child of a process
    /// that used CUDA, the answer for a CUDA device is `None`.
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
        let (slot, ready) = self.inner.slots.claim(Storage::is_known_ready)?;
        Some(self.buffer(slot, ready))
    }

    #[inline]
    fn buffer(&self, mut slot: Lease<Storage>, ready: bool) -> CpuGpuBuffer<T> {
        let Inner { slots, side_layout, options, .. } = &*self.inner;
        if !ready && !slot.is_known_ready() {
            slots.count_not_ready();
        }
        slot.reset_for_reuse(side_layout, options.zeroed);
        CpuGpuBuffer::stored(StorageHandle::pool(slot))
    }

    /// The buffers that could be acquired without growing, as far as can be told while other threads work.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 3)?;
    /// let held = pool.acquire()?;
    /// assert_eq!(pool.available(), 2);
    /// std::mem::forget(held); // costs its place, and races with nothing
    /// assert_eq!(pool.available(), 2);
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn available(&self) -> usize {
        self.inner.slots.available()
    }

    /// The buffers that there are, in the pool and out of it.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new(10, Device::Cpu, 4)?;
    /// let held = (0..5).map(|_| pool.acquire()).collect::<Vec<_>>();
    /// assert_eq!(pool.total(), 8); // it doubled for the fifth
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn total(&self) -> usize {
        self.inner.slots.total()
    }

    /// What the pool has been through.
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
        // Before the buffers are counted, which are then at least as many.
        let pinned = pinned.load(Ordering::Relaxed);
        let total = slots.total();
        PoolStats {
            available: slots.available(),
            total,
            pinned: pinned.min(total),
            pageable: total.saturating_sub(pinned),
            high_water: slots.high_water(),
            growths: slots.growths(),
            in_flight: slots.not_ready(),
        }
    }

    /// The dimensions of its buffers, outermost first.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferPool, Device};
    ///
    /// let pool = BufferPool::<u8>::new([4, 4], Device::Cpu, 1)?;
    /// pool.acquire()?.resize(3)?; // its holder's business
    /// assert_eq!(pool.acquire()?.shape(), pool.shape());
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn shape(&self) -> &[usize] {
        self.inner.side_layout.shape.dims()
    }

    /// The device of its buffers.
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
    fn segment(&self, count: usize) -> Result<Segment<Storage>> {
        let PoolOptions { pinning, host_flags, .. } = self.options;
        let options = BufferOptions { pinning, host_flags };
        let left_behind = Some(&self.left_behind_count);
        let storages =
            Storage::allocate_many(self.side_layout, count, self.device, options, left_behind)?;
        // One slab: all of them are, or none.
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

    /// A slot, although none was free. Those that tensors left behind come before new ones. The search
    /// goes on while the pool itself has some left behind: other threads may have taken the ones that
    /// came back, and left theirs behind.
    fn claim_or_grow(&self) -> Result<(Lease<Storage>, bool)> {
        loop {
            // Before the look. `Acquire`: if none is left behind, all that were are seen to be free.
            let left_behind = self.left_behind_count.load(Ordering::Acquire);
            #[cfg(feature = "dlpack")]
            let left_behind = match left_behind {
                0 => 0,
                some => crate::flight::left_behind::reclaim().map_or(0, |()| some),
            };
            let slot = self.claim_or_append();
            #[cfg(feature = "dlpack")]
            if let Err(Error::OutOfMemory { .. } | Error::PinningUnavailable { .. }) = &slot
                && crate::flight::left_behind::is_any_left_behind()
                && crate::flight::left_behind::reclaim().is_ok()
            {
                // The memory of others came back.
                return self.claim_or_append();
            }
            if slot.is_ok() || left_behind == 0 {
                return slot;
            }
        }
    }

    fn claim_or_append(&self) -> Result<(Lease<Storage>, bool)> {
        self.slots.claim_or_grow(Storage::is_known_ready, |total| self.grow(total))
    }

    /// Slots for a pool that has `total`: as many as its options say, or as many as there is memory
    /// for. Under the lock of growing.
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

    /// In a forked child the slots of a CUDA pool are not there.
    #[inline]
    fn refuse_child(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => fork::refuse_child(),
        }
    }
}

/// How many threads to expect. A pool for fewer than there are is slower and nothing else.
fn threads() -> usize {
    const AT_LEAST: usize = 16;
    // It reads files.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubling_is_bounded_by_16_mib_or_an_eighth_of_the_pool() {
        const MB: usize = 1 << 20;
        for (total, bytes, expected) in [
            (0, 100, 1),
            (1, 100, 1),
            (64, 100, 64),
            (1 << 20, 0, 1 << 20),
            (4, 4 * MB, 4),
            (33, 11 * MB / 10, 14),
            (8, 4 * MB, 4),
            (3, 100 * MB, 1),
            (80, 100 * MB, 10),
        ] {
            assert_eq!(PoolGrowth::Double.step(total, bytes, 0), expected, "{total} of {bytes}");
        }
        let by = PoolGrowth::By(NonZeroUsize::new(3).unwrap());
        assert_eq!([by.step(0, 1, 0), by.step(100, 100 * MB, 127)], [3, 3]);
    }

    #[test]
    fn a_pool_reaches_any_number_of_buffers_within_255_steps() {
        for growth in [PoolGrowth::Double, PoolGrowth::By(NonZeroUsize::MIN)] {
            let total = (0..255).fold(1, |total, steps| total + growth.step(total, 1 << 30, steps));
            assert!(total > 1 << 20, "{growth:?}: {total}");
        }
    }
}
