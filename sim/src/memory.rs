//! Device memory and pinned host memory.
//!
//! Device addresses are reserved pages without access. The bytes are in other pages, which only
//! streams use. Addresses are multiples of 256 and no more, the alignment of `cudaMalloc`. An
//! allocation reuses the address of the last released one of its size. A number that is never
//! reused detects work for the released one.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr;

use parking_lot::Mutex;

use crate::context;
use crate::live::{self, Kind};
use crate::settings::MOST_DEVICES;
use crate::status::{Result, Status};
use crate::violation::violation;

/// The offset of an allocation in its pages.
const OFFSET: usize = 256;
const PAGE: usize = 4096;
const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// The content of new memory, which no program mistakes for zeroes.
const GARBAGE: u8 = 0xcd;

struct Allocation {
    bytes: usize,
    device: usize,
    backing: usize,
    number: u64,
}

/// Pinned host memory.
struct PinnedRange {
    bytes: usize,
    /// True if this library allocated it.
    ours: bool,
    /// True if kernels reach it.
    mapped: bool,
    /// True if the device only reads it.
    read_only: bool,
    number: u64,
}

/// A range of device memory, as the call found it that sends work there.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    address: usize,
    /// `None` if the call found no device memory.
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

    /// True if kernels of a device reach this memory. Peer access is disabled by default ("CUDA C++
    /// Programming Guide, Peer-to-Peer Memory Access").
    pub(crate) fn is_reached_from(self, device: usize) -> bool {
        self.found.is_some_and(|found| context::is_peer(device, found.device))
    }

    /// Passes the bytes to `action`, on the thread of a stream.
    ///
    /// Returns `None` if the call found no device memory. Aborts the program if the memory was
    /// released since.
    pub(crate) fn with<R>(self, action: impl FnOnce(*mut u8) -> R) -> Option<R> {
        let found = self.found?;
        // The bytes themselves are touched outside the lock: copies of several streams run side by
        // side.
        let backing = memory(|memory| match memory.device.range(..=self.address).next_back() {
            Some((base, allocation)) if allocation.number == found.number => {
                allocation.backing + (self.address - base)
            }
            _ => violation("device memory was used after it was given back"),
        });
        Some(action(at(backing)))
    }
}

struct Memory {
    device: BTreeMap<usize, Allocation>,
    /// Pinned host memory by address.
    pinned: BTreeMap<usize, PinnedRange>,
    /// Counts all allocations and registrations.
    numbers: u64,
    /// Addresses of released pages by size. The last one is reused first.
    free: BTreeMap<usize, Vec<usize>>,
    /// The part of the pinned memory that the checks include.
    watched: BTreeSet<usize>,
    /// Memory that was released while the context was broken. It stays allocated without an owner.
    given_up: BTreeSet<usize>,
    /// The bytes of each device that are allocated, and those that are pinned.
    used: [usize; MOST_DEVICES],
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
    used: [0; MOST_DEVICES],
    pinned_bytes: 0,
    limit_device: 8 << 30,
    limit_pinned: 8 << 30,
    limit_registration: usize::MAX,
});

fn memory<R>(action: impl FnOnce(&mut Memory) -> R) -> R {
    action(&mut MEMORY.lock())
}

impl Memory {
    /// Aborts if the memory was released before, while its context was broken.
    fn not_given_up(&self, address: usize) {
        if self.given_up.contains(&address) {
            violation("memory was given back twice");
        }
    }

    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn pin(&mut self, address: usize, range: PinnedRange) {
        self.watched.insert(address);
        self.pinned_bytes += range.bytes;
        self.pinned.insert(address, range);
        live::born(Kind::Pinned);
    }

    fn unpin(&mut self, address: usize, bytes: usize) {
        self.pinned.remove(&address);
        self.watched.remove(&address);
        self.pinned_bytes -= bytes;
        live::died(Kind::Pinned);
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

/// Notes memory that a broken context refuses to release. Its owner no longer uses it.
pub(crate) fn give_up(address: usize) {
    memory(|memory| {
        memory.not_given_up(address);
        memory.given_up.insert(address);
    });
}

/// True if host memory is there.
fn is_mapped(address: usize, bytes: usize) -> bool {
    let begin = address / PAGE * PAGE;
    let room = address + bytes - begin;
    // SAFETY: private anonymous pages have nothing to write back. For other pages this only starts
    // it earlier.
    unsafe { libc::msync(at(begin).cast(), room, libc::MS_ASYNC) == 0 }
}

/// True if all pages of host memory can be written.
fn is_writable(address: usize, bytes: usize) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/self/maps") else { return true };
    let (mut at, end) = (address, address + bytes);
    for line in table.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(protection)) = (words.next(), words.next()) else { continue };
        let Some((start, stop)) = range.split_once('-') else { continue };
        let [start, stop] = [start, stop].map(|text| usize::from_str_radix(text, 16).unwrap_or(0));
        if (start..stop).contains(&at) && protection.as_bytes().get(1) == Some(&b'w') {
            at = stop;
        }
    }
    at >= end
}

/// Aborts if pinned memory was unmapped, except memory that was left behind.
pub(crate) fn check_pinned() {
    memory(|memory| {
        if memory.watched.iter().any(|address| !is_mapped(*address, memory.pinned[address].bytes)) {
            violation("host memory was unmapped while it was pinned");
        }
    });
}

/// Excludes the memory that is pinned now from the checks.
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

/// Maps pages, if possible at the address of the last released pages of this size.
fn pages(memory: &mut Memory, bytes: usize, protection: i32, sharing: i32) -> Option<usize> {
    let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let hint = memory.free.get_mut(&bytes).and_then(Vec::pop).unwrap_or(0);
    let hint = ptr::without_provenance_mut(hint);
    // SAFETY: without `MAP_FIXED` a new mapping touches no other memory.
    let address = unsafe { libc::mmap(hint, bytes, protection, flags, -1, 0) };
    (address != libc::MAP_FAILED).then_some(address.addr())
}

fn unmap(address: usize, bytes: usize) {
    // SAFETY: the pages came from `pages`, and nothing uses them.
    unsafe { libc::munmap(ptr::without_provenance_mut(address), bytes) };
}

/// A pointer from an address, since C passes addresses.
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
        live::born(Kind::Device);
        Ok(address)
    })
}

/// Releases memory at once, without waiting.
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
        live::died(Kind::Device);
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
        // All allocated memory is mapped, with any flags ("CUDA Runtime API, Unified Addressing").
        let number = memory.next_number();
        let range = PinnedRange { bytes: room, ours: true, mapped: true, read_only: false, number };
        memory.pin(address, range);
        Ok(address)
    })
}

pub(crate) fn free_pinned(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&PinnedRange { bytes, ours: true, .. }) => {
                unmap(address, bytes);
                memory.free.entry(bytes).or_default().push(address);
                memory.unpin(address, bytes);
                Ok(())
            }
            _ => Err(Status::cudaErrorInvalidValue),
        }
    })
}

/// Pins pages of the caller. Registrations are exact to the byte, so that two may share a page, as
/// on an H200.
///
/// Pages that cannot be written are refused, except for memory that the device only reads.
pub(crate) fn register(address: usize, bytes: usize, mapped: bool, read_only: bool) -> Result {
    if bytes == 0 || !read_only && !is_writable(address, bytes) {
        return Err(Status::cudaErrorInvalidValue);
    }
    memory(|memory| {
        let end = address + bytes;
        let before = memory.pinned.range(..end).next_back();
        if before.is_some_and(|(at, range)| address < at + range.bytes) {
            return Err(Status::cudaErrorHostMemoryAlreadyRegistered);
        }
        let room = memory.limit_pinned.saturating_sub(memory.pinned_bytes);
        if bytes > room.min(memory.limit_registration) {
            return Err(Status::cudaErrorMemoryAllocation);
        }
        let number = memory.next_number();
        memory.pin(address, PinnedRange { bytes, ours: false, mapped, read_only, number });
        Ok(())
    })
}

pub(crate) fn unregister(address: usize) -> Result {
    memory(|memory| {
        memory.not_given_up(address);
        match memory.pinned.get(&address) {
            Some(&PinnedRange { bytes, ours: false, .. }) => {
                if !is_mapped(address, bytes) {
                    violation("host memory was unmapped before it was unregistered");
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
    /// By the range with this number.
    Whole(u64),
    /// In part, or by several ranges. CUDA refuses to copy these: regions "must be either entirely
    /// registered with CUDA, or [...] not registered at all" ("CUDA Driver API, Memory Management",
    /// `cuMemcpyAsync`).
    Partly,
}

/// True if kernels reach all bytes of a host range.
///
/// Unlike copies, kernels may cross registrations. They use addresses ("CUDA C++ Programming Guide,
/// Mapped Memory", "Unified Virtual Address Space").
pub(crate) fn reached(address: usize, bytes: usize) -> bool {
    memory(|memory| {
        let (mut at, end) = (address, address + bytes);
        while at < end {
            match memory.pinned.range(..=at).next_back() {
                Some((base, range)) if range.mapped && base + range.bytes > at => {
                    at = base + range.bytes;
                }
                _ => return false,
            }
        }
        true
    })
}

/// True if the device only reads the registered memory at an address.
pub(crate) fn is_read_only(address: usize) -> bool {
    memory(|memory| {
        let range = memory.pinned.range(..=address).next_back();
        range.is_some_and(|(base, range)| address < base + range.bytes && range.read_only)
    })
}

/// The address and the bytes of the pinned range around an address.
pub(crate) fn pinned_range(address: usize) -> Option<(usize, usize)> {
    memory(|memory| {
        let (base, range) = memory.pinned.range(..=address).next_back()?;
        (address < base + range.bytes).then_some((*base, range.bytes))
    })
}

pub(crate) fn pinned(address: usize, bytes: usize) -> Pinned {
    memory(|memory| {
        let end = address + bytes;
        match memory.pinned.range(..end).next_back() {
            Some((base, range)) if base + range.bytes > address => {
                match *base <= address && end <= base + range.bytes {
                    true => Pinned::Whole(range.number),
                    false => Pinned::Partly,
                }
            }
            _ => Pinned::No,
        }
    })
}
