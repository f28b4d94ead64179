// error[E0505]
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let slice = buffer.gpu_on(&stream)?.rows(..2)?.into_host_slice();
    drop(buffer);
    println!("{slice:?}");
    Ok(())
}
