// error[E0133]
fn main() {
    let _ = cpu_gpu_buffer::Stream::from_raw(std::ptr::null_mut(), cpu_gpu_buffer::Device::Cpu, None);
}
