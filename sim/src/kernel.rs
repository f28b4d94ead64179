//! The kernels that the crate and its tests launch.
//!
//! The simulation compiles nothing. It recognises kernels by name and imitates them. Tests on
//! hardware check the real kernels.

use std::ffi::{CStr, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cudart_sys::CUfunction;

use crate::memory::Target;
use crate::queue::Stream;
use crate::status::{Result, Status};
use crate::work::{illegal, on_range, repeat};
use crate::{context, memory};

/// The names of the kernels. The handle of a function is its index here.
const KERNELS: [&CStr; 8] = [
    c"gate",
    c"store",
    c"cgb_fill_short",
    c"cgb_fill_long",
    c"cgb_repeat1",
    c"cgb_repeat16",
    c"cgb_gather_32",
    c"cgb_gather_224",
];

/// The handle of the kernel of a name.
pub(crate) fn function(name: &CStr) -> Result<CUfunction> {
    let known = KERNELS.iter().position(|kernel| *kernel == name);
    let known = known.ok_or(Status::cudaErrorSymbolNotFound)?;
    Ok(ptr::without_provenance_mut((known + 1) * 16))
}

/// The kernel's parameter of this number.
///
/// # Safety
///
/// `parameters` has one, of this type.
unsafe fn parameter<T: Copy>(parameters: *mut *mut c_void, number: usize) -> T {
    // SAFETY: the caller guarantees it.
    let place = unsafe { parameters.add(number) };
    // SAFETY: as above.
    let place = unsafe { place.read() };
    // SAFETY: as above.
    unsafe { place.cast::<T>().read_unaligned() }
}

/// A kernel with its parameters, ready to be sent to a stream.
pub(crate) type Kernel = Arc<dyn Fn(&Arc<Stream>) -> Result + Send + Sync>;

/// # Safety
///
/// `parameters` are those of the function.
pub(crate) unsafe fn kernel(
    function: CUfunction,
    [blocks, columns]: [c_uint; 2],
    threads: c_uint,
    parameters: *mut *mut c_void,
) -> Result<Kernel> {
    // The limits of a grid and of a block ("CUDA C++ Programming Guide, Compute Capabilities").
    if !(1..=i32::MAX as u32).contains(&blocks) || !(1..=1024).contains(&threads) {
        return Err(Status::cudaErrorInvalidValue);
    }
    let grid = Grid { blocks: blocks as usize, threads: threads as usize };
    let number = (function.addr() / 16).wrapping_sub(1);
    let name = KERNELS.get(number).ok_or(Status::cudaErrorInvalidResourceHandle)?;
    // SAFETY: the caller guarantees the kernel's parameters and their types.
    let word = |number| unsafe { parameter::<usize>(parameters, number) };
    match name.to_bytes() {
        b"gate" => {
            let flag = word(0);
            Ok(Arc::new(move |on| {
                let device = on.device;
                on.enqueue(move || gate(flag, device)).map(drop)
            }))
        }
        b"store" => {
            let (to, count) = (word(0), word(1));
            // SAFETY: as above.
            let value: u32 = unsafe { parameter(parameters, 2) };
            Ok(Arc::new(move |on| store(to, count * 4, value.to_ne_bytes(), on)))
        }
        // SAFETY: as above.
        b"cgb_fill_short" => Ok(unsafe { fill_kernel::<16>(grid, parameters) }),
        // SAFETY: as above.
        b"cgb_fill_long" => Ok(unsafe { fill_kernel::<224>(grid, parameters) }),
        // SAFETY: as above.
        b"cgb_gather_32" => unsafe { gather_kernel::<32>(columns, parameters) },
        // SAFETY: as above.
        b"cgb_gather_224" => unsafe { gather_kernel::<224>(columns, parameters) },
        name => {
            let width = if name == b"cgb_repeat16" { 16 } else { 1 };
            // SAFETY: as above.
            Ok(unsafe { repeat_kernel(grid, width, parameters) })
        }
    }
}

/// Writes a word over and over, to device memory or to mapped host memory.
fn store(to: usize, bytes: usize, value: [u8; 4], on: &Arc<Stream>) -> Result {
    if !memory::reached(to, bytes) {
        return repeat(to, bytes, value.to_vec(), on);
    }
    let device = on.device;
    let queued = on.enqueue(move || {
        if !memory::reached(to, bytes) {
            return illegal(None, device);
        }
        for at in (to..to + bytes).step_by(4) {
            // SAFETY: the word lies in pinned memory. The caller of the launch guarantees that
            // nothing else uses it.
            unsafe { memory::at(at).cast::<[u8; 4]>().write_unaligned(value) };
        }
    });
    queued.map(drop)
}

/// A fill with a pattern of up to `MOST` vectors.
///
/// # Safety
///
/// `parameters` are valid for this kernel.
unsafe fn fill_kernel<const MOST: usize>(grid: Grid, parameters: *mut *mut c_void) -> Kernel {
    // SAFETY: the caller guarantees the parameters.
    let word = |number| unsafe { parameter::<usize>(parameters, number) };
    let (to, bytes) = (word(0), word(1));
    // SAFETY: as above.
    let period: u32 = unsafe { parameter(parameters, 2) };
    // SAFETY: as above.
    let pattern = unsafe { parameter::<[[u8; 16]; MOST]>(parameters, 3) };
    let period = pattern[..period as usize].to_vec();
    let head = to.next_multiple_of(16) - to;
    Arc::new(move |on| {
        let period = period.clone();
        on_range(to, bytes, on, move |range| grid.fill(range, head, &period))
    })
}

/// A gather of up to `MOST` ranges, each with a column of blocks.
///
/// # Safety
///
/// `parameters` are valid for this kernel.
unsafe fn gather_kernel<const MOST: usize>(
    columns: c_uint,
    parameters: *mut *mut c_void,
) -> Result<Kernel> {
    // SAFETY: the caller guarantees the parameters.
    let word = |number| unsafe { parameter::<usize>(parameters, number) };
    let (to, from) = (word(0), word(1));
    // SAFETY: as above.
    let mut ranges = unsafe { parameter::<[[u64; 2]; MOST]>(parameters, 2) }.to_vec();
    if !(1..=ranges.len()).contains(&(columns as usize)) {
        return Err(Status::cudaErrorInvalidValue);
    }
    ranges.truncate(columns as usize);
    Ok(Arc::new(move |on| gather(to, from, ranges.clone(), on)))
}

/// A repetition in units of `width` bytes.
///
/// # Safety
///
/// `parameters` are valid for this kernel.
unsafe fn repeat_kernel(grid: Grid, width: usize, parameters: *mut *mut c_void) -> Kernel {
    // SAFETY: the caller guarantees the parameters.
    let word = |number| unsafe { parameter::<usize>(parameters, number) };
    let (to, bytes, period) = (word(0), word(1), word(2));
    // SAFETY: as above.
    let columns: u32 = unsafe { parameter(parameters, 3) };
    let head = to.next_multiple_of(width) - to;
    Arc::new(move |on| {
        on_range(to, bytes, on, move |range| {
            grid.repeat(range, head, period, width, columns as usize);
        })
    })
}

/// Copies ranges between device memory and pinned host memory. Empty ranges are not checked.
fn gather(to: usize, from: usize, ranges: Vec<[u64; 2]>, on: &Arc<Stream>) -> Result {
    let device = on.device;
    let ranges = ranges.into_iter().map(|range| range.map(|word| word as usize));
    let ranges = ranges.filter(|[_, bytes]| *bytes > 0).map(|[offset, bytes]| {
        let (to, from) = (to + offset, from + offset);
        let up = Target::of(to, bytes).is_memory();
        let (host, gpu) = if up { (from, to) } else { (to, from) };
        (up, host, Target::of(gpu, bytes), bytes)
    });
    let ranges: Vec<_> = ranges.collect();
    let queued = on.enqueue(move || {
        for (up, host, gpu, bytes) in ranges {
            // Kernels reach only mapped host memory. The bytes of one range may belong to several
            // registrations.
            if !memory::reached(host, bytes) || !gpu.is_reached_from(device) {
                return illegal(None, device);
            }
            let host = memory::at(host);
            let done = gpu.with(|gpu| {
                let (to, from) = if up { (gpu, host) } else { (host, gpu) };
                // SAFETY: one pointer is in device memory. The caller of the launch guarantees the
                // other.
                unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
            });
            illegal(done, device);
        }
    });
    queued.map(drop)
}

/// The launch dimensions of a kernel. Bytes that its blocks do not cover stay unchanged.
#[derive(Clone, Copy)]
struct Grid {
    blocks: usize,
    threads: usize,
}

impl Grid {
    /// Imitates the crate's fill kernels: a block stores two rows, and a thread one vector of each
    /// row.
    fn fill(self, range: &mut [u8], head: usize, period: &[[u8; 16]]) {
        let bytes = period.as_flattened();
        let (before, rest) = range.split_at_mut(head.min(range.len()));
        let (body, after) = rest.split_at_mut(rest.len() / 16 * 16);
        let row: Vec<u8> =
            (0..self.threads).flat_map(|thread| period[thread % period.len()]).collect();
        for rows in body.chunks_mut(row.len()).take(self.blocks * 2) {
            rows.copy_from_slice(&row[..rows.len()]);
        }
        // The head continues the period backwards, and the tail continues it forwards.
        before.copy_from_slice(&bytes[bytes.len() - head..][..before.len()]);
        let next = body.len() % bytes.len();
        after.copy_from_slice(&bytes[next..][..after.len()]);
    }

    /// Imitates the crate's repeat kernels: a thread stores one unit, and `columns` blocks cover a
    /// period.
    fn repeat(self, range: &mut [u8], head: usize, period: usize, width: usize, columns: usize) {
        let rest = &mut range[head..];
        let (body, after) = rest.split_at_mut(rest.len() / width * width);
        for block in 0..self.blocks {
            let first = block % columns * self.threads * width;
            let end = (first + self.threads * width).min(period);
            let begin = (1 + block / columns) * period;
            for begin in (begin..body.len()).step_by(self.blocks / columns * period) {
                let room = body.len() - begin;
                if first < end.min(room) {
                    body.copy_within(first..end.min(room), begin + first);
                }
            }
        }
        let next = body.len() % period;
        after.copy_from_slice(&body[next..][..after.len()]);
    }
}

/// Waits until the word is not 0, for 20 seconds at most. In a broken context kernels end.
fn gate(flag: usize, device: usize) {
    // SAFETY: the word of a gate is aligned. It stays allocated while a gate reads it.
    let flag = unsafe { &*memory::at(flag).cast::<AtomicU32>() };
    let start = Instant::now();
    while flag.load(Ordering::SeqCst) == 0
        && start.elapsed() < Duration::from_secs(20)
        && context::sticky(device).is_none()
    {
        thread::sleep(Duration::from_micros(50));
    }
}
