// error[E0599]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let view = buffer.gpu_on(&stream)?;
    let (mut one, mut other) = (view.clone(), view);
    one.as_host_slice_mut().unwrap().copy_from_slice(other.as_host_slice_mut().unwrap());
    Ok(())
}
