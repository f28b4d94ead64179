// error[E0499]
use cpu_gpu_buffer::{BufferRing, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut ring = BufferRing::<u8>::new(8, Device::Cpu, 2)?;
    let mut view = ring.gpu_on(&stream)?;
    ring.advance()?[0] = 1;
    view.as_host_slice_mut().unwrap()[0] = 2;
    Ok(())
}
