//! Copies and fills, sent to streams.

use std::ptr;
use std::sync::Arc;

use cudart_sys::{cudaMemcpyKind, cudaStream_t};

use crate::memory::{self, Pinned, Target};
use crate::queue::Stream;
use crate::random::random;
use crate::status::{Result, Status};
use crate::violation::violation;
use crate::{context, stream};

/// Copies memory in stream order. `kind` gives the direction.
pub(crate) fn copy(
    to: usize,
    from: usize,
    bytes: usize,
    kind: cudaMemcpyKind,
    on: cudaStream_t,
) -> Result {
    let on = stream::stream(on.addr())?;
    if bytes == 0 {
        return Ok(());
    }
    match kind {
        cudaMemcpyKind::cudaMemcpyHostToDevice => {
            copy_host(from, target(to, bytes)?, true, bytes, &on)
        }
        cudaMemcpyKind::cudaMemcpyDeviceToHost => {
            copy_host(to, target(from, bytes)?, false, bytes, &on)
        }
        cudaMemcpyKind::cudaMemcpyDeviceToDevice => {
            copy_device(target(to, bytes)?, target(from, bytes)?, bytes, &on)
        }
        _ => Err(Status::cudaErrorInvalidValue),
    }
}

/// Device memory of any device. Copies work between devices without peer access, too ("CUDA C++
/// Programming Guide, Peer-to-Peer Memory Copy").
fn target(address: usize, bytes: usize) -> Result<Target> {
    let target = Target::of(address, bytes);
    target.is_memory().then_some(target).ok_or(Status::cudaErrorInvalidValue)
}

fn copy_device(to: Target, from: Target, bytes: usize, on: &Arc<Stream>) -> Result {
    let queued = on.enqueue(move || {
        to.with(|to| {
            from.with(|from| {
                // SAFETY: both pointers are in device memory, which only streams access.
                unsafe { ptr::copy(from, to, bytes) };
            })
        });
    });
    queued.map(drop)
}

/// An upload or a download.
fn copy_host(host: usize, gpu: Target, upload: bool, bytes: usize, on: &Arc<Stream>) -> Result {
    let pinned = memory::pinned(host, bytes);
    // As on an H200.
    if !upload && memory::is_read_only(host) {
        return Err(Status::cudaErrorInvalidValue);
    }
    let transfer = move |host: *mut u8| {
        gpu.with(|gpu| {
            let (to, from) = if upload { (gpu, host) } else { (host, gpu) };
            // SAFETY: one pointer is in device memory. The caller of the copy guarantees the other.
            unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
        });
    };
    match pinned {
        Pinned::Partly => Err(Status::cudaErrorInvalidValue),
        Pinned::Whole(_) => on
            .enqueue(move || {
                if memory::pinned(host, bytes) != pinned {
                    violation("a copy runs on host memory that is no longer pinned");
                }
                transfer(memory::at(host));
            })
            .map(drop),
        // CUDA may stage pageable memory before the call returns, or read it later in stream order.
        // The call may also wait for the copy ("CUDA Runtime API, API synchronization behavior").
        Pinned::No if upload => match random() % 3 {
            0 => {
                // SAFETY: the caller of the copy guarantees the range.
                let staged = unsafe { std::slice::from_raw_parts(memory::at(host), bytes) };
                let mut staged = staged.to_vec();
                on.enqueue(move || transfer(staged.as_mut_ptr())).map(drop)
            }
            1 => on.enqueue(move || transfer(memory::at(host))).map(drop),
            _ => on.enqueue(move || transfer(memory::at(host)))?.wait_until_done(),
        },
        Pinned::No => on.enqueue(move || transfer(memory::at(host)))?.wait_until_done(),
    }
}

/// Writes `period` over and over, in stream order.
pub(crate) fn repeat(to: usize, bytes: usize, period: Vec<u8>, on: &Arc<Stream>) -> Result {
    on_range(to, bytes, on, move |range| {
        for part in range.chunks_mut(period.len()) {
            part.copy_from_slice(&period[..part.len()]);
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

/// Runs a kernel on a range, in stream order.
pub(crate) fn on_range(
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
            // SAFETY: the range is in device memory, which only streams access.
            body(unsafe { std::slice::from_raw_parts_mut(to, bytes) });
        });
        illegal(done, device);
    });
    queued.map(drop)
}

/// Breaks the context if a kernel accessed invalid memory.
pub(crate) fn illegal(done: Option<()>, device: usize) {
    if done.is_none() {
        context::break_context(device, Status::cudaErrorIllegalAddress);
    }
}
