//! Memory that exists already works like any host side, is never freed, and keeps its owner until
//! nothing uses it.

#![cfg(target_os = "linux")]

mod common;

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::sim::{self, Limits};
use common::{Foreign, Gate, device_bytes, in_child, test_name};
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, BufferPool, BufferRing, CpuGpuBuffer, Device, Error,
    GroupLayoutBuilder, GroupRing, HostFlags, Pinning, PoolOptions, Result, Stream, sys,
};

const PAGE: usize = 4096;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Pages of a test. Dropping the value notes that, and unmaps them.
struct Pages {
    base: NonNull<u8>,
    bytes: usize,
    dropped: Arc<AtomicU32>,
}

// SAFETY: the value only unmaps the pages, which any thread may do.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn map(bytes: usize, protection: i32, flags: i32, file: Option<&File>) -> Pages {
        let descriptor = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, descriptor, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Pages { base: NonNull::new(base.cast()).unwrap(), bytes, dropped: Arc::default() }
    }

    /// Private pages with a pattern.
    fn painted(bytes: usize) -> Pages {
        let pages = Pages::map(bytes, WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None);
        pages.bytes_mut(0, bytes).copy_from_slice(&pattern(0, bytes));
        pages
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.bytes);
        // SAFETY: within the pages.
        unsafe { self.base.add(offset) }
    }

    /// The test uses the bytes while nothing else does.
    #[allow(clippy::mut_from_ref)]
    fn bytes_mut(&self, offset: usize, bytes: usize) -> &mut [u8] {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: within the pages, and the callers use them while nothing else does.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset).as_ptr(), bytes) }
    }

    /// The number of owners that were dropped.
    fn dropped(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.dropped)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the pages of this value, which nothing refers to.
        assert_eq!(unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) }, 0);
    }
}

/// An owner that runs an action when it is let go.
struct OnDrop<F: Fn() + Send + Sync>(F);

impl<F: Fn() + Send + Sync> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Bytes that differ at neighbouring places and in neighbouring pages.
fn pattern(from: usize, bytes: usize) -> Vec<u8> {
    (from..from + bytes).map(|at| (at ^ at >> 8 ^ at >> 15) as u8).collect()
}

fn with(pinning: Pinning) -> BufferOptions {
    BufferOptions { pinning, ..Default::default() }
}

fn read_only(pinning: Pinning) -> BufferOptions {
    let host_flags = BufferOptions::default().host_flags | HostFlags::READ_ONLY;
    BufferOptions { pinning, host_flags }
}

/// Adopts bytes of the pages, which a clone of the owner may show to the test.
fn adopt(
    pages: &Arc<Pages>,
    offset: usize,
    bytes: usize,
    device: Device,
    options: BufferOptions,
) -> Result<CpuGpuBuffer<u8>> {
    adopt_with(pages, offset, bytes, device, pages.clone(), options)
}

fn adopt_with(
    pages: &Pages,
    offset: usize,
    bytes: usize,
    device: Device,
    owner: Arc<dyn Any + Send + Sync>,
    options: BufferOptions,
) -> Result<CpuGpuBuffer<u8>> {
    assert!(offset + bytes <= pages.bytes);
    // SAFETY: the callers keep the pages mapped, and touch none of these bytes meanwhile.
    unsafe { CpuGpuBuffer::adopt(pages.at(offset), bytes, device, owner, options) }
}

/// A file with a pattern, which has no name any more.
fn file(bytes: usize) -> File {
    let number = AtomicU32::fetch_add(&FILES, 1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("adopt-{}-{number}", std::process::id()));
    let options = &mut File::options();
    let mut file = options.read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(&pattern(0, bytes)).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

static FILES: AtomicU32 = AtomicU32::new(0);

/// The device side, after everything that the stream was given.
fn gpu(buffer: &CpuGpuBuffer<u8>, stream: &Stream) -> Vec<u8> {
    stream.synchronize().unwrap();
    device_bytes(buffer.device(), buffer.device_ptr(), buffer.nbytes())
}

fn is_pinned(address: *const u8) -> bool {
    let mut flags = 0;
    // SAFETY: a valid place; an address that is not pinned is a status.
    let status = unsafe { sys::cudaHostGetFlags(&mut flags, address.cast_mut().cast()) };
    // SAFETY: no arguments. Takes the error away.
    let _ = unsafe { sys::cudaGetLastError() };
    status == sys::cudaError::cudaSuccess
}

/// Registers bytes of a test.
fn register(address: NonNull<u8>, bytes: usize) {
    common::use_first_device();
    // SAFETY: the callers unregister the bytes before they unmap them.
    let status = unsafe { sys::cudaHostRegister(address.as_ptr().cast(), bytes, 3) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
}

fn unregister(address: NonNull<u8>) {
    // SAFETY: registered by the callers, and nothing is in flight.
    let status = unsafe { sys::cudaHostUnregister(address.as_ptr().cast()) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
}

/// Rows go to the device side, and other rows come back.
fn goes_and_comes_back(buffer: &mut CpuGpuBuffer<u8>, stream: &Stream) {
    let before = buffer.cpu().unwrap().to_vec();
    buffer.copy_to_gpu(.., stream).unwrap();
    assert_eq!(gpu(buffer, stream), before);
    buffer.cpu_mut().unwrap().fill(1);
    buffer.copy_to_cpu(1.., stream).unwrap();
    let host = buffer.cpu().unwrap();
    assert_eq!(host[0], 1);
    assert!(host[1..] == before[1..]);
    buffer.fill(9, stream).unwrap();
    assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 9));
    assert!(gpu(buffer, stream).iter().all(|byte| *byte == 9));
}

#[test]
fn a_mapped_file_is_read_where_it_is() {
    let _turn = common::turn();
    const BYTES: usize = 5 * PAGE + 100;
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let file = file(BYTES);
        for kind in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            let pages = Arc::new(Pages::map(BYTES, READ, kind, Some(&file)));
            let (owners, dropped) = (Arc::downgrade(&pages), pages.dropped());
            let options = read_only(Pinning::Preferred);
            let mut buffer = adopt(&pages, 7, BYTES - 9, device, options).unwrap();
            drop(pages);
            assert_eq!(buffer.is_pinned(), device != Device::Cpu, "{:?}", buffer.pinning_error());
            assert_eq!(
                buffer.cpu().unwrap().as_ptr().addr(),
                owners.upgrade().unwrap().at(7).addr().get()
            );
            assert!(gpu(&buffer, &stream).len() == BYTES - 9);
            buffer.copy_to_gpu(.., &stream).unwrap();
            assert_eq!(gpu(&buffer, &stream), pattern(7, BYTES - 9));
            assert_eq!(buffer.cpu().unwrap(), pattern(7, BYTES - 9));
            assert_eq!(buffer.try_cpu().unwrap().unwrap(), pattern(7, BYTES - 9));
            assert_eq!((dropped.load(Ordering::SeqCst), owners.strong_count()), (0, 1));
            drop(buffer);
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
        }
    }
}

#[test]
fn a_mapped_file_is_written_where_it_is() {
    let _turn = common::turn();
    const BYTES: usize = 3 * PAGE;
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let file = file(BYTES);
        let pages = Arc::new(Pages::map(BYTES, WRITE, libc::MAP_SHARED, Some(&file)));
        // Not every file system lets a device write to the pages of a file.
        let mut buffer = adopt(&pages, 0, BYTES, device, with(Pinning::Preferred)).unwrap();
        let refused = buffer.pinning_error().is_some();
        assert_eq!(buffer.is_pinned(), device != Device::Cpu && !refused);
        assert!(!refused || !common::is_simulated(), "{:?}", buffer.pinning_error());
        goes_and_comes_back(&mut buffer, &stream);
        buffer.fill_gpu(6, &stream).unwrap();
        buffer.copy_to_cpu(PAGE..PAGE + 5, &stream).unwrap();
        buffer.cpu_mut().unwrap()[0] = 5;
        drop((buffer, pages));
        let mut expected = vec![9; BYTES];
        expected[0] = 5;
        expected[PAGE..PAGE + 5].fill(6);
        let seen = Pages::map(BYTES, READ, libc::MAP_SHARED, Some(&file));
        assert!(seen.bytes_mut(0, BYTES) == expected);
    }
}

#[test]
fn memory_without_write_access_is_pinned_only_as_read_only() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (mut uses_host_tables, attribute) =
        (0, sys::cudaDeviceAttr::cudaDevAttrPageableMemoryAccessUsesHostPageTables);
    // SAFETY: a valid place.
    let status = unsafe { sys::cudaDeviceGetAttribute(&mut uses_host_tables, attribute, 0) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
    if uses_host_tables != 0 {
        return common::left_out(test, "the device needs no flag for such memory");
    }
    let file = file(PAGE);
    let pages = Arc::new(Pages::map(PAGE, READ, libc::MAP_PRIVATE, Some(&file)));
    let options = with(Pinning::Required);
    let error = adopt(&pages, 0, PAGE, device, options).unwrap_err();
    assert!(matches!(error, Error::PinningUnavailable { bytes: PAGE, .. }), "{error}");
    let buffer = adopt(&pages, 0, PAGE, device, with(Pinning::Preferred)).unwrap();
    assert!(!buffer.is_pinned());
    assert_eq!(buffer.pinning_error(), Some(&error));
    drop(buffer);
    let buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Required)).unwrap();
    assert!(buffer.is_pinned() && buffer.pinning_error().is_none());
}

#[test]
fn memory_that_begins_and_ends_anywhere_is_pinned_to_the_byte() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    for (offset, bytes) in [(0, 1), (1, 1), (PAGE - 1, 2), (5, 3 * PAGE), (100, 7 * PAGE - 100)] {
        let pages = Arc::new(Pages::painted(8 * PAGE));
        let mut buffer = adopt(&pages, offset, bytes, device, with(Pinning::Required)).unwrap();
        let at = |offset: usize| pages.at(offset).as_ptr();
        assert!(is_pinned(at(offset)) && is_pinned(at(offset + bytes - 1)));
        assert_eq!(buffer.cpu().unwrap(), pattern(offset, bytes));
        if bytes > 1 {
            goes_and_comes_back(&mut buffer, &stream);
        }
        drop(buffer);
        assert!(!is_pinned(at(offset)));
        // The bytes around it are what they were.
        assert_eq!(pages.bytes_mut(0, offset), pattern(0, offset));
        let end = offset + bytes;
        assert_eq!(pages.bytes_mut(end, 8 * PAGE - end), pattern(end, 8 * PAGE - end));
    }
}

#[test]
fn elements_of_any_type_have_the_shape_that_was_asked_for() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let numbers: Arc<[u64]> = (0..60).collect();
        let host = NonNull::from(&*numbers).cast::<u64>();
        let owner = Arc::new(numbers.clone());
        let options = read_only(Pinning::Preferred);
        // SAFETY: the owner keeps the 60 numbers, which nothing writes.
        let buffer = unsafe { CpuGpuBuffer::adopt(host, [3, 4, 5], device, owner, options) };
        let mut buffer = buffer.unwrap();
        assert_eq!((buffer.shape(), buffer.numel(), buffer.nbytes()), (&[3, 4, 5][..], 60, 480));
        buffer.copy_to_gpu(1..2, &stream).unwrap();
        stream.synchronize().unwrap();
        let bytes = device_bytes(device, buffer.device_ptr().cast(), 480);
        let seen = bytes.chunks(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
        // Rows that were not copied read as zeroes.
        let expected = |at: u64| if (20..40).contains(&at) { at } else { 0 };
        assert!(seen.eq((0..60).map(expected)));
        let shape = Error::InvalidShape { reason: String::new() };
        let owner = Arc::new(numbers.clone());
        // SAFETY: as above; there are no elements.
        let none = unsafe { CpuGpuBuffer::adopt(host, [1; 9], device, owner, options) };
        assert_eq!(std::mem::discriminant(&none.unwrap_err()), std::mem::discriminant(&shape));
        drop(buffer);
        assert_eq!(Arc::strong_count(&numbers), 1);
    }
}

// ---- registrations ----

/// The smallest size of pieces.
const PIECE: usize = 64 << 20;
const HUGEPAGE: usize = 2 << 20;

#[test]
fn memory_that_cannot_be_registered_at_once_is_registered_in_pieces_that_share_no_hugepage() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    limits.register(PIECE);
    const BYTES: usize = 2 * PIECE + 100_000;
    let pages = Arc::new(Pages::map(
        BYTES + 2 * HUGEPAGE,
        WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
    ));
    // Just before the end of a hugepage, so that the first piece ends soon behind the others' size.
    for before in [5, HUGEPAGE - 70_001] {
        let hugepage = pages.base.addr().get().next_multiple_of(HUGEPAGE) + HUGEPAGE;
        let offset = hugepage - pages.base.addr().get() - before;
        let live = (sim::live(), sim::pinned_bytes());
        let mut buffer = adopt(&pages, offset, BYTES, device, with(Pinning::Required)).unwrap();
        let bound = PIECE - (HUGEPAGE - before);
        assert_eq!((pages.at(offset).addr().get() + bound) % HUGEPAGE, 0);
        assert_eq!((sim::live()[1], sim::pinned_bytes()), (live.0[1] + 3, live.1 + BYTES));
        for (range, copies) in [
            (bound - 3..bound + 5, 2),
            (bound - 3..bound, 1),
            (bound..bound + PIECE, 1),
            (bound - 1..bound + PIECE + 1, 3),
            (0..BYTES, 3),
        ] {
            let expected = pattern(range.start, range.len().min(1 << 20));
            buffer.cpu_mut().unwrap()[range.clone()][..expected.len()].copy_from_slice(&expected);
            sim::reset();
            buffer.copy_to_gpu(range.clone(), &stream).unwrap();
            assert_eq!(sim::calls_of(c"cuMemcpyHtoDAsync"), copies, "{range:?}");
            buffer.cpu_mut().unwrap()[range.clone()].fill(0);
            buffer.copy_to_cpu(range.clone(), &stream).unwrap();
            assert!(buffer.cpu().unwrap()[range.start..].starts_with(&expected), "{range:?}");
        }
        sim::reset();
        drop(buffer);
        assert_eq!(sim::calls_of(c"cudaHostUnregister"), 3);
        assert_eq!((sim::live()[1], sim::pinned_bytes()), (live.0[1], live.1));
    }
}

#[test]
fn memory_that_is_registered_already_is_pinned_and_stays_registered() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let pages = Arc::new(Pages::painted(8 * PAGE));
    register(pages.at(100), 6 * PAGE);
    // All of it, and parts at either end and in the middle.
    for (offset, bytes) in [(100, 6 * PAGE), (100, 5), (PAGE, PAGE), (100 + 5 * PAGE, PAGE)] {
        let mut buffer = adopt(&pages, offset, bytes, device, with(Pinning::Required)).unwrap();
        assert!(buffer.is_pinned() && buffer.pinning_error().is_none());
        goes_and_comes_back(&mut buffer, &stream);
        drop(buffer);
        assert!(is_pinned(pages.at(100).as_ptr()) && is_pinned(pages.at(offset).as_ptr()));
    }
    unregister(pages.at(100));
}

#[test]
fn memory_of_several_registrations_is_pinned_and_copies_are_cut_at_their_bounds() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let pages = Arc::new(Pages::painted(8 * PAGE));
    let parts = [(50, 2 * PAGE), (50 + 2 * PAGE, 10), (60 + 2 * PAGE, 3 * PAGE)];
    parts.iter().for_each(|(offset, bytes)| register(pages.at(*offset), *bytes));
    let mut buffer = adopt(&pages, 70, 5 * PAGE - 30, device, with(Pinning::Required)).unwrap();
    assert!(buffer.is_pinned());
    goes_and_comes_back(&mut buffer, &stream);
    if common::is_simulated() {
        sim::reset();
        buffer.copy_to_gpu(.., &stream).unwrap();
        assert_eq!(sim::calls_of(c"cuMemcpyHtoDAsync"), 3);
    }
    drop(buffer);
    parts.iter().for_each(|(offset, _)| unregister(pages.at(*offset)));
}

#[test]
fn memory_of_which_a_part_is_registered_is_pageable_with_the_reason_and_works() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    for (offset, bytes) in [(0, 2 * PAGE), (2 * PAGE, 3 * PAGE), (6 * PAGE, 2 * PAGE)] {
        let pages = Arc::new(Pages::painted(8 * PAGE));
        register(pages.at(offset), bytes);
        let error = adopt(&pages, 0, 8 * PAGE, device, with(Pinning::Required)).unwrap_err();
        assert!(error.to_string().contains("only a part of it is registered"), "{error}");
        let mut buffer = adopt(&pages, 0, 8 * PAGE, device, with(Pinning::Preferred)).unwrap();
        assert!(!buffer.is_pinned());
        assert_eq!(buffer.pinning_error(), Some(&error));
        goes_and_comes_back(&mut buffer, &stream);
        drop(buffer);
        // Nothing else was registered, and this stayed so.
        let pinned = |page: usize| is_pinned(pages.at(page * PAGE).as_ptr());
        let expected = |page: usize| (offset..offset + bytes).contains(&(page * PAGE));
        assert!((0..8).all(|page| pinned(page) == expected(page)), "{offset}");
        unregister(pages.at(offset));
    }
}

#[test]
fn an_attempt_that_fails_leaves_the_registrations_of_others_alone() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let pages = Arc::new(Pages::map(2 * PIECE + HUGEPAGE, WRITE, anonymous, None));
    let hugepage = pages.base.addr().get().next_multiple_of(HUGEPAGE) - pages.base.addr().get();
    // The registration begins with the memory, and with its second piece.
    for offset in [0, PIECE] {
        register(pages.at(hugepage + offset), PAGE);
        sim::reset();
        sim::fail_call(c"cudaHostRegister", 1, 2, true, false);
        let options = with(Pinning::Preferred);
        let buffer = adopt(&pages, hugepage, 2 * PIECE, device, options).unwrap();
        assert_eq!(sim::injected(), u64::from(offset > 0), "it is not tried in vain");
        assert!(buffer.pinning_error().unwrap().to_string().contains("only a part"));
        drop(buffer);
        unregister(pages.at(hugepage + offset));
        sim::heal();
    }
}

#[test]
fn two_ranges_of_one_page_are_pinned_each_for_itself() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let pages = Arc::new(Pages::painted(3 * PAGE));
    let options = with(Pinning::Required);
    // Neighbours that share the second page.
    let mut first = adopt(&pages, 10, PAGE + 90, device, options).unwrap();
    let mut second = adopt(&pages, PAGE + 100, PAGE, device, options).unwrap();
    goes_and_comes_back(&mut first, &stream);
    let gate = Gate::close(&stream);
    second.copy_to_gpu(.., &stream).unwrap();
    // The copy that is in flight is none of the first's, whose release may wait for it all the same.
    gate.waits(|| drop(first));
    stream.synchronize().unwrap();
    assert!(second.is_pinned() && is_pinned(pages.at(PAGE + 100).as_ptr()));
    assert!(!is_pinned(pages.at(PAGE + 99).as_ptr()));
    goes_and_comes_back(&mut second, &stream);
}

#[test]
fn buffers_of_the_same_memory_share_the_registration_of_the_first() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let pages = Pages::painted(4 * PAGE);
    let (options, owner) = (read_only(Pinning::Required), || Arc::new(()));
    let adopt = |offset, bytes, owner: &Arc<()>, options| {
        adopt_with(&pages, offset, bytes, device, owner.clone(), options)
    };
    for times in 0..2 {
        // Part of the first's memory, all of it, and more than it.
        for (offset, bytes) in [(PAGE + 9, PAGE), (PAGE, 2 * PAGE), (0, 4 * PAGE)] {
            let owners = [owner(), owner()];
            let first = adopt(PAGE, 2 * PAGE, &owners[0], options).unwrap();
            let is_within = bytes <= 2 * PAGE;
            let options = match is_within {
                true => options,
                false => read_only(Pinning::Preferred),
            };
            let mut second = adopt(offset, bytes, &owners[1], options).unwrap();
            assert_eq!(
                (second.is_pinned(), second.pinning_error().is_none()),
                (is_within, is_within)
            );
            // A copy of the second is in flight when the first is dropped, unless it is pageable.
            let gate = is_within.then(|| Gate::close(&stream));
            second.copy_to_gpu(.., &stream).unwrap();
            match gate {
                Some(gate) => gate.waits(|| drop(first)),
                None => drop(first),
            }
            assert_eq!(gpu(&second, &stream), pattern(offset, bytes));
            assert!(is_pinned(pages.at(2 * PAGE - 1).as_ptr()), "times {times}");
            assert_eq!(owners.each_ref().map(Arc::strong_count), [2, 2]);
            drop(second);
            assert!(!is_pinned(pages.at(2 * PAGE - 1).as_ptr()));
            assert_eq!(owners.each_ref().map(Arc::strong_count), [1, 1]);
        }
    }
}

#[test]
fn memory_that_another_buffer_registers_or_unregisters_at_this_moment_is_pageable() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    let pages = Arc::new(Pages::painted(2 * PAGE));
    let reason = |buffer: &CpuGpuBuffer<u8>| {
        buffer.pinning_error().map_or(String::new(), ToString::to_string)
    };
    let options = read_only(Pinning::Preferred);
    let meanwhile = |call, action: &(dyn Fn() + Sync)| {
        sim::reset();
        let held = sim::Held::next(call);
        std::thread::scope(|scope| {
            let other = scope.spawn(action);
            held.wait();
            let buffer = adopt(&pages, 9, PAGE, device, options).unwrap();
            assert!(reason(&buffer).contains("at this moment"), "{}", reason(&buffer));
            drop(held);
            other.join().unwrap();
        });
    };
    let first = Mutex::new(None);
    let register = || {
        let buffer = adopt(&pages, 0, 2 * PAGE, device, read_only(Pinning::Required)).unwrap();
        *first.lock().unwrap() = Some(buffer);
    };
    meanwhile(c"cudaHostRegister", &register);
    meanwhile(c"cudaHostUnregister", &|| drop(first.lock().unwrap().take()));
    // Afterwards it can be pinned.
    assert!(adopt(&pages, 9, PAGE, device, options).unwrap().is_pinned());
    assert_eq!(Arc::strong_count(&pages), 1);
}

#[test]
fn the_options_decide_whether_and_how_memory_is_pinned() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let pages = Arc::new(Pages::painted(PAGE));
    let never = adopt(&pages, 0, PAGE, device, with(Pinning::Never)).unwrap();
    assert!(!never.is_pinned() && never.pinning_error().is_none());
    assert!(!is_pinned(pages.at(0).as_ptr()));
    drop(never);
    let flags = |options: BufferOptions| {
        let buffer = adopt(&pages, 0, PAGE, device, options).unwrap();
        let mut flags = 0;
        // SAFETY: a valid place, and pinned memory.
        let status = unsafe { sys::cudaHostGetFlags(&mut flags, pages.at(0).as_ptr().cast()) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        drop(buffer);
        HostFlags::from_bits_truncate(flags)
    };
    let all = flags(with(Pinning::Required));
    assert!(all.contains(HostFlags::PORTABLE | HostFlags::MAPPED));
    if common::is_simulated() {
        // Bits without a name are another function's.
        let host_flags = HostFlags::from_bits_retain(!0);
        assert!(flags(BufferOptions { host_flags, pinning: Pinning::Required }).contains(all));
    }
}

#[test]
fn a_device_that_cannot_register_as_read_only_registers_without() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    const NOT_SUPPORTED: u32 = 801;
    let pages = Arc::new(Pages::painted(PAGE));
    sim::reset();
    sim::fail_call(c"cudaHostRegister", 1, NOT_SUPPORTED, true, false);
    let mut buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Required)).unwrap();
    assert_eq!((sim::calls_of(c"cudaHostRegister"), sim::injected()), (2, 1));
    assert!(buffer.is_pinned());
    assert_eq!(buffer.cpu_mut(), Err(Error::ReadOnly));
    drop(buffer);
    // It may register nothing at all.
    sim::reset();
    sim::fail_function(c"cudaHostRegister", NOT_SUPPORTED);
    let buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Preferred)).unwrap();
    assert_eq!(sim::calls_of(c"cudaHostRegister"), 2);
    assert!(buffer.pinning_error().unwrap().to_string().contains("cudaHostRegister"));
}

// ---- the owner ----

#[test]
fn memory_is_unregistered_before_its_owner_is_let_go() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let pages = Arc::new(Pages::painted(4 * PAGE));
    let seen = Arc::new(Mutex::new(None));
    let owner = OnDrop({
        let (pages, seen) = (pages.clone(), seen.clone());
        move || *seen.lock().unwrap() = Some(is_pinned(pages.at(9).as_ptr()))
    });
    let buffer = adopt_with(&pages, 5, 3 * PAGE, device, Arc::new(owner), with(Pinning::Required));
    let buffer = buffer.unwrap();
    assert!(is_pinned(pages.at(9).as_ptr()));
    drop(buffer);
    assert_eq!(seen.lock().unwrap().take(), Some(false));
    assert_eq!(Arc::strong_count(&pages), 1);
}

#[test]
fn an_upload_in_flight_holds_the_owner_back() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let foreign = Foreign::new(PAGE / 4, 0);
    for options in [read_only(Pinning::Required), with(Pinning::Never)] {
        let pages = Arc::new(Pages::painted(PAGE));
        let gate: Arc<Mutex<Option<Arc<Gate>>>> = Arc::default();
        let opened = Arc::new(AtomicBool::new(false));
        let owner = OnDrop({
            let (gate, opened) = (gate.clone(), opened.clone());
            move || {
                let gate = gate.lock().unwrap();
                opened.store(gate.as_ref().unwrap().is_open(), Ordering::SeqCst);
            }
        });
        let mut buffer = adopt_with(&pages, 0, PAGE, device, Arc::new(owner), options).unwrap();
        // A copy from pageable memory may wait, so only a kernel is held up there.
        let closed = Arc::new(Gate::close(&stream));
        *gate.lock().unwrap() = Some(closed.clone());
        match options.pinning {
            Pinning::Never => {
                buffer.gpu_on(&stream).unwrap();
            }
            _ => {
                let to = foreign.as_ptr().cast();
                // SAFETY: the memory has as many bytes, and outlives the copy.
                unsafe { buffer.copy_to_device_ptr(.., to, &stream) }.unwrap();
            }
        }
        closed.waits(|| drop(buffer));
        assert!(opened.load(Ordering::SeqCst), "the owner was let go before the gate opened");
        stream.synchronize().unwrap();
    }
    assert_eq!(device_bytes(device, foreign.as_ptr().cast(), PAGE), pattern(0, PAGE));
}

#[test]
fn an_owner_is_forgotten_if_its_memory_may_still_be_registered() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    const ILLEGAL: u32 = 700;
    limits.register(PIECE);
    let bytes = 2 * PIECE;
    for number in 1..=2 {
        let pages =
            Arc::new(Pages::map(bytes, WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None));
        let before = sim::live();
        let buffer = adopt(&pages, 0, bytes, device, with(Pinning::Required)).unwrap();
        let pieces = sim::live()[1] - before[1];
        sim::reset();
        sim::fail_call(c"cudaHostUnregister", number, ILLEGAL, true, false);
        drop(buffer);
        assert_eq!(sim::injected(), 1);
        // The other pieces are unregistered all the same.
        assert_eq!(sim::calls_of(c"cudaHostUnregister"), pieces as u64);
        assert_eq!(sim::live()[1], before[1] + 1);
        assert_eq!(Arc::strong_count(&pages), 2, "the owner was let go");
        sim::heal();
        common::forget(pages);
        sim::leave_behind();
    }
}

#[test]
fn an_owner_is_forgotten_if_a_failed_attempt_may_have_left_memory_registered() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    const ILLEGAL: u32 = 700;
    for pinning in [Pinning::Required, Pinning::Preferred] {
        let pages = Arc::new(Pages::painted(PAGE));
        let live = sim::live()[1];
        // The registration has its effect, and the call to undo it fails as well.
        sim::reset();
        sim::fail_call(c"cudaHostRegister", 1, ILLEGAL, true, true);
        let held = sim::Held::next(c"cudaHostUnregister");
        let adopting = std::thread::scope(|scope| {
            let adopting = scope.spawn(|| adopt(&pages, 0, PAGE, device, with(pinning)));
            held.wait();
            sim::fail_call(c"cudaHostUnregister", 1, ILLEGAL, true, false);
            drop(held);
            adopting.join().unwrap()
        });
        assert_eq!(sim::live()[1], live + 1, "the pages are still registered");
        match adopting {
            Ok(buffer) => {
                assert_eq!(pinning, Pinning::Preferred);
                assert!(!buffer.is_pinned() && buffer.pinning_error().is_some());
            }
            Err(error) => {
                assert!(matches!(error, Error::PinningUnavailable { .. }), "{error}");
            }
        }
        assert_eq!(Arc::strong_count(&pages), 2, "the owner was let go");
        sim::heal();
        common::forget(pages);
        sim::leave_behind();
    }
}

#[test]
fn an_owner_is_forgotten_if_nobody_knows_whether_its_memory_is_in_use() {
    let test = test_name!();
    let Some((device, _limits)) = Limits::of(test) else { return };
    let stream = Stream::new(device).unwrap();
    let pages = Arc::new(Pages::painted(PAGE));
    let mut buffer = adopt(&pages, 0, PAGE, device, with(Pinning::Required)).unwrap();
    let gate = Gate::close(&stream);
    buffer.copy_to_gpu(.., &stream).unwrap();
    sim::reset();
    sim::fail(1, 700, false, false);
    drop(buffer);
    assert_eq!(sim::calls_of(c"cudaHostUnregister"), 0);
    assert_eq!(Arc::strong_count(&pages), 2, "the owner was let go");
    sim::heal();
    gate.open();
    stream.synchronize().unwrap();
    common::forget(pages);
    sim::leave_behind();
}

#[test]
fn a_failed_adoption_lets_the_owner_go_and_leaves_nothing_registered() {
    let test = test_name!();
    let Some((device, limits)) = Limits::of(test) else { return };
    let pages = Arc::new(Pages::painted(PAGE));
    let before = sim::live();
    limits.allocate(0, device);
    let error = adopt(&pages, 0, PAGE, device, Default::default()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { bytes: PAGE, .. }), "{error}");
    drop(limits);
    let Some((device, limits)) = Limits::of(test) else { return };
    limits.pin(PAGE - 1);
    let error = adopt(&pages, 0, PAGE, device, with(Pinning::Required)).unwrap_err();
    assert!(matches!(error, Error::PinningUnavailable { bytes: PAGE, .. }), "{error}");
    let buffer = adopt(&pages, 0, PAGE, device, with(Pinning::Preferred)).unwrap();
    assert_eq!(buffer.pinning_error(), Some(&error));
    drop(buffer);
    assert_eq!((sim::live(), Arc::strong_count(&pages)), (before, 1));
}

#[test]
fn an_owner_that_panics_leaves_nothing_behind() {
    let _turn = common::turn();
    for device in common::devices() {
        common::make_what_stays(device);
        let before = common::is_simulated().then(sim::live);
        let pages = Arc::new(Pages::painted(PAGE));
        let panics = Arc::new(AtomicU32::new(0));
        let owner = |panics: Arc<AtomicU32>| {
            OnDrop(move || {
                panics.fetch_add(1, Ordering::SeqCst);
                panic!("the owner's own");
            })
        };
        // When the buffer is dropped, and when it moves to memory of its own.
        for grows in [false, true] {
            panics.store(0, Ordering::SeqCst);
            let owner = Arc::new(owner(panics.clone()));
            let buffer = adopt_with(&pages, 0, PAGE, device, owner, Default::default());
            let mut buffer = buffer.unwrap();
            let panic = match grows {
                false => catch_unwind(AssertUnwindSafe(|| drop(buffer))),
                true => catch_unwind(AssertUnwindSafe(move || {
                    let grown = catch_unwind(AssertUnwindSafe(|| buffer.resize(2 * PAGE)));
                    assert_eq!(buffer.numel(), 2 * PAGE);
                    assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 0));
                    grown.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).unwrap();
                })),
            };
            let text = panic.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!((*text, panics.load(Ordering::SeqCst)), ("the owner's own", 1));
        }
        assert_eq!(common::is_simulated().then(sim::live), before);
        assert!(device == Device::Cpu || !is_pinned(pages.at(0).as_ptr()));
    }
}

#[test]
fn a_size_within_the_memory_stays_in_it_and_a_larger_one_lets_the_owner_go() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let pages = Arc::new(Pages::painted(2 * PAGE));
        let mut buffer = adopt(&pages, 3, PAGE, device, Default::default()).unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.resize([10, 5]).unwrap();
        assert_eq!(buffer.cpu().unwrap().as_ptr(), pages.at(3).as_ptr().cast_const());
        assert_eq!(buffer.cpu().unwrap(), [0; 50]);
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [0; 50]);
        assert_eq!(Arc::strong_count(&pages), 2);
        buffer.resize(PAGE).unwrap();
        assert_eq!(Arc::strong_count(&pages), 2);
        buffer.resize(PAGE + 1).unwrap();
        assert_eq!(Arc::strong_count(&pages), 1);
        assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 0));
        buffer.fill(1, &stream).unwrap();
        assert_eq!(pages.bytes_mut(3 + PAGE, 9), pattern(3 + PAGE, 9));
    }
}

#[test]
fn memory_of_no_bytes_is_not_registered_and_keeps_its_owner() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let pages = Arc::new(Pages::painted(PAGE));
    let calls = common::is_simulated().then(sim::calls);
    for options in [with(Pinning::Required), read_only(Pinning::Required)] {
        let buffer = adopt(&pages, 9, 0, device, options).unwrap();
        assert!(!buffer.is_pinned() && buffer.pinning_error().is_none());
        assert!(buffer.cpu().unwrap().is_empty() && Arc::strong_count(&pages) == 2);
        drop(buffer);
        assert_eq!(Arc::strong_count(&pages), 1);
    }
    assert_eq!(common::is_simulated().then(sim::calls), calls);
}

#[test]
fn memory_of_the_cpu_calls_no_cuda_and_is_not_pinned() {
    let _turn = common::turn();
    Device::auto();
    let pages = Arc::new(Pages::painted(PAGE));
    let calls = common::is_simulated().then(sim::calls);
    let stream = Stream::new(Device::Cpu).unwrap();
    let mut buffer = adopt(&pages, 1, 100, Device::Cpu, with(Pinning::Preferred)).unwrap();
    assert!(!buffer.is_pinned() && buffer.pinning_error().is_none());
    goes_and_comes_back(&mut buffer, &stream);
    drop(buffer);
    let required = adopt(&pages, 1, 100, Device::Cpu, with(Pinning::Required)).unwrap_err();
    let reason = "the device is the CPU".into();
    assert_eq!(required, Error::PinningUnavailable { bytes: 100, reason });
    assert_eq!(Arc::strong_count(&pages), 1);
    assert_eq!(common::is_simulated().then(sim::calls), calls);
}

// ---- read-only ----

#[test]
fn nothing_writes_a_read_only_host_side() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let file = file(PAGE);
        let pages = Arc::new(Pages::map(PAGE, READ, libc::MAP_PRIVATE, Some(&file)));
        let mut buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Preferred)).unwrap();
        buffer.copy_to_gpu(.., &stream).unwrap();
        buffer.fill_gpu(8, &stream).unwrap();
        let mut theirs = vec![0u8; PAGE];
        let foreign = (device != Device::Cpu).then(|| Foreign::new(PAGE / 4, 4));
        let from: *const u8 = foreign.as_ref().map_or(theirs.as_ptr(), |it| it.as_ptr().cast());
        // Twice: a wait for the upload must not make the host side writable.
        for _ in 0..2 {
            assert_eq!(buffer.cpu_mut(), Err(Error::ReadOnly));
            assert_eq!(buffer.try_cpu_mut(), Err(Error::ReadOnly));
            assert_eq!(buffer.fill(1, &stream), Err(Error::ReadOnly));
            assert_eq!(buffer.fill_cpu(1), Err(Error::ReadOnly));
            assert_eq!(buffer.zero(&stream), Err(Error::ReadOnly));
            assert_eq!(buffer.resize(5), Err(Error::ReadOnly));
            assert_eq!(buffer.resize(PAGE), Err(Error::ReadOnly));
            assert_eq!(buffer.resize(2 * PAGE), Err(Error::ReadOnly));
            assert_eq!(buffer.copy_to_cpu(.., &stream), Err(Error::ReadOnly));
            assert_eq!(buffer.copy_to_cpu(5..5, &stream), Err(Error::ReadOnly));
            // SAFETY: as many bytes, which nothing writes.
            let from = unsafe { buffer.copy_from_device_ptr(.., from, &stream) };
            assert_eq!(from, Err(Error::ReadOnly));
            buffer.synchronize().unwrap();
        }
        // Nothing has changed, and what does not write it works.
        assert_eq!((buffer.shape(), buffer.cpu().unwrap()), (&[PAGE][..], &pattern(0, PAGE)[..]));
        assert_eq!(gpu(&buffer, &stream), [8; PAGE]);
        buffer.copy_to_gpu(..100, &stream).unwrap();
        buffer.gpu_on(&stream).unwrap();
        assert_eq!(gpu(&buffer, &stream)[..100], pattern(0, 100));
        let to: *mut u8 = foreign.as_ref().map_or(theirs.as_mut_ptr(), |it| it.as_ptr().cast());
        // SAFETY: as many bytes, which nothing else uses.
        unsafe { buffer.copy_to_device_ptr(.., to, &stream) }.unwrap();
        stream.synchronize().unwrap();
        assert_eq!(device_bytes(device, to, PAGE), pattern(0, PAGE));
        drop(buffer);
        assert_eq!(Arc::strong_count(&pages), 1);
    }
}

#[test]
fn errors_of_shapes_and_rows_come_before_read_only_and_errors_of_streams_after_it() {
    let _turn = common::turn();
    for device in common::devices() {
        let pages = Arc::new(Pages::painted(PAGE));
        let mut buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Preferred)).unwrap();
        let stream = Stream::new(device).unwrap();
        assert!(matches!(buffer.resize([1; 9]), Err(Error::InvalidShape { .. })));
        let rows = buffer.copy_to_cpu(1..PAGE + 1, &stream);
        assert!(matches!(rows, Err(Error::OutOfRange { .. })));
        let other = match device {
            Device::Cpu => continue,
            Device::Cuda(_) => Stream::new(Device::Cpu).unwrap(),
        };
        assert_eq!(buffer.copy_to_cpu(.., &other), Err(Error::ReadOnly));
        assert_eq!(buffer.fill(1, &other), Err(Error::ReadOnly));
        assert_eq!(buffer.zero(&other), Err(Error::ReadOnly));
        assert!(matches!(buffer.copy_to_gpu(.., &other), Err(Error::DeviceMismatch { .. })));
    }
}

#[test]
fn memory_of_our_own_cannot_be_read_only() {
    let _turn = common::turn();
    let options = read_only(Pinning::Preferred);
    let mut builder = GroupLayoutBuilder::new();
    builder.add::<u32>(8);
    let layout = builder.build().unwrap();
    for device in common::devices() {
        for bytes in [0, 100] {
            let buffer = CpuGpuBuffer::<u8>::with_options(bytes, device, options);
            assert_eq!(buffer.err(), Some(Error::ReadOnly));
            for buffers in [0, 3] {
                let host_flags = options.host_flags;
                let options = PoolOptions { host_flags, ..Default::default() };
                let pool = BufferPool::<u8>::with_options(bytes, device, buffers, options);
                assert_eq!(pool.err(), Some(Error::ReadOnly));
            }
            let ring = BufferRing::<u8>::with_options(bytes, device, 2, options);
            assert_eq!(ring.err(), Some(Error::ReadOnly));
        }
        let group = BufferGroup::with_options(&layout, device, options);
        assert_eq!(group.err(), Some(Error::ReadOnly));
        let ring = GroupRing::with_options(&layout, device, 2, options);
        assert_eq!(ring.err(), Some(Error::ReadOnly));
    }
}

// ---- other processes ----

#[test]
fn a_forked_child_touches_neither_cuda_nor_the_owner() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    for options in [with(Pinning::Required), read_only(Pinning::Required), with(Pinning::Never)] {
        let stream = Stream::new(device).unwrap();
        let pages = Arc::new(Pages::painted(PAGE));
        let dropped = pages.dropped();
        let mut buffer = Some(adopt(&pages, 0, PAGE, device, options).unwrap());
        let mut none = Some(adopt(&pages, 9, 0, device, options).unwrap());
        let calls = common::is_simulated().then(sim::calls);
        in_child(|| {
            for buffer in [&mut buffer, &mut none] {
                let mut buffer = buffer.take().unwrap();
                assert_eq!(buffer.cpu().err(), Some(Error::Forked));
                assert_eq!(buffer.cpu_mut().err(), Some(Error::Forked));
                assert_eq!(buffer.try_cpu_mut().err(), Some(Error::Forked));
                assert_eq!(buffer.fill_cpu(1), Err(Error::Forked));
                if buffer.nbytes() > 0 {
                    assert_eq!(buffer.copy_to_gpu(.., &stream), Err(Error::Forked));
                    assert_eq!(buffer.copy_to_cpu(.., &stream), Err(Error::Forked));
                    assert_eq!(buffer.resize(3), Err(Error::Forked));
                }
                drop(buffer);
            }
            // No advice: the child has its copy of the pages.
            assert_eq!(pages.bytes_mut(0, PAGE), pattern(0, PAGE));
            assert_eq!((dropped.load(Ordering::SeqCst), Arc::strong_count(&pages)), (0, 3));
            assert_eq!(common::is_simulated().then(sim::calls), calls, "the child called CUDA");
        });
        // The parent's still works.
        buffer.as_mut().unwrap().copy_to_gpu(.., &stream).unwrap();
        assert_eq!(gpu(buffer.as_ref().unwrap(), &stream), pattern(0, PAGE));
        drop((buffer, none));
        assert_eq!(Arc::strong_count(&pages), 1);
    }
}

#[test]
fn a_buffer_of_the_cpu_lets_its_owner_go_in_a_forked_child_as_well() {
    let _turn = common::turn();
    Device::auto();
    let pages = Arc::new(Pages::painted(PAGE));
    let mut buffer = Some(adopt(&pages, 0, PAGE, Device::Cpu, Default::default()).unwrap());
    in_child(|| {
        let mut buffer = buffer.take().unwrap();
        buffer.cpu_mut().unwrap().fill(1);
        drop(buffer);
        assert_eq!(Arc::strong_count(&pages), 1);
    });
    assert_eq!(buffer.unwrap().cpu().unwrap(), pattern(0, PAGE));
}

#[test]
fn a_file_that_is_truncated_ends_the_process_with_sigbus() {
    let test = test_name!();
    let device = Device::auto();
    if !common::is_subprocess() {
        let status = common::in_subprocess(test, &[]).status;
        return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status:?}");
    }
    let file = file(2 * PAGE);
    let pages = Arc::new(Pages::map(2 * PAGE, READ, libc::MAP_SHARED, Some(&file)));
    let buffer = adopt(&pages, 0, 2 * PAGE, device, read_only(Pinning::Preferred)).unwrap();
    assert_eq!(buffer.cpu().unwrap()[2 * PAGE - 1], pattern(2 * PAGE - 1, 1)[0]);
    file.set_len(PAGE as u64).unwrap();
    // The page that is left can still be read.
    assert_eq!(buffer.cpu().unwrap()[PAGE - 1], pattern(PAGE - 1, 1)[0]);
    // A sanitizer would handle it.
    // SAFETY: the default action is no function of this program.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    let gone = &raw const buffer.cpu().unwrap()[PAGE];
    // SAFETY: the address is mapped. The kernel has no page for it any more, and ends the process.
    unsafe { gone.read_volatile() };
    unreachable!("the page is gone");
}

// ---- tensors ----

#[cfg(feature = "dlpack")]
#[test]
fn a_tensor_keeps_the_owner_until_it_is_gone() {
    use cpu_gpu_buffer::dlpack;

    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        for host in [true, false] {
            let pages = Arc::new(Pages::painted(PAGE));
            let mut buffer = adopt(&pages, 0, PAGE, device, Default::default()).unwrap();
            buffer.copy_to_gpu(.., &stream).unwrap();
            let tensor = match host {
                true => buffer.export_cpu().unwrap(),
                false => buffer.export_gpu(&stream).unwrap(),
            };
            drop(buffer);
            dlpack::reclaim().unwrap();
            assert_eq!(Arc::strong_count(&pages), 2, "{device}, host {host}");
            drop(tensor);
            dlpack::reclaim().unwrap();
            assert_eq!(Arc::strong_count(&pages), 1, "{device}, host {host}");
        }
        let pages = Arc::new(Pages::painted(PAGE));
        let mut buffer = adopt(&pages, 0, PAGE, device, read_only(Pinning::Preferred)).unwrap();
        // Its consumer might write it.
        assert_eq!(buffer.export_cpu().err(), Some(Error::ReadOnly));
        drop(buffer.export_gpu(&stream).unwrap());
        buffer.copy_to_gpu(.., &stream).unwrap();
    }
}

#[cfg(feature = "dlpack")]
#[test]
fn the_owner_outlives_what_a_consumer_of_its_tensor_queued() {
    use cpu_gpu_buffer::dlpack;

    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let theirs = Stream::new(device).unwrap();
    let seen = Foreign::new(PAGE / 4, 0);
    let pages = Arc::new(Pages::painted(PAGE));
    let mut buffer = adopt(&pages, 0, PAGE, device, Default::default()).unwrap();
    assert!(buffer.is_pinned());
    let tensor = buffer.export_cpu().unwrap();
    let gate = Gate::close(&theirs);
    let (to, from) = (seen.as_ptr().cast(), pages.at(0).as_ptr().cast());
    let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
    // SAFETY: both have a page. The owner keeps the pages until the copy has arrived, which the
    // test is about.
    let status = unsafe { sys::cudaMemcpyAsync(to, from, PAGE, kind, theirs.as_raw()) };
    assert_eq!(status, sys::cudaError::cudaSuccess);
    gate.waits(|| {
        drop(tensor);
        drop(buffer);
        assert_eq!(Arc::strong_count(&pages), 2, "the consumer's copy has not arrived");
        dlpack::reclaim().unwrap();
    });
    assert_eq!(Arc::strong_count(&pages), 1);
    theirs.synchronize().unwrap();
    assert_eq!(bytemuck::cast_slice::<_, u8>(&seen.words()), pattern(0, PAGE));
}
