// error[E0499]
use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let mut view = group.gpu_on(&stream)?;
    group.copy_to_gpu(&[key.rows(..)], &stream)?;
    println!("{:?}", view.member(key)?.as_host_slice());
    Ok(())
}
