//! Memory that tensors of other libraries left behind.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::device::Device;

/// The number of a pool's buffers that tensors left behind.
pub(crate) type LeftBehindCount = Arc<AtomicUsize>;

/// Takes back what tensors left behind, before `bytes` are allocated on a device. Waits for the
/// devices, so the caller holds no lock. If it fails, the next allocation tries again.
pub(crate) fn reclaim_before_allocating(bytes: usize, device: Device) {
    #[cfg(feature = "dlpack")]
    if bytes > 0 && device != Device::Cpu {
        let _ = crate::flight::exports::reclaim();
    }
    let _ = (bytes, device);
}
