//! Peer access: copies between two devices that do not pass through host memory.
//!
//! It is off by default, for each ordered pair of contexts ("CUDA C++ Programming Guide,
//! Peer-to-Peer Memory Access"). It is switched on at the first copy between the two, and stays on.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cuda::calls;

/// The devices that a context was connected with, as bits. Devices beyond the last bit are never
/// connected.
#[derive(Default)]
pub(crate) struct Peers(AtomicU64);

impl Peers {
    /// Lets the current context, of device `ordinal`, use memory of device `peer`, if possible.
    ///
    /// There is no error: without peer access the driver stages copies in host memory.
    pub(crate) fn enable(&self, ordinal: u32, peer: u32) {
        let Some(bit) = 1u64.checked_shl(peer) else {
            return;
        };
        if self.0.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        if calls::context::can_access_peer(ordinal, peer).unwrap_or(false) {
            // Another library may have switched it on, which is an error here.
            let _ = calls::context::enable_peer_access(peer);
        }
    }
}
