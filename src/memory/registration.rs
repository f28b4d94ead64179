//! Registering host memory with CUDA, as one range or in several pieces of one size.
//!
//! The driver may refuse to register much memory at once, so smaller pieces are tried. CUDA refuses
//! a copy that spans two registrations ("CUDA Driver API, Memory Management", `cuMemcpyAsync`).
//! Copies are therefore cut at the [bounds](Pieces::bounds) of the pieces.

use std::iter;
use std::ops::Range;
use std::ptr::NonNull;

use crate::cuda::calls;
use crate::error::Error;
use crate::memory::split::{HUGEPAGE, split_by};
use crate::sys::cudaError;

/// The sizes of pieces, tried in turn if the whole cannot be registered.
const PIECES: [usize; 2] = [1 << 30, 64 << 20];

// Pieces end at hugepages, so that no page lies in two pieces.
const _: () = assert!(PIECES[0].is_multiple_of(HUGEPAGE) && PIECES[1].is_multiple_of(HUGEPAGE));

/// The sizes to try for `bytes` bytes. `usize::MAX` stands for a single registration.
fn sizes(bytes: usize) -> impl Iterator<Item = usize> {
    iter::once(usize::MAX).chain(PIECES.into_iter().filter(move |size| *size < bytes))
}

/// Why an attempt to register failed.
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// `true` if pages may still be registered.
    pub(crate) leaves_pages: bool,
}

/// Host memory, cut into the pieces that are registered one by one.
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    address: NonNull<u8>,
    bytes: usize,
    /// The bytes between the hugepage's beginning and the address, which the first piece lacks.
    lead: usize,
    /// The bytes of a piece, a multiple of a hugepage. `usize::MAX` if there is one piece.
    size: usize,
}

// SAFETY: the value never reads through the address.
unsafe impl Send for Pieces {}
// SAFETY: as above.
unsafe impl Sync for Pieces {}

impl Pieces {
    /// The ways to cut memory, in the order in which they are tried. The first is a single piece.
    pub(crate) fn ways(address: NonNull<u8>, bytes: usize) -> impl Iterator<Item = Pieces> {
        let lead = Pieces::lead(address);
        sizes(bytes).map(move |size| Pieces { address, bytes, lead, size })
    }

    /// The bytes between an address and the hugepage's beginning before it.
    fn lead(address: NonNull<u8>) -> usize {
        address.addr().get() % HUGEPAGE
    }

    /// The pieces in order, as offsets from the address.
    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let Pieces { bytes, lead, size, .. } = self;
        split_by(lead..lead + bytes, size).map(move |range| range.start - lead..range.end - lead)
    }

    /// The offsets at which a piece ends and the next begins.
    pub(crate) fn bounds(self) -> Box<[usize]> {
        self.ranges().skip(1).map(|range| range.start).collect()
    }

    /// Registers all pieces in the current context. On failure it unregisters them again.
    ///
    /// A piece that somebody else has registered is left alone.
    ///
    /// # Safety
    ///
    /// - The memory is mapped. It stays so until the pieces are unregistered.
    /// - No copy uses it.
    pub(crate) unsafe fn register(self, flags: u32) -> Result<(), Failed> {
        for (number, range) in self.ranges().enumerate() {
            // SAFETY: the piece lies within the memory.
            let address = unsafe { self.address.add(range.start) }.as_ptr();
            // SAFETY: the caller vouches for the pages.
            let Err(error) = (unsafe { calls::memory::host_register(address, range.len(), flags) })
            else {
                continue;
            };
            // The error may come from earlier asynchronous work, and the pages be registered.
            let gone = is_already_registered(&error) || {
                // SAFETY: no copy has used the pages yet.
                match unsafe { calls::memory::host_unregister(address) } {
                    Ok(())
                    | Err(Error::Cuda {
                        code:
                            cudaError::cudaErrorHostMemoryNotRegistered
                            | cudaError::cudaErrorInvalidValue
                            | cudaError::cudaErrorNotSupported,
                        ..
                    }) => true,
                    Err(_) => false,
                }
            };
            // SAFETY: the pieces before this one are registered, and no copy has used them yet.
            let before = unsafe { self.unregister_first(number) };
            return Err(Failed { error, leaves_pages: !(before && gone) });
        }
        Ok(())
    }

    /// Unregisters all pieces, even if some of them fail. Returns `false` if one may still be
    /// registered.
    ///
    /// # Safety
    ///
    /// - The pieces are registered.
    /// - Nothing is in flight from or to them.
    pub(crate) unsafe fn unregister(self) -> bool {
        // SAFETY: the caller vouches for all pieces.
        unsafe { self.unregister_first(usize::MAX) }
    }

    /// As [`unregister`](Self::unregister), for the first `count` pieces.
    ///
    /// # Safety
    ///
    /// As for [`unregister`](Self::unregister), for these pieces.
    unsafe fn unregister_first(self, count: usize) -> bool {
        let mut gone = true;
        for range in self.ranges().take(count) {
            // SAFETY: the piece lies within the memory.
            let address = unsafe { self.address.add(range.start) }.as_ptr();
            // SAFETY: the caller vouches for the piece.
            gone &= unsafe { calls::memory::host_unregister(address) }.is_ok();
        }
        gone
    }
}

/// Returns whether a registration failed because somebody else has registered a part.
pub(crate) fn is_already_registered(error: &Error) -> bool {
    let code = cudaError::cudaErrorHostMemoryAlreadyRegistered;
    matches!(error, Error::Cuda { code: seen, .. } if *seen == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn the_whole_is_tried_first_and_then_smaller_registrations() {
        for (bytes, expected) in [
            (4096, &[usize::MAX][..]),
            (64 * MIB, &[usize::MAX]),
            (64 * MIB + 4096, &[usize::MAX, 64 * MIB]),
            (1024 * MIB, &[usize::MAX, 64 * MIB]),
            (3000 * MIB, &[usize::MAX, 1024 * MIB, 64 * MIB]),
        ] {
            assert_eq!(sizes(bytes).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn pieces_end_at_hugepages_wherever_the_memory_begins() {
        for offset in [0, 1, 4097, HUGEPAGE - 1, HUGEPAGE, 63 * MIB + 5] {
            let start = (512 * MIB) + offset;
            let address = NonNull::new(std::ptr::without_provenance_mut(start)).unwrap();
            let bytes = 200 * MIB + 7;
            let [whole, pieces] = Pieces::ways(address, bytes).collect::<Vec<_>>()[..] else {
                panic!("two ways are possible for so many bytes");
            };
            assert!(whole.ranges().eq(iter::once(0..bytes)) && whole.bounds().is_empty());
            let ranges: Vec<_> = pieces.ranges().collect();
            assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, bytes));
            assert!(ranges.iter().all(|range| (1..=64 * MIB).contains(&range.len())));
            let bounds = pieces.bounds();
            assert!(
                bounds.iter().all(|bound| (start + bound).is_multiple_of(HUGEPAGE)),
                "{offset}"
            );
            assert!(ranges[1..].iter().map(|range| range.start).eq(bounds.iter().copied()));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
