//! Device memory: from `cudaMalloc`, or zeroed pageable memory on the CPU.

use std::alloc::Layout;
use std::mem;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result, Side};
use crate::memory::host::HostMemory;
use crate::memory::options::{HostFlags, Pinning};
use crate::sys::cudaError;

/// Owned device memory. It is zeroed on the CPU, and uninitialized on a CUDA device.
pub(crate) enum DeviceMemory {
    Cpu(HostMemory),
    Cuda {
        address: *mut u8,
        /// The address that `cudaMalloc` returned. It may lie before the aligned address.
        base: *mut u8,
        context: &'static Context,
    },
    /// Memory of no bytes.
    Empty,
}

// SAFETY: the memory belongs to the value alone, and can be released on any thread.
unsafe impl Send for DeviceMemory {}
// SAFETY: through a shared reference only the address can be read.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// The least alignment of `cudaMalloc` ("CUDA C++ Programming Guide, Device Memory Accesses").
    pub(crate) const ALIGN: usize = 256;

    /// Allocates on the device of `context`, or on the CPU without one.
    pub(crate) fn new(
        layout: Layout,
        context: Option<&'static Context>,
        device: Device,
    ) -> Result<DeviceMemory> {
        if layout.size() == 0 {
            return Ok(DeviceMemory::Empty);
        }
        let out_of_memory = Error::OutOfMemory { side: Side::Device, bytes: layout.size(), device };
        let Some(context) = context else {
            return HostMemory::new(layout, Pinning::Never, HostFlags::empty(), None, device)
                .map(DeviceMemory::Cpu)
                .map_err(|_| out_of_memory);
        };
        let _current = context.enter()?;
        let room = layout.size().saturating_add(layout.align().saturating_sub(Self::ALIGN));
        let base = match calls::memory::malloc(room) {
            Err(Error::Cuda { code: cudaError::cudaErrorMemoryAllocation, .. }) => {
                return Err(out_of_memory);
            }
            other => other?,
        };
        context.keep_memory();
        let aligned = base.addr().next_multiple_of(layout.align());
        Ok(DeviceMemory::Cuda { address: base.with_addr(aligned), base, context })
    }

    /// The address, which is null if there are no bytes.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self {
            DeviceMemory::Cpu(memory) => memory.as_ptr(),
            DeviceMemory::Cuda { address, .. } => *address,
            DeviceMemory::Empty => std::ptr::null_mut(),
        }
    }

    /// Leaks the memory, because something may still use it.
    pub(crate) fn leak(&mut self) {
        mem::forget(mem::replace(self, DeviceMemory::Empty));
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let DeviceMemory::Cuda { base, context, .. } = self {
            if fork::forked() {
                return;
            }
            // The runtime finds the device by the address, so a failure to enter is ignored.
            let _current = context.enter();
            // SAFETY: this value allocated the memory. It is dropped after all its uses have
            // finished, and leaked otherwise.
            let released = unsafe { calls::memory::free(*base) };
            // An error says that the context is broken. Nothing can be done then.
            let _ = released;
        }
    }
}
