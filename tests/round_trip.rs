//! Rows arrive in full, both sides begin as zeroes, and a buffer describes itself, on the CPU and
//! on CUDA.

mod common;

use common::{device_bytes, test_name};
use cpu_gpu_buffer::{
    BufferOptions, CpuGpuBuffer, DType, Device, Element, HostFlags, Pinning, Shape, Stream,
    is_pinned_memory_available,
};

#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Zeroable)]
#[repr(C, align(1024))]
struct Wide([u8; 1024]);
// SAFETY: bytes, without padding: the size is the alignment.
unsafe impl bytemuck::Pod for Wide {}

#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Zeroable)]
#[repr(C, align(16384))]
struct Page([u8; 16384]);
// SAFETY: as above.
unsafe impl bytemuck::Pod for Page {}

/// Buffers of every kind of host memory.
fn each(run: impl Fn(Device, &Stream, BufferOptions)) {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        for pinning in [Pinning::Preferred, Pinning::Never] {
            run(device, &stream, BufferOptions { pinning, ..Default::default() });
        }
    }
}

#[test]
fn both_sides_begin_as_zeroes_whatever_the_memory_held() {
    each(|device, stream, options| {
        for rows in [1, 1000, 3 << 20] {
            let dirty = |value: u8| {
                let mut buffer = CpuGpuBuffer::<u8>::with_options(rows, device, options).unwrap();
                buffer.fill(value, stream).unwrap();
                buffer.synchronize().unwrap();
            };
            dirty(0xee);
            let mut buffer = CpuGpuBuffer::<u8>::with_options(rows, device, options).unwrap();
            assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 0));
            buffer.fill_cpu(1).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            assert!(buffer.cpu().unwrap().iter().all(|byte| *byte == 0));

            dirty(0xdd);
            let mut buffer = CpuGpuBuffer::<u8>::with_options(rows, device, options).unwrap();
            let view = buffer.gpu_on(stream).unwrap();
            let address = view.as_ptr();
            stream.synchronize().unwrap();
            assert!(device_bytes(device, address, rows).iter().all(|byte| *byte == 0));

            // A first upload of some rows leaves the others zero.
            dirty(0xcc);
            let mut buffer = CpuGpuBuffer::<u8>::with_options(rows, device, options).unwrap();
            buffer.fill_cpu(9).unwrap();
            buffer.copy_to_gpu(rows / 2.., stream).unwrap();
            buffer.synchronize().unwrap();
            let seen = device_bytes(device, buffer.device_ptr(), rows);
            let (before, after) = seen.split_at(rows / 2);
            assert!(before.iter().all(|byte| *byte == 0));
            assert!(after.iter().all(|byte| *byte == 9));
        }
    });
}

#[test]
fn selected_rows_move_and_no_others() {
    each(|device, stream, options| {
        let mut buffer = CpuGpuBuffer::<u16>::with_options([10, 3, 2], device, options).unwrap();
        let fresh: Vec<u16> = (0..60).collect();
        type Copy = fn(&mut CpuGpuBuffer<u16>, &Stream);
        let cases: [(std::ops::Range<usize>, Copy); 6] = [
            (0..10, |buffer, stream| buffer.copy_to_gpu(.., stream).unwrap()),
            (0..4, |buffer, stream| buffer.copy_to_gpu(..4, stream).unwrap()),
            (2..7, |buffer, stream| buffer.copy_to_gpu(2..7, stream).unwrap()),
            (0..4, |buffer, stream| buffer.copy_to_gpu(..=3, stream).unwrap()),
            (9..10, |buffer, stream| buffer.copy_to_gpu(9.., stream).unwrap()),
            (5..5, |buffer, stream| buffer.copy_to_gpu(5..5, stream).unwrap()),
        ];
        for (rows, copy) in cases {
            buffer.fill_gpu(777, stream).unwrap();
            buffer.cpu_mut().unwrap().copy_from_slice(&fresh);
            copy(&mut buffer, stream);
            buffer.cpu_mut().unwrap().fill(0);
            buffer.copy_to_cpu(.., stream).unwrap();
            for (at, seen) in buffer.cpu().unwrap().iter().enumerate() {
                let expected = if rows.contains(&(at / 6)) { fresh[at] } else { 777 };
                assert_eq!(*seen, expected, "element {at} of {rows:?} on {device}");
            }
        }
        buffer.fill_gpu(5, stream).unwrap();
        buffer.fill_cpu(6).unwrap();
        buffer.copy_to_cpu(3..5, stream).unwrap();
        for (at, seen) in buffer.cpu().unwrap().iter().enumerate() {
            assert_eq!(*seen, if (3..5).contains(&(at / 6)) { 5 } else { 6 });
        }
    });
}

#[test]
fn rows_go_to_and_come_from_memory_of_others() {
    each(|device, stream, options| {
        let mut ours = CpuGpuBuffer::<u32>::with_options([8, 4], device, options).unwrap();
        let mut theirs = CpuGpuBuffer::<u32>::with_options([8, 4], device, options).unwrap();
        theirs.fill_gpu(1, stream).unwrap();
        ours.fill_cpu(2).unwrap();
        let address = theirs.gpu_on(stream).unwrap().as_mut_ptr();
        // SAFETY: memory of the same shape, used on the same stream.
        unsafe { ours.copy_to_device_ptr(2..4, address, stream) }.unwrap();
        theirs.copy_to_cpu(.., stream).unwrap();
        for (row, seen) in theirs.cpu().unwrap().chunks(4).enumerate() {
            assert_eq!(seen, [if (2..4).contains(&row) { 2 } else { 1 }; 4]);
        }
        // SAFETY: as above.
        unsafe { ours.copy_from_device_ptr(3..5, address, stream) }.unwrap();
        for (row, seen) in ours.cpu().unwrap().chunks(4).enumerate() {
            assert_eq!(seen, [if row == 4 { 1 } else { 2 }; 4]);
        }
    });
}

#[test]
fn resizing_zeroes_both_sides_and_keeps_memory_that_fits() {
    each(|device, stream, options| {
        let mut buffer = CpuGpuBuffer::<i32>::with_options([6, 4], device, options).unwrap();
        buffer.fill(-1, stream).unwrap();
        let address = buffer.device_ptr();
        for shape in [Shape::from([2, 3]), Shape::from([24]), Shape::from([100, 2]), Shape::from(1)]
        {
            buffer.fill(-1, stream).unwrap();
            buffer.resize(shape).unwrap();
            assert_eq!(buffer.shape(), shape.dims());
            assert_eq!(buffer.numel(), shape.dims().iter().product::<usize>());
            if buffer.numel() <= 24 && buffer.shape() != [1] {
                assert_eq!(buffer.device_ptr(), address);
            }
            assert!(buffer.cpu().unwrap().iter().all(|element| *element == 0));
            buffer.fill_cpu(3).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            assert!(buffer.cpu().unwrap().iter().all(|element| *element == 0));
        }
        assert_eq!(buffer.is_pinned(), device != Device::Cpu && options.pinning != Pinning::Never);
    });
}

#[test]
fn shapes_and_types_of_no_size_work() {
    each(|device, stream, options| {
        for shape in [Shape::from([0]), Shape::from([4, 0, 3]), Shape::from([0, usize::MAX, 9])] {
            let mut buffer = CpuGpuBuffer::<f32>::with_options(shape, device, options).unwrap();
            assert_eq!((buffer.numel(), buffer.nbytes()), (0, 0));
            assert!(buffer.device_ptr().is_null());
            buffer.copy_to_gpu(.., stream).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            buffer.fill(1.0, stream).unwrap();
            assert!(buffer.cpu().unwrap().is_empty() && buffer.cpu_mut().unwrap().is_empty());
            assert!(buffer.gpu_on(stream).unwrap().is_empty());
            assert!(buffer.is_idle().unwrap());
            buffer.resize([2, 2]).unwrap();
            buffer.fill(1.0, stream).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            assert_eq!(buffer.cpu().unwrap(), [1.0; 4]);
            let address = buffer.device_ptr();
            buffer.resize(shape).unwrap();
            assert!(buffer.cpu().unwrap().is_empty());
            // The memory is kept, and so is the address.
            assert_eq!(buffer.device_ptr(), address);
            assert!(!address.is_null());
        }
        let mut units = CpuGpuBuffer::<()>::with_options([3, 4], device, options).unwrap();
        units.copy_to_gpu(1..2, stream).unwrap();
        units.fill((), stream).unwrap();
        assert_eq!(units.cpu().unwrap().len(), 12);
        assert_eq!(units.gpu_on(stream).unwrap().rows(..2).unwrap().len(), 8);
        assert!(units.copy_to_gpu(..4, stream).is_err());
    });
}

#[test]
fn types_of_large_alignment_are_aligned_on_both_sides() {
    each(|device, stream, options| {
        let mut wide = CpuGpuBuffer::<Wide>::with_options(5, device, options).unwrap();
        let mut page = CpuGpuBuffer::<Page>::with_options(3, device, options).unwrap();
        assert!(wide.device_ptr().is_aligned() && page.device_ptr().is_aligned());
        wide.fill(Wide([7; 1024]), stream).unwrap();
        wide.fill_cpu(Wide([1; 1024])).unwrap();
        wide.copy_to_cpu(.., stream).unwrap();
        assert_eq!(wide.cpu().unwrap(), [Wide([7; 1024]); 5]);
        page.cpu_mut().unwrap()[1] = Page([3; 16384]);
        page.copy_to_gpu(1..2, stream).unwrap();
        page.cpu_mut().unwrap()[1] = Page([0; 16384]);
        page.copy_to_cpu(.., stream).unwrap();
        assert!(page.cpu().unwrap()[1] == Page([3; 16384]));
    });
}

#[test]
fn a_buffer_says_what_it_is() {
    let buffer = CpuGpuBuffer::<f32>::new([32, 768], Device::Cpu).unwrap();
    assert_eq!(
        format!("{buffer:?}"),
        "CpuGpuBuffer(shape=[32, 768], dtype=f32, device=cpu, pinned=false)"
    );
    assert_eq!(buffer.dtype(), DType::F32);
    let units = CpuGpuBuffer::<[u16; 3]>::new(2, Device::Cpu).unwrap();
    assert_eq!(
        format!("{units:?}"),
        "CpuGpuBuffer(shape=[2], dtype=[u16; 3], device=cpu, pinned=false)"
    );
    if let Some((device, _turn)) = common::cuda(test_name!()) {
        assert!(is_pinned_memory_available());
        let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
        let buffer = CpuGpuBuffer::<i64>::with_options([2, 3], device, options).unwrap();
        assert_eq!(
            format!("{buffer:?}"),
            "CpuGpuBuffer(shape=[2, 3], dtype=i64, device=cuda:0, pinned=true)"
        );
        let memory = device.memory().unwrap();
        assert!(memory.free > 0 && memory.free <= memory.total);
    } else {
        assert!(!is_pinned_memory_available());
    }
}

#[test]
fn elements_of_array_libraries_have_their_names() {
    fn has<T: Element>(dtype: DType, name: &str) {
        let buffer = CpuGpuBuffer::<T>::new(1, Device::Cpu).unwrap();
        assert_eq!((buffer.dtype(), buffer.dtype().to_string().as_str()), (dtype, name));
        assert!(format!("{buffer:?}").contains(&format!("dtype={name},")), "{buffer:?}");
    }
    has::<u8>(DType::U8, "u8");
    has::<i8>(DType::I8, "i8");
    has::<u16>(DType::U16, "u16");
    has::<i16>(DType::I16, "i16");
    has::<u32>(DType::U32, "u32");
    has::<i32>(DType::I32, "i32");
    has::<u64>(DType::U64, "u64");
    has::<i64>(DType::I64, "i64");
    has::<f32>(DType::F32, "f32");
    has::<f64>(DType::F64, "f64");
}

#[cfg(any(feature = "half", feature = "fp8"))]
#[test]
fn elements_of_other_crates_have_names_and_go_there_and_back() {
    fn check<T: Element + PartialEq + std::fmt::Debug>(dtype: DType, name: &str, value: T) {
        each(|device, stream, options| {
            let mut buffer = CpuGpuBuffer::<T>::with_options([5, 3], device, options).unwrap();
            assert_eq!(
                (buffer.dtype(), T::DTYPE, buffer.nbytes()),
                (dtype, dtype, 15 * size_of::<T>())
            );
            assert!(format!("{buffer:?}").contains(&format!("dtype={name}")));
            buffer.cpu_mut().unwrap()[4] = value;
            buffer.copy_to_gpu(.., stream).unwrap();
            buffer.fill_cpu(T::zeroed()).unwrap();
            buffer.copy_to_cpu(1..2, stream).unwrap();
            assert_eq!(buffer.cpu().unwrap()[3..6], [T::zeroed(), value, T::zeroed()]);
            buffer.fill(value, stream).unwrap();
            buffer.copy_to_cpu(.., stream).unwrap();
            assert_eq!(buffer.cpu().unwrap(), [value; 15]);
        });
    }
    #[cfg(feature = "half")]
    {
        check(DType::F16, "f16", half::f16::from_f32(0.333));
        check(DType::BF16, "bf16", half::bf16::from_f32(-1.5e30));
    }
    #[cfg(feature = "fp8")]
    {
        check(DType::F8E4M3, "f8e4m3", float8::F8E4M3::from_f32(0.333));
        check(DType::F8E5M2, "f8e5m2", float8::F8E5M2::from_f32(-1.5e3));
    }
}

#[test]
fn a_view_covers_the_rows_it_was_asked_for() {
    each(|device, stream, options| {
        let mut buffer = CpuGpuBuffer::<u64>::with_options([5, 2], device, options).unwrap();
        let base = buffer.device_ptr();
        let view = buffer.gpu_on(stream).unwrap();
        assert_eq!((view.as_ptr(), view.len(), view.shape()), (base.cast_const(), 10, &[5, 2][..]));
        assert_eq!(view.device(), device);
        assert_eq!(view.as_host_slice().is_some(), device == Device::Cpu);
        let mut rows = view.rows(1..=2).unwrap();
        assert_eq!((rows.as_mut_ptr(), rows.len()), (base.wrapping_add(2), 4));
        assert_eq!(rows.shape(), [2, 2]);
        let host = rows.as_host_slice_mut();
        assert_eq!(host.is_some(), device == Device::Cpu);
        host.unwrap_or_default().fill(7);
        assert_eq!(rows.as_host_slice(), (device == Device::Cpu).then_some(&[7; 4][..]));
        assert!(rows.rows(..3).is_err());
        assert_eq!(buffer.gpu_on(stream).unwrap().rows(5..).unwrap().len(), 0);
    });
}

#[test]
fn host_flags_without_a_name_are_left_out() {
    let Some((device, _turn)) = common::cuda(test_name!()) else {
        return;
    };
    let stream = Stream::new(device).unwrap();
    // Among them read-only, I/O memory and write-combined.
    let host_flags = HostFlags::from_bits_retain(!0) - HostFlags::READ_ONLY;
    let options = BufferOptions { pinning: Pinning::Required, host_flags };
    let mut buffer = CpuGpuBuffer::<u8>::with_options(5000, device, options).unwrap();
    buffer.fill_gpu(3, &stream).unwrap();
    buffer.copy_to_cpu(.., &stream).unwrap();
    assert_eq!(buffer.cpu().unwrap(), [3; 5000]);
}
