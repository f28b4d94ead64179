// compiles
use cpu_gpu_buffer::{BufferGroup, CpuGpuBuffer, Device, GroupLayoutBuilder, Stream};
fn shared<T: Send + Sync>(_: &T) {}
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    buffer.cpu_mut()?[0] = 1;
    buffer.copy_to_gpu(.., &stream)?;
    let seen = buffer.cpu()?;
    assert_eq!(seen[0], 1);
    let mut view = buffer.gpu_on(&stream)?;
    view.as_host_slice_mut().unwrap()[0] = 2;
    let mut rows = view.rows(2..)?;
    rows.as_host_slice_mut().unwrap()[0] = 1;
    assert_eq!(rows.len(), 6);
    let mut from = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    buffer.copy_to_gpu_from(0, &mut from, .., &stream)?;
    shared(&buffer);
    shared(&stream);
    shared(&stream.record()?);
    let mut builder = GroupLayoutBuilder::new();
    let (key, other) = (builder.add::<u8>(8), builder.add::<u32>(8));
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let mut members = group.members_mut();
    let (one, two) = (members.cpu_mut(key)?, members.cpu_mut(other)?);
    (one[0], two[0]) = (1, 2);
    group.copy_to_gpu(&[key.rows(..), other.rows(..)], &stream)?;
    let mut view = group.gpu_on(&stream)?;
    assert_eq!(view.member(key)?.len(), view.member(other)?.len());
    shared(&group);
    Ok(())
}
