//! Host and device memory that several storages share.
//!
//! Each storage has its own range of the slab. The slab lives as long as the last of them. If a
//! storage cannot confirm that its range is unused, it abandons the slab, which is then leaked as a
//! whole.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::context::Context;
use crate::device::Device;
use crate::error::Result;
use crate::memory::adopted::Owner;
use crate::memory::device_memory::DeviceMemory;
use crate::memory::host::HostMemory;
use crate::memory::options::BufferOptions;

/// The memory of both sides.
pub(crate) struct Slab {
    host: HostMemory,
    gpu: DeviceMemory,
    abandoned: AtomicBool,
}

impl Slab {
    /// Allocates sides of these layouts. The host side is zeroed, and the device side on the CPU.
    pub(crate) fn new(
        host: Layout,
        gpu: Layout,
        context: Option<&'static Context>,
        device: Device,
        options: BufferOptions,
    ) -> Result<Slab> {
        options.host_flags.refuse_read_only()?;
        // The device has less memory. If it is short of memory, nothing is pinned in vain.
        let gpu = DeviceMemory::new(gpu, context, device)?;
        let host = HostMemory::new(host, options.pinning, options.host_flags, context, device)?;
        Ok(Slab { host, gpu, abandoned: AtomicBool::new(false) })
    }

    /// A slab whose host side is adopted memory, with a device side of the layout.
    ///
    /// # Safety
    ///
    /// As for [`HostMemory::adopt`], for as many bytes as the layout has.
    pub(crate) unsafe fn adopt(
        host: NonNull<u8>,
        layout: Layout,
        context: Option<&'static Context>,
        device: Device,
        owner: Owner,
        options: BufferOptions,
    ) -> Result<Slab> {
        let gpu = DeviceMemory::new(layout, context, device)?;
        // SAFETY: the caller vouches for the memory.
        let host = unsafe { HostMemory::adopt(host, layout.size(), owner, options, context) }?;
        Ok(Slab { host, gpu, abandoned: AtomicBool::new(false) })
    }

    #[inline]
    pub(crate) fn host(&self) -> &HostMemory {
        &self.host
    }

    /// The address of the device side, which is null if there are no bytes.
    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        self.gpu.as_ptr()
    }

    /// Marks the memory as possibly in use for ever. Dropping the slab then leaks it.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if *self.abandoned.get_mut() {
            self.host.leak();
            self.gpu.leak();
        }
    }
}
