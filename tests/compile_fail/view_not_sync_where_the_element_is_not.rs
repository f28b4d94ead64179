// error[E0277]
use std::cell::Cell;
use std::marker::PhantomData;
fn sync<T: Sync>() {}
fn main() {
    sync::<cpu_gpu_buffer::GpuView<'static, PhantomData<Cell<u8>>>>();
}
