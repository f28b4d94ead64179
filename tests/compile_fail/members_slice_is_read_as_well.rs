// error[E0502]
use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let slice = group.members_mut().cpu_mut(key)?;
    println!("{}", group.cpu(key)?[0]);
    slice[0] = 1;
    Ok(())
}
