// error[E0277]: `[f32; 2]` has no `DType`: expected an element type that array libraries know
fn dtype<T: cpu_gpu_buffer::Element>() {}
fn main() {
    dtype::<[f32; 2]>();
}
