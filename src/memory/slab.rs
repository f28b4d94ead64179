//! Host and device memory that several storages share, each with a piece of its own.
//!
//! A slab lives as long as the last storage in it. A storage that cannot know whether something still uses
//! its piece abandons the slab, which is then leaked as a whole.

use std::alloc::Layout;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::buffer::buffer::BufferOptions;
use crate::cuda::device::{Context, Device};
use crate::error::Result;
use crate::memory::device_memory::DeviceMemory;
use crate::memory::host::HostMemory;

pub(crate) struct Slab {
    host: HostMemory,
    gpu: DeviceMemory,
    abandoned: AtomicBool,
}

impl Slab {
    /// Sides of these sizes and alignments: the host side zeroed, the device side on the CPU too. Has back first what
    /// tensors left behind, unless the caller holds a lock.
    pub(crate) fn new(
        host: Layout,
        gpu: Layout,
        context: Option<&'static Context>,
        device: Device,
        options: BufferOptions,
        locked: bool,
    ) -> Result<Slab> {
        #[cfg(feature = "dlpack")]
        if context.is_some() && !locked {
            // What cannot be had now is there the next time.
            let _ = crate::flight::exports::reclaim();
        }
        let _ = locked;
        // The device first: it has less memory, and what it lacks need not be pinned in vain.
        let gpu = DeviceMemory::new(gpu, context, device)?;
        let host = HostMemory::new(host, options.pinning, options.host_flags, context, device)?;
        Ok(Slab { host, gpu, abandoned: AtomicBool::new(false) })
    }

    #[inline]
    pub(crate) fn host(&self) -> &HostMemory {
        &self.host
    }

    /// The first byte of the device side; null where there are none.
    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        self.gpu.as_ptr()
    }

    /// Something may use the memory for ever: it will not be given back.
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
