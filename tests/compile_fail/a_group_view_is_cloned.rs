// error[E0599]
use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let view = group.gpu_on(&stream)?;
    let (mut one, mut other) = (view.clone(), view);
    println!("{:?} {:?}", one.member(key)?, other.member(key)?);
    Ok(())
}
