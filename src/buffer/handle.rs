//! The handle of a buffer's storage. Dropping it returns the storage to its origin.

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

/// A buffer's storage, with its origin.
pub(crate) struct StorageHandle(ManuallyDrop<Origin>);

/// The origin of a storage.
enum Origin {
    Own(Box<Storage>),
    /// A slot of a pool, which gets the storage back as it is.
    Pool(Lease<Storage>),
}

impl StorageHandle {
    /// A storage with memory of its own, both sides zeroed.
    pub(crate) fn own(
        side_layout: SideLayout,
        device: Device,
        options: BufferOptions,
    ) -> Result<StorageHandle> {
        reclaim_before_allocating(side_layout.layout.size(), device);
        let mut one = Storage::allocate_many(side_layout, 1, device, options, None)?;
        let storage = one.pop().expect("one storage was asked for");
        Ok(StorageHandle::of(Origin::Own(Box::new(storage))))
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
        Ok(StorageHandle::of(Origin::Own(Box::new(storage))))
    }

    /// The storage that a pool hands out.
    #[inline]
    pub(crate) fn pool(slot: Lease<Storage>) -> StorageHandle {
        StorageHandle::of(Origin::Pool(slot))
    }

    #[inline]
    fn of(origin: Origin) -> StorageHandle {
        StorageHandle(ManuallyDrop::new(origin))
    }
}

impl Drop for StorageHandle {
    /// Returns a pool's storage without waiting, after [closing](Storage::close_with_event) its
    /// records. Exported storage goes to its last owner.
    #[inline]
    fn drop(&mut self) {
        #[cfg(feature = "dlpack")]
        if let Some(exports) = self.take_exports() {
            // SAFETY: the value is being dropped, and is not used after this.
            let origin = unsafe { ManuallyDrop::take(&mut self.0) };
            return exports.buffer_dropped(Box::new(StorageHandle::of(origin)));
        }
        if let Origin::Pool(storage) = &*self.0 {
            storage.close_with_event();
        }
        // SAFETY: the value is being dropped, and this happens once.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

#[cfg(feature = "dlpack")]
impl ExportedStorage for StorageHandle {
    fn device(&self) -> Device {
        Storage::device(self)
    }

    /// A record stays open if, for example, its stream is in capture. Nobody can ask later whether
    /// that work is finished, because the stream may be gone then.
    fn close_or_leak(&self) -> bool {
        self.close_with_event();
        let open = matches!(*self.0, Origin::Own(_)) && self.is_open();
        if open {
            self.leak();
        }
        !open
    }

    fn left_behind_count(&self) -> Option<&LeftBehindCount> {
        Storage::left_behind_count(self)
    }

    fn give_back(self: Box<Self>) -> Box<dyn Any + Send> {
        let mut handle = ManuallyDrop::new(*self);
        // SAFETY: the handle is not dropped, and is not used after this.
        match unsafe { ManuallyDrop::take(&mut handle.0) } {
            own @ Origin::Own(_) => Box::new(StorageHandle::of(own)),
            Origin::Pool(slot) => {
                let mut slot = ManuallyDrop::new(slot);
                slot.supersede_open();
                // SAFETY: the lease is not dropped, and is not used after this.
                Box::new(unsafe { slot.release() })
            }
        }
    }
}

impl Deref for StorageHandle {
    type Target = Storage;

    #[inline]
    fn deref(&self) -> &Storage {
        match &*self.0 {
            Origin::Own(storage) => storage,
            Origin::Pool(lease) => lease,
        }
    }
}

impl DerefMut for StorageHandle {
    #[inline]
    fn deref_mut(&mut self) -> &mut Storage {
        match &mut *self.0 {
            Origin::Own(storage) => storage,
            Origin::Pool(lease) => lease,
        }
    }
}
