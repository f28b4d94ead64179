//! Rows of members arrive in full, and no other byte changes, on every path that a copy can take.

mod common;

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use common::{device_bytes, test_name};
use cpu_gpu_buffer::{
    BufferGroup, BufferOptions, Device, GroupLayout, GroupLayoutBuilder, HostFlags, MemberKey,
    MemberRows, Pinning, Stream,
};

/// An element that is aligned to more than members are.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(512))]
struct Wide([u8; 512]);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(16))]
struct Quad([u32; 4]);

/// No size, and an alignment.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Nothing([u64; 0]);

type Read = dyn Fn(&BufferGroup) -> Vec<u8>;
type Write = dyn Fn(&mut BufferGroup, &[u8]);
type Add = fn(&mut GroupLayoutBuilder, [usize; 2], bool) -> Member;

/// A member as bytes, whatever its elements are.
struct Member {
    rows: usize,
    row: usize,
    mirrored: bool,
    select: Box<dyn Fn(Range<usize>) -> MemberRows>,
    read: Box<Read>,
    write: Box<Write>,
    gpu: Box<dyn Fn(&BufferGroup) -> *mut u8>,
}

impl Member {
    fn add<T: Pod + Send + Sync>(
        builder: &mut GroupLayoutBuilder,
        [rows, columns]: [usize; 2],
        mirrored: bool,
    ) -> Member {
        let key: MemberKey<T> = match mirrored {
            true => builder.add_mirrored([rows, columns]),
            false => builder.add([rows, columns]),
        };
        Member {
            rows,
            row: columns * size_of::<T>(),
            mirrored,
            select: Box::new(move |rows| key.rows(rows)),
            read: Box::new(move |group| bytemuck::cast_slice(group.cpu(key).unwrap()).to_vec()),
            write: Box::new(move |group, bytes| {
                let host = group.cpu_mut(key).unwrap();
                assert!(host.as_ptr().addr().is_multiple_of(align_of::<T>()));
                // Elements of no size have no bytes to be written.
                if size_of::<T>() > 0 {
                    bytemuck::cast_slice_mut(host).copy_from_slice(bytes);
                }
            }),
            gpu: Box::new(move |group| group.device_ptr(key).unwrap().cast()),
        }
    }

    fn bytes(&self) -> usize {
        self.rows * self.row
    }
}

/// A small generator: xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) as usize) % below
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        for some in bytes.chunks_mut(8) {
            self.next(1);
            some.copy_from_slice(&self.0.to_ne_bytes()[..some.len()]);
        }
        bytes
    }
}

/// Whichever way copies take, what arrives is the same.
const OPTIONS: [BufferOptions; 3] = [
    BufferOptions {
        pinning: Pinning::Preferred,
        host_flags: HostFlags::PORTABLE.union(HostFlags::MAPPED),
    },
    BufferOptions {
        pinning: Pinning::Never,
        host_flags: HostFlags::PORTABLE.union(HostFlags::MAPPED),
    },
    BufferOptions { pinning: Pinning::Preferred, host_flags: HostFlags::PORTABLE },
];

/// A group, and what each of its sides must hold, byte by byte.
struct Model {
    group: BufferGroup,
    members: Vec<Member>,
    host: Vec<Vec<u8>>,
    gpu: Vec<Vec<u8>>,
    /// For looks, which send nothing.
    stream: Stream,
}

impl Model {
    fn new(
        members: Vec<Member>,
        layout: &GroupLayout,
        device: Device,
        options: BufferOptions,
    ) -> Model {
        let group = BufferGroup::with_options(layout, device, options).unwrap();
        let zeroes: Vec<_> = members.iter().map(|member| vec![0; member.bytes()]).collect();
        let stream = Stream::new(device).unwrap();
        Model { group, members, host: zeroes.clone(), gpu: zeroes, stream }
    }

    fn write(&mut self, index: usize, random: &mut Random) {
        let bytes = random.bytes(self.members[index].bytes());
        (self.members[index].write)(&mut self.group, &bytes);
        self.host[index] = bytes;
    }

    /// Copies rows of members, in this order.
    fn copy(&mut self, up: bool, rows: &[(usize, Range<usize>)], stream: &Stream) {
        let selected: Vec<_> =
            rows.iter().map(|(index, rows)| (self.members[*index].select)(rows.clone())).collect();
        match up {
            true => self.group.copy_to_gpu(&selected, stream).unwrap(),
            false => self.group.copy_to_cpu(&selected, stream).unwrap(),
        }
        for (index, rows) in rows {
            let row = self.members[*index].row;
            let bytes = rows.start * row..rows.end * row;
            let (host, gpu) = (&mut self.host[*index], &mut self.gpu[*index]);
            match up {
                true => gpu[bytes.clone()].copy_from_slice(&host[bytes]),
                false => host[bytes.clone()].copy_from_slice(&gpu[bytes]),
            }
        }
    }

    /// Looks at every byte of every member. Of what the host owns, rows may have been carried along that were not
    /// asked for; they are then as in the host side.
    #[track_caller]
    fn look(&mut self, what: &str) {
        // It may not have been used yet, and then it is not zeroed.
        self.group.gpu_on(&self.stream).unwrap();
        self.group.synchronize().unwrap();
        for (index, member) in self.members.iter().enumerate() {
            let (host, gpu) = (&self.host[index], &mut self.gpu[index]);
            let seen = (member.read)(&self.group);
            same(&seen, host, what, index);
            let address = (member.gpu)(&self.group);
            let mut seen = device_bytes(self.group.device(), address, gpu.len());
            if member.mirrored && seen != *gpu {
                for ((seen, gpu), host) in seen.iter_mut().zip(gpu.iter_mut()).zip(host) {
                    if *seen == *host {
                        *gpu = *seen;
                    }
                }
            }
            same(&seen, gpu, what, index);
        }
    }
}

#[track_caller]
fn same(seen: &[u8], expected: &[u8], what: &str, index: usize) {
    // In one call: a sanitizer does not look at every byte by itself.
    if seen != expected {
        let at = seen.iter().zip(expected).position(|(seen, expected)| seen != expected);
        panic!("{what}: byte {at:?} of {} of member {index} is wrong", seen.len());
    }
}

/// A layout of members of any types and sizes.
fn any_layout(random: &mut Random, mirrored: bool) -> (Vec<Member>, GroupLayout) {
    const KINDS: [Add; 10] = [
        Member::add::<u8>,
        Member::add::<[u8; 3]>,
        Member::add::<u16>,
        Member::add::<[u16; 7]>,
        Member::add::<f32>,
        Member::add::<u64>,
        Member::add::<[u8; 17]>,
        Member::add::<Quad>,
        Member::add::<Wide>,
        Member::add::<Nothing>,
    ];
    let mut builder = GroupLayoutBuilder::new();
    let count = 1 + random.next(30);
    let members = (0..count).map(|_| {
        let rows = match random.next(10) {
            0 => random.next(2),
            1 => 3000 + random.next(9000),
            _ => random.next(70),
        };
        let shape = [rows, 1 + random.next(3)];
        KINDS[random.next(KINDS.len())](&mut builder, shape, mirrored && random.next(2) == 0)
    });
    (members.collect(), builder.build().unwrap())
}

/// Rows of some members, in any order, and of some of them several times.
fn any_rows(random: &mut Random, members: &[Member]) -> Vec<(usize, Range<usize>)> {
    let mut indices: Vec<_> = (0..members.len()).collect();
    for last in (1..indices.len()).rev() {
        indices.swap(last, random.next(last + 1));
    }
    indices.truncate(1 + random.next(members.len()));
    for _ in 0..random.next(2) * random.next(20) {
        indices.push(random.next(members.len()));
    }
    let rows = |index: usize| {
        let rows = members[index].rows;
        let (one, other) = (random.next(rows + 1), random.next(rows + 1));
        match random.next(3) {
            0 => (index, 0..rows),
            1 => (index, 0..one),
            _ => (index, one.min(other)..one.max(other)),
        }
    };
    indices.into_iter().map(rows).collect()
}

/// Whatever rows of whatever members are sent whichever way, on any of three streams.
fn anything(test: &str, mirrored: bool) {
    let _turn = common::turn();
    for device in common::devices() {
        let streams = [(); 3].map(|()| Stream::new(device).unwrap());
        for seed in 1..=20 {
            let mut random = Random(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
            let (members, layout) = any_layout(&mut random, mirrored);
            let options = OPTIONS[random.next(8) % 3];
            let mut model = Model::new(members, &layout, device, options);
            for step in 0..24 {
                for _ in 0..random.next(4) {
                    let index = random.next(model.members.len());
                    model.write(index, &mut random);
                }
                let rows = any_rows(&mut random, &model.members);
                model.copy(random.next(2) == 0, &rows, &streams[random.next(3)]);
                if mirrored || random.next(4) == 0 {
                    model.look(&format!("{test}, {device}, seed {seed}, step {step}"));
                }
            }
            model.look(&format!("{test}, {device}, seed {seed}"));
        }
    }
}

#[test]
fn any_rows_of_any_members_arrive_and_not_a_byte_beside_them() {
    anything(test_name!(), false);
}

#[test]
fn what_the_host_owns_is_carried_along_as_it_is_or_not_at_all() {
    anything(test_name!(), true);
}

/// Members of bytes between which something always lies that is not asked for.
fn apart(lengths: impl IntoIterator<Item = usize>) -> (Vec<Member>, GroupLayout) {
    let mut builder = GroupLayoutBuilder::new();
    let members =
        lengths.into_iter().map(|len| Member::add::<u8>(&mut builder, [len + 2, 1], false));
    (members.collect(), builder.build().unwrap())
}

/// All but the first and last byte of each member.
fn inner(members: &[Member]) -> Vec<(usize, Range<usize>)> {
    members.iter().enumerate().map(|(index, member)| (index, 1..member.rows - 1)).collect()
}

/// How many kernels, copies and events a copy is made of, where that can be counted.
fn counted(model: &mut Model, action: impl FnOnce(&mut Model)) -> Option<[u64; 3]> {
    if !common::is_simulated() || model.group.device() == Device::Cpu {
        action(model);
        return None;
    }
    #[cfg(target_os = "linux")]
    {
        use common::sim::{calls_of, reset};
        reset();
        action(model);
        let copies = calls_of(c"cuMemcpyHtoDAsync") + calls_of(c"cuMemcpyDtoHAsync");
        let launches = calls_of(c"cuLaunchKernel") + calls_of(c"cuGraphLaunch");
        Some([launches, copies, calls_of(c"cuEventRecord")])
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Sends rows both ways, with both sides different everywhere before; every byte is looked at. The answer is what
/// each way was made of: it must be the same.
fn both_ways(
    model: &mut Model,
    rows: &[(usize, Range<usize>)],
    stream: &Stream,
    what: &str,
) -> Option<[u64; 3]> {
    let mut random = Random(rows.len() as u64 + 1);
    let all: Vec<_> = (0..model.members.len()).collect();
    let whole: Vec<_> = all.iter().map(|index| (*index, 0..model.members[*index].rows)).collect();
    all.iter().for_each(|index| model.write(*index, &mut random));
    model.copy(true, &whole, stream);
    all.iter().for_each(|index| model.write(*index, &mut random));
    let up = counted(model, |model| model.copy(true, rows, stream));
    model.look(what);
    all.iter().for_each(|index| model.write(*index, &mut random));
    let down = counted(model, |model| model.copy(false, rows, stream));
    model.look(what);
    assert_eq!(up, down, "{what}");
    up
}

/// What so many short ranges are moved by: one kernel where it reaches the host side, and there are several.
fn expected(ranges: u64, options: BufferOptions) -> [u64; 3] {
    match ranges > 1 && options == OPTIONS[0] {
        true => [1, 0, 1],
        false => [0, ranges, 1],
    }
}

/// For each device and options, with a stream.
fn each(run: impl Fn(Device, BufferOptions, &Stream)) {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        OPTIONS.into_iter().for_each(|options| run(device, options, &stream));
    }
}

#[test]
fn rows_of_one_member_in_many_places_arrive_in_one_call() {
    each(|device, options, stream| {
        let mut builder = GroupLayoutBuilder::new();
        let member = Member::add::<u32>(&mut builder, [4000, 3], false);
        let layout = builder.build().unwrap();
        let mut model = Model::new(vec![member], &layout, device, options);
        // Every fourth row, in an order that is not that of the rows.
        let mut rows: Vec<_> = (0..1000).map(|at| (0, at * 7 % 1000 * 4)).collect();
        let ranges = |rows: &[(usize, usize)]| -> Vec<_> {
            rows.iter().map(|(index, row)| (*index, *row..*row + 1)).collect()
        };
        let calls = both_ways(&mut model, &ranges(&rows), stream, "apart");
        if let Some(calls) = calls {
            let expected = if options == OPTIONS[0] { [5, 0, 1] } else { [0, 1000, 1] };
            assert_eq!(calls, expected);
        }
        // Each of them twice, and all that touch: one range.
        rows.extend_from_within(..);
        rows.extend((0..4000).map(|row| (0, row)));
        let calls = both_ways(&mut model, &ranges(&rows), stream, "joined");
        assert!(calls.is_none_or(|calls| calls == [0, 1, 1]), "{calls:?}");
        // A range within another, which goes on behind it.
        let overlapping = [(0, 10..20), (0, 12..13), (0, 15..30), (0, 31..32)];
        both_ways(&mut model, &overlapping, stream, "overlapping");
    });
}

#[test]
fn any_number_of_ranges_arrives_by_as_few_calls_as_there_can_be() {
    each(|device, options, stream| {
        for (ranges, launches) in
            [(1, 0), (2, 1), (32, 1), (33, 1), (224, 1), (225, 2), (448, 2), (449, 3)]
        {
            let (members, layout) = apart((0..ranges).map(|range| 1 + range * 37 % 500));
            let rows = inner(&members);
            let mut model = Model::new(members, &layout, device, options);
            let what = format!("{ranges} ranges, {options:?}");
            let seen = both_ways(&mut model, &rows, stream, &what);
            let copies = if launches == 0 { ranges as u64 } else { 0 };
            let expected = match options == OPTIONS[0] {
                true => [launches, copies, 1],
                // Kernels do not reach such memory, or nobody said that they do.
                false => [0, ranges as u64, 1],
            };
            assert!(seen.is_none_or(|seen| seen == expected), "{what}: {seen:?}");
        }
    });
}

#[test]
fn ranges_of_every_length_arrive_at_every_distance_to_the_bounds_of_vectors() {
    each(|device, options, stream| {
        // Every length up to three vectors, beginning at every byte of one, and such as take several blocks.
        let long = [4095, 4096, 4097, 70_000, 131_072 + 15];
        for start in 0..16 {
            let (members, layout) = apart((0..50).chain(long).map(|len| len + 16));
            let rows = (0..50).chain(long).enumerate();
            let rows: Vec<_> = rows.map(|(index, len)| (index, start..start + len)).collect();
            let mut model = Model::new(members, &layout, device, options);
            both_ways(&mut model, &rows, stream, &format!("from byte {start}, {options:?}"));
        }
    });
}

#[test]
fn long_ranges_go_by_copies_and_with_many_short_ones_by_a_kernel() {
    each(|device, options, stream| {
        let long = [300_001, 200_000, 150_003];
        let short = (0..20).map(|range| 100 + range);
        for (lengths, launches) in [
            (long.to_vec(), 0),
            (long.into_iter().chain(short.clone()).collect(), 1),
            ([3 << 20].into_iter().chain(short).collect(), 0),
        ] {
            let ranges = lengths.len() as u64;
            let (members, layout) = apart(lengths);
            let rows = inner(&members);
            let mut model = Model::new(members, &layout, device, options);
            let what = format!("{ranges} ranges, {options:?}");
            let seen = both_ways(&mut model, &rows, stream, &what);
            let kernel = launches > 0 && options == OPTIONS[0];
            let expected = if kernel { [launches, 0, 1] } else { [0, ranges, 1] };
            assert!(seen.is_none_or(|seen| seen == expected), "{what}: {seen:?}");
        }
    });
}

#[test]
fn neighbours_with_nothing_but_padding_between_them_go_as_one() {
    each(|device, options, stream| {
        let mut builder = GroupLayoutBuilder::new();
        let members = vec![
            Member::add::<u8>(&mut builder, [100, 1], false),
            Member::add::<[u8; 3]>(&mut builder, [51, 2], false),
            Member::add::<u64>(&mut builder, [0, 1], false),
            Member::add::<Wide>(&mut builder, [2, 1], false),
            Member::add::<u16>(&mut builder, [33, 1], true),
            Member::add::<f32>(&mut builder, [10, 1], false),
        ];
        let mut model = Model::new(members, &builder.build().unwrap(), device, options);
        for (rows, ranges) in [
            // In any order, with the beginning of the first and the end of the last left out.
            (vec![(1, 0..51), (0, 7..100), (4, 0..33), (3, 0..2), (5, 0..9)], 1),
            (vec![(2, 0..0), (1, 3..51), (3, 0..1)], 1),
            // A row is missing.
            (vec![(0, 0..99), (1, 0..51)], 2),
            (vec![(0, 0..100), (1, 1..51)], 2),
            // A member is.
            (vec![(0, 0..100), (3, 0..2)], 2),
            // Rows of none, and none at all.
            (vec![(0, 9..9), (1, 51..51), (3, 0..2)], 1),
        ] {
            let what = format!("{rows:?}, {options:?}");
            let seen = both_ways(&mut model, &rows, stream, &what);
            let expected = expected(ranges, options);
            assert!(seen.is_none_or(|seen| seen == expected), "{what}: {seen:?}");
        }
        let nothing = both_ways(&mut model, &[(2, 0..0), (0, 5..5)], stream, "nothing");
        assert!(nothing.is_none_or(|seen| seen == [0, 0, 0]), "{nothing:?}");
    });
}

#[test]
fn rows_that_the_host_owns_are_carried_along_by_uploads_where_that_makes_one_copy() {
    each(|device, options, stream| {
        let most = 96 << 10;
        let mut builder = GroupLayoutBuilder::new();
        let members = vec![
            Member::add::<u8>(&mut builder, [100, 1], true),
            Member::add::<u32>(&mut builder, [50, 2], true),
            Member::add::<u8>(&mut builder, [100, 1], true),
            Member::add::<u8>(&mut builder, [most, 1], true),
            Member::add::<u8>(&mut builder, [100, 1], true),
            Member::add::<u8>(&mut builder, [100, 1], false),
            Member::add::<u8>(&mut builder, [100, 1], true),
        ];
        let mut model = Model::new(members, &builder.build().unwrap(), device, options);
        model.look("at first");
        let mut random = Random(9);
        let mut send = |rows: &[(usize, Range<usize>)], up, ranges: u64| {
            (0..7).for_each(|index| model.write(index, &mut random));
            let seen = counted(&mut model, |model| model.copy(up, rows, stream));
            model.look(&format!("{rows:?}, {options:?}"));
            let expected = expected(ranges, options);
            assert!(seen.is_none_or(|seen| seen == expected), "{rows:?}: {seen:?}");
        };
        send(&[(0, 0..100), (1, 0..50)], true, 1);
        // The rest of the first, what is between, and the beginning of the last.
        send(&[(0, 5..40), (2, 60..99)], true, 1);
        send(&[(0, 5..40), (1, 7..8), (2, 60..99)], true, 1);
        // Just as much as is worth it, and one byte more.
        send(&[(2, 0..100), (4, 0..100)], true, 1);
        send(&[(2, 0..99), (4, 0..100)], true, 2);
        // Not over a member that the device may have written, nor over its rows.
        send(&[(4, 0..100), (6, 0..100)], true, 2);
        send(&[(4, 0..100), (5, 1..100)], true, 2);
        // Nor into the host side, ever.
        send(&[(0, 5..40), (2, 60..99)], false, 2);
        send(&[(0, 5..40), (1, 0..49)], false, 2);
    });
}

#[test]
fn rows_between_many_rows_of_a_mirrored_member_are_carried_up_to_one_copys_worth_in_all() {
    each(|device, options, stream| {
        let mut builder = GroupLayoutBuilder::new();
        let member = Member::add::<[u8; 1024]>(&mut builder, [2000, 1], true);
        let mut model = Model::new(vec![member], &builder.build().unwrap(), device, options);
        model.look("at first");
        model.write(0, &mut Random(3));
        let rows: Vec<_> = (0..1000).map(|row| (0, row * 2..row * 2 + 1)).collect();
        let seen = counted(&mut model, |model| model.copy(true, &rows, stream));
        // Kernels are launched for 224 ranges each. Without them each range costs a copy.
        let expected = if options == OPTIONS[0] { [5, 0, 1] } else { [0, 1, 1] };
        assert!(seen.is_none_or(|seen| seen == expected), "{options:?}: {seen:?}");
        let before = model.gpu[0].clone();
        model.look("carried");
        let carried = before.iter().zip(&model.gpu[0]).filter(|(before, now)| before != now);
        // Some of the bytes are zeroes on both sides.
        let (carried, most) = (carried.count(), 96 << 10);
        if options == OPTIONS[0] || device == Device::Cpu {
            assert!((most - (2 << 10)..=most).contains(&carried), "{carried} bytes are carried");
        }
    });
}

#[test]
fn rows_that_the_host_does_not_own_after_all_are_overwritten_on_the_cpu_as_on_a_gpu() {
    each(|device, options, stream| {
        for mirrored in [false, true] {
            let mut builder = GroupLayoutBuilder::new();
            let keys: [MemberKey<u32>; 3] = [(); 3].map(|()| match mirrored {
                true => builder.add_mirrored(100),
                false => builder.add(100),
            });
            let mut group =
                BufferGroup::with_options(&builder.build().unwrap(), device, options).unwrap();
            let mut view = group.gpu_on(stream).unwrap().member(keys[1]).unwrap();
            match view.as_host_slice_mut() {
                Some(words) => words.fill(7),
                None => common::store(view.as_mut_ptr(), view.len(), 7, stream),
            }
            group.copy_to_gpu(&[keys[0].rows(..), keys[2].rows(..)], stream).unwrap();
            group.synchronize().unwrap();
            let address = group.device_ptr(keys[1]).unwrap();
            let seen = common::device_words(device, address, 100);
            common::all(&seen, if mirrored { 0 } else { 7 });
        }
    });
}

#[test]
fn kernels_that_reach_host_memory_are_turned_off_by_never_and_by_nothing_else() {
    let test = test_name!();
    let variable = "CPU_GPU_BUFFER_MAPPED_KERNELS";
    if !common::is_subprocess() {
        for value in ["never", "", "0", "always"] {
            let output = common::in_subprocess(test, &[(variable, value)]);
            assert!(output.status.success(), "{variable}={value}: {output:?}");
        }
        return;
    }
    let off = std::env::var(variable).unwrap() == "never";
    each(|device, options, stream| {
        let (members, layout) = apart([100, 200]);
        let rows = inner(&members);
        let mut model = Model::new(members, &layout, device, options);
        let seen = both_ways(&mut model, &rows, stream, test);
        let expected = if off { [0, 2, 1] } else { expected(2, options) };
        assert!(seen.is_none_or(|seen| seen == expected), "{off}, {options:?}: {seen:?}");
    });
}

#[test]
fn both_sides_begin_as_zeroes_and_addresses_never_change() {
    each(|device, options, stream| {
        let (members, layout) = any_layout(&mut Random(77), false);
        let mut model = Model::new(members, &layout, device, options);
        let addresses = |model: &Model| -> Vec<_> {
            model.members.iter().map(|member| (member.gpu)(&model.group)).collect()
        };
        let before = addresses(&model);
        model.look("at first");
        let rows = model.members.iter().map(|member| (member.select)(0..member.rows));
        let rows: Vec<_> = rows.collect();
        for _ in 0..100 {
            model.group.copy_to_gpu(&rows, stream).unwrap();
            model.group.copy_to_cpu(&rows, stream).unwrap();
            model.group.gpu_on(stream).unwrap();
        }
        assert_eq!(addresses(&model), before);
        model.look("at last");
    });
}

#[test]
fn a_group_tells_what_it_is() {
    each(|device, options, stream| {
        let mut builder = GroupLayoutBuilder::new();
        let one = builder.add::<u16>([4, 3]);
        let wide = builder.add::<Wide>(2);
        let layout = builder.build().unwrap();
        let mut group = BufferGroup::with_options(&layout, device, options).unwrap();
        assert_eq!(
            (group.shape(one).unwrap(), group.shape(wide).unwrap()),
            (&[4, 3][..], &[2][..])
        );
        assert_eq!(group.device(), device);
        let (address, other) = (group.device_ptr(one).unwrap(), group.device_ptr(wide).unwrap());
        assert!(address.addr().is_multiple_of(256) && other.addr().is_multiple_of(512));
        let mut view = group.gpu_on(stream).unwrap();
        assert_eq!(view.device(), device);
        let (seen, len) = (view.member(one).unwrap(), view.member(wide).unwrap().len());
        assert_eq!(
            (seen.as_mut_ptr(), seen.shape(), seen.len(), len),
            (address, &[4, 3][..], 12, 2)
        );
        assert_eq!(seen.rows(1..3).unwrap().as_mut_ptr(), address.wrapping_add(3));
        // A layout serves many groups.
        let again = BufferGroup::with_options(&layout, device, options).unwrap();
        assert_ne!(again.device_ptr(one).unwrap(), address);
        assert_eq!(again.is_pinned(), format!("{again:?}").contains("true"), "{again:?}");
    });
}
