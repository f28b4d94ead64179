// error[E0277]
fn _takes(_: cpu_gpu_buffer::CpuGpuBuffer<&'static u8>) {}
fn main() {}
