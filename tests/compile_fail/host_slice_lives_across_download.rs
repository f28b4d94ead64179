// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let slice = buffer.cpu_mut()?;
    buffer.copy_to_cpu(.., &stream)?;
    slice[0] = 1;
    Ok(())
}
