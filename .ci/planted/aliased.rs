//! A program for `.ci/miri control`. Its results are right with the planted fault, too: only Miri
//! sees that two slices of the same memory are used in turn.

use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};

#[test]
fn a_member_is_taken_twice() {
    let mut builder = GroupLayoutBuilder::new();
    let ids = builder.add::<i32>(4);
    let mut group = BufferGroup::new(&builder.build().unwrap(), Device::Cpu).unwrap();
    let mut members = group.members_mut();
    let first = members.cpu_mut(ids).unwrap();
    let second = members.cpu_mut(ids).unwrap();
    first.fill(1);
    second[0] = 2;
    first[1] = 3;
    assert_eq!(group.cpu(ids).unwrap(), [2, 3, 1, 1]);
}
