// error[E0499]
use cpu_gpu_buffer::{Device, Stream, BufferRing};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut ring = BufferRing::<u8>::new(8, Device::Cpu, 2)?;
    let slice = ring.advance()?;
    ring.copy_to_gpu(.., &stream)?;
    slice[0] = 1;
    Ok(())
}
