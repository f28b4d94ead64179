//! Rows in many places of one table, which are uploaded together.

use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, MemberKey, Stream, sys};

use super::job::{BATCH, Job};
use crate::figures::Run;
use crate::measure::{each, seconds, turns};
use crate::raw::{self, DeviceMemory, Pinned};
use crate::setup::Setup;

/// The rows of the table, and those that are uploaded.
const ROWS: usize = 1024;
const CHANGED: usize = 64;
/// The bytes of a row.
const WIDTH: usize = 1024;
const CASES: [&str; 2] = ["enqueue", "until done"];

pub fn plan(_: &Setup) -> Vec<Job> {
    vec![Box::new(job)]
}

/// The rows that are uploaded. No two of them touch.
fn changed() -> impl Iterator<Item = usize> {
    (0..CHANGED).map(|at| at * (ROWS / CHANGED) + at % 7)
}

fn job(setup: &Setup, run: &mut Run) {
    let mut tables: Vec<Box<dyn Table>> = vec![Box::new(Member::new(setup.device))];
    if setup.is_cuda() {
        tables.push(Box::new(Raw::new()));
    }
    tables.iter_mut().for_each(|table| verify(table.as_mut()));
    for case in CASES {
        let spreads = turns(setup.rounds(500), &mut tables, |table| {
            Some(match case {
                "enqueue" => {
                    let cost = each((BATCH / CHANGED).max(1), || table.upload()) * 1e-3;
                    table.finish();
                    cost
                }
                _ => {
                    let step = || {
                        table.upload();
                        table.finish();
                    };
                    seconds(step) * 1e6
                }
            })
        });
        for (table, spread) in tables.iter().zip(spreads) {
            let spread = spread.expect("each round gives a sample");
            run.add(("scattered", case, CHANGED * WIDTH), table.name(), "µs", spread);
        }
    }
    tables.iter_mut().for_each(|table| verify(table.as_mut()));
}

/// A table and a stream.
trait Table {
    fn name(&self) -> &'static str;

    /// Enqueues the uploads of the changed rows.
    fn upload(&mut self);

    /// Waits for the stream.
    fn finish(&mut self);

    /// Writes the host side.
    fn write(&mut self, bytes: &[u8]);

    /// Reads the device side.
    fn read(&mut self) -> Vec<u8>;
}

/// Sends random bytes, and compares.
fn verify(table: &mut dyn Table) {
    let mut bytes = vec![0; ROWS * WIDTH];
    fastrand::fill(&mut bytes);
    table.write(&bytes);
    table.upload();
    let seen = table.read();
    for row in changed() {
        let row = row * WIDTH..(row + 1) * WIDTH;
        assert!(seen[row.clone()] == bytes[row], "{}: bytes were lost", table.name());
    }
}

/// A member of a group, in one call.
struct Member {
    group: BufferGroup,
    key: MemberKey<u8>,
    stream: Stream,
}

impl Member {
    fn new(device: Device) -> Member {
        let mut builder = GroupLayoutBuilder::new();
        let key = builder.add([ROWS, WIDTH]);
        let group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
        assert!(device == Device::Cpu || group.is_pinned(), "no memory could be pinned");
        Member { group, key, stream: Stream::new(device).unwrap() }
    }
}

impl Table for Member {
    fn name(&self) -> &'static str {
        "cpu-gpu-buffer group, one call"
    }

    fn upload(&mut self) {
        let mut rows = [self.key.rows(..0); CHANGED];
        for (rows, row) in rows.iter_mut().zip(changed()) {
            *rows = self.key.rows(row..row + 1);
        }
        self.group.copy_to_gpu(&rows, &self.stream).unwrap();
    }

    fn finish(&mut self) {
        self.stream.synchronize().unwrap();
    }

    fn write(&mut self, bytes: &[u8]) {
        self.group.cpu_mut(self.key).unwrap().copy_from_slice(bytes);
    }

    fn read(&mut self) -> Vec<u8> {
        self.group.copy_to_cpu(&[self.key.into()], &self.stream).unwrap();
        self.group.cpu(self.key).unwrap().to_vec()
    }
}

/// A copy for each row.
struct Raw {
    host: Pinned,
    device: DeviceMemory,
    stream: raw::Stream,
}

impl Raw {
    fn new() -> Raw {
        let bytes = ROWS * WIDTH;
        let (host, device) = (Pinned::new(bytes), DeviceMemory::new(bytes));
        Raw { host, device, stream: raw::Stream::new() }
    }
}

impl Table for Raw {
    fn name(&self) -> &'static str {
        "64 cudaMemcpyAsync"
    }

    fn upload(&mut self) {
        let kind = sys::cudaMemcpyKind::cudaMemcpyHostToDevice;
        let (to, from) = (self.device.as_ptr(), self.host.as_ptr());
        for row in changed() {
            let (to, from) =
                (to.wrapping_byte_add(row * WIDTH), from.wrapping_byte_add(row * WIDTH));
            // SAFETY: both have the row. `drop` waits for the stream first.
            unsafe { raw::copy(to, from, WIDTH, kind, self.stream.as_raw()) };
        }
    }

    fn finish(&mut self) {
        self.stream.synchronize();
    }

    fn write(&mut self, bytes: &[u8]) {
        self.finish();
        // SAFETY: nothing was enqueued since the wait.
        unsafe { self.host.slice() }.copy_from_slice(bytes);
    }

    fn read(&mut self) -> Vec<u8> {
        let kind = sys::cudaMemcpyKind::cudaMemcpyDeviceToHost;
        let (to, from) = (self.host.as_ptr(), self.device.as_ptr());
        // SAFETY: both have this many bytes.
        unsafe { raw::copy(to, from, ROWS * WIDTH, kind, self.stream.as_raw()) };
        self.finish();
        // SAFETY: nothing was enqueued since the wait.
        unsafe { self.host.slice() }.to_vec()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.stream.synchronize();
    }
}
