//! Host and device memory that several storages share, each with a piece of its own.
//!
//! A slab lives as long as the last storage in it. A storage that cannot know whether something still uses
//! its piece abandons the slab, which is then leaked as a whole.

use std::alloc::Layout;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::context::Context;
use crate::device::Device;
use crate::error::Result;
use crate::memory::device_memory::DeviceMemory;
use crate::memory::host::HostMemory;
use crate::memory::options::BufferOptions;

pub(crate) struct Slab {
    host: HostMemory,
    gpu: DeviceMemory,
    abandoned: AtomicBool,
}

impl Slab {
    /// Sides of these sizes and alignments. The host side is zeroed; the device side is zeroed on the CPU.
    pub(crate) fn new(
        host: Layout,
        gpu: Layout,
        context: Option<&'static Context>,
        device: Device,
        options: BufferOptions,
    ) -> Result<Slab> {
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
