// error[E0382]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let mut view = buffer.gpu_on(&stream)?;
    let mut copy = view;
    view.as_host_slice_mut().unwrap().copy_from_slice(copy.as_host_slice_mut().unwrap());
    Ok(())
}
