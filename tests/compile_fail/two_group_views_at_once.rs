// error[E0499]
use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    let mut one = group.gpu_on(&stream)?.member(key)?;
    let mut other = group.gpu_on(&stream)?.member(key)?;
    one.as_host_slice_mut().unwrap().copy_from_slice(other.as_host_slice_mut().unwrap());
    Ok(())
}
