//! Whatever call of the driver fails in the middle of whatever operation: a typed error, no panic, nothing
//! lost, and the same value usable again. Where the context breaks, what may be in use is leaked; and in a forked
//! child nothing is called at all.
//!
//! For each operation, its calls are made to fail one after the other, until it runs without meeting the
//! fault: in each of the ways of `FAULTS`, and on a fresh and on a busy bench. Then the context is broken at each of
//! them.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, Weak};

use common::{Gate, in_child, sim, test_name};
#[cfg(feature = "dlpack")]
use cpu_gpu_buffer::dlpack;
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, BufferPool, BufferRing, CpuGpuBuffer, Device, Error, Event,
    GroupLayout, GroupLayoutBuilder, GroupRing, HostFlags, MemberKey, MemberRows, Pinning,
    PoolOptions, Result, Stream, StreamOptions, WaitPolicy, is_pinned_memory_available, sys,
};

const DEVICE: Device = Device::Cuda(0);
/// Where a branch depends on a size, an operation brings things of its own.
const WORDS: usize = 300;

/// What an operation works on: a buffer, and what else it has to do with. A busy bench has transfers on one stream and
/// a device use on another. A thread waits for the one by spinning and for the other by blocking: beside the wait for
/// a whole stream, the policy is a flag of events alone, and where that is another one, an event is made anew.
struct Bench {
    stream: Stream,
    other: Stream,
    event: Event,
    buffer: CpuGpuBuffer<u32>,
    foreign: CpuGpuBuffer<u32>,
    /// Of few buffers; the busy one's were given back in flight.
    pool: BufferPool<u32>,
    members: Members,
    group: Option<BufferGroup>,
    ring: Option<GroupRing>,
    slots: Option<BufferRing<u32>>,
}

struct Members {
    layout: GroupLayout,
    keys: [MemberKey<u32>; 7],
}

impl Members {
    fn new() -> Members {
        let mut builder = GroupLayoutBuilder::new();
        let keys = [(); 7].map(|()| builder.add(WORDS));
        Members { layout: builder.build().unwrap(), keys }
    }

    /// Rows that one kernel moves, or a copy where it is one member.
    fn rows(&self, members: &[usize]) -> Vec<MemberRows> {
        members.iter().map(|member| self.keys[*member].rows(1..WORDS - 1)).collect()
    }

    /// Every second row of members, in more places than one kernel takes.
    fn scattered(&self) -> Vec<MemberRows> {
        let rows = |key: &MemberKey<u32>| {
            let key = *key;
            (0..WORDS).step_by(2).map(move |row| key.rows(row..row + 1))
        };
        self.keys[..2].iter().flat_map(rows).collect()
    }

    /// Rows go to the device and back in every member.
    fn verify_group(&self, group: &mut BufferGroup, stream: &Stream, value: u32) {
        let rows = self.rows(&[0, 1, 2, 3, 4, 5, 6]);
        let write = |group: &mut BufferGroup, value: u32| {
            let mut members = group.members_mut();
            self.keys.iter().for_each(|key| members.cpu_mut(*key).unwrap().fill(value));
        };
        write(group, value);
        group.copy_to_gpu(&rows, stream).unwrap();
        write(group, 0);
        group.copy_to_cpu(&rows, stream).unwrap();
        for key in self.keys {
            common::all(&group.cpu(key).unwrap()[1..WORDS - 1], value);
        }
        group.synchronize().unwrap();
        assert!(group.is_idle().unwrap());
    }

    /// Steps arrive, of each side, and of one that was uploaded before.
    fn verify_ring(&self, ring: &mut GroupRing, stream: &Stream, value: u32) {
        let rows = self.rows(&[0, 1, 2, 3, 4, 5, 6]);
        for step in 0..3 {
            ring.advance().unwrap();
            self.keys.iter().for_each(|key| ring.cpu_mut(*key).unwrap().fill(value + step));
            ring.copy_to_gpu(&rows, stream).unwrap();
        }
        ring.synchronize().unwrap();
        assert!(ring.is_idle().unwrap());
        let mut view = ring.gpu_on(stream).unwrap();
        for key in self.keys {
            let rows = view.member(key).unwrap().rows(1..WORDS - 1).unwrap();
            common::all(&common::device_words(DEVICE, rows.as_ptr(), WORDS - 2), value + 2);
        }
        self.keys.iter().for_each(|key| ring.cpu_mut(*key).unwrap().fill(0));
        ring.copy_to_cpu(&rows, stream).unwrap();
        ring.advance().unwrap();
        for key in self.keys {
            common::all(&ring.cpu_back(1, key).unwrap()[1..WORDS - 1], value + 2);
        }
    }
}

/// As [`Members::verify_ring`].
fn verify_slots(slots: &mut BufferRing<u32>, stream: &Stream, value: u32) {
    for step in 0..3 {
        slots.advance().unwrap().fill(value + step);
        slots.copy_to_gpu(.., stream).unwrap();
    }
    slots.synchronize().unwrap();
    assert!(slots.is_idle().unwrap());
    common::all(&common::device_words(DEVICE, slots.device_ptr(), WORDS), value + 2);
    slots.cpu_mut().unwrap().fill(0);
    slots.copy_to_cpu(.., stream).unwrap();
    slots.advance().unwrap();
    common::all(slots.cpu_back(1).unwrap(), value + 2);
}

impl Bench {
    /// With buffers in the pool, a group and rings where `has` says so by their types' names.
    fn new(state: State, has: impl Fn(&str) -> bool) -> Bench {
        let options = StreamOptions { wait: WaitPolicy::DeviceDefault, ..Default::default() };
        let stream = Stream::with_options(DEVICE, options).unwrap();
        let options = StreamOptions { wait: WaitPolicy::Block, ..Default::default() };
        let other = Stream::with_options(DEVICE, options).unwrap();
        let buffer = CpuGpuBuffer::new(WORDS, DEVICE).unwrap();
        let mut foreign = CpuGpuBuffer::new(WORDS, DEVICE).unwrap();
        foreign.gpu_on(&stream).unwrap();
        foreign.synchronize().unwrap();
        let pooled = if has("BufferPool") { 2 } else { 0 };
        let pool = BufferPool::new(WORDS, DEVICE, pooled).unwrap();
        let members = Members::new();
        let layout = &members.layout;
        let group = has("BufferGroup").then(|| BufferGroup::new(layout, DEVICE).unwrap());
        let ring = has("GroupRing").then(|| GroupRing::new(layout, DEVICE, 2).unwrap());
        let slots = has("BufferRing").then(|| BufferRing::new(WORDS, DEVICE, 2).unwrap());
        let event = stream.record().unwrap();
        let mut bench =
            Bench { stream, other, event, buffer, foreign, pool, members, group, ring, slots };
        if let State::Busy = state {
            bench.be_busy();
        }
        bench
    }

    fn be_busy(&mut self) {
        let (stream, other) = (&self.stream, &self.other);
        let mut pooled: Vec<_> =
            (0..self.pool.total()).map(|_| self.pool.acquire().unwrap()).collect();
        for buffer in pooled.iter_mut().chain([&mut self.buffer]) {
            buffer.copy_to_gpu(.., other).unwrap();
            buffer.copy_to_cpu(..5, stream).unwrap();
            buffer.gpu_on(other).unwrap();
        }
        let (some, many) = (self.members.rows(&[0, 3]), self.members.rows(&[1, 2, 3, 5]));
        if let Some(group) = &mut self.group {
            group.copy_to_gpu(&many, other).unwrap();
            group.copy_to_cpu(&some, stream).unwrap();
            group.gpu_on(other).unwrap();
        }
        for stream in [stream, other] {
            if let Some(ring) = &mut self.ring {
                ring.advance().unwrap();
                ring.copy_to_gpu(&many, stream).unwrap();
                ring.copy_to_cpu(&some, stream).unwrap();
            }
            if let Some(slots) = &mut self.slots {
                slots.advance().unwrap();
                slots.copy_to_gpu(.., stream).unwrap();
                slots.copy_to_cpu(..5, stream).unwrap();
            }
        }
        if let Some(ring) = &mut self.ring {
            ring.gpu_on(stream).unwrap();
        }
        self.event = stream.record().unwrap();
    }

    /// Everything still works, once calls succeed again.
    fn verify(&mut self) {
        #[cfg(feature = "dlpack")]
        dlpack::reclaim().unwrap();
        assert_eq!(self.pool.available(), self.pool.total(), "the pool lost a buffer");
        let total = self.pool.total();
        let mut pooled: Vec<_> = (0..total).map(|_| self.pool.try_acquire().unwrap()).collect();
        for buffer in pooled.iter_mut().chain([&mut self.buffer, &mut self.foreign]) {
            for (value, stream) in [(7, &self.stream), (8, &self.other)] {
                buffer.fill(value, stream).unwrap();
                buffer.fill_cpu(0).unwrap();
                buffer.copy_to_cpu(.., stream).unwrap();
                common::all(buffer.cpu().unwrap(), value);
                buffer.fill_cpu(value + 2).unwrap();
                buffer.copy_to_gpu(.., stream).unwrap();
                buffer.fill_cpu(0).unwrap();
                buffer.copy_to_cpu(.., stream).unwrap();
                common::all(buffer.cpu().unwrap(), value + 2);
            }
            buffer.synchronize().unwrap();
            assert!(buffer.is_idle().unwrap());
        }
        for (value, stream) in [(7, &self.stream), (8, &self.other)] {
            if let Some(group) = &mut self.group {
                self.members.verify_group(group, stream, value);
            }
            if let Some(ring) = &mut self.ring {
                self.members.verify_ring(ring, stream, value);
            }
            if let Some(slots) = &mut self.slots {
                verify_slots(slots, stream, value);
            }
        }
        self.event.synchronize().unwrap();
    }

    /// Of its buffers, the pool, the group and the rings.
    fn sides(&self) -> i64 {
        let there = [
            self.pool.total() > 0,
            self.group.is_some(),
            self.ring.is_some(),
            self.slots.is_some(),
        ];
        4 + 2 * there.into_iter().filter(|there| *there).count() as i64
    }

    fn group(&mut self) -> (&mut BufferGroup, &Members, &Stream) {
        (self.group.as_mut().expect(NAMED), &self.members, &self.stream)
    }

    fn ring(&mut self) -> (&mut GroupRing, &Members, &Stream) {
        (self.ring.as_mut().expect(NAMED), &self.members, &self.stream)
    }

    fn slots(&mut self) -> (&mut BufferRing<u32>, &Stream) {
        (self.slots.as_mut().expect(NAMED), &self.stream)
    }
}

const NAMED: &str = "the operation's name says that it has to do with it";

#[derive(Clone, Copy, Debug)]
enum State {
    Fresh,
    Busy,
}

/// Words in pages of their own, which are unmapped when their owner is let go.
struct Words(NonNull<u32>);

// SAFETY: the value only unmaps the pages, which any thread may do.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    const BYTES: usize = WORDS * 4;

    fn new() -> Words {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let pages =
            unsafe { libc::mmap(std::ptr::null_mut(), Words::BYTES, protection, flags, -1, 0) };
        assert_ne!(pages, libc::MAP_FAILED);
        Words(NonNull::new(pages.cast()).unwrap())
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the pages of this value, which nothing refers to.
        assert_eq!(unsafe { libc::munmap(self.0.as_ptr().cast(), Words::BYTES) }, 0);
    }
}

/// Adopts words whose owner unmaps them.
fn adopt(pinning: Pinning, host_flags: HostFlags) -> Result<CpuGpuBuffer<u32>> {
    /// Leak detectors find owners that are forgotten here.
    static OWNERS: Mutex<Vec<Weak<Words>>> = Mutex::new(Vec::new());
    let owner = Arc::new(Words::new());
    OWNERS.lock().unwrap().push(Arc::downgrade(&owner));
    let options = BufferOptions { pinning, host_flags };
    // SAFETY: the owner keeps the words, and nothing else uses them.
    unsafe { CpuGpuBuffer::adopt(owner.0, WORDS, DEVICE, owner, options) }
}

type Operation = fn(&mut Bench) -> Result<()>;

/// Every public operation that may reach CUDA, by the name of its function; `name/kind` for several kinds.
const OPERATIONS: &[(&str, Operation)] = &[
    ("CpuGpuBuffer::new", |_| CpuGpuBuffer::<u8>::new(100, DEVICE).map(drop)),
    ("CpuGpuBuffer::new/aligned", |_| CpuGpuBuffer::<u64>::new([3 << 17], DEVICE).map(drop)),
    ("CpuGpuBuffer::with_options", |_| {
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        CpuGpuBuffer::<u8>::with_options(100, DEVICE, options).map(drop)
    }),
    ("CpuGpuBuffer::from_slice", |bench| {
        CpuGpuBuffer::<u8>::from_slice(3, &[1, 2, 3], &bench.stream).map(drop)
    }),
    ("CpuGpuBuffer::adopt", |_| adopt(Pinning::Required, HostFlags::PORTABLE).map(drop)),
    ("CpuGpuBuffer::adopt/in use, ::drop", |bench| {
        let flags = HostFlags::PORTABLE | HostFlags::READ_ONLY;
        let mut buffer = adopt(Pinning::Preferred, flags)?;
        buffer.copy_to_gpu(.., &bench.other)?;
        buffer.gpu_on(&bench.stream)?;
        Ok(())
    }),
    ("CpuGpuBuffer::cpu", |bench| bench.buffer.cpu().map(drop)),
    ("CpuGpuBuffer::cpu_rows", |bench| bench.buffer.cpu_rows(1..2).map(drop)),
    ("CpuGpuBuffer::cpu_rows_mut", |bench| bench.buffer.cpu_rows_mut(1..2).map(drop)),
    ("CpuGpuBuffer::write_rows", |bench| bench.buffer.write_rows(1..3, &[7; 2], &bench.stream)),
    ("CpuGpuBuffer::copy_to_gpu_from", |bench| {
        bench.buffer.copy_to_gpu_from(1, &mut bench.foreign, 2..5, &bench.stream)
    }),
    ("CpuGpuBuffer::copy_to_cpu_from", |bench| {
        bench.buffer.copy_to_cpu_from(1, &mut bench.foreign, 2..5, &bench.stream)
    }),
    ("CpuGpuBuffer::copy_gpu_from", |bench| {
        bench.buffer.copy_gpu_from(1, &mut bench.foreign, 2..5, &bench.stream)
    }),
    ("CpuGpuBuffer::cpu_on", |bench| bench.buffer.cpu_on(&bench.stream).map(drop)),
    ("CpuGpuBuffer::cpu_mut", |bench| bench.buffer.cpu_mut().map(drop)),
    ("CpuGpuBuffer::try_cpu", |bench| bench.buffer.try_cpu().map(drop)),
    ("CpuGpuBuffer::try_cpu_mut", |bench| bench.buffer.try_cpu_mut().map(drop)),
    ("CpuGpuBuffer::copy_to_gpu", |bench| bench.buffer.copy_to_gpu(.., &bench.stream)),
    // On the stream that a busy bench uploads on.
    ("CpuGpuBuffer::copy_to_gpu/rows", |bench| bench.buffer.copy_to_gpu(1..3, &bench.other)),
    ("CpuGpuBuffer::copy_to_cpu", |bench| bench.buffer.copy_to_cpu(.., &bench.stream)),
    ("CpuGpuBuffer::copy_to_device_ptr", |bench| {
        let to = bench.foreign.device_ptr();
        // SAFETY: memory of the same shape, which nothing else uses.
        unsafe { bench.buffer.copy_to_device_ptr(.., to, &bench.stream) }
    }),
    ("CpuGpuBuffer::copy_from_device_ptr", |bench| {
        let from = bench.foreign.device_ptr();
        // SAFETY: as above.
        unsafe { bench.buffer.copy_from_device_ptr(.., from, &bench.stream) }
    }),
    #[cfg(feature = "ndarray")]
    ("CpuGpuBuffer::cpu_array", |bench| bench.buffer.cpu_array().map(drop)),
    #[cfg(feature = "ndarray")]
    ("CpuGpuBuffer::cpu_array_mut", |bench| bench.buffer.cpu_array_mut().map(drop)),
    #[cfg(feature = "dlpack")]
    ("CpuGpuBuffer::export_gpu", |bench| bench.buffer.export_gpu(&bench.stream).map(drop)),
    #[cfg(feature = "dlpack")]
    ("CpuGpuBuffer::export_gpu/again", |bench| {
        // Each time the devices are waited for; the first time the side may have to be zeroed.
        drop(bench.buffer.export_gpu(&bench.other)?);
        drop(bench.buffer.export_gpu(&bench.stream)?);
        bench.buffer.copy_to_gpu(1..3, &bench.other)
    }),
    #[cfg(feature = "dlpack")]
    ("CpuGpuBuffer::export_gpu_unordered", |bench| {
        // SAFETY: nobody uses it.
        unsafe { bench.buffer.export_gpu_unordered() }.map(drop)
    }),
    #[cfg(feature = "dlpack")]
    ("CpuGpuBuffer::export_gpu_unguarded", |bench| {
        // SAFETY: nobody uses it.
        unsafe { bench.buffer.export_gpu_unguarded() }.map(drop)
    }),
    #[cfg(feature = "dlpack")]
    ("CpuGpuBuffer::export_cpu", |bench| bench.buffer.export_cpu().map(drop)),
    #[cfg(feature = "dlpack")]
    ("reclaim", |_| dlpack::reclaim()),
    #[cfg(feature = "dlpack")]
    ("reclaim/::drop", |bench| {
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, DEVICE)?;
        buffer.copy_to_gpu(.., &bench.other)?;
        buffer.gpu_on(&bench.other)?;
        let tensor = buffer.export_cpu()?;
        drop(buffer);
        drop(tensor);
        dlpack::reclaim()
    }),
    #[cfg(feature = "dlpack")]
    ("BufferPool::acquire/left behind", |bench| {
        for _ in 0..2 {
            let mut buffer = bench.pool.acquire()?;
            drop(buffer.export_gpu(&bench.stream)?);
        }
        bench.pool.acquire().map(drop)
    }),
    ("CpuGpuBuffer::is_idle", |bench| bench.buffer.is_idle().map(drop)),
    ("CpuGpuBuffer::synchronize", |bench| bench.buffer.synchronize()),
    ("CpuGpuBuffer::fill", |bench| bench.buffer.fill(3, &bench.stream)),
    ("CpuGpuBuffer::fill_cpu", |bench| bench.buffer.fill_cpu(3)),
    ("CpuGpuBuffer::fill_gpu", |bench| bench.buffer.fill_gpu(0x01020304, &bench.stream)),
    ("CpuGpuBuffer::fill_gpu/kernel", |bench| {
        let mut buffer = CpuGpuBuffer::<[u8; 5]>::new(9, DEVICE)?;
        buffer.fill_gpu([1, 2, 3, 4, 5], &bench.stream)
    }),
    ("CpuGpuBuffer::fill_gpu/long", |bench| {
        let mut buffer = CpuGpuBuffer::<[u16; 4000]>::new(2, DEVICE)?;
        buffer.fill_gpu(std::array::from_fn(|at| at as u16), &bench.stream)
    }),
    ("CpuGpuBuffer::zero", |bench| bench.buffer.zero(&bench.stream)),
    ("CpuGpuBuffer::resize/in place", |bench| bench.buffer.resize([30, 2])),
    ("CpuGpuBuffer::resize", |bench| bench.buffer.resize(5 * WORDS)),
    ("CpuGpuBuffer::gpu_on", |bench| bench.buffer.gpu_on(&bench.stream).map(drop)),
    ("CpuGpuBuffer::drop", |bench| {
        let mut foreign = std::mem::replace(&mut bench.foreign, CpuGpuBuffer::new(0, DEVICE)?);
        foreign.copy_to_gpu(.., &bench.other)?;
        foreign.copy_to_cpu(.., &bench.stream)?;
        foreign.gpu_on(&bench.other)?;
        Ok(())
    }),
    ("BufferPool::new", |_| BufferPool::<u8>::new(100, DEVICE, 3).map(drop)),
    ("BufferPool::with_options", |_| {
        let options = PoolOptions { pinning: Pinning::Required, ..Default::default() };
        BufferPool::<u8>::with_options(100, DEVICE, 3, options).map(drop)
    }),
    ("BufferPool::acquire", |bench| bench.pool.acquire().map(drop)),
    ("BufferPool::acquire/in use", |bench| {
        let mut buffer = bench.pool.acquire()?;
        buffer.copy_to_gpu(..5, &bench.stream)?;
        buffer.cpu_mut()?[0] = 1;
        buffer.resize([30, 2])?;
        buffer.fill(3, &bench.other)
    }),
    ("BufferPool::acquire/growing", |bench| {
        let _all = [bench.pool.acquire()?, bench.pool.acquire()?];
        bench.pool.acquire().map(drop)
    }),
    ("BufferPool::acquire/zeroed, ::drop", |bench| {
        let options = PoolOptions { zeroed: true, ..Default::default() };
        let pool = BufferPool::<u32>::with_options(WORDS, DEVICE, 1, options)?;
        let mut buffer = pool.acquire()?;
        buffer.copy_to_gpu(.., &bench.stream)?;
        buffer.synchronize()?;
        drop(buffer);
        let buffer = pool.acquire()?;
        common::all(buffer.cpu()?, 0);
        Ok(())
    }),
    ("BufferPool::acquire/::drop", |bench| {
        let pool = BufferPool::<u32>::new(WORDS, DEVICE, 2)?;
        let (mut first, mut second) = (pool.acquire()?, pool.acquire()?);
        first.copy_to_gpu(.., &bench.other)?;
        drop(first);
        drop(pool);
        second.copy_to_cpu(.., &bench.stream)
    }),
    ("BufferPool::try_acquire", |bench| {
        // The only reason that there can be.
        bench.pool.try_acquire().map(drop).ok_or(Error::Forked)
    }),
    ("BufferGroup::new", |bench| BufferGroup::new(&bench.members.layout, DEVICE).map(drop)),
    ("BufferGroup::with_options", |bench| {
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        BufferGroup::with_options(&bench.members.layout, DEVICE, options).map(drop)
    }),
    ("BufferGroup::with_options/copies, ::drop", |bench| {
        let (_, members, stream) = bench.group();
        // No kernel reaches such memory.
        let options = BufferOptions { host_flags: HostFlags::PORTABLE, ..Default::default() };
        let mut group = BufferGroup::with_options(&members.layout, DEVICE, options)?;
        group.copy_to_gpu(&members.rows(&[1, 3]), stream)?;
        group.copy_to_cpu(&members.rows(&[1, 3]), stream)
    }),
    ("BufferGroup::cpu", |bench| {
        let (group, members, _) = bench.group();
        group.cpu(members.keys[3]).map(drop)
    }),
    ("BufferGroup::cpu_mut", |bench| {
        let (group, members, _) = bench.group();
        group.cpu_mut(members.keys[3]).map(drop)
    }),
    #[cfg(feature = "ndarray")]
    ("BufferGroup::cpu_array", |bench| {
        let (group, members, _) = bench.group();
        group.cpu_array(members.keys[3]).map(drop)
    }),
    #[cfg(feature = "ndarray")]
    ("BufferGroup::cpu_array_mut", |bench| {
        let (group, members, _) = bench.group();
        group.cpu_array_mut(members.keys[3]).map(drop)
    }),
    ("MembersMut::cpu_mut", |bench| {
        let (group, members, _) = bench.group();
        let mut sides = group.members_mut();
        members.keys.iter().try_for_each(|key| sides.cpu_mut(*key).map(drop))
    }),
    ("BufferGroup::try_cpu", |bench| {
        let (group, members, _) = bench.group();
        group.try_cpu(members.keys[3]).map(drop)
    }),
    ("BufferGroup::try_cpu_mut", |bench| {
        let (group, members, _) = bench.group();
        group.try_cpu_mut(members.keys[3]).map(drop)
    }),
    ("BufferGroup::copy_to_gpu", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_gpu(&members.rows(&[1, 2, 4, 6]), stream)
    }),
    ("BufferGroup::copy_to_gpu/copy", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_gpu(&members.rows(&[3]), stream)
    }),
    ("BufferGroup::copy_to_cpu", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_cpu(&members.rows(&[1, 2, 4, 6]), stream)
    }),
    ("BufferGroup::copy_to_cpu/copy", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_cpu(&members.rows(&[3]), stream)
    }),
    ("BufferGroup::copy_to_cpu/often", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_cpu(&members.rows(&[3, 1, 3, 1]), stream)
    }),
    ("BufferGroup::copy_to_cpu/many", |bench| {
        let (group, members, stream) = bench.group();
        group.copy_to_cpu(&members.scattered(), stream)
    }),
    ("BufferGroup::is_idle", |bench| bench.group().0.is_idle().map(drop)),
    ("BufferGroup::synchronize", |bench| bench.group().0.synchronize()),
    ("BufferGroup::gpu_on", |bench| {
        let (group, _, stream) = bench.group();
        group.gpu_on(stream).map(drop)
    }),
    ("BufferGroup::drop", |bench| {
        let (members, stream) = (&bench.members, &bench.stream);
        let mut group = BufferGroup::new(&members.layout, DEVICE)?;
        group.copy_to_gpu(&members.rows(&[1, 2, 4, 6]), stream)?;
        group.copy_to_cpu(&members.rows(&[3, 1]), stream)
    }),
    ("GroupRing::new", |bench| GroupRing::new(&bench.members.layout, DEVICE, 3).map(drop)),
    ("GroupRing::with_options", |bench| {
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        GroupRing::with_options(&bench.members.layout, DEVICE, 3, options).map(drop)
    }),
    ("GroupRing::advance", |bench| bench.ring().0.advance()),
    ("GroupRing::try_advance", |bench| bench.ring().0.try_advance().map(drop)),
    ("GroupRing::cpu", |bench| {
        let (ring, members, _) = bench.ring();
        ring.cpu(members.keys[3]).map(drop)
    }),
    ("GroupRing::cpu_mut", |bench| {
        let (ring, members, _) = bench.ring();
        ring.cpu_mut(members.keys[3]).map(drop)
    }),
    ("GroupRing::try_cpu", |bench| {
        let (ring, members, _) = bench.ring();
        ring.try_cpu(members.keys[3]).map(drop)
    }),
    ("GroupRing::try_cpu_mut", |bench| {
        let (ring, members, _) = bench.ring();
        ring.try_cpu_mut(members.keys[3]).map(drop)
    }),
    ("GroupRing::cpu_back", |bench| {
        let (ring, members, _) = bench.ring();
        ring.advance()?;
        ring.cpu_back(1, members.keys[3]).map(drop)
    }),
    ("MembersMut::cpu_back", |bench| {
        let (ring, members, _) = bench.ring();
        ring.advance()?;
        ring.members_mut().cpu_back(1, members.keys[3]).map(drop)
    }),
    ("MembersMut::cpu_back/current", |bench| {
        let (ring, members, _) = bench.ring();
        ring.members_mut().cpu_back(0, members.keys[3]).map(drop)
    }),
    ("MembersMut::cpu_mut/of a ring", |bench| {
        let (ring, members, _) = bench.ring();
        let mut sides = ring.members_mut();
        members.keys.iter().try_for_each(|key| sides.cpu_mut(*key).map(drop))
    }),
    #[cfg(feature = "ndarray")]
    ("GroupRing::cpu_array", |bench| {
        let (ring, members, _) = bench.ring();
        ring.cpu_array(members.keys[3]).map(drop)
    }),
    #[cfg(feature = "ndarray")]
    ("GroupRing::cpu_array_mut", |bench| {
        let (ring, members, _) = bench.ring();
        ring.cpu_array_mut(members.keys[3]).map(drop)
    }),
    ("GroupRing::copy_to_gpu", |bench| {
        let (ring, members, stream) = bench.ring();
        ring.copy_to_gpu(&members.rows(&[1, 2, 4, 6]), stream)
    }),
    ("GroupRing::copy_to_cpu", |bench| {
        let (ring, members, stream) = bench.ring();
        ring.copy_to_cpu(&members.rows(&[1, 2, 4, 6]), stream)
    }),
    ("GroupRing::gpu_on", |bench| {
        let (ring, _, stream) = bench.ring();
        ring.gpu_on(stream).map(drop)
    }),
    ("GroupRing::is_idle", |bench| bench.ring().0.is_idle().map(drop)),
    ("GroupRing::synchronize", |bench| bench.ring().0.synchronize()),
    ("GroupRing::drop", |bench| {
        let (members, stream) = (&bench.members, &bench.stream);
        let mut ring = GroupRing::new(&members.layout, DEVICE, 2)?;
        ring.copy_to_gpu(&members.rows(&[1, 2, 4, 6]), stream)?;
        ring.advance()?;
        ring.gpu_on(stream).map(drop)
    }),
    ("BufferRing::new", |_| BufferRing::<u8>::new(100, DEVICE, 2).map(drop)),
    ("BufferRing::with_options", |_| {
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        BufferRing::<u8>::with_options(100, DEVICE, 2, options).map(drop)
    }),
    ("BufferRing::advance", |bench| bench.slots().0.advance().map(drop)),
    ("BufferRing::try_advance", |bench| bench.slots().0.try_advance().map(drop)),
    ("BufferRing::cpu", |bench| bench.slots().0.cpu().map(drop)),
    ("BufferRing::cpu_mut", |bench| bench.slots().0.cpu_mut().map(drop)),
    ("BufferRing::try_cpu", |bench| bench.slots().0.try_cpu().map(drop)),
    ("BufferRing::try_cpu_mut", |bench| bench.slots().0.try_cpu_mut().map(drop)),
    ("BufferRing::cpu_back", |bench| bench.slots().0.cpu_back(0).map(drop)),
    ("BufferRing::cpu_back/older", |bench| {
        let (slots, stream) = bench.slots();
        slots.copy_to_cpu(.., stream)?;
        slots.advance()?;
        slots.cpu_back(1).map(drop)
    }),
    ("BufferRing::copy_to_cpu", |bench| {
        let (slots, stream) = bench.slots();
        slots.copy_to_cpu(1..9, stream)
    }),
    ("BufferRing::copy_to_gpu", |bench| {
        let (slots, stream) = bench.slots();
        slots.copy_to_gpu(1..9, stream)
    }),
    ("BufferRing::gpu_on", |bench| {
        let (slots, stream) = bench.slots();
        slots.gpu_on(stream).map(drop)
    }),
    ("BufferRing::is_idle", |bench| bench.slots().0.is_idle().map(drop)),
    ("BufferRing::synchronize", |bench| bench.slots().0.synchronize()),
    ("Stream::new", |_| Stream::new(DEVICE).map(drop)),
    ("Stream::with_options", |_| Stream::with_options(DEVICE, Default::default()).map(drop)),
    ("Stream::from_raw", |_| {
        // SAFETY: the legacy stream lives as long as its context.
        let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), DEVICE, None) }?;
        let mut buffer = CpuGpuBuffer::<u8>::new(9, DEVICE)?;
        buffer.fill(1, &legacy)?;
        legacy.synchronize()
    }),
    ("Stream::synchronize", |bench| bench.stream.synchronize()),
    ("Stream::synchronize/blocking", |bench| bench.other.synchronize()),
    ("Stream::is_idle", |bench| bench.stream.is_idle().map(drop)),
    ("Stream::record", |bench| bench.stream.record().map(drop)),
    ("Stream::wait", |bench| bench.other.wait(&bench.event)),
    ("Event::is_complete", |bench| bench.event.is_complete().map(drop)),
    ("Event::synchronize", |bench| bench.event.synchronize()),
    ("Event::elapsed_since", |bench| bench.event.elapsed_since(&bench.event).map(drop)),
    ("Device::cuda", |_| Device::cuda(0).map(drop)),
    ("Device::memory", |_| DEVICE.memory().map(drop)),
    ("Device::auto", |_| {
        Device::auto();
        Ok(())
    }),
    ("Device::cuda_count", |_| {
        Device::cuda_count();
        Ok(())
    }),
    ("is_pinned_memory_available", |_| {
        is_pinned_memory_available();
        Ok(())
    }),
];

/// Public functions that read what is known and never reach CUDA.
const SILENT: &[&str] = &[
    "CpuGpuBuffer::device_ptr",
    "CpuGpuBuffer::shape",
    "CpuGpuBuffer::numel",
    "CpuGpuBuffer::nbytes",
    "CpuGpuBuffer::device",
    "CpuGpuBuffer::is_pinned",
    "CpuGpuBuffer::pinning_error",
    "CpuGpuBuffer::dtype",
    #[cfg(feature = "dlpack")]
    "Tensor::device",
    #[cfg(feature = "dlpack")]
    "Tensor::as_plain_cpu",
    #[cfg(feature = "dlpack")]
    "Tensor::into_raw",
    #[cfg(feature = "dlpack")]
    "Tensor::into_raw_unversioned",
    "BufferPool::available",
    "BufferPool::total",
    "BufferPool::stats",
    "BufferPool::shape",
    "BufferPool::device",
    "BufferGroup::members_mut",
    "BufferGroup::device_ptr",
    "BufferGroup::shape",
    "BufferGroup::layout",
    "BufferGroup::device",
    "BufferGroup::is_pinned",
    "GroupRing::members_mut",
    "GroupRing::device_ptr",
    "GroupRing::shape",
    "GroupRing::depth",
    "GroupRing::layout",
    "GroupRing::device",
    "GroupRing::is_pinned",
    "BufferRing::device_ptr",
    "BufferRing::shape",
    "BufferRing::depth",
    "BufferRing::device",
    "BufferRing::is_pinned",
    "GroupView::member",
    "GroupView::device",
    "GroupLayoutBuilder::new",
    "GroupLayoutBuilder::add",
    "GroupLayoutBuilder::add_mirrored",
    "GroupLayoutBuilder::build",
    "MemberKey::rows",
    "Stream::as_raw",
    "Stream::device",
    "Event::device",
];

/// Types of plain values, whose functions never reach CUDA.
const PLAIN: &[&str] = &["DType", "Error", "GpuView", "HostFlags", "Shape", "StreamFlags"];

/// Whether a function is there only with a feature that this program was compiled without.
fn is_left_out(name: &str) -> bool {
    let ndarray = name.contains("::cpu_array");
    let dlpack = name.contains("::export_") || name.starts_with("Tensor::") || name == "reclaim";
    !cfg!(feature = "ndarray") && ndarray || !cfg!(feature = "dlpack") && dlpack
}

/// The public functions that `docs/api` lists, but for those of traits: `Owner::function`, or
/// `function` for a free one.
fn public_functions() -> Vec<String> {
    let mut functions = Vec::new();
    let mut of_trait = false;
    for line in include_str!("../docs/api/cpu-gpu-buffer.txt").lines() {
        if line.starts_with("impl") {
            of_trait = line.contains(" for ");
        }
        let Some(at) = line.find("fn cpu_gpu_buffer::").filter(|_| line.starts_with("pub ")) else {
            continue;
        };
        // `fn cpu_gpu_buffer::module::Owner<T>::function<U>(`, without what stands in `<>`.
        let mut depth = 0;
        let mut path = line[at + 3..].split('(').next().unwrap().to_owned();
        path.retain(|letter| {
            depth += i32::from(letter == '<');
            let outside = depth == 0;
            depth -= i32::from(letter == '>');
            outside
        });
        let words: Vec<_> = path.split("::").collect();
        let [.., owner, function] = words[..] else { panic!("{line}") };
        if !owner.starts_with(char::is_uppercase) {
            functions.push(function.to_owned());
        } else if !of_trait && !PLAIN.contains(&owner) {
            functions.push(format!("{owner}::{function}"));
        }
    }
    functions
}

#[test]
fn every_public_function_is_an_operation_here_or_known_to_be_silent() {
    let named = |name: &&str| !name.contains('/') && !name.ends_with("::drop");
    let operations = OPERATIONS.iter().map(|(name, _)| *name).filter(named);
    let known: BTreeSet<_> = operations.chain(SILENT.iter().copied()).collect();
    let public = public_functions();
    let public: BTreeSet<_> =
        public.iter().map(String::as_str).filter(|name| !is_left_out(name)).collect();
    assert_eq!(known, public, "the lists here, and docs/api");
}

/// Makes the chunk of pinned memory that stays with the device once it was made. Leaked pieces
/// wear a chunk out. The next one is made here, and is not taken for a leak of what comes after.
fn make_what_stays() {
    // More than a bench and its operation take together.
    const ROOM: usize = 256 << 10;
    assert_eq!(Device::auto(), DEVICE);
    drop(CpuGpuBuffer::<u8>::new(ROOM, DEVICE).unwrap());
}

/// What goes wrong: the code, whether with one call or with all from it on, and whether the call has its effect. Most
/// codes mean the same to the crate, as cudaErrorIllegalAddress does, which comes in every way. Two mean something,
/// each in one place. cudaErrorMemoryAllocation, of an allocation, is the error that says so, for which a pool grows by
/// less; what is made to fit then succeeds or fails, too. cudaErrorInvalidValue says that pages are not registered, but
/// is believed only where registering them failed just before: where calls fail one after the other.
const FAULTS: [(u32, bool, bool); 6] = [
    (700, true, false),
    (700, false, false),
    (700, true, true),
    (2, true, false),
    (2, false, false),
    (1, false, false),
];

/// The faults, or as many of them as `CPU_GPU_BUFFER_TEST_FAULTS` says: what looks for races and leaks is slow, and does
/// not need each.
fn kinds() -> impl Iterator<Item = (u32, bool, bool)> {
    let most = std::env::var("CPU_GPU_BUFFER_TEST_FAULTS").ok();
    FAULTS.into_iter().take(most.map_or(FAULTS.len(), |most| most.parse().unwrap()))
}

/// Runs the test in a process of its own, beside others: the simulated runtime is one of a process.
/// Returns `false` in that process.
fn runs_in_own_process(test: &str) -> bool {
    if common::is_subprocess() {
        return false;
    }
    let output = common::in_subprocess(test, &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
    true
}

/// Makes each call of each operation fail, with benches in this state.
fn any_call_may_fail(test: &str, state: State) {
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    if runs_in_own_process(test) {
        return;
    }
    let _turn = common::turn();
    make_what_stays();
    let mut faults = 0;
    for (name, operation) in OPERATIONS {
        for fault @ (code, once, effect) in kinds() {
            let what = format!("{name}, {state:?}, {code}, once {once}, effect {effect}");
            faults += sweep(&what, *operation, state, fault);
        }
    }
    println!("{faults} faults");
}

#[test]
fn any_call_may_fail_in_any_operation() {
    any_call_may_fail(test_name!(), State::Fresh);
}

#[test]
fn any_call_may_fail_in_any_operation_while_work_is_in_flight() {
    any_call_may_fail(test_name!(), State::Busy);
}

/// Runs the operation with something going wrong. The answer is what it answered, and that it neither panicked
/// nor answered an untyped error.
fn run(what: &str, operation: Operation, bench: &mut Bench, code: u32) -> Result<()> {
    let result = catch_unwind(AssertUnwindSafe(|| operation(bench)));
    let result = result.unwrap_or_else(|_| panic!("{what}: panicked"));
    match &result {
        Ok(()) => {}
        Err(Error::Cuda { code: seen, call }) => {
            assert!(seen.0 == code && !call.is_empty(), "{what}: {result:?}");
        }
        Err(
            Error::OutOfMemory { .. }
            | Error::PinningUnavailable { .. }
            | Error::Unavailable { .. },
        ) => {}
        // The driver says so of memory that kernels do not reach.
        Err(Error::NotMapped) if code == 1 => {}
        Err(error) => panic!("{what}: {error}"),
    }
    result
}

/// The things that live, but for those that tensors left to be reclaimed.
fn live() -> [i64; 5] {
    #[cfg(feature = "dlpack")]
    dlpack::reclaim().unwrap();
    sim::live()
}

/// The things that live and did not before.
fn left(before: [i64; 5]) -> i64 {
    live().iter().zip(before).map(|(now, before)| now - before).sum()
}

/// Whether the operation drops a buffer of its own that is in flight. Where the wait fails, nobody knows whether
/// it still is, and both sides are leaked.
fn drops(what: &str) -> bool {
    ["/kernel", "/long", "from_raw", "from_slice", "::drop"].iter().any(|kind| what.contains(kind))
}

/// Whether the operation has to do with a type's values.
fn concerns(what: &str, owner: &str) -> bool {
    what.starts_with(owner) || what.starts_with("MembersMut")
}

/// Makes the operation's calls fail, one after the other; the answer is how many there were.
fn sweep(
    what: &str,
    operation: Operation,
    state: State,
    (code, once, effect): (u32, bool, bool),
) -> u64 {
    for number in 1.. {
        make_what_stays();
        let before = live();
        let mut bench = Bench::new(state, |owner| concerns(what, owner));
        sim::reset();
        sim::fail(number, code, once, effect);
        let what = format!("{what}, call {number}");
        let result = run(&what, operation, &mut bench, code);
        sim::heal();
        let (injected, released) = (sim::injected(), sim::injected_releases());
        if injected == 0 {
            assert!(result.is_ok(), "{what}: {result:?}");
            return number - 1;
        }
        bench.verify();
        drop(bench);
        // What a failing call was to give back stays behind, and what one made that then said it had not.
        let excused = released as i64 + i64::from(effect);
        let unknown = if drops(&what) && injected > released { 2 } else { 0 };
        let left = left(before);
        assert!((0..=excused + unknown).contains(&left), "{what}: {left} things are left behind");
        sim::leave_behind();
    }
    unreachable!()
}

#[test]
fn pages_that_were_registered_by_a_call_that_failed_are_unregistered() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let _turn = common::turn();
    make_what_stays();
    for number in 1.. {
        let before = sim::live();
        sim::reset();
        // The call answers the error of earlier work, and has done its own.
        sim::fail(number, 1, true, true);
        drop(CpuGpuBuffer::<u8>::new(5 << 20, DEVICE));
        assert_eq!(sim::live()[1], before[1], "call {number}: pages are still pinned");
        if sim::injected() == 0 {
            return sim::heal();
        }
    }
}

// ---- a broken context ----

const ILLEGAL: u32 = 700;

#[test]
fn the_context_may_break_at_any_call_of_any_operation() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    if runs_in_own_process(test) {
        return;
    }
    let _turn = common::turn();
    make_what_stays();
    let mut calls = 0;
    for (name, operation) in OPERATIONS {
        for state in [State::Fresh, State::Busy] {
            for mended in [true, false] {
                let what = format!("{name}, {state:?}, mended {mended}");
                calls += break_each(&what, *operation, state, mended);
            }
        }
    }
    println!("{calls} calls");
}

/// Breaks the context at the operation's calls, one after the other; the answer is how many there were. The bench
/// is dropped after the context was mended and everything was seen to work again, or before.
fn break_each(what: &str, operation: Operation, state: State, mended: bool) -> u64 {
    for number in 1.. {
        make_what_stays();
        let before = live();
        let mut bench = Bench::new(state, |owner| concerns(what, owner));
        sim::reset();
        sim::break_at(number, ILLEGAL);
        let what = format!("{what}, call {number}");
        let result = run(&what, operation, &mut bench, ILLEGAL);
        if sim::injected() == 0 {
            assert!(result.is_ok(), "{what}: {result:?}");
            sim::heal();
            return number - 1;
        }
        // It sticks, and is named by the call that answered it.
        for stream in [&bench.stream, &bench.other] {
            let next = stream.synchronize();
            let Err(Error::Cuda { code, call }) = next else { panic!("{what}: {next:?}") };
            assert_eq!((code.0, call), (ILLEGAL, "cuStreamIsCapturing"), "{what}");
        }
        if mended {
            sim::heal();
            bench.verify();
        }
        let sides = bench.sides();
        drop(bench);
        // Releases that a broken context refused leave their things behind. What was in flight is not even asked to
        // be released: the bench's sides and those of the operation's own.
        let refused = sim::injected_releases() as i64;
        let unknown = match (mended, drops(&what)) {
            (true, true) => 2,
            (true, false) => 0,
            (false, _) => sides + 2,
        };
        // Looks at all that is pinned still being there.
        sim::heal();
        let left = left(before);
        assert!(
            (0..=refused + unknown).contains(&left),
            "{what}: {left} things, {refused} refused"
        );
        sim::leave_behind();
    }
    unreachable!()
}

#[test]
fn memory_that_a_broken_context_may_still_use_is_never_given_back_nor_handed_out_again() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let _turn = common::turn();
    make_what_stays();
    let stream = Stream::new(DEVICE).unwrap();
    let releases = || [c"cudaFree", c"cudaHostUnregister", c"cudaFreeHost"].map(sim::calls_of);
    let busy: [fn(&mut CpuGpuBuffer<u32>, &Stream); 4] = [
        |buffer, stream| buffer.copy_to_gpu(.., stream).unwrap(),
        |buffer, stream| buffer.copy_to_cpu(.., stream).unwrap(),
        |buffer, stream| buffer.fill_gpu(7, stream).unwrap(),
        |buffer, stream| {
            buffer.gpu_on(stream).unwrap();
        },
    ];
    for (kind, use_it) in busy.iter().enumerate() {
        let before = sim::live();
        let mut buffer = CpuGpuBuffer::<u32>::new(WORDS, DEVICE).unwrap();
        let mut idle = CpuGpuBuffer::<u32>::new(WORDS, DEVICE).unwrap();
        idle.fill(1, &stream).unwrap();
        idle.synchronize().unwrap();
        let host = buffer.cpu().unwrap().as_ptr();
        let gate = Gate::close(&stream);
        use_it(&mut buffer, &stream);
        let gpu = (buffer.device_ptr(), idle.device_ptr());
        sim::reset();
        sim::break_at(1, ILLEGAL);
        stream.synchronize().unwrap_err();
        drop(buffer);
        assert_eq!(releases(), [0, 0, 0], "kind {kind}: memory was given back that may be in use");
        // Known to be idle: that is given back, whatever comes of it. Its host side is a piece of a
        // chunk.
        drop(idle);
        assert_eq!(releases(), [1, 0, 0], "kind {kind}");
        gate.open();
        sim::heal();
        // No side that may be in use is to be had again.
        let now = sim::live();
        assert_eq!(
            [now[0] - before[0], now[1] - before[1]],
            [2, 1],
            "kind {kind}: with the gate's page"
        );
        let again: Vec<_> =
            (0..20).map(|_| CpuGpuBuffer::<u32>::new(WORDS, DEVICE).unwrap()).collect();
        for buffer in again {
            assert!(buffer.is_pinned());
            assert!(![gpu.0, gpu.1].contains(&buffer.device_ptr()), "kind {kind}");
            assert_ne!(buffer.cpu().unwrap().as_ptr(), host, "kind {kind}");
        }
    }
}

#[test]
fn a_broken_context_is_found_in_the_last_error_once_and_only_after_a_foreign_call() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "faults need the simulated runtime");
    }
    let _turn = common::turn();
    let stream = Stream::new(DEVICE).unwrap();
    common::use_first_device();
    sim::reset();
    sim::break_at(1, ILLEGAL);
    // SAFETY: no arguments.
    let last_error = || unsafe { sys::cudaGetLastError() };
    stream.synchronize().unwrap_err();
    // Ours was cleared.
    assert_eq!(last_error(), sys::cudaError::cudaSuccess);
    // SAFETY: the stream is live.
    let foreign = unsafe { sys::cudaStreamQuery(stream.as_raw()) };
    assert_eq!([foreign.0, last_error().0, last_error().0], [ILLEGAL, ILLEGAL, 0]);
    sim::heal();
    stream.synchronize().unwrap();
}

// ---- a forked child ----

#[test]
fn every_operation_is_refused_in_a_forked_child_and_makes_no_call() {
    let test = test_name!();
    if !common::is_simulated() {
        return common::left_out(test, "calls are counted by the simulated runtime");
    }
    if !common::is_subprocess() {
        let output = common::in_subprocess(test, &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        return assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    }
    // These say what there is, and in the child there is nothing.
    let answers = ["Device::auto", "Device::cuda_count", "is_pinned_memory_available"];
    assert_eq!(Device::auto(), DEVICE);
    for state in [State::Fresh, State::Busy] {
        let mut bench = Bench::new(state, |_| true);
        let view = bench.buffer.gpu_on(&bench.stream).unwrap();
        let (address, rows) = (view.as_mut_ptr(), view.len());
        let calls = sim::calls();
        in_child(|| {
            for (name, operation) in OPERATIONS {
                let result = operation(&mut bench);
                match answers.contains(name) {
                    true => assert_eq!(result, Ok(()), "{name}"),
                    false => assert_eq!(result, Err(Error::Forked), "{name}"),
                }
            }
            // What is known without CUDA is still told.
            assert_eq!((bench.buffer.device_ptr(), bench.buffer.numel()), (address, rows));
            assert_eq!((Device::auto(), Device::cuda_count()), (Device::Cpu, 0));
            assert!(!is_pinned_memory_available());
            drop(bench.stream.clone());
            drop(bench);
            assert_eq!(sim::calls(), calls, "the child called CUDA");
        });
    }
}
