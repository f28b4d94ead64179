// error[E0597]
use cpu_gpu_buffer::{CpuGpuBuffer, Device};
fn main() -> cpu_gpu_buffer::Result<()> {
    let slice;
    {
        let buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
        slice = buffer.cpu()?;
    }
    println!("{}", slice[0]);
    Ok(())
}
