// error[E0277]
fn main() {
    let buffer = cpu_gpu_buffer::CpuGpuBuffer::<[u8; 3]>::new(8, cpu_gpu_buffer::Device::Cpu).unwrap();
    buffer.dtype();
}
