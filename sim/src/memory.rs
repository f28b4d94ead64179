//! Device memory and pinned host memory.
//!
//! A device address is reserved and cannot be read or written; the bytes are elsewhere, for the
//! streams alone. Addresses are multiples of 256 and of no more, as `cudaMalloc` promises no more.
//! The next allocation of as much gets the address that was given back last; work that was sent
//! before then is found out by the allocation's number, which is never used again.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr;

use parking_lot::Mutex;

use crate::control::{self, Kind};
use crate::{Result, Status, context};

/// Where an allocation begins within its pages.
const OFFSET: usize = 256;
const PAGE: usize = 4096;
const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// What fresh memory holds: nothing that a program could take for zeroes.
const GARBAGE: u8 = 0xcd;

struct Allocation {
    bytes: usize,
    device: usize,
    backing: usize,
    number: u64,
}

/// Pinned host memory.
struct Piece {
    bytes: usize,
    /// Whether this library allocated it.
    ours: bool,
    /// Whether kernels reach it.
    mapped: bool,
    number: u64,
}

/// A range of device memory, as the call found it that sends work there.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    address: usize,
    /// `None` where there was no such memory.
    found: Option<Found>,
}

#[derive(Clone, Copy)]
struct Found {
    number: u64,
    device: usize,
}

impl Target {
    pub(crate) fn of(address: usize, bytes: usize) -> Target {
        let found = memory(|memory| {
            let (base, allocation) = memory.device.range(..=address).next_back()?;
            let end = address.checked_add(bytes)?;
            let found = Found { number: allocation.number, device: allocation.device };
            (end <= base + allocation.bytes).then_some(found)
        });
        Target { address, found }
    }

    pub(crate) fn is_memory(self) -> bool {
        self.found.is_some()
    }

    /// Kernels of one device do not reach memory of another, as long as nobody enables that ("CUDA
    /// C++ Programming Guide, Peer-to-Peer Memory Access"), which nothing does here.
    pub(crate) fn is_reached_from(self, device: usize) -> bool {
        self.found.is_some_and(|found| found.device == device)
    }

    /// Does something with the bytes, on a stream's thread. `None` where there was no such memory;
    /// where it was given back since, the program ends.
    pub(crate) fn with<R>(self, action: impl FnOnce(*mut u8) -> R) -> Option<R> {
        let found = self.found?;
        // The bytes themselves are touched outside the lock: copies of several streams run side by
        // side.
        let backing = memory(|memory| match memory.device.range(..=self.address).next_back() {
            Some((base, allocation)) if allocation.number == found.number => {
                allocation.backing + (self.address - base)
            }
            _ => control::violation("device memory was used after it was given back"),
        });
        Some(action(at(backing)))
    }
}

struct Memory {
    device: BTreeMap<usize, Allocation>,
    /// Pinned host memory by address.
    pinned: BTreeMap<usize, Piece>,
    /// The allocations so far, and the pieces.
    numbers: u64,
    /// Where memory was that was given back, by its room, the last one at the end.
    free: BTreeMap<usize, Vec<usize>>,
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
    pinned: BTreeMap::new(),
    numbers: 0,
    free: BTreeMap::new(),
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

    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn pin(&mut self, address: usize, bytes: usize, ours: bool, mapped: bool) {
        let number = self.next_number();
        self.pinned.insert(address, Piece { bytes, ours, mapped, number });
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
        if memory.watched.iter().any(|address| !is_mapped(*address, memory.pinned[address].bytes)) {
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

/// Pages; `None` where there are none. They begin where as many were given back last, unless
/// somebody else is there.
fn pages(memory: &mut Memory, bytes: usize, protection: i32, sharing: i32) -> Option<usize> {
    let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let hint = memory.free.get_mut(&bytes).and_then(Vec::pop).unwrap_or(0);
    let hint = ptr::without_provenance_mut(hint);
    // SAFETY: a new mapping where nothing is mapped touches no other memory.
    let address = unsafe { libc::mmap(hint, bytes, protection, flags, -1, 0) };
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
        let address = pages(memory, room, libc::PROT_NONE, libc::MAP_PRIVATE)
            .ok_or(Status::cudaErrorMemoryAllocation)?;
        let backing = pages(memory, room, WRITABLE, libc::MAP_PRIVATE)
            .ok_or(Status::cudaErrorMemoryAllocation)?;
        // SAFETY: `room` bytes of a mapping of our own.
        unsafe { ptr::write_bytes(at(backing), GARBAGE, room) };
        let address = address + OFFSET;
        let number = memory.next_number();
        memory.device.insert(address, Allocation { bytes, device, backing, number });
        memory.used[device] += bytes;
        control::born(Kind::Device);
        Ok(address)
    })
}

/// Gives memory back at once.
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
        let free = memory.free.entry(room).or_default();
        free.extend([gone.backing, address - OFFSET]);
        memory.used[gone.device] -= gone.bytes;
        control::died(Kind::Device);
        Ok(())
    })
}

pub(crate) fn allocate_pinned(bytes: usize) -> Result<usize> {
    memory(|memory| {
        if bytes == 0 || bytes > memory.limit_pinned.saturating_sub(memory.pinned_bytes) {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        let room = bytes.next_multiple_of(PAGE);
        // A forked child's is the same memory, as was seen on an H200.
        let address = pages(memory, room, WRITABLE, libc::MAP_SHARED)
            .ok_or(Status::cudaErrorMemoryAllocation)?;
        // SAFETY: a mapping of our own.
        unsafe { ptr::write_bytes(at(address), GARBAGE, room) };
        // "CUDA Runtime API, Unified Addressing": all that is allocated is mapped, whatever the
        // flags say.
        memory.pin(address, room, true, true);
        Ok(address)
    })
}

pub(crate) fn free_pinned(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&Piece { bytes, ours: true, .. }) => {
                unmap(address, bytes);
                memory.free.entry(bytes).or_default().push(address);
                memory.unpin(address, bytes);
                Ok(())
            }
            _ => Err(Status::cudaErrorInvalidValue),
        }
    })
}

/// Pins pages of the caller's.
pub(crate) fn register(address: usize, bytes: usize, mapped: bool) -> Result {
    if bytes == 0 {
        return Err(Status::cudaErrorInvalidValue);
    }
    memory(|memory| {
        let end = address + bytes;
        let before = memory.pinned.range(..end).next_back();
        if before.is_some_and(|(at, piece)| address < at + piece.bytes) {
            return Err(Status::cudaErrorHostMemoryAlreadyRegistered);
        }
        let room = memory.limit_pinned.saturating_sub(memory.pinned_bytes);
        if bytes > room.min(memory.limit_registration) {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        memory.pin(address, bytes, false, mapped);
        Ok(())
    })
}

pub(crate) fn unregister(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&Piece { bytes, ours: false, .. }) => {
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
    /// By the piece of this number.
    Whole(u64),
    /// In part, or in pieces: CUDA copies from and to no such range ("CUDA Driver API, Memory Management",
    /// `cuMemcpyAsync`: regions "must be either entirely registered with CUDA, or [...] not registered at all").
    Partly,
}

/// Whether kernels reach all of a range of host memory: each byte is mapped, by one piece or
/// another. Unlike copies, they look at addresses ("CUDA C++ Programming Guide, Mapped Memory",
/// "Unified Virtual Address Space").
pub(crate) fn reached(address: usize, bytes: usize) -> bool {
    memory(|memory| {
        let (mut at, end) = (address, address + bytes);
        while at < end {
            match memory.pinned.range(..=at).next_back() {
                Some((base, piece)) if piece.mapped && base + piece.bytes > at => {
                    at = base + piece.bytes;
                }
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
            Some((base, piece)) if base + piece.bytes > address => {
                match *base <= address && end <= base + piece.bytes {
                    true => Pinned::Whole(piece.number),
                    false => Pinned::Partly,
                }
            }
            _ => Pinned::No,
        }
    })
}
