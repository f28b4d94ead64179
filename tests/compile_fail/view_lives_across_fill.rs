// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let view = buffer.gpu_on(&stream)?;
    buffer.fill(1, &stream)?;
    println!("{:?}", view.as_host_slice());
    Ok(())
}
