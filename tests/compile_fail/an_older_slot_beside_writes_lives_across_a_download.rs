// error[E0499]
use cpu_gpu_buffer::{Device, GroupLayoutBuilder, GroupRing, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut builder = GroupLayoutBuilder::new();
    let key = builder.add::<u8>(8);
    let mut ring = GroupRing::new(&builder.build()?, Device::Cpu, 2)?;
    ring.advance()?;
    let before = ring.members_mut().cpu_back(1, key)?;
    ring.copy_to_cpu(&[key.into()], &stream)?;
    println!("{before:?}");
    Ok(())
}
