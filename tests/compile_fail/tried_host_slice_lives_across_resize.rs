// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device};
fn main() -> cpu_gpu_buffer::Result<()> {
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let slice = buffer.try_cpu_mut()?.unwrap();
    buffer.resize(100)?;
    slice[0] = 1;
    Ok(())
}
