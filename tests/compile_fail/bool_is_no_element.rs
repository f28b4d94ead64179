// error[E0277]
fn _takes(_: cpu_gpu_buffer::CpuGpuBuffer<bool>) {}
fn main() {}
