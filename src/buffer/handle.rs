//! The handle that owns a buffer's storage. Dropping it releases the storage or returns it to its
//! pool.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::buffer::side_layout::SideLayout;
use crate::buffer::storage::Storage;
use crate::device::Device;
use crate::error::Result;
use crate::flight::left_behind::reclaim_before_allocating;
#[cfg(feature = "dlpack")]
use crate::flight::left_behind::{ExportedStorage, LeftBehindCount};
use crate::memory::adopted::Owner;
use crate::memory::options::BufferOptions;
use crate::slots::Lease;
#[cfg(feature = "dlpack")]
use std::any::Any;

/// Owns the storage of a buffer. Dropping it releases the storage or returns it to its pool.
pub(crate) struct StorageHandle(ManuallyDrop<HeldStorage>);

/// A storage, with or without a pool.
enum HeldStorage {
    /// The storage belongs to no pool. Dropping it releases the memory that it allocated.
    Own(Box<Storage>),
    /// The storage lies in a pool slot. Dropping the lease returns it, with its bytes and records.
    Pool(Lease<Storage>),
}

impl StorageHandle {
    /// Allocates a storage. Its first use of either side finds zeroes.
    pub(crate) fn allocate(
        side_layout: SideLayout,
        device: Device,
        options: BufferOptions,
    ) -> Result<StorageHandle> {
        reclaim_before_allocating(side_layout.layout.size(), device);
        let mut storages = Storage::allocate_many(side_layout, 1, device, options, None)?;
        let storage = storages.pop().expect("one storage was asked for");
        Ok(StorageHandle::hold(HeldStorage::Own(Box::new(storage))))
    }

    /// A storage whose host side is adopted memory.
    ///
    /// # Safety
    ///
    /// As for [`Storage::adopt`].
    pub(crate) unsafe fn adopt(
        host: NonNull<u8>,
        side_layout: SideLayout,
        device: Device,
        owner: Owner,
        options: BufferOptions,
    ) -> Result<StorageHandle> {
        reclaim_before_allocating(side_layout.layout.size(), device);
        // SAFETY: the caller vouches for the memory.
        let storage = unsafe { Storage::adopt(host, side_layout, device, owner, options) }?;
        Ok(StorageHandle::hold(HeldStorage::Own(Box::new(storage))))
    }

    /// Takes the storage of a pool slot that was just leased.
    #[inline]
    pub(crate) fn from_pool(lease: Lease<Storage>) -> StorageHandle {
        StorageHandle::hold(HeldStorage::Pool(lease))
    }

    #[inline]
    fn hold(held: HeldStorage) -> StorageHandle {
        StorageHandle(ManuallyDrop::new(held))
    }
}

impl Drop for StorageHandle {
    /// Releases the storage, or returns it to its pool.
    ///
    /// Releasing waits for the storage's records. Returning does not wait, but first closes the
    /// open records. For exported storage, `flight/exports` decides who releases it, and when.
    #[inline]
    fn drop(&mut self) {
        #[cfg(feature = "dlpack")]
        if let Some(exports) = self.take_exports() {
            // SAFETY: the handle is being dropped, and this branch returns. So `self.0` is not used
            // again. The new handle owns the storage. It has no exports any more, so dropping it
            // does not come here.
            let held = unsafe { ManuallyDrop::take(&mut self.0) };
            return exports.buffer_dropped(Box::new(StorageHandle::hold(held)));
        }
        if let HeldStorage::Pool(lease) = &*self.0 {
            lease.close_if_open();
        }
        // SAFETY: the handle is being dropped, and `self.0` was not taken, since the branch that
        // takes it returns. So the storage is dropped once and not used after this.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

#[cfg(feature = "dlpack")]
impl ExportedStorage for StorageHandle {
    fn device(&self) -> Device {
        Storage::device(self)
    }

    /// Closes the open records. If one stays open, leaks memory that no pool owns, and returns
    /// `false`.
    ///
    /// Recording fails if, for example, the stream is in capture. Nobody can wait for an open
    /// record later: its stream may be borrowed without an owner, and destroyed by then. Memory of
    /// a pool is not released here, so its records may stay open. [`give_back`](Self::give_back)
    /// supersedes them.
    fn close_or_leak(&self) -> bool {
        self.close_if_open();
        let must_leak = matches!(*self.0, HeldStorage::Own(_)) && self.is_open();
        if must_leak {
            self.leak();
        }
        !must_leak
    }

    fn left_behind_count(&self) -> Option<&LeftBehindCount> {
        Storage::left_behind_count(self)
    }

    fn give_back(self: Box<Self>) -> Box<dyn Any + Send> {
        let mut handle = ManuallyDrop::new(*self);
        // SAFETY: the handle is not dropped, and is not used after this.
        match unsafe { ManuallyDrop::take(&mut handle.0) } {
            // The caller drops the storage, which then waits for its records.
            own @ HeldStorage::Own(_) => Box::new(StorageHandle::hold(own)),
            HeldStorage::Pool(lease) => {
                let mut lease = ManuallyDrop::new(lease);
                // All devices were waited for, so everything that was sent is finished. The stream
                // of an open record may be destroyed by now, so the next holder must not touch it.
                lease.supersede_open();
                // If the pool is gone, the value is the slot's reference to its segment. Dropping
                // it may free memory, so the caller does that. SAFETY: the lease is not dropped,
                // and is not used after this.
                Box::new(unsafe { lease.release() })
            }
        }
    }
}

impl Deref for StorageHandle {
    type Target = Storage;

    #[inline]
    fn deref(&self) -> &Storage {
        match &*self.0 {
            HeldStorage::Own(storage) => storage,
            HeldStorage::Pool(lease) => lease,
        }
    }
}

impl DerefMut for StorageHandle {
    #[inline]
    fn deref_mut(&mut self) -> &mut Storage {
        match &mut *self.0 {
            HeldStorage::Own(storage) => storage,
            HeldStorage::Pool(lease) => lease,
        }
    }
}
