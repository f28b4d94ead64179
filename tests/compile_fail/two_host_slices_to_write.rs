// error[E0499]
use cpu_gpu_buffer::{CpuGpuBuffer, Device};
fn main() -> cpu_gpu_buffer::Result<()> {
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let a = buffer.cpu_mut()?;
    let b = buffer.cpu_mut()?;
    a[0] = b[0];
    Ok(())
}
