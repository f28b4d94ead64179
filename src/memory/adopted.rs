//! Host memory of somebody else, for example a mapped file, as a host side.
//!
//! The memory is [registered](crate::memory::registration) and never freed. It is unregistered
//! before its owner is let go. If it may still be registered, the owner is forgotten instead: it
//! might unmap the pages. A forked child drops none of this: its storage is leaked.
//!
//! Somebody else may have registered the memory already. It then counts as pinned. A registration
//! of a part cannot be completed: the driver refuses to register bytes twice. On an H200 with
//! driver 580, registrations are exact to the byte, and two of them may share a page.
//!
//! The registration may be that of another adopted buffer. Both buffers share it then, so that it
//! lives as long as the copies of both. With it lives the owner that was adopted first. The
//! registrations of all adopted memory are therefore known by their addresses. No lock is held
//! during a CUDA call.

use std::any::Any;
use std::iter;
use std::mem;
use std::ops::Range;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::error::{Error, Result};
use crate::memory::options::HostFlags;
use crate::memory::registration::{Failed, Pieces, is_already_registered};
use crate::sys::cudaError;

/// The value that keeps adopted memory.
pub(crate) type Owner = Arc<dyn Any + Send + Sync>;

/// Adopted memory. Dropping the value lets the owner go, once the memory is not registered.
pub(crate) struct Adopted {
    is_pinned: bool,
    /// The registration of this memory, or those of other adopted buffers that it overlaps.
    registrations: Vec<Arc<Registration>>,
    /// `None` if the registration has it. Let go after the registrations.
    owner: Option<Owner>,
}

// Only the owner is not known to be unwind safe. It is kept and dropped, and never looked at.
impl UnwindSafe for Adopted {}
impl RefUnwindSafe for Adopted {}

/// A registration of adopted memory. Dropping the value ends it, and then lets the owner go.
struct Registration {
    pieces: Pieces,
    context: &'static Context,
    /// Given up before the owner is let go: the addresses may be mapped again then.
    claim: Claim,
    /// `None` only while the value is dropped.
    owner: Option<Owner>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // The runtime finds registrations by their address, so a failure to enter is ignored.
        let current = self.context.enter();
        // SAFETY: the pieces are registered. The memory is dropped after its transfers have
        // finished, and leaked otherwise.
        if !unsafe { self.pieces.unregister() } {
            mem::forget(self.owner.take());
        }
        drop(current);
        // The owner is let go with the fields. It may do anything, and panic.
    }
}

// ---- registrations by their addresses ----

/// Addresses that an adopted buffer registers, or has registered.
struct Claimed {
    range: Range<usize>,
    /// Cannot be upgraded while the addresses are being registered or unregistered.
    registration: Weak<Registration>,
}

/// No two ranges overlap.
static CLAIMED: Mutex<Vec<Claimed>> = Mutex::new(Vec::new());

fn claimed() -> MutexGuard<'static, Vec<Claimed>> {
    CLAIMED.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// The right to register addresses. Dropping the value gives it up.
struct Claim {
    start: usize,
}

impl Claim {
    /// Claims addresses. If others have claimed some, returns their registrations.
    fn new(range: Range<usize>) -> std::result::Result<Claim, Vec<Option<Arc<Registration>>>> {
        let mut claimed = claimed();
        let overlaps =
            |other: &&Claimed| other.range.start < range.end && range.start < other.range.end;
        // They are dropped without the lock: the last share unregisters the memory.
        let others: Vec<_> =
            claimed.iter().filter(overlaps).map(|other| other.registration.upgrade()).collect();
        if !others.is_empty() {
            return Err(others);
        }
        let start = range.start;
        claimed.push(Claimed { range, registration: Weak::new() });
        Ok(Claim { start })
    }

    /// Lets others share the registration.
    fn publish(&self, registration: &Arc<Registration>) {
        let mut claimed = claimed();
        let own = claimed.iter_mut().find(|own| own.range.start == self.start);
        own.expect("a claim is known").registration = Arc::downgrade(registration);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        claimed().retain(|own| own.range.start != self.start);
    }
}

// ---- pinning ----

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
        Adopted { is_pinned: false, registrations: Vec::new(), owner: Some(owner) }
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    /// Keeps the registrations and the owner for ever.
    pub(crate) fn leak(&mut self) {
        mem::take(&mut self.registrations).into_iter().for_each(mem::forget);
        mem::forget(self.owner.take());
    }

    /// Registers the memory, unless it is registered already. There is at least one byte.
    ///
    /// # Safety
    ///
    /// - The memory is mapped while the owner is kept.
    /// - No copy of this buffer uses it.
    /// - Nobody else registers or unregisters any of it, except for other adopted buffers.
    pub(crate) unsafe fn pin(
        &mut self,
        address: NonNull<u8>,
        bytes: usize,
        flags: HostFlags,
        context: &'static Context,
    ) -> Attempt {
        let _current = match context.enter() {
            Ok(current) => current,
            Err(error) => return Attempt::refused(error),
        };
        let start = address.addr().get();
        let claim = match Claim::new(start..start + bytes) {
            Ok(claim) => claim,
            Err(others) => match others.into_iter().collect() {
                Some(others) => {
                    // Also if a part is registered: copies of this buffer use that part.
                    self.registrations = others;
                    return self.pin_by_others(address, bytes);
                }
                None => {
                    return Attempt::refused(
                        "another buffer registers or unregisters a part of it at this moment",
                    );
                }
            },
        };
        match registered_range(address.as_ptr()) {
            Err(error) => Attempt::refused(error),
            Ok(Some(_)) => self.pin_by_others(address, bytes),
            // SAFETY: the caller vouches for the memory.
            Ok(None) => unsafe { self.register(claim, (address, bytes), flags, context) },
        }
    }

    /// Registers the memory, whose first byte is not registered, in the current context.
    ///
    /// # Safety
    ///
    /// As for [`pin`](Self::pin).
    unsafe fn register(
        &mut self,
        claim: Claim,
        (address, bytes): (NonNull<u8>, usize),
        flags: HostFlags,
        context: &'static Context,
    ) -> Attempt {
        let mut refusal = String::new();
        // Some devices cannot register memory as read-only.
        let without = flags - HostFlags::READ_ONLY;
        let next = (without != flags).then_some(without);
        for flags in iter::once(flags).chain(next) {
            for pieces in Pieces::ways(address, bytes) {
                // SAFETY: the caller vouches for the memory. The owner is kept until the pieces are
                // unregistered.
                let failed = match unsafe { pieces.register(flags.bits()) } {
                    Ok(()) => {
                        let owner = self.owner.take();
                        let own = Arc::new(Registration { pieces, context, claim, owner });
                        own.claim.publish(&own);
                        self.registrations.push(own);
                        self.is_pinned = true;
                        return Attempt { bounds: pieces.bounds(), refusal: None };
                    }
                    Err(failed) => failed,
                };
                refusal = failed.error.to_string();
                match failed {
                    Failed { leaves_pages: true, .. } => {
                        mem::forget(self.owner.clone());
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
                self.is_pinned = true;
                Attempt { bounds, refusal: None }
            }
            Ok((bounds, false)) => {
                let refusal = "only a part of it is registered already".to_string();
                Attempt { bounds, refusal: Some(refusal) }
            }
            Err(error) => Attempt::refused(error),
        }
    }
}

/// The smallest page. A gap between registrations is searched in these steps.
const PAGE: usize = 4096;

/// The offsets at which registrations of others begin or end in the memory, and whether they cover
/// all of it.
///
/// A registration that begins within a page, behind a gap, is not found, and a copy may run into
/// it. On an H200 with driver 580 that copy works: only the registration of its first byte counts.
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
