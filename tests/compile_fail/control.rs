// compiles
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn shared<T: Send + Sync>(_: &T) {}
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    buffer.cpu_mut()?[0] = 1;
    buffer.copy_to_gpu(.., &stream)?;
    let seen = buffer.cpu()?;
    assert_eq!(seen[0], 1);
    let view = buffer.gpu_on(&stream)?;
    assert_eq!(view.len(), 8);
    shared(&buffer);
    shared(&stream);
    shared(&stream.record()?);
    Ok(())
}
