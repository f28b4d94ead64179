//! Host memory of somebody else, for example a mapped file, as a host side.
//!
//! The memory is [registered](crate::memory::registration) and never freed. It is unregistered
//! before its owner is let go. If it may still be registered, the owner is forgotten instead: it
//! might unmap the pages. A forked child drops none of this: its storage is leaked.
//!
//! Somebody else may have registered the memory already. It then counts as pinned, and stays
//! registered. A registration of a part cannot be completed: the driver refuses to register bytes
//! twice. On an H200 with driver 580, registrations are exact to the byte, and two of them may
//! share a page.

use std::any::Any;
use std::mem;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::error::{Error, Result};
use crate::memory::options::HostFlags;
use crate::memory::registration::{Failed, Pieces, is_already_registered};
use crate::sys::cudaError;

/// The value that keeps adopted memory.
pub(crate) type Owner = Arc<dyn Any + Send + Sync>;

/// Adopted memory. Dropping the value unregisters it, and then lets the owner go.
pub(crate) struct Adopted {
    registration: Registration,
    /// `None` only while the value is dropped.
    owner: Option<Owner>,
}

/// The registration of adopted memory.
enum Registration {
    None,
    Own {
        pieces: Pieces,
        context: &'static Context,
    },
    /// Somebody else registered all of it, and unregisters it.
    Foreign,
    /// A failed attempt may have left pages registered.
    Unknown,
}

/// The result of an attempt to pin adopted memory.
pub(crate) struct Attempt {
    /// The offsets at which a registration begins or ends.
    pub(crate) bounds: Box<[usize]>,
    /// Why the memory is not pinned.
    pub(crate) refusal: Option<String>,
}

impl Attempt {
    /// No attempt.
    pub(crate) fn none() -> Attempt {
        Attempt { bounds: Box::default(), refusal: None }
    }

    fn refused(why: impl ToString) -> Attempt {
        Attempt { refusal: Some(why.to_string()), ..Attempt::none() }
    }
}

impl Adopted {
    /// Memory that is not registered.
    pub(crate) fn pageable(owner: Owner) -> Adopted {
        Adopted { registration: Registration::None, owner: Some(owner) }
    }

    pub(crate) fn is_pinned(&self) -> bool {
        matches!(self.registration, Registration::Own { .. } | Registration::Foreign)
    }

    /// Registers the memory, unless somebody else has. There is at least one byte.
    ///
    /// # Safety
    ///
    /// - The memory is mapped while the owner is kept.
    /// - No copy uses it, and nobody registers or unregisters any of it during the call.
    pub(crate) unsafe fn pin(
        &mut self,
        address: NonNull<u8>,
        bytes: usize,
        flags: HostFlags,
        context: &'static Context,
    ) -> Attempt {
        let is_foreign = || registered_range(address.as_ptr()).map(|range| range.is_some());
        let entered = context.enter();
        match entered.and_then(|current| is_foreign().map(|foreign| (current, foreign))) {
            Err(error) => Attempt::refused(error),
            Ok((_current, true)) => self.pin_by_others(address, bytes),
            // SAFETY: the caller vouches for the memory.
            Ok((_current, false)) => unsafe { self.register(address, bytes, flags, context) },
        }
    }

    /// Registers the memory, whose first byte is not registered, in the current context.
    ///
    /// # Safety
    ///
    /// As for [`pin`](Self::pin).
    unsafe fn register(
        &mut self,
        address: NonNull<u8>,
        bytes: usize,
        flags: HostFlags,
        context: &'static Context,
    ) -> Attempt {
        let mut refusal = String::new();
        // Some devices cannot register memory as read-only.
        let without = flags - HostFlags::READ_ONLY;
        for flags in [Some(flags), Some(without).filter(|flags_left| *flags_left != flags)] {
            let Some(flags) = flags else { continue };
            for pieces in Pieces::ways(address, bytes) {
                // SAFETY: the caller vouches for the memory. The owner is kept until the pieces are
                // unregistered.
                let failed = match unsafe { pieces.register(flags.bits()) } {
                    Ok(()) => {
                        self.registration = Registration::Own { pieces, context };
                        return Attempt { bounds: pieces.bounds(), refusal: None };
                    }
                    Err(failed) => failed,
                };
                refusal = failed.error.to_string();
                match failed {
                    Failed { leaves_pages: true, .. } => {
                        self.registration = Registration::Unknown;
                        return Attempt { bounds: pieces.bounds(), refusal: Some(refusal) };
                    }
                    Failed { error, .. } if is_already_registered(&error) => {
                        return self.pin_by_others(address, bytes);
                    }
                    Failed { error, .. } if is_not_supported(&error) => break,
                    _ => {}
                }
            }
        }
        Attempt::refused(refusal)
    }

    /// Looks for the registrations of others. The memory is pinned if they cover all of it.
    fn pin_by_others(&mut self, address: NonNull<u8>, bytes: usize) -> Attempt {
        match registrations(address, bytes) {
            Ok((bounds, true)) => {
                self.registration = Registration::Foreign;
                Attempt { bounds, refusal: None }
            }
            Ok((bounds, false)) => {
                let refusal = "only a part of it is registered already".to_string();
                Attempt { bounds, refusal: Some(refusal) }
            }
            Err(error) => Attempt::refused(error),
        }
    }

    /// Ends the registration. Returns `false` if the memory may still be registered.
    fn unregister(&mut self) -> bool {
        match mem::replace(&mut self.registration, Registration::None) {
            Registration::None | Registration::Foreign => true,
            Registration::Unknown => false,
            Registration::Own { pieces, context } => {
                // The runtime finds registrations by their address, so a failure is ignored.
                let _current = context.enter();
                // SAFETY: the pieces are registered. The memory is dropped after its transfers have
                // finished, and leaked otherwise.
                unsafe { pieces.unregister() }
            }
        }
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if !self.unregister() {
            mem::forget(self.owner.take());
        }
        // The owner is let go with the fields. Its `drop` may panic.
    }
}

/// The smallest page. A gap between registrations is searched in these steps.
const PAGE: usize = 4096;

/// The offsets at which registrations of others begin or end in the memory, and whether they cover
/// all of it.
///
/// A registration that begins within a page, behind a gap, is not found. On an H200 with driver 580
/// such a copy is one of pageable memory: the registration of its first byte counts.
fn registrations(address: NonNull<u8>, bytes: usize) -> Result<(Box<[usize]>, bool)> {
    let start = address.addr().get();
    let (mut bounds, mut at, mut is_all) = (Vec::new(), 0, true);
    while at < bytes {
        let next = match registered_range(address.as_ptr().wrapping_add(at))? {
            Some(range) => {
                bounds.extend([at, range.end - start]);
                range.end - start
            }
            None => {
                is_all = false;
                (start + at + 1).next_multiple_of(PAGE) - start
            }
        };
        at = next;
    }
    bounds.retain(|bound| (1..bytes).contains(bound));
    bounds.dedup();
    Ok((bounds.into(), is_all))
}

/// The registered range around an address, which ends behind it. `None` if the address is not
/// registered.
fn registered_range(address: *mut u8) -> Result<Option<Range<usize>>> {
    let range = calls::memory::pinned_range(address)?;
    Ok(range.filter(|range| range.contains(&address.addr())))
}

fn is_not_supported(error: &Error) -> bool {
    matches!(error, Error::Cuda { code: cudaError::cudaErrorNotSupported, .. })
}
