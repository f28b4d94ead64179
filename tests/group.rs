//! Members of a group and halves of a ring are moved together, and no safe program can race with that.

mod common;

use common::{Gate, device_bytes};
use cpu_gpu_buffer::{
    BufferGroup, Device, Error, GroupLayoutBuilder, GroupRing, Key, Stream, UploadRing,
};

#[test]
fn rows_of_members_arrive_and_nothing_beside_them() {
    let _turn = common::turn();
    for device in common::devices() {
        let stream = Stream::new(device).unwrap();
        let mut builder = GroupLayoutBuilder::new();
        let bytes = builder.add::<u8>(1000);
        let words = builder.add::<u32>([50, 3]);
        let empty = builder.add::<u64>(0);
        let longs = builder.add::<[u8; 3]>([40, 2]);
        let layout = builder.finish();
        let mut group = BufferGroup::new(&layout, device).unwrap();
        group.cpu_mut(bytes).unwrap().fill(1);
        group.cpu_mut(words).unwrap().fill(2);
        group.cpu_mut(longs).unwrap().fill([3; 3]);
        group
            .copy_to_gpu(
                &[longs.rows(3..7), bytes.rows(5..999), empty.rows(..), words.rows(1..2)],
                &stream,
            )
            .unwrap();
        group.cpu_mut(bytes).unwrap().fill(9);
        group.copy_to_cpu(&[bytes.rows(..), words.rows(..), longs.rows(..)], &stream).unwrap();
        let seen = group.cpu(bytes).unwrap();
        assert!(seen[..5] == [0; 5] && seen[5..999].iter().all(|b| *b == 1) && seen[999] == 0);
        let seen = group.cpu(words).unwrap();
        assert!(seen[..3] == [0; 3] && seen[3..6] == [2; 3] && seen[6..].iter().all(|w| *w == 0));
        let seen = group.cpu(longs).unwrap();
        assert!(
            seen[..6].iter().chain(&seen[14..]).all(|l| *l == [0; 3]) && seen[6..14] == [[3; 3]; 8]
        );
    }
}
