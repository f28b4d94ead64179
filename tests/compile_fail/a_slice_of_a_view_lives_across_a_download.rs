// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let mut view = buffer.gpu_on(&stream)?;
    let slice = view.as_host_slice_mut().unwrap();
    buffer.copy_to_cpu(.., &stream)?;
    slice[0] = 1;
    Ok(())
}
