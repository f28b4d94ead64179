// error[E0502]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut from = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let mut to = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let host = from.cpu_rows(2..)?;
    to.copy_to_gpu_from(0, &mut from, .., &stream)?;
    println!("{host:?}");
    Ok(())
}
