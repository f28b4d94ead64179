// error[E0277]
use std::marker::PhantomData;
#[derive(Clone, Copy, bytemuck::Zeroable)]
#[repr(C)]
struct Local(u8, PhantomData<*const ()>);
unsafe impl bytemuck::Pod for Local {}
fn main() {
    cpu_gpu_buffer::GroupLayoutBuilder::new().add::<Local>(8);
}
