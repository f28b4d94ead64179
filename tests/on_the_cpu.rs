//! Buffers, views, groups, rings, pools and tensors on the CPU never touch invalid memory.
//!
//! Miri runs this program (`.ci/miri`). The program therefore asks for no CUDA device and loads no
//! library.

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, BufferPool, BufferRing, CpuGpuBuffer, Device, Error,
    GroupLayoutBuilder, GroupRing, HostFlags, Stream,
};

fn stream() -> Stream {
    Stream::new(Device::Cpu).unwrap()
}

fn buffer<T: bytemuck::Pod>(shape: &[usize]) -> CpuGpuBuffer<T> {
    CpuGpuBuffer::new(shape, Device::Cpu).unwrap()
}

#[test]
fn rows_go_to_the_device_side_and_back() {
    let stream = stream();
    let mut rows = buffer::<u16>(&[5, 3]);
    assert!(rows.cpu().unwrap().iter().all(|value| *value == 0));
    for (index, value) in rows.cpu_mut().unwrap().iter_mut().enumerate() {
        *value = index as u16;
    }
    rows.copy_to_gpu(1..4, &stream).unwrap();
    rows.cpu_mut().unwrap().fill(99);
    rows.copy_to_cpu(..2, &stream).unwrap();
    assert_eq!(rows.cpu().unwrap()[..7], [0, 0, 0, 3, 4, 5, 99]);
    assert_eq!(rows.try_cpu().unwrap().unwrap().len(), 15);
    rows.try_cpu_mut().unwrap().unwrap()[14] = 7;
    rows.copy_to_gpu(.., &stream).unwrap();
    let view = rows.gpu_on(&stream).unwrap();
    let host = view.as_host_slice().unwrap();
    assert_eq!((host[6], host[14]), (99, 7));
    rows.synchronize().unwrap();
    assert!(rows.is_idle().unwrap());
}

#[test]
fn a_view_of_rows_is_written_through_its_address() {
    let stream = stream();
    let mut rows = buffer::<u32>(&[4, 2]);
    let view = rows.gpu_on(&stream).unwrap().rows(1..3).unwrap();
    assert_eq!(view.shape(), [2, 2]);
    for index in 0..view.len() {
        // SAFETY: within the view.
        let address = unsafe { view.as_mut_ptr().add(index) };
        // SAFETY: nothing else refers to the device side while the view lives.
        unsafe { address.write(index as u32 + 1) };
    }
    assert_eq!(view.as_host_slice(), Some(&[1, 2, 3, 4][..]));
    rows.copy_to_cpu(.., &stream).unwrap();
    assert_eq!(rows.cpu().unwrap(), [0, 0, 1, 2, 3, 4, 0, 0]);
    assert_eq!(
        rows.gpu_on(&stream).unwrap().rows(3..5).err().map(|error| error.to_string()),
        Some("rows 3..5 are not within 0..4".into())
    );
}

#[test]
fn addresses_of_others_are_read_and_written() {
    let stream = stream();
    let mut rows = buffer::<u64>(&[3]);
    rows.cpu_mut().unwrap().copy_from_slice(&[1, 2, 3]);
    let mut others = [0u64; 3];
    // SAFETY: valid for writes of three rows, and the copy is done when the call returns.
    unsafe { rows.copy_to_device_ptr(.., others.as_mut_ptr(), &stream) }.unwrap();
    assert_eq!(others, [1, 2, 3]);
    others[1] = 20;
    // SAFETY: valid for reads of three rows, and the copy is done when the call returns.
    unsafe { rows.copy_from_device_ptr(.., others.as_ptr(), &stream) }.unwrap();
    assert_eq!(rows.cpu().unwrap(), [1, 20, 3]);
}

#[test]
fn memory_of_others_is_the_host_side_until_the_buffer_moves_out_of_it() {
    let stream = stream();
    let numbers: Arc<[Cell]> = (0..6).map(|number| Cell(number.into())).collect();
    let host = NonNull::from(&*numbers).cast::<u64>();
    let options = BufferOptions::default();
    let adopt = |shape: [usize; 2]| {
        let owner = Arc::new(numbers.clone());
        // SAFETY: the owner keeps six numbers, which nothing else uses while the buffer does.
        unsafe { CpuGpuBuffer::adopt(host, shape, Device::Cpu, owner, options) }.unwrap()
    };
    let mut adopted = adopt([3, 2]);
    assert_eq!(adopted.cpu().unwrap(), [0, 1, 2, 3, 4, 5]);
    adopted.copy_to_gpu(1.., &stream).unwrap();
    adopted.cpu_mut().unwrap().fill(9);
    adopted.copy_to_cpu(..2, &stream).unwrap();
    assert_eq!(adopted.cpu().unwrap(), [0, 0, 2, 3, 9, 9]);
    adopted.resize([1, 2]).unwrap();
    adopted.cpu_mut().unwrap()[1] = 7;
    adopted.resize([3, 3]).unwrap();
    assert_eq!(Arc::strong_count(&numbers), 1);
    adopted.fill(4, &stream).unwrap();
    drop(adopted);
    assert_eq!(adopt([3, 2]).cpu().unwrap(), [0, 7, 2, 3, 9, 9]);
    let options = BufferOptions { host_flags: HostFlags::READ_ONLY, ..options };
    // SAFETY: as above.
    let read_only =
        unsafe { CpuGpuBuffer::adopt(host, 6, Device::Cpu, Arc::new(numbers.clone()), options) };
    let mut read_only = read_only.unwrap();
    assert_eq!(read_only.cpu_mut(), Err(Error::ReadOnly));
    read_only.copy_to_gpu(.., &stream).unwrap();
    let view = read_only.gpu_on(&stream).unwrap();
    assert_eq!(view.as_host_slice(), Some(&[0, 7, 2, 3, 9, 9][..]));
    drop(read_only);
    // SAFETY: no buffer has the numbers any more.
    assert_eq!(unsafe { numbers[1].0.get().read() }, 7);
}

/// A number that is written through its address.
struct Cell(UnsafeCell<u64>);

// SAFETY: the test uses the numbers of an array on one thread.
unsafe impl Sync for Cell {}

#[test]
fn fills_of_every_width_cover_each_element() {
    fn check<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(value: T) {
        let stream = stream();
        let mut filled = buffer::<T>(&[7]);
        filled.fill(value, &stream).unwrap();
        assert_eq!(filled.cpu().unwrap(), [value; 7]);
        assert_eq!(filled.gpu_on(&stream).unwrap().as_host_slice(), Some(&[value; 7][..]));
        filled.zero(&stream).unwrap();
        filled.fill_cpu(value).unwrap();
        filled.copy_to_cpu(3.., &stream).unwrap();
        let (first, last) = filled.cpu().unwrap().split_at(3);
        assert_eq!(first, [value; 3]);
        assert!(last.iter().all(|value| bytemuck::bytes_of(value).iter().all(|byte| *byte == 0)));
        filled.fill_gpu(value, &stream).unwrap();
        filled.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(filled.cpu().unwrap(), [value; 7]);
    }
    check(5u8);
    check(0x0102u16);
    check([1u8, 2, 3]);
    check(0x0102_0304u32);
    check(-0.0f64);
    check([1u64, 2, 3]);
    buffer::<()>(&[9]).fill_cpu(()).unwrap();
}

#[test]
fn a_size_changes_within_the_capacity_and_beyond_it() {
    let stream = stream();
    let mut sized = buffer::<u32>(&[8]);
    sized.fill(3, &stream).unwrap();
    for shape in [&[4, 1][..], &[0], &[2, 4], &[64], &[3]] {
        sized.resize(shape).unwrap();
        assert_eq!(sized.shape(), shape);
        assert!(sized.cpu().unwrap().iter().all(|value| *value == 0));
        let device = sized.gpu_on(&stream).unwrap();
        assert!(device.as_host_slice().unwrap().iter().all(|value| *value == 0));
        sized.fill(9, &stream).unwrap();
    }
    assert!(matches!(sized.resize([1; 9]), Err(Error::InvalidShape { .. })));
}

#[test]
fn what_is_moved_swapped_or_forgotten_stays_whole() {
    let stream = stream();
    let mut one = buffer::<u8>(&[3]);
    let mut other = buffer::<u8>(&[5]);
    one.fill(1, &stream).unwrap();
    other.fill(2, &stream).unwrap();
    std::mem::swap(&mut one, &mut other);
    assert_eq!((one.cpu().unwrap(), other.cpu().unwrap()), (&[2; 5][..], &[1; 3][..]));
    let moved = Box::new(one);
    let moved = thread::spawn(move || {
        assert_eq!(moved.cpu().unwrap(), [2; 5]);
        moved
    });
    assert_eq!(moved.join().unwrap().cpu().unwrap(), [2; 5]);
    let event = stream.record().unwrap();
    stream.wait(&event).unwrap();
    assert!(event.is_complete().unwrap() && stream.is_idle().unwrap());
}

#[test]
fn members_of_a_group_do_not_touch_each_other() {
    let stream = stream();
    let mut builder = GroupLayoutBuilder::new();
    let small = builder.add::<u8>([3, 1]);
    let none = builder.add::<u64>([0, 4]);
    let wide = builder.add::<u64>([2, 2]);
    let host = builder.add_mirrored::<u16>(5);
    let layout = builder.build().unwrap();
    let mut group = BufferGroup::new(&layout, Device::Cpu).unwrap();
    let mut members = group.members_mut();
    // All at once, and each by itself.
    let (a, b, c, d) = (
        members.cpu_mut(small).unwrap(),
        members.cpu_mut(none).unwrap(),
        members.cpu_mut(wide).unwrap(),
        members.cpu_mut(host).unwrap(),
    );
    a.fill(1);
    c.fill(2);
    d.fill(3);
    assert!(b.is_empty());
    a[0] = 4;
    group.copy_to_gpu(&[wide.rows(1..), small.rows(..2), host.rows(..)], &stream).unwrap();
    let mut view = group.gpu_on(&stream).unwrap();
    assert_eq!(view.member(small).unwrap().as_host_slice(), Some(&[4, 1, 0][..]));
    let mut wide_view = view.member(wide).unwrap();
    assert_eq!(wide_view.as_host_slice(), Some(&[0, 0, 2, 2][..]));
    wide_view.as_host_slice_mut().unwrap()[0] = 5;
    group.cpu_mut(wide).unwrap().fill(0);
    group.copy_to_cpu(&[wide.rows(..1)], &stream).unwrap();
    assert_eq!(group.cpu(wide).unwrap(), [5, 0, 0, 0]);
    assert_eq!(group.cpu(small).unwrap(), [4, 1, 1]);
    assert_eq!(group.cpu(host).unwrap(), [3; 5]);
    group.synchronize().unwrap();
}

#[test]
fn older_slots_are_read_beside_writes_of_the_current_one() {
    let stream = stream();
    let mut builder = GroupLayoutBuilder::new();
    let (ids, flags) = (builder.add::<i32>([4, 2]), builder.add::<u8>(3));
    let mut ring = GroupRing::new(&builder.build().unwrap(), Device::Cpu, 3).unwrap();
    for step in 0..6 {
        ring.advance().unwrap();
        let mut members = ring.members_mut();
        let now = members.cpu_mut(ids).unwrap();
        let before = members.cpu_back(1, ids).unwrap();
        let own = members.cpu_back(0, flags).unwrap();
        let again = members.cpu_back(1, ids).unwrap();
        now.copy_from_slice(before);
        now[7] += i32::from(own[0]) + 1;
        assert_eq!((before[7], again[7], now[7]), (step, step, step + 1));
        // Rows in many places, in no order, and some of them often.
        let rows = [ids.rows(3..), ids.rows(..1), ids.rows(2..), ids.rows(3..), ids.rows(..0)];
        ring.copy_to_gpu(&rows, &stream).unwrap();
        let mut view = ring.gpu_on(&stream).unwrap();
        let (mut first, mut second) = (view.member(ids).unwrap(), view.member(flags).unwrap());
        let (from, to) = (first.as_host_slice_mut().unwrap(), second.as_host_slice_mut().unwrap());
        to[2] = from[7] as u8;
        from[0] = 5;
        ring.copy_to_cpu(&[flags.rows(2..), ids.rows(..1), ids.rows(0..1)], &stream).unwrap();
        assert_eq!(ring.cpu(flags).unwrap(), [0, 0, step as u8 + 1]);
        assert_eq!(ring.cpu_back(0, ids).unwrap()[..2], [5, 0]);
    }
    let view = ring.gpu_on(&stream).unwrap().member(ids).unwrap().rows(1..).unwrap();
    assert_eq!(view.into_host_slice().unwrap(), [0, 0, 0, 0, 0, 6]);
}

#[test]
fn slots_of_a_ring_are_written_in_turn() {
    let stream = stream();
    let mut builder = GroupLayoutBuilder::new();
    let ids = builder.add::<i32>(6);
    let flags = builder.add::<u8>(3);
    let mut ring = GroupRing::new(&builder.build().unwrap(), Device::Cpu, 3).unwrap();
    for step in 0..7i32 {
        ring.advance().unwrap();
        ring.cpu_mut(ids).unwrap()[..2].fill(step);
        ring.members_mut().cpu_mut(flags).unwrap().fill(step as u8);
        ring.copy_to_gpu(&[ids.rows(..2), flags.rows(..)], &stream).unwrap();
        let mut view = ring.gpu_on(&stream).unwrap();
        assert_eq!(view.member(ids).unwrap().as_host_slice(), Some(&[step, step, 0, 0, 0, 0][..]));
        assert_eq!(view.member(flags).unwrap().as_host_slice(), Some(&[step as u8; 3][..]));
        assert!(ring.is_idle().unwrap());
    }
    let mut uploads = BufferRing::<u16>::new([2, 2], Device::Cpu, 2).unwrap();
    for step in 0..5 {
        uploads.advance().unwrap().fill(step);
        uploads.copy_to_gpu(1.., &stream).unwrap();
        let view = uploads.gpu_on(&stream).unwrap();
        assert_eq!(view.as_host_slice(), Some(&[0, 0, step, step][..]));
    }
    uploads.synchronize().unwrap();
}

#[test]
fn threads_share_a_pool_and_its_buffers_outlive_it() {
    let pool = BufferPool::<u32>::new(5, Device::Cpu, 2).unwrap();
    thread::scope(|scope| {
        for number in 1..4 {
            let pool = &pool;
            scope.spawn(move || {
                let stream = stream();
                for _ in 0..3 {
                    let mut held = pool.acquire().unwrap();
                    held.fill(number, &stream).unwrap();
                    held.copy_to_cpu(.., &stream).unwrap();
                    assert_eq!(held.cpu().unwrap(), [number; 5]);
                }
            });
        }
    });
    let held: Vec<_> = (0..5).map(|_| pool.acquire().unwrap()).collect();
    assert!(pool.try_acquire().is_none() || pool.total() > 5);
    drop(pool);
    thread::spawn(move || drop(held)).join().unwrap();
}

#[test]
#[cfg(feature = "dlpack")]
fn tensors_and_their_buffer_go_in_either_order() {
    let stream = stream();
    for buffer_first in [true, false] {
        let mut lent = buffer::<f32>(&[2, 3]);
        lent.fill(1.5, &stream).unwrap();
        let host = lent.export_cpu().unwrap().into_raw();
        let device = lent.export_gpu(&stream).unwrap().into_raw_unversioned();
        // SAFETY: the tensor lives until its deleter is called, and nobody changes it.
        let host_tensor = unsafe { &(*host).dl_tensor };
        // SAFETY: as above.
        let device_tensor = unsafe { &(*device).dl_tensor };
        // SAFETY: as above.
        let host_deleter = unsafe { (*host).deleter }.unwrap();
        // SAFETY: as above.
        let device_deleter = unsafe { (*device).deleter }.unwrap();
        let lent = if buffer_first { None } else { Some(lent) };
        for tensor in [host_tensor, device_tensor] {
            // SAFETY: there are as many dimensions.
            let shape = unsafe { std::slice::from_raw_parts(tensor.shape, tensor.ndim as usize) };
            assert_eq!(shape, [2, 3]);
            // SAFETY: the tensor has six elements.
            let last = unsafe { tensor.data.cast::<f32>().add(5) };
            // SAFETY: nobody else looks at the side while the tensor lives.
            unsafe { last.write(2.5) };
        }
        // SAFETY: each tensor's deleter, once.
        unsafe { host_deleter(host) };
        // SAFETY: as above.
        unsafe { device_deleter(device) };
        if let Some(mut lent) = lent {
            assert_eq!(lent.cpu().unwrap()[4..], [1.5, 2.5]);
            let view = lent.gpu_on(&stream).unwrap();
            assert_eq!(view.as_host_slice().unwrap()[4..], [1.5, 2.5]);
        }
    }
    drop(buffer::<u8>(&[1]).export_cpu().unwrap());
    cpu_gpu_buffer::dlpack::reclaim().unwrap();
}

#[test]
fn values_may_cross_a_caught_panic() {
    use std::panic::{RefUnwindSafe, UnwindSafe};

    fn both<T: UnwindSafe + RefUnwindSafe>() {}
    both::<cpu_gpu_buffer::Device>();
    both::<cpu_gpu_buffer::Error>();
    both::<cpu_gpu_buffer::Shape>();
    both::<cpu_gpu_buffer::DType>();
    both::<Stream>();
    both::<cpu_gpu_buffer::Event>();
    both::<CpuGpuBuffer<f32>>();
    both::<cpu_gpu_buffer::BufferPool<f32>>();
    both::<BufferGroup>();
    both::<cpu_gpu_buffer::GroupLayout>();
    both::<cpu_gpu_buffer::MemberKey<f32>>();
    both::<GroupRing>();
    both::<cpu_gpu_buffer::BufferRing<f32>>();
    both::<cpu_gpu_buffer::BufferOptions>();
    both::<cpu_gpu_buffer::PoolOptions>();
    both::<cpu_gpu_buffer::StreamOptions>();
}

#[test]
fn keys_are_equal_if_they_name_one_member() {
    use std::collections::HashMap;

    use cpu_gpu_buffer::{MemberKey, MemberRows};

    let (mut one, mut other) = (GroupLayoutBuilder::new(), GroupLayoutBuilder::new());
    let (a, b, foreign): (MemberKey<u8>, _, _) = (one.add(4), one.add(4), other.add(4));
    let clone = a;
    assert!(a == clone && a != b && a != foreign);
    let names = HashMap::from([(a, "a"), (b, "b"), (foreign, "foreign")]);
    assert_eq!([names[&clone], names[&b], names[&foreign]], ["a", "b", "foreign"]);
    let all: MemberRows = a.into();
    assert_eq!(format!("{all:?}"), format!("{:?}", a.rows(..)));
}

#[test]
fn shapes_come_from_whatever_lists_numbers() {
    use cpu_gpu_buffer::Shape;

    let expected = Shape::from([2, 3, 4, 5]);
    assert_eq!(Shape::from((2, 3, 4, 5)), expected);
    assert_eq!(Shape::from(&vec![2, 3, 4, 5]), expected);
    assert_eq!(Shape::from((2, 3, 4)), Shape::from([2, 3, 4]));
    assert_eq!((Shape::from((2, 3)), Shape::from((2,))), (Shape::from([2, 3]), Shape::from(2)));
}

#[test]
fn element_types_are_read_from_their_names() {
    use cpu_gpu_buffer::{DType, Error};

    for (name, bytes) in [
        ("u8", 1),
        ("i8", 1),
        ("u16", 2),
        ("i16", 2),
        ("u32", 4),
        ("i32", 4),
        ("u64", 8),
        ("i64", 8),
        ("f8e4m3", 1),
        ("f8e5m2", 1),
        ("f16", 2),
        ("bf16", 2),
        ("f32", 4),
        ("f64", 8),
    ] {
        let dtype: DType = name.parse().unwrap();
        assert_eq!((dtype.name(), dtype.size_of()), (name, bytes));
    }
    for text in ["", "float", "F32", "f32 "] {
        assert_eq!(text.parse::<DType>(), Err(Error::InvalidDType { text: text.into() }));
    }
}

#[test]
fn clones_of_an_event_are_one_event() {
    let stream = stream();
    let event = stream.record().unwrap();
    let clone = event.clone();
    drop(event);
    stream.wait(&clone).unwrap();
    clone.synchronize().unwrap();
    let later = stream.record().unwrap();
    later.clone().synchronize().unwrap();
    assert!(clone.is_complete().unwrap());
    later.elapsed_since(&clone).unwrap();
}
