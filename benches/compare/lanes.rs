//! The lanes of this crate and of the raw runtime.
//!
//! A lane has a host side, a device side of the same size and a stream. Each library has one lane
//! for each usual way to copy.

use std::ffi::c_void;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, sys};

use crate::lane::{Lane, OURS, OURS_BETWEEN, OURS_IN_CONTEXT, OURS_PREFIX, RAW, RAW_EVENT};
use crate::raw::{self, DeviceMemory, Event, Pinned};
use crate::setup::Setup;

/// The kinds of lanes.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// All rows of a buffer.
    Ours,
    /// The first half of the rows of a buffer.
    OursPrefix,
    /// All rows, from the host side of one buffer to the device side of another, and back.
    OursBetween,
    /// All rows, in threads that have chosen a device. Programs with other CUDA libraries do that.
    OursInContext,
    /// The copy alone, waited for by its stream.
    Raw,
    /// The copy and an event, waited for by the event.
    RawEvent,
    Cudarc,
    CudarcUntracked,
}

impl Kind {
    /// Makes the lanes that exist on this device. Their host sides contain random bytes.
    pub fn lanes(kinds: &[Kind], setup: &Setup, bytes: usize) -> Vec<Box<dyn Lane>> {
        kinds.iter().filter_map(|kind| kind.lane(setup, bytes)).collect()
    }

    pub fn lane(self, setup: &Setup, bytes: usize) -> Option<Box<dyn Lane>> {
        let mut lane: Box<dyn Lane> = match (self, setup.device) {
            (Kind::Ours, device) => Box::new(OursLane::new(OURS, bytes, bytes, device)),
            (Kind::OursPrefix, device) => {
                Box::new(OursLane::new(OURS_PREFIX, bytes, 2 * bytes, device))
            }
            (Kind::OursBetween, device) => Box::new(BetweenLane::new(bytes, device)),
            (_, Device::Cpu) => return None,
            (Kind::OursInContext, device) => {
                Box::new(OursLane::new(OURS_IN_CONTEXT, bytes, bytes, device))
            }
            (Kind::Raw, Device::Cuda(ordinal)) => Box::new(RawLane::new(false, bytes, ordinal)),
            (Kind::RawEvent, Device::Cuda(ordinal)) => Box::new(RawLane::new(true, bytes, ordinal)),
            (Kind::Cudarc, _) => Box::new(setup.cudarc.as_ref()?.lane(true, bytes)),
            (Kind::CudarcUntracked, _) => Box::new(setup.cudarc.as_ref()?.lane(false, bytes)),
        };
        fastrand::fill(lane.write());
        Some(lane)
    }
}

struct OursLane {
    name: &'static str,
    bytes: usize,
    buffer: CpuGpuBuffer<u8>,
    stream: Stream,
}

impl OursLane {
    fn new(name: &'static str, bytes: usize, rows: usize, device: Device) -> OursLane {
        let buffer = CpuGpuBuffer::new(rows, device).unwrap();
        assert!(device == Device::Cpu || buffer.is_pinned(), "no memory could be pinned");
        OursLane { name, bytes, buffer, stream: Stream::new(device).unwrap() }
    }
}

impl Lane for OursLane {
    fn name(&self) -> &'static str {
        self.name
    }

    fn upload(&mut self) {
        match self.name {
            OURS_PREFIX => self.buffer.copy_to_gpu(..self.bytes, &self.stream).unwrap(),
            _ => self.buffer.copy_to_gpu(.., &self.stream).unwrap(),
        }
    }

    fn download(&mut self) {
        match self.name {
            OURS_PREFIX => self.buffer.copy_to_cpu(..self.bytes, &self.stream).unwrap(),
            _ => self.buffer.copy_to_cpu(.., &self.stream).unwrap(),
        }
    }

    fn read(&mut self) -> &[u8] {
        &self.buffer.cpu().unwrap()[..self.bytes]
    }

    fn write(&mut self) -> &mut [u8] {
        &mut self.buffer.cpu_mut().unwrap()[..self.bytes]
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.as_raw()
    }

    fn enter(&mut self) {
        if let (OURS_IN_CONTEXT, Device::Cuda(ordinal)) = (self.name, self.buffer.device()) {
            raw::set_device(ordinal);
        }
    }
}

/// A staging buffer and a buffer that lives on the device.
struct BetweenLane {
    staging: CpuGpuBuffer<u8>,
    target: CpuGpuBuffer<u8>,
    stream: Stream,
}

impl BetweenLane {
    fn new(bytes: usize, device: Device) -> BetweenLane {
        let buffer = || CpuGpuBuffer::new(bytes, device).unwrap();
        let (staging, target) = (buffer(), buffer());
        assert!(device == Device::Cpu || staging.is_pinned(), "no memory could be pinned");
        BetweenLane { staging, target, stream: Stream::new(device).unwrap() }
    }
}

impl Lane for BetweenLane {
    fn name(&self) -> &'static str {
        OURS_BETWEEN
    }

    fn upload(&mut self) {
        self.target.copy_to_gpu_from(0, &mut self.staging, .., &self.stream).unwrap();
    }

    fn download(&mut self) {
        self.staging.copy_to_cpu_from(0, &mut self.target, .., &self.stream).unwrap();
    }

    fn read(&mut self) -> &[u8] {
        self.staging.cpu().unwrap()
    }

    fn write(&mut self) -> &mut [u8] {
        self.staging.cpu_mut().unwrap()
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.as_raw()
    }
}

struct RawLane {
    host: Pinned,
    device: DeviceMemory,
    stream: raw::Stream,
    event: Option<Event>,
    bytes: usize,
    ordinal: u32,
}

impl RawLane {
    fn new(event: bool, bytes: usize, ordinal: u32) -> RawLane {
        RawLane {
            host: Pinned::new(bytes),
            device: DeviceMemory::new(bytes),
            stream: raw::Stream::new(),
            event: event.then(|| Event::new(false)),
            bytes,
            ordinal,
        }
    }

    #[inline]
    fn copy(&self, to: *mut c_void, from: *mut c_void, kind: sys::cudaMemcpyKind) {
        // SAFETY: both sides have this many bytes. The lane waits for its copies before it drops
        // them.
        unsafe { raw::copy(to, from, self.bytes, kind, self.stream.as_raw()) };
        if let Some(event) = &self.event {
            event.record(self.stream.as_raw());
        }
    }

    fn wait(&self) {
        match &self.event {
            Some(event) => event.synchronize(),
            None => self.stream.synchronize(),
        }
    }
}

impl Lane for RawLane {
    fn name(&self) -> &'static str {
        if self.event.is_some() { RAW_EVENT } else { RAW }
    }

    fn upload(&mut self) {
        let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
        self.copy(self.device.as_ptr(), self.host.as_ptr(), kind);
    }

    fn download(&mut self) {
        let kind = sys::cudaMemcpyKind::cudaMemcpyDeviceToHost;
        self.copy(self.host.as_ptr(), self.device.as_ptr(), kind);
    }

    fn read(&mut self) -> &[u8] {
        self.write()
    }

    fn write(&mut self) -> &mut [u8] {
        self.wait();
        // SAFETY: nothing was enqueued since the wait.
        unsafe { self.host.slice() }
    }

    fn finish(&mut self) {
        self.stream.synchronize();
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.as_raw()
    }

    fn enter(&mut self) {
        raw::set_device(self.ordinal);
    }
}

impl Drop for RawLane {
    fn drop(&mut self) {
        self.stream.synchronize();
    }
}
