// error[E0308]
use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let other: cpu_gpu_buffer::MemberKey<u32> = key;
    println!("{}", group.cpu(other)?[0]);
    group.copy_to_gpu(&[key.rows(..)], &stream)?;
    Ok(())
}
