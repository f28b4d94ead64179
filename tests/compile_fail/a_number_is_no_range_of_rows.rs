// error[E0277]: `usize` is no range of rows: expected a range of rows
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
fn main() -> cpu_gpu_buffer::Result<()> {
    let stream = Stream::new(Device::Cpu)?;
    let mut buffer = CpuGpuBuffer::<u8>::new(8, Device::Cpu)?;
    let rows: usize = 3;
    buffer.copy_to_gpu(rows, &stream)
}
