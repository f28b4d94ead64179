//! Sixteen small arrays that are uploaded together, like the inputs of one step.
//!
//! Each upload covers a prefix of a different length.

use cpu_gpu_buffer::{
    BufferGroup, CpuGpuBuffer, Device, GroupLayoutBuilder, MemberKey, Stream, sys,
};

use super::job::{BATCH, Job};
use crate::figures::Run;
use crate::measure::{each, seconds, turns};
use crate::raw::{self, DeviceMemory, Pinned};
use crate::setup::Setup;

const MEMBERS: usize = 16;
/// The size of an array. The prefixes are side as long on average.
const ROOM: usize = 16 << 10;
/// All prefixes together.
pub const BYTES: usize = MEMBERS * ROOM / 2;
pub const CASES: [&str; 2] = ["enqueue", "until done"];
pub const GROUP: &str = "cpu-gpu-buffer group";
const GROUP_MIRRORED: &str = "cpu-gpu-buffer group, mirrored";
const BUFFERS: &str = "cpu-gpu-buffer, 16 buffers";
pub const RAW_EACH: &str = "16 cudaMemcpyAsync";
const RAW_ALL: &str = "one cudaMemcpyAsync of as much";
pub const TORCH: &str = "PyTorch, 16 `[:n]`";

/// The length of a member's prefix, as in `compare.py`.
fn prefix(member: usize) -> usize {
    4352 + 512 * member
}

pub fn plan(_: &Setup) -> Vec<Job> {
    vec![Box::new(job)]
}

fn job(setup: &Setup, run: &mut Run) {
    assert_eq!((0..MEMBERS).map(prefix).sum::<usize>(), BYTES);
    let device = setup.device;
    let mut bundles: Vec<Box<dyn Bundle>> = vec![
        Box::new(Grouped::new(GROUP, device)),
        Box::new(Grouped::new(GROUP_MIRRORED, device)),
        Box::new(Single::new(device)),
    ];
    if setup.is_cuda() {
        bundles.push(Box::new(Raw::new(RAW_EACH, (0..MEMBERS).map(prefix).collect())));
        bundles.push(Box::new(Raw::new(RAW_ALL, vec![BYTES])));
    }
    for bundle in &mut bundles {
        verify(bundle.as_mut());
    }
    for case in CASES {
        let spreads = turns(setup.rounds(500), &mut bundles, |bundle| {
            Some(match case {
                "enqueue" => {
                    let cost = each(BATCH / MEMBERS, || bundle.upload()) * 1e-3;
                    bundle.finish();
                    cost
                }
                _ => {
                    let step = || {
                        bundle.upload();
                        bundle.finish();
                    };
                    seconds(step) * 1e6
                }
            })
        });
        for (bundle, spread) in bundles.iter().zip(spreads) {
            let spread = spread.expect("each round gives a sample");
            run.add(("group", case, BYTES), bundle.name(), "µs", spread);
        }
    }
    for bundle in &mut bundles {
        verify(bundle.as_mut());
    }
}

/// Arrays and a stream.
trait Bundle {
    fn name(&self) -> &'static str;

    /// Enqueues the uploads of all prefixes.
    fn upload(&mut self);

    /// Waits for the stream.
    fn finish(&mut self);

    /// Writes the prefixes on the host side, one after another.
    fn write(&mut self, bytes: &[u8]);

    /// Reads the prefixes on the device side, one after another.
    fn read(&mut self) -> Vec<u8>;
}

/// Sends random bytes, and compares.
fn verify(bundle: &mut dyn Bundle) {
    let mut bytes = vec![0; BYTES];
    fastrand::fill(&mut bytes);
    bundle.write(&bytes);
    bundle.upload();
    bundle.finish();
    bundle.write(&vec![0; BYTES]);
    assert!(bundle.read() == bytes, "{}: bytes were lost", bundle.name());
}

/// Cuts bytes into prefixes.
fn cut(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    (0..MEMBERS).map(move |member| {
        let (first, rest) = bytes.split_at(prefix(member));
        bytes = rest;
        first
    })
}

struct Grouped {
    name: &'static str,
    keys: Vec<MemberKey<u8>>,
    group: BufferGroup,
    stream: Stream,
}

impl Grouped {
    fn new(name: &'static str, device: Device) -> Grouped {
        let mut builder = GroupLayoutBuilder::new();
        let add = |_| match name {
            GROUP_MIRRORED => builder.add_mirrored(ROOM),
            _ => builder.add(ROOM),
        };
        let keys = (0..MEMBERS).map(add).collect();
        let group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
        assert!(device == Device::Cpu || group.is_pinned(), "no memory could be pinned");
        Grouped { name, keys, group, stream: Stream::new(device).unwrap() }
    }
}

impl Bundle for Grouped {
    fn name(&self) -> &'static str {
        self.name
    }

    fn upload(&mut self) {
        let rows: [_; MEMBERS] =
            std::array::from_fn(|member| self.keys[member].rows(..prefix(member)));
        self.group.copy_to_gpu(&rows, &self.stream).unwrap();
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn write(&mut self, bytes: &[u8]) {
        for (key, bytes) in self.keys.iter().zip(cut(bytes)) {
            self.group.cpu_mut(*key).unwrap()[..bytes.len()].copy_from_slice(bytes);
        }
    }

    fn read(&mut self) -> Vec<u8> {
        let rows: Vec<_> = self.keys.iter().map(|key| key.rows(..)).collect();
        self.group.copy_to_cpu(&rows, &self.stream).unwrap();
        let of = |(member, key): (usize, &MemberKey<u8>)| {
            self.group.cpu(*key).unwrap()[..prefix(member)].to_vec()
        };
        self.keys.iter().enumerate().flat_map(of).collect()
    }
}

struct Single {
    buffers: Vec<CpuGpuBuffer<u8>>,
    stream: Stream,
}

impl Single {
    fn new(device: Device) -> Single {
        let buffers = (0..MEMBERS).map(|_| CpuGpuBuffer::new(ROOM, device).unwrap()).collect();
        Single { buffers, stream: Stream::new(device).unwrap() }
    }
}

impl Bundle for Single {
    fn name(&self) -> &'static str {
        BUFFERS
    }

    fn upload(&mut self) {
        for (member, buffer) in self.buffers.iter_mut().enumerate() {
            buffer.copy_to_gpu(..prefix(member), &self.stream).unwrap();
        }
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn write(&mut self, bytes: &[u8]) {
        for (buffer, bytes) in self.buffers.iter_mut().zip(cut(bytes)) {
            buffer.cpu_mut().unwrap()[..bytes.len()].copy_from_slice(bytes);
        }
    }

    fn read(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        for (member, buffer) in self.buffers.iter_mut().enumerate() {
            buffer.copy_to_cpu(.., &self.stream).unwrap();
            all.extend_from_slice(&buffer.cpu().unwrap()[..prefix(member)]);
        }
        all
    }
}

/// One copy or several, of as many bytes in all.
struct Raw {
    name: &'static str,
    parts: Vec<(Pinned, DeviceMemory, usize)>,
    stream: raw::Stream,
}

impl Raw {
    fn new(name: &'static str, lengths: Vec<usize>) -> Raw {
        let part = |bytes| (Pinned::new(bytes), DeviceMemory::new(bytes), bytes);
        Raw { name, parts: lengths.into_iter().map(part).collect(), stream: raw::Stream::new() }
    }
}

impl Bundle for Raw {
    fn name(&self) -> &'static str {
        self.name
    }

    fn upload(&mut self) {
        let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
        for (host, device, bytes) in &self.parts {
            let (to, from) = (device.as_ptr(), host.as_ptr());
            // SAFETY: both pointers are valid for this many bytes. `drop` waits for the stream
            // first.
            unsafe { raw::copy(to, from, *bytes, kind, self.stream.as_raw()) };
        }
    }

    fn finish(&mut self) {
        self.stream.synchronize();
    }

    fn write(&mut self, mut bytes: &[u8]) {
        self.finish();
        for (host, _, length) in &mut self.parts {
            let (first, rest) = bytes.split_at(*length);
            // SAFETY: nothing was enqueued since the wait.
            unsafe { host.slice() }.copy_from_slice(first);
            bytes = rest;
        }
    }

    fn read(&mut self) -> Vec<u8> {
        let kind = sys::cudaMemcpyKind::cudaMemcpyDeviceToHost;
        let mut all = Vec::new();
        for (host, device, bytes) in &mut self.parts {
            let (to, from) = (host.as_ptr(), device.as_ptr());
            // SAFETY: as for the upload.
            unsafe { raw::copy(to, from, *bytes, kind, self.stream.as_raw()) };
            self.stream.synchronize();
            // SAFETY: nothing was enqueued since the wait.
            all.extend_from_slice(unsafe { host.slice() });
        }
        all
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.stream.synchronize();
    }
}
