// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let mut view = buffer.gpu_on(&stream)?;
    let (one, other) = (view.as_host_slice_mut(), view.as_host_slice_mut());
    one.unwrap().copy_from_slice(other.unwrap());
    Ok(())
}
