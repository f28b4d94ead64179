//! Storage whose host side is memory that exists already, which may be read-only.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::buffer::side_layout::SideLayout;
use crate::buffer::storage::Storage;
use crate::cuda::devices::context;
use crate::device::Device;
use crate::error::Result;
use crate::memory::adopted::Owner;
use crate::memory::options::BufferOptions;
use crate::memory::slab::Slab;

impl Storage {
    /// A storage whose host side is adopted memory. The device side is zeroed.
    ///
    /// # Safety
    ///
    /// As for [`Slab::adopt`].
    pub(crate) unsafe fn adopt(
        host: NonNull<u8>,
        side_layout: SideLayout,
        device: Device,
        owner: Owner,
        options: BufferOptions,
    ) -> Result<Storage> {
        let layout = side_layout.layout;
        let context = match device {
            Device::Cuda(ordinal) if layout.size() > 0 => Some(context(ordinal)?),
            // Nothing is allocated or registered there.
            _ => None,
        };
        // SAFETY: the caller vouches for the memory.
        let slab = unsafe { Slab::adopt(host, layout, context, device, owner, options) }?;
        Ok(Storage::in_slab(&Arc::new(slab), 0, side_layout, device, options, None))
    }

    /// Returns [`ReadOnly`](crate::Error::ReadOnly) if the host side is never written.
    #[inline]
    pub(crate) fn refuse_read_only(&self) -> Result<()> {
        let refused = self.options.host_flags.refuse_read_only();
        refused.or_else(|error| self.device_side.refuse_child().and(Err(error)))
    }
}
