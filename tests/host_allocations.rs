//! An allocation whose size the caller chose returns an error if memory runs out. It never aborts
//! the process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

use cpu_gpu_buffer::{
    BufferGroup, BufferPool, CpuGpuBuffer, Device, Error, GroupLayout, GroupLayoutBuilder,
    GroupRing, MemberKey, MemberRows, Result, Shape, Side, Stream,
};

thread_local! {
    /// The most bytes that this thread gets at once.
    static MOST: Cell<usize> = const { Cell::new(usize::MAX) };
    /// The bytes that it still gets; nothing is added when it gives some back.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The system's memory, of which a thread gets no more than it is to.
struct Limited;

impl Limited {
    fn refuses(bytes: usize) -> bool {
        let left = LEFT.get().checked_sub(bytes).filter(|_| bytes <= MOST.get());
        LEFT.set(left.unwrap_or(LEFT.get()));
        left.is_none()
    }
}

// SAFETY: the system's allocator, or no memory, which is an answer, too.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if Limited::refuses(layout.size()) {
            return ptr::null_mut();
        }
        // SAFETY: the caller's own contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if Limited::refuses(layout.size()) {
            return ptr::null_mut();
        }
        // SAFETY: the caller's own contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if Limited::refuses(bytes) {
            return ptr::null_mut();
        }
        // SAFETY: the caller's own contract.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's own contract.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Limited = Limited;

/// Runs an action whose thread gets so many bytes at once at most, and so many together.
fn within<R>(most: usize, together: usize, action: impl FnOnce() -> R) -> R {
    struct Unlimited;
    impl Drop for Unlimited {
        fn drop(&mut self) {
            MOST.set(usize::MAX);
            LEFT.set(usize::MAX);
        }
    }
    let _after = Unlimited;
    MOST.set(most);
    LEFT.set(together);
    action()
}

/// Runs an action in whose thread no allocation is larger than this.
fn limited<R>(most: usize, action: impl FnOnce() -> R) -> R {
    within(most, usize::MAX, action)
}

/// Bytes that do for every fixed number of things, and not for `MANY`.
const FEW: usize = 8 << 10;
const MANY: usize = 20_000;

#[track_caller]
fn is_out_of_memory<R>(made: Result<R>, on: Device) {
    match made.map(drop) {
        Err(Error::OutOfMemory { side: Side::Host, bytes, device }) => {
            // Lists that grow ask for twice as much as they need.
            assert!(bytes > FEW / 2 && device == on, "{bytes} bytes on {device}");
        }
        other => panic!("{other:?}"),
    }
}

fn members(count: usize, rows: usize) -> (Vec<MemberKey<u8>>, GroupLayout) {
    let mut builder = GroupLayoutBuilder::new();
    let keys = (0..count).map(|_| builder.add::<u8>(rows)).collect();
    (keys, builder.build().unwrap())
}

fn devices(run: impl Fn(Device, &Stream)) {
    let _turn = common::turn();
    for device in common::devices() {
        run(device, &Stream::new(device).unwrap());
    }
}

#[test]
fn many_members_are_an_error_where_memory_for_them_runs_out() {
    devices(|device, _| {
        let (_, layout) = members(MANY, 0);
        limited(FEW, || {
            is_out_of_memory(BufferGroup::new(&layout, device), device);
            is_out_of_memory(GroupRing::new(&layout, device, 2), device);
        });
        // Lists of the layout are of no device: the error is `build`'s, and names the CPU.
        let layout = limited(FEW, || {
            let mut builder = GroupLayoutBuilder::new();
            for _ in 0..MANY {
                builder.add::<u8>(0);
            }
            builder.build()
        });
        is_out_of_memory(layout, Device::Cpu);
        let mut builder = GroupLayoutBuilder::new();
        for _ in 0..MANY {
            builder.add::<u8>(0);
        }
        is_out_of_memory(limited(FEW, || builder.build()), Device::Cpu);
    });
}

#[test]
fn many_slots_are_an_error_where_memory_for_them_runs_out() {
    devices(|device, _| {
        let (_, layout) = members(1, 0);
        limited(FEW, || is_out_of_memory(GroupRing::new(&layout, device, 1 << 16), device));
    });
}

#[test]
fn many_members_and_many_slots_take_no_memory_for_each_pair() {
    devices(|device, _| {
        let (keys, layout) = members(MANY, 0);
        // A word for each pair would be 10 GB.
        let most = 64 << 20;
        let ring = within(most, most, || GroupRing::new(&layout, device, 1 << 16));
        let mut ring = ring.unwrap();
        ring.advance().unwrap();
        assert!(ring.cpu_mut(keys[MANY - 1]).unwrap().is_empty());
    });
}

#[test]
fn a_copy_of_many_members_is_an_error_where_memory_for_it_runs_out() {
    devices(|device, stream| {
        let (keys, layout) = members(MANY, 1);
        let rows: Vec<MemberRows> = keys.iter().map(|key| key.rows(..)).collect();
        let mut group = BufferGroup::new(&layout, device).unwrap();
        for key in &keys {
            group.cpu_mut(*key).unwrap().fill(3);
        }
        limited(FEW, || is_out_of_memory(group.copy_to_gpu(&rows, stream), device));
        if device != Device::Cpu {
            // The slot's table of the members is made with its first copy.
            limited(FEW, || is_out_of_memory(group.copy_to_gpu(&rows[..1], stream), device));
        }
        group.copy_to_gpu(&rows, stream).unwrap();
        group.copy_to_cpu(&rows, stream).unwrap();
        assert_eq!(group.cpu(keys[MANY - 1]).unwrap(), [3]);
    });
}

#[test]
fn steps_of_a_group_and_of_a_ring_allocate_nothing_once_they_were_all_taken() {
    devices(|device, stream| {
        let mut builder = GroupLayoutBuilder::new();
        let (table, sampled) = (builder.add::<u32>([4000, 2]), builder.add::<u32>(8));
        let layout = builder.build().unwrap();
        let mut group = BufferGroup::new(&layout, device).unwrap();
        let mut ring = GroupRing::new(&layout, device, 3).unwrap();
        let other = Stream::new(device).unwrap();
        // Rows in many places, in no order, and some of them often.
        let rows = (0..1000).map(|at| table.rows(at * 7 % 1000 * 4..at * 7 % 1000 * 4 + 1));
        let mut rows: Vec<MemberRows> = rows.collect();
        rows.extend_from_within(..100);
        let mut step = |step: u32| -> Result<()> {
            let stream = if step.is_multiple_of(2) { stream } else { &other };
            group.cpu_mut(table)?.fill(step);
            group.copy_to_gpu(&rows, stream)?;
            group.copy_to_cpu(&rows, stream)?;
            ring.advance()?;
            let mut members = ring.members_mut();
            let before = members.cpu_back(1, sampled)?[0];
            members.cpu_mut(table)?.fill(before);
            ring.copy_to_gpu(&rows, stream)?;
            ring.gpu_on(stream)?.member(sampled)?;
            ring.copy_to_cpu(&[sampled.into()], stream)?;
            ring.cpu_back(1, sampled).map(drop)
        };
        (2..20).try_for_each(&mut step).unwrap();
        let left = LEFT.get();
        let done = (20..60).try_for_each(&mut step);
        assert_eq!((done, LEFT.get()), (Ok(()), left));
    });
}

#[test]
fn many_buffers_of_a_pool_are_an_error_where_memory_for_them_runs_out() {
    devices(|device, _| {
        limited(FEW, || is_out_of_memory(BufferPool::<u8>::new(0, device, MANY), device));
    });
}

#[test]
fn a_shape_of_many_dimensions_takes_no_memory_for_them() {
    let dims = vec![1; MANY];
    limited(FEW, || {
        let made = CpuGpuBuffer::<u8>::new(Shape::from(&dims[..]), Device::Cpu);
        assert!(matches!(made, Err(Error::InvalidShape { .. })), "{made:?}");
    });
}
