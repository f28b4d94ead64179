//! Bad use returns a typed error and changes nothing.

mod common;

use std::cell::Cell;
use std::ops::{Bound, RangeBounds};

use common::{Gate, test_name};
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, BufferRing, CpuGpuBuffer, Device, Error, GroupLayoutBuilder,
    GroupRing, MemberKey, Pinning, Shape, Side, Stream, StreamOptions, sys,
};

fn each(run: impl Fn(Device, Stream)) {
    let _turn = common::turn();
    for device in common::devices() {
        run(device, Stream::new(device).unwrap());
    }
}

#[test]
fn rows_out_of_range_or_reversed_are_refused() {
    each(|device, stream| {
        let mut buffer = CpuGpuBuffer::<u8>::new([4, 2], device).unwrap();
        buffer.fill(7, &stream).unwrap();
        let reversed = (Bound::Included(3), Bound::Excluded(2));
        let overflow = (Bound::Excluded(usize::MAX), Bound::Unbounded);
        let end = (Bound::Unbounded, Bound::Included(usize::MAX));
        for result in [
            buffer.copy_to_gpu(..5, &stream),
            buffer.copy_to_cpu(4..5, &stream),
            buffer.copy_to_cpu(5.., &stream),
            buffer.copy_to_gpu(reversed, &stream),
            buffer.copy_to_gpu(overflow, &stream),
            buffer.copy_to_cpu(end, &stream),
            buffer.gpu_on(&stream).unwrap().rows(..9).map(drop),
        ] {
            let named = matches!(result, Err(Error::OutOfRange { rows: 4, member: None, .. }));
            assert!(named, "{result:?}");
        }
        buffer.copy_to_gpu(4.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [7; 8]);
    });
}

#[test]
fn shapes_of_no_or_too_many_dimensions_or_too_many_bytes_are_refused() {
    each(|device, stream| {
        let mut buffer = CpuGpuBuffer::<u64>::new([2, 2], device).unwrap();
        buffer.fill(9, &stream).unwrap();
        let none: [usize; 0] = [];
        for shape in [
            Shape::from(none),
            Shape::from([1; 9]),
            Shape::from(vec![1; 20]),
            Shape::from(usize::MAX),
            Shape::from([1 << 40, 1 << 40]),
            Shape::from((isize::MAX as usize) / 8 + 1),
        ] {
            let made = CpuGpuBuffer::<u64>::new(shape, device);
            assert!(matches!(made, Err(Error::InvalidShape { .. })), "{shape:?}");
            let resized = buffer.resize(shape);
            assert!(matches!(resized, Err(Error::InvalidShape { .. })), "{shape:?}");
        }
        assert_eq!(buffer.shape(), [2, 2]);
        assert_eq!(buffer.cpu().unwrap(), [9; 4]);
        CpuGpuBuffer::<u64>::new([1; 8], device).unwrap();
    });
}

#[test]
fn a_stream_or_an_event_of_another_device_is_refused() {
    let (cpu, turn) = (Device::Cpu, common::turn());
    for (device, other) in match Device::auto() {
        Device::Cpu => {
            common::left_out(test_name!(), "no CUDA device");
            vec![]
        }
        cuda if Device::cuda_count() > 1 => {
            vec![(cuda, cpu), (cpu, cuda), (cuda, Device::Cuda(1)), (Device::Cuda(1), cuda)]
        }
        cuda => vec![(cuda, cpu), (cpu, cuda)],
    } {
        let (stream, wrong) = (Stream::new(device).unwrap(), Stream::new(other).unwrap());
        let mut buffer = CpuGpuBuffer::<u8>::new(100, device).unwrap();
        buffer.fill(3, &stream).unwrap();
        let mismatch = Error::DeviceMismatch { expected: device, actual: other };
        assert_eq!(buffer.copy_to_gpu(.., &wrong), Err(mismatch.clone()));
        assert_eq!(buffer.copy_to_cpu(.., &wrong), Err(mismatch.clone()));
        assert_eq!(buffer.copy_to_cpu(5..5, &wrong), Err(mismatch.clone()));
        assert_eq!(buffer.fill(4, &wrong), Err(mismatch.clone()));
        assert_eq!(buffer.fill_gpu(4, &wrong), Err(mismatch.clone()));
        assert_eq!(buffer.zero(&wrong), Err(mismatch.clone()));
        assert_eq!(buffer.gpu_on(&wrong).map(drop), Err(mismatch.clone()));
        let (ours, theirs) = (stream.record().unwrap(), wrong.record().unwrap());
        assert_eq!(ours.elapsed_since(&theirs), Err(mismatch));
        // Waiting across devices is what events are for.
        stream.wait(&theirs).unwrap();
        wrong.wait(&ours).unwrap();
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [3; 100]);
    }
    drop(turn);
}

#[test]
fn a_device_that_does_not_exist_is_refused_with_the_reason() {
    let absent = Device::Cuda(99);
    // A buffer without bytes uses no device.
    let mut none = CpuGpuBuffer::<u8>::new([0, 2], absent).unwrap();
    assert!(none.cpu().unwrap().is_empty());
    assert!(matches!(none.resize(1), Err(Error::Unavailable { .. })));
    for result in [
        Device::cuda(99).map(drop),
        absent.memory().map(drop),
        Stream::new(absent).map(drop),
        CpuGpuBuffer::<u8>::new(1, absent).map(drop),
    ] {
        let Err(Error::Unavailable { reason }) = result else { panic!("{result:?}") };
        assert!(!reason.is_empty());
    }
    for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "CUDA", "cuda:99999999999"] {
        let parsed = text.parse::<Device>();
        assert_eq!(parsed, Err(Error::InvalidDevice { text: text.into() }));
    }
    assert_eq!("cuda:99".parse(), Ok(absent));
}

#[test]
fn exhausted_memory_is_named_and_the_other_side_given_back() {
    each(|device, stream| {
        let mut buffer = CpuGpuBuffer::<u8>::new(1000, device).unwrap();
        buffer.fill(5, &stream).unwrap();
        // More than any GPU has; for the CPU, more than there are addresses.
        let bytes = if device == Device::Cpu { 1 << 62 } else { 1 << 46 };
        let free = || match device {
            Device::Cpu => 0,
            Device::Cuda(_) => device.memory().unwrap().free,
        };
        let before = free();
        for result in [CpuGpuBuffer::<u8>::new(bytes, device).map(drop), buffer.resize(bytes)] {
            let expected = Error::OutOfMemory { side: Side::Device, bytes, device };
            assert_eq!(result, Err(expected));
        }
        // The driver may have let go of what it had kept of earlier allocations.
        assert!(free() >= before, "{} of {before}", free());
        assert_eq!(buffer.shape(), [1000]);
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [5; 1000]);
    });
}

#[test]
fn required_pinning_is_an_error_where_there_is_none() {
    let options = BufferOptions { pinning: Pinning::Required, ..Default::default() };
    let made = CpuGpuBuffer::<u32>::with_options(25, Device::Cpu, options);
    assert!(matches!(made, Err(Error::PinningUnavailable { bytes: 100, .. })), "{made:?}");
}

/// Answers differently each time it is asked: small first, then far out.
struct Shifty {
    start: Cell<usize>,
    end: Cell<usize>,
    bounds: [[usize; 2]; 2],
}

impl Shifty {
    fn new(first: [usize; 2], then: [usize; 2]) -> Shifty {
        Shifty { start: Cell::new(0), end: Cell::new(0), bounds: [first, then] }
    }
}

impl RangeBounds<usize> for Shifty {
    fn start_bound(&self) -> Bound<&usize> {
        let asked = self.start.replace(1);
        Bound::Included(&self.bounds[asked][0])
    }

    fn end_bound(&self) -> Bound<&usize> {
        let asked = self.end.replace(1);
        Bound::Excluded(&self.bounds[asked][1])
    }
}

#[test]
fn a_range_that_changes_its_answers_moves_nothing_out_of_bounds() {
    each(|device, stream| {
        let mut buffer = CpuGpuBuffer::<u8>::new(8, device).unwrap();
        buffer.fill_cpu(1).unwrap();
        buffer.copy_to_gpu(Shifty::new([2, 4], [1 << 40, 1 << 41]), &stream).unwrap();
        let outward = Shifty::new([1 << 40, 1 << 41], [2, 4]);
        assert!(matches!(buffer.copy_to_gpu(outward, &stream), Err(Error::OutOfRange { .. })));
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [0, 0, 1, 1, 0, 0, 0, 0]);
        let view = buffer.gpu_on(&stream).unwrap();
        assert_eq!(view.rows(Shifty::new([1, 3], [0, 1 << 40])).unwrap().len(), 2);
    });
}

#[test]
fn the_per_thread_stream_and_streams_of_the_cpu_are_not_adopted() {
    let per_thread = std::ptr::without_provenance_mut(2);
    for (raw, device) in [(per_thread, Device::Cuda(0)), (std::ptr::null_mut(), Device::Cpu)] {
        // SAFETY: neither is used.
        let stream = unsafe { Stream::from_raw(raw, device, None) };
        assert!(matches!(stream, Err(Error::InvalidStream { .. })), "{stream:?}");
    }
}

#[test]
fn events_in_the_wrong_order_are_an_error() {
    each(|device, stream| {
        let first = stream.record().unwrap();
        // Enough work between the two for any clock to tell them apart.
        let mut buffer = CpuGpuBuffer::<u8>::new(64 << 20, device).unwrap();
        buffer.fill(1, &stream).unwrap();
        let second = stream.record().unwrap();
        assert!(second.elapsed_since(&first).unwrap() > std::time::Duration::ZERO);
        assert_eq!(first.elapsed_since(&second), Err(Error::EventOrder));
    });
}

#[test]
fn a_stream_in_capture_is_refused_and_its_capture_survives() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let stream = Stream::new(device).unwrap();
    let other = Stream::new(device).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(4096, device).unwrap();
    buffer.fill(5, &stream).unwrap();
    buffer.synchronize().unwrap();
    buffer.gpu_on(&stream).unwrap();
    let event = other.record().unwrap();
    common::begin_capture(&stream);
    let refused = Err(Error::StreamCapturing);
    assert_eq!(buffer.copy_to_gpu(.., &stream), refused);
    assert_eq!(buffer.copy_to_cpu(..1, &stream), refused);
    assert_eq!(buffer.fill(9, &stream), refused);
    assert_eq!(buffer.fill_gpu(9, &stream), refused);
    assert_eq!(buffer.zero(&stream), refused);
    assert_eq!(buffer.gpu_on(&stream).map(drop), refused);
    assert_eq!(stream.record().map(drop), refused);
    assert_eq!(stream.wait(&event), refused);
    assert_eq!(stream.synchronize(), refused);
    assert_eq!(stream.is_idle().map(drop), refused);
    // The buffer's last use is one of this stream's, of which nothing can be known now.
    assert_eq!(buffer.is_idle().map(drop), refused);
    assert_eq!(buffer.copy_to_gpu(.., &other), refused);
    // The host side has nothing to do with it.
    assert_eq!(buffer.cpu_mut().unwrap()[..], [5; 4096]);
    common::end_capture(&stream);
    buffer.copy_to_gpu(.., &other).unwrap();
    buffer.synchronize().unwrap();
}

#[test]
fn the_legacy_stream_is_refused_while_a_stream_that_it_waits_for_is_in_capture() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    // SAFETY: the legacy stream lives as long as its context.
    let legacy = unsafe { Stream::from_raw(std::ptr::null_mut(), device, None) }.unwrap();
    let options =
        StreamOptions { flags: cpu_gpu_buffer::StreamFlags::empty(), ..Default::default() };
    let blocking = Stream::with_options(device, options).unwrap();
    let mut buffer = CpuGpuBuffer::<u8>::new(16, device).unwrap();
    common::begin_capture(&blocking);
    assert_eq!(buffer.copy_to_gpu(.., &legacy), Err(Error::StreamCapturing));
    common::end_capture(&blocking);
    buffer.copy_to_gpu(.., &legacy).unwrap();
}

/// All that a buffer, its streams and events do.
fn everything(device: Device) -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(device)?;
    let other = Stream::new(device)?;
    let mut buffer = CpuGpuBuffer::<u32>::new(1 << 20, device)?;
    buffer.fill(7, &stream)?;
    buffer.copy_to_gpu(.., &other)?;
    buffer.copy_to_cpu(..9, &stream)?;
    buffer.is_idle()?;
    buffer.try_cpu_mut()?;
    buffer.cpu_mut()?[0] = 1;
    buffer.resize(2 << 20)?;
    buffer.gpu_on(&stream)?;
    let event = stream.record()?;
    event.is_complete()?;
    event.synchronize()?;
    event.elapsed_since(&event)?;
    stream.is_idle()?;
    stream.synchronize()?;
    device.memory()?;
    let mut builder = GroupLayoutBuilder::new();
    let keys = [(); 7].map(|()| builder.add::<u32>(1 << 10));
    let mut ring = GroupRing::new(&builder.build()?, device, 2)?;
    for _ in 0..3 {
        ring.advance()?;
        ring.cpu_mut(keys[0])?[0] = 1;
        ring.copy_to_gpu(&keys.map(|key| key.rows(..9)), &stream)?;
        ring.gpu_on(&other)?;
    }
    ring.synchronize()?;
    buffer.synchronize()
}

#[test]
fn another_threads_capture_survives_everything_a_buffer_does() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let captured = Stream::new(device).unwrap();
    let warm = Gate::close(&captured);
    warm.open();
    captured.synchronize().unwrap();
    common::begin_capture(&captured);
    let done = std::thread::spawn(move || everything(device)).join().unwrap();
    common::end_capture(&captured);
    done.unwrap();
}

#[test]
fn a_threads_own_capture_mode_is_left_alone() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let exchange = |mut mode| {
        // SAFETY: a valid mode, and a place for the previous one.
        let status = unsafe { sys::cudaThreadExchangeStreamCaptureMode(&mut mode) };
        assert_eq!(status, sys::cudaError::cudaSuccess);
        mode
    };
    for mode in [
        sys::cudaStreamCaptureMode::cudaStreamCaptureModeGlobal,
        sys::cudaStreamCaptureMode::cudaStreamCaptureModeThreadLocal,
        sys::cudaStreamCaptureMode::cudaStreamCaptureModeRelaxed,
    ] {
        let before = exchange(mode);
        everything(device).unwrap();
        assert_eq!(exchange(before), mode);
    }
}

#[test]
fn growing_a_buffer_of_which_nothing_can_be_known_is_refused_and_changes_nothing() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let mut buffer = CpuGpuBuffer::<u8>::new(4096, device).unwrap();
    buffer.fill(5, &stream).unwrap();
    buffer.fill_cpu(6).unwrap();
    let address = buffer.gpu_on(&stream).unwrap().as_mut_ptr();
    common::begin_capture(&stream);
    assert_eq!(buffer.resize(1 << 20), Err(Error::StreamCapturing));
    assert_eq!((buffer.shape(), buffer.device_ptr()), (&[4096][..], address));
    common::end_capture(&stream);
    assert_eq!(buffer.cpu().unwrap(), [6; 4096]);
    buffer.copy_to_cpu(.., &other).unwrap();
    assert_eq!(buffer.cpu().unwrap(), [5; 4096]);
    buffer.resize(1 << 20).unwrap();
}

// ---- groups and rings ----

/// A group of two members whose sides differ, and a key of another layout.
fn group(
    device: Device,
    stream: &Stream,
) -> (BufferGroup, MemberKey<u8>, MemberKey<u32>, MemberKey<u8>) {
    let mut builder = GroupLayoutBuilder::new();
    let (one, two) = (builder.add::<u8>([4, 2]), builder.add::<u32>(5));
    let mut group = BufferGroup::new(&builder.build().unwrap(), device).unwrap();
    group.cpu_mut(one).unwrap().fill(7);
    group.cpu_mut(two).unwrap().fill(7);
    group.copy_to_gpu(&[one.rows(..), two.rows(..)], stream).unwrap();
    group.cpu_mut(one).unwrap().fill(9);
    group.cpu_mut(two).unwrap().fill(9);
    (group, one, two, GroupLayoutBuilder::new().add(8))
}

/// Neither side has changed.
#[track_caller]
fn unchanged(mut group: BufferGroup, one: MemberKey<u8>, two: MemberKey<u32>, stream: &Stream) {
    assert!(group.cpu(one).unwrap() == [9; 8] && group.cpu(two).unwrap() == [9; 5]);
    group.copy_to_cpu(&[one.rows(..), two.rows(..)], stream).unwrap();
    assert!(group.cpu(one).unwrap() == [7; 8] && group.cpu(two).unwrap() == [7; 5]);
}

#[test]
fn a_key_of_another_layout_names_no_member() {
    each(|device, stream| {
        let (mut group, one, two, foreign) = group(device, &stream);
        let refused = Err(Error::InvalidKey);
        assert_eq!(group.cpu(foreign).map(drop), refused);
        assert_eq!(group.cpu_mut(foreign).map(drop), refused);
        assert_eq!(group.members_mut().cpu_mut(foreign).map(drop), refused);
        assert_eq!(group.shape(foreign).map(drop), refused);
        assert_eq!(group.device_ptr(foreign).map(drop), refused);
        assert_eq!(group.copy_to_gpu(&[one.rows(..), foreign.rows(..)], &stream), refused);
        assert_eq!(group.copy_to_cpu(&[foreign.rows(..0)], &stream), refused);
        let mut view = group.gpu_on(&stream).unwrap();
        assert_eq!(view.member(foreign).map(drop), refused);
        let mut members = group.members_mut();
        assert_eq!(members.cpu_mut(foreign).map(drop), refused);
        assert_eq!(members.cpu_back(0, foreign).map(drop), refused);
        assert_eq!(members.cpu_back(1, foreign).map(drop), refused);
        unchanged(group, one, two, &stream);

        let mut builder = GroupLayoutBuilder::new();
        builder.add::<u8>(8);
        let mut ring = GroupRing::new(&builder.build().unwrap(), device, 2).unwrap();
        assert_eq!(ring.cpu(foreign).map(drop), refused);
        assert_eq!(ring.cpu_mut(foreign).map(drop), refused);
        assert_eq!(ring.members_mut().cpu_mut(foreign).map(drop), refused);
        assert_eq!(ring.try_cpu(foreign).map(drop), refused);
        assert_eq!(ring.try_cpu_mut(foreign).map(drop), refused);
        assert_eq!(ring.cpu_back(0, foreign).map(drop), refused);
        assert_eq!(ring.shape(foreign).map(drop), refused);
        assert_eq!(ring.device_ptr(foreign).map(drop), refused);
        assert_eq!(ring.copy_to_gpu(&[foreign.rows(..)], &stream), refused);
        assert_eq!(ring.copy_to_cpu(&[foreign.into()], &stream), refused);
        assert_eq!(ring.gpu_on(&stream).unwrap().member(foreign).map(drop), refused);
    });
}

#[test]
fn a_key_is_of_the_elements_that_it_was_made_with() {
    use std::marker::PhantomData;
    // The one is a subtype of the other, and so are their keys; they are different types all the same.
    type Any = PhantomData<for<'a> fn(&'a u8)>;
    type Static = PhantomData<fn(&'static u8)>;
    let mut builder = GroupLayoutBuilder::new();
    let key: MemberKey<Any> = builder.add(3);
    let group = BufferGroup::new(&builder.build().unwrap(), Device::Cpu).unwrap();
    assert_eq!(group.cpu(key).unwrap().len(), 3);
    let other: MemberKey<Static> = key;
    assert_eq!(group.cpu(other).map(drop), Err(Error::InvalidKey));
}

#[test]
fn rows_of_members_out_of_range_or_reversed_are_refused() {
    each(|device, stream| {
        let (mut group, one, two, _) = group(device, &stream);
        let reversed = (Bound::Included(3), Bound::Excluded(2));
        let overflow = (Bound::Excluded(usize::MAX), Bound::Unbounded);
        let end = (Bound::Unbounded, Bound::Included(usize::MAX));
        for rows in [
            one.rows(..5),
            one.rows(4..5),
            one.rows(5..),
            one.rows(reversed),
            one.rows(overflow),
            one.rows(end),
        ] {
            for result in [
                group.copy_to_gpu(&[two.rows(..), rows], &stream),
                group.copy_to_cpu(&[rows, two.rows(..)], &stream),
            ] {
                let named =
                    matches!(result, Err(Error::OutOfRange { rows: 4, member: Some(0), .. }));
                assert!(named, "{result:?}");
            }
        }
        let beyond = group.copy_to_gpu(&[one.rows(..), two.rows(1..6)], &stream);
        assert_eq!(beyond, Err(Error::OutOfRange { start: 1, end: 6, rows: 5, member: Some(1) }));
        group.copy_to_gpu(&[one.rows(4..), two.rows(2..2)], &stream).unwrap();
        unchanged(group, one, two, &stream);

        let mut ring = BufferRing::<u8>::new([4, 2], device, 2).unwrap();
        let sent = ring.copy_to_gpu(..5, &stream);
        assert_eq!(sent, Err(Error::OutOfRange { start: 0, end: 5, rows: 4, member: None }));
    });
}

#[test]
fn rows_whose_range_changes_its_answers_are_those_of_the_first() {
    each(|device, stream| {
        let (mut group, one, two, _) = group(device, &stream);
        let outward = one.rows(Shifty::new([1 << 40, 1 << 41], [2, 3]));
        let sent = group.copy_to_gpu(&[outward], &stream);
        assert!(matches!(sent, Err(Error::OutOfRange { .. })), "{sent:?}");
        let inward = one.rows(Shifty::new([2, 3], [1 << 40, 1 << 41]));
        group.copy_to_cpu(&[inward], &stream).unwrap();
        assert_eq!(group.cpu(one).unwrap(), [9, 9, 9, 9, 7, 7, 9, 9]);
        assert_eq!(group.cpu(two).unwrap(), [9; 5]);
    });
}

#[test]
fn a_member_is_taken_once_from_a_value_that_gives_several() {
    each(|device, stream| {
        let (mut group, one, two, _) = group(device, &stream);
        let twice = Err(Error::DuplicateMember { index: 1 });
        let mut members = group.members_mut();
        let first = members.cpu_mut(two).unwrap();
        assert_eq!(members.cpu_mut(two).map(drop), twice);
        assert_eq!(members.cpu_back(0, two).map(drop), twice);
        assert_eq!((first.len(), members.cpu_mut(one).unwrap().len()), (5, 8));
        let mut view = group.gpu_on(&stream).unwrap();
        let first = view.member(two).unwrap();
        assert_eq!(view.member(two).map(drop), twice);
        assert_eq!((first.len(), view.member(one).unwrap().len()), (5, 8));
        // The next value gives them again.
        assert_eq!(group.members_mut().cpu_mut(two).unwrap().len(), 5);
        assert_eq!(group.gpu_on(&stream).unwrap().member(two).unwrap().len(), 5);
        unchanged(group, one, two, &stream);
    });
}

#[test]
fn a_member_that_is_read_in_the_current_slot_is_not_written_beside() {
    each(|device, stream| {
        let (mut group, one, two, _) = group(device, &stream);
        let mut members = group.members_mut();
        let (read, written) = (members.cpu_back(0, two).unwrap(), members.cpu_mut(one).unwrap());
        let twice = Err(Error::DuplicateMember { index: 1 });
        assert_eq!(members.cpu_mut(two).map(drop), twice);
        assert_eq!(members.cpu_back(0, two).map(drop), twice);
        assert_eq!(members.cpu_back(0, one).err(), Some(Error::DuplicateMember { index: 0 }));
        // A group has one slot.
        let older = Error::OutOfRange { start: 1, end: 2, rows: 1, member: None };
        assert_eq!(members.cpu_back(1, two).err(), Some(older));
        assert_eq!((read.len(), written.len()), (5, 8));
        unchanged(group, one, two, &stream);
    });
}

#[test]
fn a_slot_of_more_steps_ago_than_there_are_is_out_of_range() {
    each(|device, _| {
        let mut builder = GroupLayoutBuilder::new();
        let key = builder.add::<u8>(8);
        let mut ring = GroupRing::new(&builder.build().unwrap(), device, 3).unwrap();
        let mut single = BufferRing::<u8>::new(8, device, 3).unwrap();
        let beyond = |steps: usize, rows| {
            Some(Error::OutOfRange {
                start: steps,
                end: steps.saturating_add(1),
                rows,
                member: None,
            })
        };
        for advances in 0..5 {
            let readable = 3.min(advances + 1);
            for steps in [0, 1, 2, 3, 4, usize::MAX] {
                let error = if steps < readable { None } else { beyond(steps, readable) };
                assert_eq!(ring.cpu_back(steps, key).err(), error, "{steps} after {advances}");
                assert_eq!(ring.members_mut().cpu_back(steps, key).err(), error);
                assert_eq!(single.cpu_back(steps).err(), error);
            }
            ring.advance().unwrap();
            assert!(single.try_advance().unwrap().is_some());
        }
    });
}

#[test]
fn a_copy_of_no_members_does_nothing() {
    each(|device, stream| {
        let (mut group, one, two, _) = group(device, &stream);
        group.copy_to_gpu(&[], &stream).unwrap();
        group.copy_to_cpu(&[], &stream).unwrap();
        unchanged(group, one, two, &stream);
        let mut builder = GroupLayoutBuilder::new();
        builder.add::<u8>(8);
        let mut ring = GroupRing::new(&builder.build().unwrap(), device, 2).unwrap();
        ring.copy_to_gpu(&[], &stream).unwrap();
        assert!(ring.is_idle().unwrap());
    });
}

#[test]
fn layouts_without_members_or_of_invalid_or_too_many_bytes_are_refused() {
    each(|device, _| {
        let made = GroupLayoutBuilder::new().build().map(drop);
        assert!(matches!(made, Err(Error::InvalidGroup { .. })), "{made:?}");
        let none: [usize; 0] = [];
        let half = isize::MAX as usize / 2;
        for shapes in [
            vec![Shape::from(none)],
            vec![Shape::from([1; 9])],
            vec![Shape::from(3), Shape::from([1 << 40, 1 << 40]), Shape::from(3)],
            // Each is valid, and all together are not; nor with their padding.
            vec![Shape::from(half), Shape::from(half), Shape::from(half)],
            vec![Shape::from(isize::MAX as usize)],
            vec![Shape::from(isize::MAX as usize - 300), Shape::from(1)],
        ] {
            let mut builder = GroupLayoutBuilder::new();
            let keys: Vec<_> = shapes.iter().map(|shape| builder.add::<u8>(*shape)).collect();
            let made = builder.build().map(drop);
            assert!(matches!(made, Err(Error::InvalidShape { .. })), "{shapes:?}: {made:?}");
            drop(keys);
        }
        let made = BufferRing::<u64>::new([1 << 40, 1 << 40], device, 2).map(drop);
        assert!(matches!(made, Err(Error::InvalidShape { .. })), "{made:?}");
    });
}

#[test]
fn a_stream_of_another_device_is_refused_by_a_group() {
    let test = test_name!();
    let Some((cuda, _turn)) = common::cuda(test) else { return };
    for (device, other) in [(cuda, Device::Cpu), (Device::Cpu, cuda)] {
        let (stream, wrong) = (Stream::new(device).unwrap(), Stream::new(other).unwrap());
        let (mut group, one, two, _) = group(device, &stream);
        let mismatch = Err(Error::DeviceMismatch { expected: device, actual: other });
        assert_eq!(group.copy_to_gpu(&[one.rows(..)], &wrong), mismatch);
        assert_eq!(group.copy_to_cpu(&[one.rows(..)], &wrong), mismatch);
        assert_eq!(group.copy_to_cpu(&[one.rows(2..2)], &wrong), mismatch);
        assert_eq!(group.copy_to_gpu(&[], &wrong), mismatch);
        assert_eq!(group.gpu_on(&wrong).map(drop), mismatch);
        unchanged(group, one, two, &stream);
        let mut ring = BufferRing::<u8>::new(0, device, 2).unwrap();
        assert_eq!(ring.copy_to_gpu(.., &wrong), mismatch);
        assert_eq!(ring.gpu_on(&wrong).map(drop), mismatch);
    }
}

#[test]
fn a_stream_in_capture_is_refused_by_a_group_and_its_capture_survives() {
    let test = test_name!();
    let Some((device, _turn)) = common::cuda(test) else { return };
    let (stream, other) = (Stream::new(device).unwrap(), Stream::new(device).unwrap());
    let (mut group, one, two, _) = group(device, &stream);
    let mut ring = BufferRing::<u8>::new(100, device, 2).unwrap();
    group.gpu_on(&stream).unwrap();
    common::begin_capture(&stream);
    let refused = Err(Error::StreamCapturing);
    assert_eq!(group.copy_to_gpu(&[one.rows(..)], &stream), refused);
    assert_eq!(group.copy_to_cpu(&[one.rows(..1)], &stream), refused);
    assert_eq!(group.copy_to_gpu(&[], &stream), refused);
    assert_eq!(group.gpu_on(&stream).map(drop), refused);
    assert_eq!(ring.copy_to_gpu(.., &stream), refused);
    assert_eq!(ring.gpu_on(&stream).map(drop), refused);
    // The last use is one of this stream's, of which nothing can be known now.
    assert_eq!(group.is_idle().map(drop), refused);
    assert_eq!(group.synchronize(), refused);
    assert_eq!(group.copy_to_gpu(&[one.rows(..)], &other), refused);
    // Host sides have nothing to do with it.
    assert_eq!(group.cpu_mut(one).unwrap()[..], [9; 8]);
    common::end_capture(&stream);
    unchanged(group, one, two, &other);
}

#[test]
fn an_error_says_in_words_what_is_wrong() {
    let (device, other) = (Device::Cpu, Device::Cuda(3));
    let code = sys::cudaError::cudaErrorInvalidValue;
    // CUDA's own words, where there is a runtime to ask for them.
    let name = if sys::runtime().is_ok() { "InvalidValue" } else { "(1)" };
    let reason = || "for a reason".to_string();
    let (side, bytes) = (Side::Host, 12_345);
    for (error, words) in [
        (Error::Cuda { code, call: "cudaMalloc" }, &["cudaMalloc", name][..]),
        (Error::OutOfMemory { side, bytes, device }, &["host", "12345", "cpu"]),
        (Error::OutOfMemory { side: Side::Device, bytes, device: other }, &["device", "cuda:3"]),
        (Error::PinningUnavailable { bytes, reason: reason() }, &["12345", "for a reason"]),
        (Error::Unavailable { reason: reason() }, &["for a reason"]),
        (Error::InvalidShape { reason: reason() }, &["shape", "for a reason"]),
        (Error::OutOfRange { start: 5, end: 9, rows: 8, member: None }, &["5..9", "0..8"]),
        (
            Error::OutOfRange { start: 5, end: 9, rows: 8, member: Some(3) },
            &["5..9", "member 3", "0..8"],
        ),
        (Error::DeviceMismatch { expected: device, actual: other }, &["cpu", "cuda:3"]),
        (Error::StreamCapturing, &["captured"]),
        (Error::InvalidStream { reason: "for a reason" }, &["for a reason"]),
        (Error::InvalidDevice { text: "gpu".into() }, &["gpu"]),
        (Error::PoolExhausted { max_buffers: 3 }, &["pool", "3 buffers"]),
        (Error::InvalidKey, &["key", "layout"]),
        (Error::DuplicateMember { index: 3 }, &["member 3"]),
        (Error::InvalidGroup { reason: "for a reason" }, &["group", "for a reason"]),
        (Error::Exported { side: Side::Device }, &["tensor", "device side"]),
        (Error::EventOrder, &["later"]),
        (Error::Forked, &["fork"]),
    ] {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        // CUDA's status is behind its error, for who walks the chain.
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let expected = matches!(error, Error::Cuda { .. }).then(|| code.to_string());
        assert_eq!(source, expected, "{text}");
    }
}

#[test]
fn an_error_leaves_no_last_error_behind() {
    let Some((device, _turn)) = common::cuda(test_name!()) else {
        return;
    };
    assert!(CpuGpuBuffer::<u8>::new(1usize << 46, device).is_err());
    // SAFETY: no arguments.
    assert_eq!(unsafe { sys::cudaGetLastError() }, sys::cudaError::cudaSuccess);
}
