//! The driver's functions that the runtime hands out, and the kernels that the crate and its tests launch.
//!
//! The simulation compiles nothing: it knows the kernels by their names, and does what they do. That the
//! kernels themselves do it is tested on hardware.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cudart_sys::{
    CUcontext, CUdevice_v1, CUdeviceptr_v2, CUevent, CUfunction, CUmodule, CUresult, CUstream,
    CUstreamCaptureMode, CUstreamCaptureStatus, cudaMemcpyKind, cudaStreamCaptureMode,
};

use crate::memory::Target;
use crate::stream::Stream;
use crate::{Result, Status, context, control, graph, memory, put, runtime, stream};

/// Counts a call of the driver's and may make it fail; unlike the runtime's, it leaves no last error.
pub(crate) fn call(name: &'static str, body: impl FnOnce() -> Result) -> CUresult {
    CUresult(control::run(name, body).map_or(0, |status| status.0))
}

/// A context's handle says its device.
fn handle(device: usize) -> CUcontext {
    ptr::without_provenance_mut((device + 1) * 16)
}

fn device_of(handle: CUcontext) -> Result<usize> {
    match (handle.addr() / 16).checked_sub(1) {
        Some(device) if device < context::count() => Ok(device),
        _ => Err(Status::cudaErrorDeviceUninitialized),
    }
}

unsafe extern "C" fn device_get(place: *mut CUdevice_v1, ordinal: c_int) -> CUresult {
    call("cuDeviceGet", || {
        context::is_active(usize::try_from(ordinal).unwrap_or(usize::MAX))?;
        put(place, ordinal)
    })
}

unsafe extern "C" fn primary_retain(place: *mut CUcontext, device: CUdevice_v1) -> CUresult {
    call("cuDevicePrimaryCtxRetain", || {
        context::activate(device as usize)?;
        put(place, handle(device as usize))
    })
}

unsafe extern "C" fn primary_release(device: CUdevice_v1) -> CUresult {
    call("cuDevicePrimaryCtxRelease", || context::is_active(device as usize).map(drop))
}

unsafe extern "C" fn primary_state(
    device: CUdevice_v1,
    flags: *mut c_uint,
    active: *mut c_int,
) -> CUresult {
    call("cuDevicePrimaryCtxGetState", || {
        put(flags, 0)?;
        put(active, context::is_active(device as usize)?.into())
    })
}

unsafe extern "C" fn get_current(place: *mut CUcontext) -> CUresult {
    call("cuCtxGetCurrent", || put(place, context::current().map_or(ptr::null_mut(), handle)))
}

unsafe extern "C" fn push(new: CUcontext) -> CUresult {
    call("cuCtxPushCurrent", || {
        context::push(device_of(new)?);
        Ok(())
    })
}

unsafe extern "C" fn pop(place: *mut CUcontext) -> CUresult {
    call("cuCtxPopCurrent", || match context::pop() {
        Some(device) => put(place, handle(device)),
        None => Err(Status::cudaErrorDeviceUninitialized),
    })
}

/// Fat binaries begin with this word.
const FATBIN: u32 = 0xba55_ed50;

unsafe extern "C" fn module_load(place: *mut CUmodule, image: *const c_void) -> CUresult {
    call("cuModuleLoadData", || {
        let device = context::current().ok_or(Status::cudaErrorDeviceUninitialized)?;
        context::sticky(device).map_or(Ok(()), Err)?;
        stream::prohibited(context::capture_mode())?;
        stream::wait_from(1);
        // SAFETY: an image is longer than a word.
        let begin: [u8; 4] = unsafe { image.cast::<[u8; 4]>().read() };
        let is_text = begin.iter().all(|byte| byte.is_ascii());
        if u32::from_ne_bytes(begin) != FATBIN && !is_text {
            return Err(Status::cudaErrorInvalidKernelImage);
        }
        put(place, ptr::without_provenance_mut(32))
    })
}

unsafe extern "C" fn module_unload(_module: CUmodule) -> CUresult {
    call("cuModuleUnload", || stream::prohibited(context::capture_mode()))
}

/// The kernels; a function's handle is the place of its name here.
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

unsafe extern "C" fn module_function(
    place: *mut CUfunction,
    _module: CUmodule,
    name: *const c_char,
) -> CUresult {
    call("cuModuleGetFunction", || {
        // SAFETY: the caller of a C function passes NUL-terminated names.
        let name = unsafe { CStr::from_ptr(name) };
        let known = KERNELS.iter().position(|kernel| *kernel == name);
        let known = known.ok_or(Status::cudaErrorSymbolNotFound)?;
        put(place, ptr::without_provenance_mut((known + 1) * 16))
    })
}

/// The kernel's parameter of this number.
///
/// # Safety
///
/// `parameters` has one, of this type.
unsafe fn parameter<T: Copy>(parameters: *mut *mut c_void, number: usize) -> T {
    // SAFETY: the caller vouches for it.
    let place = unsafe { parameters.add(number) };
    // SAFETY: as above.
    let place = unsafe { place.read() };
    // SAFETY: as above.
    unsafe { place.cast::<T>().read_unaligned() }
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn launch(
    function: CUfunction,
    blocks: c_uint,
    blocks_y: c_uint,
    _blocks_z: c_uint,
    threads: c_uint,
    _threads_y: c_uint,
    _threads_z: c_uint,
    _shared: c_uint,
    on: CUstream,
    parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> CUresult {
    call("cuLaunchKernel", || {
        // A launch wants the context of its stream.
        let device = current()?;
        let on = stream::stream(on.addr())?;
        if on.device != device {
            return Err(Status::cudaErrorInvalidResourceHandle);
        }
        // SAFETY: the caller vouches for the parameters.
        let kernel = unsafe { kernel(function, [blocks, blocks_y], threads, parameters) }?;
        kernel(&on)
    })
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
    // CUDA C++ Programming Guide, "Compute Capabilities": the most blocks of a grid, and threads of a block.
    if !(1..=i32::MAX as u32).contains(&blocks) || !(1..=1024).contains(&threads) {
        return Err(Status::cudaErrorInvalidValue);
    }
    let grid = Grid { blocks: blocks as usize, threads: threads as usize };
    let number = (function.addr() / 16).wrapping_sub(1);
    let name = KERNELS.get(number).ok_or(Status::cudaErrorInvalidResourceHandle)?;
    // SAFETY: the caller vouches for the kernel's parameters, of these types.
    let word = |number| unsafe { parameter::<usize>(parameters, number) };
    Ok(match name.to_bytes() {
        b"gate" => {
            let flag = word(0);
            Arc::new(move |on| {
                let device = on.device;
                on.enqueue(move || gate(flag, device)).map(drop)
            })
        }
        b"store" => {
            let (to, count) = (word(0), word(1));
            // SAFETY: as above.
            let value: u32 = unsafe { parameter(parameters, 2) };
            Arc::new(move |on| repeat(to, count * 4, value.to_ne_bytes().to_vec(), on))
        }
        name @ (b"cgb_fill_short" | b"cgb_fill_long") => {
            let (to, bytes) = (word(0), word(1));
            // SAFETY: as above.
            let period: u32 = unsafe { parameter(parameters, 2) };
            let pattern = if name == b"cgb_fill_short" {
                // SAFETY: as above.
                unsafe { parameter::<[[u8; 16]; 16]>(parameters, 3) }.to_vec()
            } else {
                // SAFETY: as above.
                unsafe { parameter::<[[u8; 16]; 224]>(parameters, 3) }.to_vec()
            };
            let period = pattern[..period as usize].to_vec();
            let head = to.next_multiple_of(16) - to;
            Arc::new(move |on| {
                let period = period.clone();
                on_range(to, bytes, on, move |range| grid.fill(range, head, &period))
            })
        }
        name @ (b"cgb_gather_32" | b"cgb_gather_224") => {
            let (to, from) = (word(0), word(1));
            let mut pieces = if name == b"cgb_gather_32" {
                // SAFETY: as above.
                unsafe { parameter::<[[u64; 2]; 32]>(parameters, 2) }.to_vec()
            } else {
                // SAFETY: as above.
                unsafe { parameter::<[[u64; 2]; 224]>(parameters, 2) }.to_vec()
            };
            // A column of blocks for each piece.
            if !(1..=pieces.len()).contains(&(columns as usize)) {
                return Err(Status::cudaErrorInvalidValue);
            }
            pieces.truncate(columns as usize);
            Arc::new(move |on| gather(to, from, pieces.clone(), on))
        }
        name => {
            let width = if name == b"cgb_repeat16" { 16 } else { 1 };
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
    })
}

/// Copies pieces between device memory and pinned host memory. One of no bytes is not looked at.
fn gather(to: usize, from: usize, pieces: Vec<[u64; 2]>, on: &Arc<Stream>) -> Result {
    let device = on.device;
    let pieces = pieces.into_iter().map(|piece| piece.map(|word| word as usize));
    let pieces = pieces.filter(|[_, bytes]| *bytes > 0).map(|[offset, bytes]| {
        let (to, from) = (to + offset, from + offset);
        let up = Target::of(to, bytes).is_memory();
        let (host, gpu) = if up { (from, to) } else { (to, from) };
        (up, host, Target::of(gpu, bytes), bytes)
    });
    let pieces: Vec<_> = pieces.collect();
    let queued = on.enqueue(move || {
        for (up, host, gpu, bytes) in pieces {
            // Kernels reach no host memory but what is mapped; all of it, whatever registrations it
            // is of.
            if !memory::reached(host, bytes) || !gpu.is_reached_from(device) {
                return illegal(None, device);
            }
            let host = memory::at(host);
            let done = gpu.with(|gpu| {
                let (to, from) = if up { (gpu, host) } else { (host, gpu) };
                // SAFETY: one lies in device memory; the caller of the launch vouches for the other.
                unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
            });
            illegal(done, device);
        }
    });
    queued.map(drop)
}

/// How a kernel is launched. What its blocks do not cover stays as it is.
#[derive(Clone, Copy)]
struct Grid {
    blocks: usize,
    threads: usize,
}

impl Grid {
    /// The crate's fill kernels: two rows to a block, and a vector of each row to a thread.
    fn fill(self, range: &mut [u8], head: usize, period: &[[u8; 16]]) {
        let bytes = period.as_flattened();
        let (before, rest) = range.split_at_mut(head.min(range.len()));
        let (body, after) = rest.split_at_mut(rest.len() / 16 * 16);
        let row: Vec<u8> =
            (0..self.threads).flat_map(|thread| period[thread % period.len()]).collect();
        for piece in body.chunks_mut(row.len()).take(self.blocks * 2) {
            piece.copy_from_slice(&row[..piece.len()]);
        }
        // What lies before the first bound is the end of the period, what lies after the last bound goes on.
        before.copy_from_slice(&bytes[bytes.len() - head..][..before.len()]);
        let next = body.len() % bytes.len();
        after.copy_from_slice(&bytes[next..][..after.len()]);
    }

    /// The crate's kernels that repeat: a unit of the period to a thread, `columns` blocks to a period.
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

/// Runs a kernel on a range, in stream order.
fn on_range(
    to: usize,
    bytes: usize,
    on: &Arc<Stream>,
    body: impl FnOnce(&mut [u8]) + Send + 'static,
) -> Result {
    let device = on.device;
    let to = Target::of(to, bytes);
    let queued = on.enqueue(move || {
        if !to.is_reached_from(device) {
            return illegal(None, device);
        }
        let done = to.with(|to| {
            // SAFETY: within device memory, which the streams alone touch.
            body(unsafe { std::slice::from_raw_parts_mut(to, bytes) });
        });
        illegal(done, device);
    });
    queued.map(drop)
}

/// Waits until the word is not 0, for 20 seconds at most. In a broken context kernels end.
fn gate(flag: usize, device: usize) {
    // SAFETY: a gate's word is aligned, and is not given back while a gate looks at it.
    let flag = unsafe { &*memory::at(flag).cast::<AtomicU32>() };
    let start = Instant::now();
    while flag.load(Ordering::SeqCst) == 0
        && start.elapsed() < Duration::from_secs(20)
        && context::sticky(device).is_none()
    {
        thread::sleep(Duration::from_micros(50));
    }
}

/// A kernel that touched what is no memory breaks its context.
fn illegal(done: Option<()>, device: usize) {
    if done.is_none() {
        context::break_context(device, Status::cudaErrorIllegalAddress);
    }
}

/// Writes `period` over and over, in stream order.
fn repeat(to: usize, bytes: usize, period: Vec<u8>, on: &Arc<Stream>) -> Result {
    on_range(to, bytes, on, move |range| {
        for piece in range.chunks_mut(period.len()) {
            piece.copy_from_slice(&period[..piece.len()]);
        }
    })
}

pub(crate) fn fill(to: usize, value: u8, bytes: usize, on: &Arc<Stream>) -> Result {
    if bytes == 0 {
        return Ok(());
    }
    if !Target::of(to, bytes).is_reached_from(on.device) {
        return Err(Status::cudaErrorInvalidValue);
    }
    repeat(to, bytes, vec![value; 4096], on)
}

/// A memset of the driver's: it wants no current context, and an aligned range.
fn memset(name: &'static str, to: u64, unit: &[u8], count: usize, on: CUstream) -> CUresult {
    call(name, || {
        let (to, bytes) = (to as usize, count * unit.len());
        let on = stream::stream(on.addr())?;
        if !to.is_multiple_of(unit.len()) || !Target::of(to, bytes).is_reached_from(on.device) {
            return Err(Status::cudaErrorInvalidValue);
        }
        context::sticky(on.device).map_or(Ok(()), Err)?;
        repeat(to, bytes, unit.repeat(1024), &on)
    })
}

unsafe extern "C" fn memset_d16(
    to: CUdeviceptr_v2,
    value: u16,
    count: usize,
    on: CUstream,
) -> CUresult {
    memset("cuMemsetD16Async", to, &value.to_ne_bytes(), count, on)
}

unsafe extern "C" fn memset_d32(
    to: CUdeviceptr_v2,
    value: c_uint,
    count: usize,
    on: CUstream,
) -> CUresult {
    memset("cuMemsetD32Async", to, &value.to_ne_bytes(), count, on)
}

// The functions that the runtime has too. They want a current context where their namesakes make one, and
// exchanging the mode wants none ("CUDA Driver API", of each).

/// Some context is current, and it is not broken.
pub(crate) fn current() -> Result<usize> {
    let device = context::current().ok_or(Status::cudaErrorDeviceUninitialized)?;
    context::sticky(device).map_or(Ok(device), Err)
}

unsafe extern "C" fn exchange_capture_mode(mode: *mut CUstreamCaptureMode) -> CUresult {
    call("cuThreadExchangeStreamCaptureMode", || {
        if mode.is_null() {
            return Err(Status::cudaErrorInvalidValue);
        }
        // SAFETY: not null, and the caller of a C function passes valid places.
        let new = unsafe { mode.read() };
        let before = context::exchange_capture_mode(cudaStreamCaptureMode(new.0));
        put(mode, CUstreamCaptureMode(before.0))
    })
}

unsafe extern "C" fn is_capturing(on: CUstream, place: *mut CUstreamCaptureStatus) -> CUresult {
    call("cuStreamIsCapturing", || {
        let device = current()?;
        put(place, CUstreamCaptureStatus(stream::capture_status(on.addr(), device)?.0))
    })
}

unsafe extern "C" fn memcpy_h2d(
    to: CUdeviceptr_v2,
    from: *const c_void,
    bytes: usize,
    on: CUstream,
) -> CUresult {
    call("cuMemcpyHtoDAsync", || {
        current()?;
        let kind = cudaMemcpyKind::cudaMemcpyHostToDevice;
        runtime::copy(to as usize, from.addr(), bytes, kind, on)
    })
}

unsafe extern "C" fn memcpy_d2h(
    to: *mut c_void,
    from: CUdeviceptr_v2,
    bytes: usize,
    on: CUstream,
) -> CUresult {
    call("cuMemcpyDtoHAsync", || {
        current()?;
        let kind = cudaMemcpyKind::cudaMemcpyDeviceToHost;
        runtime::copy(to.addr(), from as usize, bytes, kind, on)
    })
}

unsafe extern "C" fn stream_query(on: CUstream) -> CUresult {
    call("cuStreamQuery", || {
        current()?;
        stream::query(on.addr())
    })
}

unsafe extern "C" fn event_record(event: CUevent, on: CUstream) -> CUresult {
    call("cuEventRecord", || {
        current()?;
        stream::record(event.addr(), &stream::stream(on.addr())?)
    })
}

unsafe extern "C" fn event_query(event: CUevent) -> CUresult {
    call("cuEventQuery", || {
        stream::prohibited(context::capture_mode())?;
        stream::query_event(event.addr())
    })
}

unsafe extern "C" fn event_synchronize(event: CUevent) -> CUresult {
    call("cuEventSynchronize", || {
        stream::prohibited(context::capture_mode())?;
        stream::synchronize_event(event.addr())
    })
}

// The types are those of the driver's headers.
const _: cudart_sys::PFN_cuThreadExchangeStreamCaptureMode_v10010 = Some(exchange_capture_mode);
const _: cudart_sys::PFN_cuMemcpyHtoDAsync_v3020 = Some(memcpy_h2d);
const _: cudart_sys::PFN_cuMemcpyDtoHAsync_v3020 = Some(memcpy_d2h);
const _: cudart_sys::PFN_cuStreamIsCapturing_v10000 = Some(is_capturing);
const _: cudart_sys::PFN_cuStreamQuery_v2000 = Some(stream_query);
const _: cudart_sys::PFN_cuEventRecord_v2000 = Some(event_record);
const _: cudart_sys::PFN_cuEventQuery_v2000 = Some(event_query);
const _: cudart_sys::PFN_cuEventSynchronize_v2000 = Some(event_synchronize);
const _: cudart_sys::PFN_cuDeviceGet_v2000 = Some(device_get);
const _: cudart_sys::PFN_cuDevicePrimaryCtxRetain_v7000 = Some(primary_retain);
const _: cudart_sys::PFN_cuDevicePrimaryCtxRelease_v11000 = Some(primary_release);
const _: cudart_sys::PFN_cuCtxGetCurrent_v4000 = Some(get_current);
const _: cudart_sys::PFN_cuCtxPushCurrent_v4000 = Some(push);
const _: cudart_sys::PFN_cuCtxPopCurrent_v4000 = Some(pop);
const _: cudart_sys::PFN_cuModuleLoadData_v2000 = Some(module_load);
const _: cudart_sys::PFN_cuModuleUnload_v2000 = Some(module_unload);
const _: cudart_sys::PFN_cuModuleGetFunction_v2000 = Some(module_function);
const _: cudart_sys::PFN_cuLaunchKernel_v4000 = Some(launch);
const _: cudart_sys::PFN_cuMemsetD16Async_v3020 = Some(memset_d16);
const _: cudart_sys::PFN_cuMemsetD32Async_v3020 = Some(memset_d32);

/// The address of a function of the driver's; null where the simulation has none of the name.
pub(crate) fn entry_point(name: &CStr) -> *const c_void {
    match name.to_bytes() {
        b"cuDeviceGet" => device_get as *const c_void,
        b"cuDevicePrimaryCtxRetain" => primary_retain as *const c_void,
        b"cuDevicePrimaryCtxRelease" => primary_release as *const c_void,
        b"cuDevicePrimaryCtxGetState" => primary_state as *const c_void,
        b"cuCtxGetCurrent" => get_current as *const c_void,
        b"cuCtxPushCurrent" => push as *const c_void,
        b"cuCtxPopCurrent" => pop as *const c_void,
        b"cuModuleLoadData" => module_load as *const c_void,
        b"cuModuleUnload" => module_unload as *const c_void,
        b"cuModuleGetFunction" => module_function as *const c_void,
        b"cuLaunchKernel" => launch as *const c_void,
        b"cuMemsetD16Async" => memset_d16 as *const c_void,
        b"cuMemsetD32Async" => memset_d32 as *const c_void,
        b"cuThreadExchangeStreamCaptureMode" => exchange_capture_mode as *const c_void,
        b"cuMemcpyHtoDAsync" => memcpy_h2d as *const c_void,
        b"cuMemcpyDtoHAsync" => memcpy_d2h as *const c_void,
        b"cuStreamIsCapturing" => is_capturing as *const c_void,
        b"cuStreamQuery" => stream_query as *const c_void,
        b"cuEventRecord" => event_record as *const c_void,
        b"cuEventQuery" => event_query as *const c_void,
        b"cuEventSynchronize" => event_synchronize as *const c_void,
        name => graph::entry_point(name),
    }
}
