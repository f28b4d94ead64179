// error[E0505]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let mut view = buffer.gpu_on(&stream)?;
    let one = view.as_host_slice_mut().unwrap();
    let other = view.into_host_slice().unwrap();
    one.copy_from_slice(other);
    Ok(())
}
