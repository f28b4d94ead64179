// error[E0502]
use cpu_gpu_buffer::{BufferRing, Device};
fn main() -> cpu_gpu_buffer::Result<()> {
    let mut ring = BufferRing::<u8>::new(8, Device::Cpu, 2)?;
    ring.advance()?;
    let before = ring.cpu_back(1)?;
    ring.advance()?[0] = 1;
    println!("{before:?}");
    Ok(())
}
