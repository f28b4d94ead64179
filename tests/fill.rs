//! A fill sets every element of every size, and not a byte beside them.

mod common;

use bytemuck::Pod;
use common::{device_bytes, is_all, test_name};
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};

/// A fill of so many bytes and more is never a memset.
const KERNEL_FROM: usize = 64 << 10;

/// Lengths around the edges of what a kernel stores at once: 16 bytes, a row of a block, a tile of a
/// block, several blocks; and around nothing.
fn lengths(size: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = [0, 16, 64, 256 * 16, 4 * 256 * 16, 3 * 4 * 512 * 16]
        .iter()
        .flat_map(|edge| {
            let at = edge / size;
            [at.saturating_sub(1), at, at + 1, at + 2]
        })
        .collect();
    lengths.sort();
    lengths.dedup();
    lengths
}

/// Lengths around the one from which a kernel does what a memset could, and of many blocks.
fn long_lengths(size: usize) -> Vec<usize> {
    let (from, many) = (KERNEL_FROM / size, (1 << 20) / size);
    vec![from - 1, from, from + 1, many - 1, many, many + 1]
}

/// True if the bytes are `pattern`, over and over.
fn repeats(bytes: &[u8], pattern: &[u8]) -> bool {
    // One call compares each repetition with the one before it.
    bytes.is_empty()
        || bytes.starts_with(pattern)
            && bytes[pattern.len()..] == bytes[..bytes.len() - pattern.len()]
}

/// Fills the first elements of a buffer that has more, and looks at all of its bytes.
fn check<T: Pod>(device: Device, stream: &Stream, value: T, guard: T, lengths: &[usize]) {
    let (value_bytes, guard_bytes) = (bytemuck::bytes_of(&value), bytemuck::bytes_of(&guard));
    let size = value_bytes.len();
    let most = lengths.last().copied().unwrap() + 4;
    let mut buffer = CpuGpuBuffer::<T>::new(most, device).unwrap();
    for &length in lengths {
        buffer.resize(most).unwrap();
        buffer.fill(guard, stream).unwrap();
        buffer.resize(length).unwrap();
        // A resize zeroes what it keeps in use, before anyone can see it.
        buffer.gpu_on(stream).unwrap();
        buffer.fill_gpu(value, stream).unwrap();
        buffer.synchronize().unwrap();
        let seen = device_bytes(device, buffer.device_ptr().cast(), most * size);
        let (filled, beside) = seen.split_at(length * size);
        assert!(repeats(filled, value_bytes), "{length} elements of {size} bytes on {device}");
        assert!(
            repeats(beside, guard_bytes),
            "beside {length} elements of {size} bytes on {device}"
        );
    }
}

fn check_size<const N: usize>(device: Device, stream: &Stream) {
    check_lengths::<N>(device, stream, &lengths(N));
}

fn check_lengths<const N: usize>(device: Device, stream: &Stream, lengths: &[usize]) {
    let mut value = [0u8; N];
    for (at, byte) in value.iter_mut().enumerate() {
        *byte = (at * 37 + at / 251 * 11 + 5) as u8;
    }
    let guard = [0xa5; N];
    check(device, stream, value, guard, lengths);
    // Repeating every byte, and where it fits, every 2 and every 4 bytes.
    check(device, stream, [0x3c; N], guard, lengths);
    for period in [2, 4] {
        if N.is_multiple_of(period) {
            let mut value = [0u8; N];
            for (at, byte) in value.iter_mut().enumerate() {
                *byte = (at % period) as u8 + 1;
            }
            check(device, stream, value, guard, lengths);
        }
    }
}

#[test]
fn elements_of_every_size_are_filled_and_nothing_beside_them() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        check_size::<1>(device, &stream);
        check_size::<2>(device, &stream);
        check_size::<3>(device, &stream);
        check_size::<4>(device, &stream);
        check_size::<6>(device, &stream);
        check_size::<8>(device, &stream);
        check_size::<12>(device, &stream);
        check_size::<16>(device, &stream);
        check_size::<24>(device, &stream);
        check_size::<32>(device, &stream);
        check_size::<48>(device, &stream);
        check_size::<64>(device, &stream);
        check_size::<100>(device, &stream);
        check_size::<1000>(device, &stream);
    }
}

#[test]
fn elements_longer_than_a_kernels_parameters_are_filled() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        check_size::<225>(device, &stream);
        check_size::<1001>(device, &stream);
        check_size::<3584>(device, &stream);
        check_size::<3600>(device, &stream);
        check_size::<5001>(device, &stream);
        check_size::<8192>(device, &stream);
    }
}

#[test]
fn long_fills_of_elements_of_every_size_set_them_and_nothing_beside_them() {
    fn check_long<const N: usize>(device: Device, stream: &Stream) {
        check_lengths::<N>(device, stream, &long_lengths(N));
    }
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        check_long::<1>(device, &stream);
        check_long::<2>(device, &stream);
        check_long::<3>(device, &stream);
        check_long::<4>(device, &stream);
        check_long::<5>(device, &stream);
        check_long::<6>(device, &stream);
        check_long::<7>(device, &stream);
        check_long::<8>(device, &stream);
        check_long::<9>(device, &stream);
        check_long::<10>(device, &stream);
        check_long::<11>(device, &stream);
        check_long::<12>(device, &stream);
        check_long::<13>(device, &stream);
        check_long::<14>(device, &stream);
        check_long::<15>(device, &stream);
        check_long::<16>(device, &stream);
        check_long::<17>(device, &stream);
        check_long::<48>(device, &stream);
        check_long::<100>(device, &stream);
        check_long::<3584>(device, &stream);
        check_long::<3585>(device, &stream);
        check_long::<4000>(device, &stream);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_short_fill_with_a_pattern_of_the_drivers_is_a_memset_and_a_long_one_a_kernel() {
    use common::sim;
    let test = test_name!();
    if !common::is_simulated() {
        common::left_out(test, "it counts calls, which only the simulated runtime does");
        return;
    }
    let _turn = common::turn();
    let device = Device::Cuda(0);
    let stream = Stream::new(device).unwrap();
    for (bytes, memsets) in [(KERNEL_FROM - 1, 1), (KERNEL_FROM, 0)] {
        let mut buffer = CpuGpuBuffer::<u8>::new(bytes, device).unwrap();
        let calls = || (sim::calls_of(c"cudaMemsetAsync"), sim::calls_of(c"cuLaunchKernel"));
        sim::reset();
        // The first zeroing goes the same way.
        buffer.gpu_on(&stream).unwrap();
        assert_eq!(calls(), (memsets, 1 - memsets), "zeroing {bytes} bytes");
        buffer.fill_gpu(7, &stream).unwrap();
        assert_eq!(calls(), (2 * memsets, 2 * (1 - memsets)), "filling {bytes} bytes");
        buffer.synchronize().unwrap();
    }
}

#[test]
fn numbers_are_filled_as_numbers() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let mut buffer = CpuGpuBuffer::<f64>::new([3, 1000], device).unwrap();
        for value in [0.0, -1.5, f64::MAX, 1e-300] {
            buffer.fill(value, &stream).unwrap();
            assert_eq!(buffer.cpu().unwrap(), [value; 3000]);
            buffer.fill_cpu(7.0).unwrap();
            buffer.copy_to_cpu(.., &stream).unwrap();
            assert_eq!(buffer.cpu().unwrap(), [value; 3000]);
        }
        buffer.zero(&stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [0.0; 3000]);
        buffer.copy_to_cpu(.., &stream).unwrap();
        assert_eq!(buffer.cpu().unwrap(), [0.0; 3000]);
    }
}

/// An element as large as the stack of a thread is by default.
type Large = [f32; 1 << 19];

#[test]
fn zeroing_makes_no_element_on_the_stack() {
    let _turn = common::turn();
    for device in common::devices() {
        let zeroed = move || {
            let stream = Stream::new(device).unwrap();
            let mut buffer = CpuGpuBuffer::<Large>::new(2, device).unwrap();
            buffer.cpu_mut().unwrap().as_flattened_mut().fill(1.0);
            buffer.copy_to_gpu(.., &stream).unwrap();
            buffer.zero(&stream).unwrap();
            assert!(is_all(buffer.cpu().unwrap().as_flattened(), 0.0));
            buffer.cpu_mut().unwrap().as_flattened_mut().fill(2.0);
            buffer.copy_to_cpu(.., &stream).unwrap();
            assert!(is_all(buffer.cpu().unwrap().as_flattened(), 0.0));
        };
        std::thread::Builder::new().stack_size(1 << 20).spawn(zeroed).unwrap().join().unwrap();
    }
}

#[test]
fn any_number_of_elements_of_no_size_is_filled_at_once() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let mut units = CpuGpuBuffer::<()>::new(usize::MAX, device).unwrap();
        // In a thread that is left behind, should one of them take its time.
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            units.fill_cpu(()).unwrap();
            units.fill_gpu((), &stream).unwrap();
            units.fill((), &stream).unwrap();
            units.zero(&stream).unwrap();
            done.send(units.cpu().unwrap().len()).unwrap();
        });
        let len = is_done.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(len, Ok(usize::MAX), "{device}");
    }
}
