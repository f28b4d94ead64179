//! Device memory and pinned host memory.
//!
//! A device address is reserved and cannot be read or written; the bytes are elsewhere, for the streams
//! alone. Addresses are multiples of 256 and of no more, as `cudaMalloc` promises no more.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr;

use parking_lot::Mutex;

use crate::control::{self, Kind};
use crate::{Result, Status, context};

/// Where an allocation begins within its pages.
const OFFSET: usize = 256;
const PAGE: usize = 4096;
/// What fresh memory holds: nothing that a program could take for zeroes.
const GARBAGE: u8 = 0xcd;

struct Allocation {
    bytes: usize,
    device: usize,
    backing: usize,
}

struct Memory {
    device: BTreeMap<usize, Allocation>,
    /// Device memory that was given back, by address: touching it is a violation, not an error.
    gone: BTreeMap<usize, usize>,
    /// Pinned host memory by address: its bytes, and whether this library allocated it.
    pinned: BTreeMap<usize, (usize, bool)>,
    /// That of it which was not left behind.
    watched: BTreeSet<usize>,
    /// Memory that was given back while the context was broken: it stays, and is nobody's any more.
    given_up: BTreeSet<usize>,
    /// The bytes of each device that are allocated, and those that are pinned.
    used: [usize; context::MOST],
    pinned_bytes: usize,
    limit_device: usize,
    limit_pinned: usize,
    limit_registration: usize,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    device: BTreeMap::new(),
    gone: BTreeMap::new(),
    pinned: BTreeMap::new(),
    watched: BTreeSet::new(),
    given_up: BTreeSet::new(),
    used: [0; context::MOST],
    pinned_bytes: 0,
    limit_device: 8 << 30,
    limit_pinned: 8 << 30,
    limit_registration: usize::MAX,
});

fn memory<R>(action: impl FnOnce(&mut Memory) -> R) -> R {
    action(&mut MEMORY.lock())
}

impl Memory {
    /// Whoever gives memory back that a broken context kept does so twice.
    fn not_given_up(&self, address: usize) {
        if self.given_up.contains(&address) {
            control::violation("memory was given back twice");
        }
    }

    fn pin(&mut self, address: usize, bytes: usize, ours: bool) {
        self.pinned.insert(address, (bytes, ours));
        self.watched.insert(address);
        self.pinned_bytes += bytes;
        control::born(Kind::Pinned);
    }

    fn unpin(&mut self, address: usize, bytes: usize) {
        self.pinned.remove(&address);
        self.watched.remove(&address);
        self.pinned_bytes -= bytes;
        control::died(Kind::Pinned);
    }
}

pub(crate) fn limit_device(bytes: usize) {
    memory(|memory| memory.limit_device = bytes);
}

pub(crate) fn limit_pinned(bytes: usize) {
    memory(|memory| memory.limit_pinned = bytes);
}

pub(crate) fn limit_registration(bytes: usize) {
    memory(|memory| memory.limit_registration = bytes);
}

/// A broken context refuses to release memory, of whatever kind. Its owner has given it up all the same.
pub(crate) fn give_up(address: usize) {
    memory(|memory| {
        memory.not_given_up(address);
        memory.given_up.insert(address);
    });
}

/// Whether host memory is there.
fn is_mapped(address: usize, bytes: usize) -> bool {
    let begin = address / PAGE * PAGE;
    let room = address + bytes - begin;
    // SAFETY: private anonymous pages have nothing to write back; of others it only begins earlier.
    unsafe { libc::msync(at(begin).cast(), room, libc::MS_ASYNC) == 0 }
}

/// Ends the program where memory is pinned that is not there any more. What was left behind is not looked at.
pub(crate) fn check_pinned() {
    memory(|memory| {
        if memory.watched.iter().any(|address| !is_mapped(*address, memory.pinned[address].0)) {
            control::violation("host memory was unmapped while it was pinned");
        }
    });
}

/// What is pinned now is nobody's any more.
pub(crate) fn leave_behind() {
    memory(|memory| memory.watched.clear());
}

pub(crate) fn pinned_bytes() -> usize {
    memory(|memory| memory.pinned_bytes)
}

/// Free and total bytes.
pub(crate) fn info(device: usize) -> (usize, usize) {
    memory(|memory| {
        let total = memory.limit_device;
        (total.saturating_sub(memory.used[device]), total)
    })
}

/// Pages of the process's own; `None` where there are none.
fn pages(bytes: usize, protection: i32) -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    (address != libc::MAP_FAILED).then_some(address.addr())
}

fn unmap(address: usize, bytes: usize) {
    // SAFETY: pages that `pages` gave, and that nothing uses.
    unsafe { libc::munmap(ptr::without_provenance_mut(address), bytes) };
}

/// An address that came as a number, which is how C sees it.
pub(crate) fn at(address: usize) -> *mut u8 {
    ptr::with_exposed_provenance_mut(address)
}

pub(crate) fn allocate_device(device: usize, bytes: usize) -> Result<usize> {
    if bytes == 0 {
        return Ok(0);
    }
    memory(|memory| {
        let free = memory.limit_device.saturating_sub(memory.used[device]);
        if bytes > free {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        let room = (bytes + OFFSET).next_multiple_of(PAGE);
        let address = pages(room, libc::PROT_NONE).ok_or(Status::cudaErrorMemoryAllocation)?;
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let backing = pages(room, writable).ok_or(Status::cudaErrorMemoryAllocation)?;
        // SAFETY: `room` bytes of a mapping of our own.
        unsafe { ptr::write_bytes(at(backing), GARBAGE, room) };
        let address = address + OFFSET;
        while let Some((gone, bytes)) = memory.gone.range(..address + room).next_back()
            && address < gone + bytes
        {
            let gone = *gone;
            memory.gone.remove(&gone);
        }
        memory.device.insert(address, Allocation { bytes, device, backing });
        memory.used[device] += bytes;
        control::born(Kind::Device);
        Ok(address)
    })
}

/// Gives memory back at once. CUDA promises no wait for what is queued, and here there is none.
pub(crate) fn free_device(address: usize) -> Result {
    if address == 0 {
        return Ok(());
    }
    memory(|memory| {
        memory.not_given_up(address);
        let gone = memory.device.remove(&address).ok_or(Status::cudaErrorInvalidValue)?;
        let room = (gone.bytes + OFFSET).next_multiple_of(PAGE);
        unmap(gone.backing, room);
        unmap(address - OFFSET, room);
        memory.gone.insert(address, gone.bytes);
        memory.used[gone.device] -= gone.bytes;
        control::died(Kind::Device);
        Ok(())
    })
}

/// Does something with the bytes behind a range of device memory, on a stream's thread. `None` where there
/// is no such memory; where it was given back, the program ends.
pub(crate) fn with_device<R>(
    address: usize,
    bytes: usize,
    action: impl FnOnce(*mut u8) -> R,
) -> Option<R> {
    // The bytes themselves are touched outside the lock: copies of several streams run side by side.
    let backing = memory(|memory| {
        let end = address.checked_add(bytes)?;
        if let Some((base, allocation)) = memory.device.range(..=address).next_back()
            && end <= base + allocation.bytes
        {
            return Some(allocation.backing + (address - base));
        }
        if let Some((base, bytes)) = memory.gone.range(..=address).next_back()
            && address < base + bytes
        {
            control::violation("device memory was used after it was given back");
        }
        None
    })?;
    Some(action(at(backing)))
}

/// Whether a range is device memory.
pub(crate) fn is_device(address: usize, bytes: usize) -> bool {
    memory(|memory| {
        let found = memory.device.range(..=address).next_back();
        found.is_some_and(|(base, allocation)| address + bytes <= base + allocation.bytes)
    })
}

pub(crate) fn allocate_pinned(bytes: usize) -> Result<usize> {
    memory(|memory| {
        if bytes == 0 || bytes > memory.limit_pinned.saturating_sub(memory.pinned_bytes) {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        let room = bytes.next_multiple_of(PAGE);
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let address = pages(room, writable).ok_or(Status::cudaErrorMemoryAllocation)?;
        // SAFETY: a mapping of our own.
        unsafe { ptr::write_bytes(at(address), GARBAGE, room) };
        memory.pin(address, room, true);
        Ok(address)
    })
}

pub(crate) fn free_pinned(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&(bytes, true)) => {
                unmap(address, bytes);
                memory.unpin(address, bytes);
                Ok(())
            }
            _ => Err(Status::cudaErrorInvalidValue),
        }
    })
}

/// Pins pages of the caller's.
pub(crate) fn register(address: usize, bytes: usize) -> Result {
    if bytes == 0 {
        return Err(Status::cudaErrorInvalidValue);
    }
    memory(|memory| {
        let end = address + bytes;
        let before = memory.pinned.range(..end).next_back();
        if before.is_some_and(|(at, (bytes, _))| address < at + bytes) {
            return Err(Status::cudaErrorHostMemoryAlreadyRegistered);
        }
        let room = memory.limit_pinned.saturating_sub(memory.pinned_bytes);
        if bytes > room.min(memory.limit_registration) {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        memory.pin(address, bytes, false);
        Ok(())
    })
}

pub(crate) fn unregister(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&(bytes, false)) => {
                if !is_mapped(address, bytes) {
                    control::violation("host memory was unmapped before it was unregistered");
                }
                memory.unpin(address, bytes);
                Ok(())
            }
            _ => Err(Status::cudaErrorHostMemoryNotRegistered),
        }
    })
}

/// How a range of host memory is pinned.
#[derive(PartialEq, Eq, Clone, Copy)]
pub(crate) enum Pinned {
    No,
    Whole,
    /// In part, or in pieces: CUDA copies from and to no such range ("CUDA Driver API, Memory Management",
    /// `cuMemcpyAsync`: regions "must be either entirely registered with CUDA, or [...] not registered at all").
    Partly,
}

/// Whether kernels reach all of a range of host memory: each byte is pinned, by one piece or another. Unlike copies,
/// they look at addresses ("CUDA C++ Programming Guide, Mapped Memory", "Unified Virtual Address Space").
pub(crate) fn reached(address: usize, bytes: usize) -> bool {
    memory(|memory| {
        let (mut at, end) = (address, address + bytes);
        while at < end {
            match memory.pinned.range(..=at).next_back() {
                Some((base, (length, _))) if base + length > at => at = base + length,
                _ => return false,
            }
        }
        true
    })
}

pub(crate) fn pinned(address: usize, bytes: usize) -> Pinned {
    memory(|memory| {
        let end = address + bytes;
        match memory.pinned.range(..end).next_back() {
            Some((base, (length, _))) if base + length > address => {
                match *base <= address && end <= base + length {
                    true => Pinned::Whole,
                    false => Pinned::Partly,
                }
            }
            _ => Pinned::No,
        }
    })
}
