//! The host side as an array of the `ndarray` crate has the buffer's shape, and waits like a slice.

#![cfg(feature = "ndarray")]

mod common;

use common::{Gate, all, device_words, test_name};
use cpu_gpu_buffer::{
    BufferGroup, CpuGpuBuffer, Device, Error, GroupLayoutBuilder, GroupRing, Stream,
};
use ndarray::{Array, Axis, IxDyn};

const WORDS: usize = 3000;
const OLD: u32 = 0x0101_0101;
const NEW: u32 = 0x1234_5678;

#[test]
fn an_array_is_the_host_side_in_the_buffers_shape() {
    let _turn = common::turn();
    for device in common::devices() {
        for shape in [&[7][..], &[2, 3], &[1, 1, 5, 1], &[2, 1, 2, 1, 2, 1, 2, 1], &[3, 0, 2]] {
            let mut buffer = CpuGpuBuffer::<u16>::new(shape, device).unwrap();
            let numel = buffer.numel() as u16;
            let ascending = Array::from_shape_vec(IxDyn(shape), (0..numel).collect()).unwrap();
            buffer.cpu_array_mut().unwrap().assign(&ascending);
            assert_eq!(buffer.cpu().unwrap(), (0..numel).collect::<Vec<_>>());
            assert_eq!(buffer.cpu_array().unwrap(), ascending);
            assert_eq!(buffer.cpu_array().unwrap().as_ptr(), buffer.cpu().unwrap().as_ptr());
        }
        let mut buffer = CpuGpuBuffer::<[u8; 3]>::new([4, 2], device).unwrap();
        buffer.resize([2, 3]).unwrap();
        buffer.cpu_array_mut().unwrap()[[1, 2]] = [1, 2, 3];
        assert_eq!(buffer.cpu().unwrap()[5], [1, 2, 3]);
    }
}

#[test]
fn a_shape_that_no_array_can_have_is_refused() {
    let mut buffer = CpuGpuBuffer::<u8>::new([usize::MAX, 0], Device::Cpu).unwrap();
    assert!(buffer.cpu().unwrap().is_empty());
    let refused = |error| matches!(error, Error::InvalidShape { .. });
    assert!(buffer.cpu_array().is_err_and(refused));
    assert!(buffer.cpu_array_mut().is_err_and(refused));
}

#[test]
fn arrays_of_members_have_the_members_shapes() {
    let _turn = common::turn();
    for device in common::devices() {
        let mut builder = GroupLayoutBuilder::new();
        let (ids, table) = (builder.add::<i64>(5), builder.add::<f32>([3, 4]));
        let layout = builder.build().unwrap();
        let strange = GroupLayoutBuilder::new().add::<i64>(5);
        let mut group = BufferGroup::new(&layout, device).unwrap();
        group.cpu_array_mut(table).unwrap().index_axis_mut(Axis(0), 1).fill(0.5);
        group.cpu_array_mut(ids).unwrap()[4] = 7;
        assert_eq!(
            group.cpu_array(table).unwrap().sum_axis(Axis(1)).into_raw_vec_and_offset().0,
            [0.0, 2.0, 0.0]
        );
        assert_eq!(group.cpu(ids).unwrap(), [0, 0, 0, 0, 7]);
        assert_eq!(group.cpu_array(strange).err(), Some(Error::InvalidKey));
        let mut ring = GroupRing::new(&layout, device, 2).unwrap();
        ring.advance().unwrap();
        ring.cpu_array_mut(table).unwrap()[[2, 3]] = 1.5;
        assert_eq!(ring.cpu_array(table).unwrap()[[2, 3]], 1.5);
        assert_eq!(ring.cpu(table).unwrap()[11], 1.5);
        assert_eq!(ring.cpu_array_mut(strange).err(), Some(Error::InvalidKey));
    }
}

#[test]
fn an_array_waits_as_the_slice_does() {
    let Some((device, _turn)) = common::cuda(test_name!()) else { return };
    let stream = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u32>::new([WORDS / 3, 3], device).unwrap();
    buffer.fill_gpu(OLD, &stream).unwrap();
    buffer.synchronize().unwrap();

    let gate = Gate::close(&stream);
    buffer.copy_to_cpu(.., &stream).unwrap();
    let seen = gate.waits(|| buffer.cpu_array().unwrap().iter().copied().collect::<Vec<_>>());
    all(&seen, OLD);

    let gate = Gate::close(&stream);
    buffer.copy_to_gpu(.., &stream).unwrap();
    gate.during(std::time::Duration::from_millis(100), || {
        assert_eq!(buffer.cpu_array().unwrap()[[0, 0]], OLD);
        assert!(!gate.is_open(), "reading waits for an upload");
        buffer.cpu_array_mut().unwrap().fill(NEW);
    });
    buffer.synchronize().unwrap();
    all(&device_words(device, buffer.device_ptr(), WORDS), OLD);

    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u32>([WORDS / 3, 3]);
    let layout = builder.build().unwrap();
    let mut group = BufferGroup::new(&layout, device).unwrap();
    group.cpu_array_mut(key).unwrap().fill(OLD);
    let gate = Gate::close(&stream);
    group.copy_to_gpu(&[key.rows(..)], &stream).unwrap();
    gate.waits(|| group.cpu_array_mut(key).unwrap().fill(NEW));
    group.synchronize().unwrap();
    all(&device_words(device, group.device_ptr(key).unwrap(), WORDS), OLD);
}
