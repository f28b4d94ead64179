// error[E0277]
use std::marker::PhantomData;
fn send<T: Send>() {}
fn main() {
    send::<cpu_gpu_buffer::GpuView<'static, PhantomData<*const u8>>>();
}
