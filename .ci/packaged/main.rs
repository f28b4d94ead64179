//! A program as somebody writes it who has nothing but the published crates: each kind of buffer goes to the first CUDA
//! device that works, or stays on the CPU, and comes back as it was.

use cpu_gpu_buffer::{
    BufferGroup, BufferPool, BufferRing, CpuGpuBuffer, Device, GroupLayoutBuilder, Stream, sys,
};

fn main() -> cpu_gpu_buffer::Result<()> {
    let device = Device::auto();
    let stream = Stream::new(device)?;

    let mut buffer = CpuGpuBuffer::<[u8; 3]>::new([1000, 7], device)?;
    buffer.cpu_mut()?.fill([1, 2, 3]);
    buffer.copy_to_gpu(..500, &stream)?;
    buffer.cpu_mut()?.fill([9; 3]);
    buffer.copy_to_cpu(.., &stream)?;
    let (sent, rest) = buffer.cpu()?.split_at(3500);
    assert!(
        sent.iter().all(|element| *element == [1, 2, 3])
            && rest.iter().all(|element| *element == [0; 3])
    );
    // Three bytes do not repeat in a word: the embedded kernel fills them.
    buffer.fill_gpu([4, 5, 6], &stream)?;
    buffer.copy_to_cpu(1.., &stream)?;
    assert!(buffer.cpu()?[7..].iter().all(|element| *element == [4, 5, 6]));

    let pool = BufferPool::<u64>::new(1 << 20, device, 2)?;
    for step in 0..100 {
        let mut pooled = pool.acquire()?;
        pooled.cpu_mut()?[step] = step as u64;
        pooled.copy_to_gpu(step..=step, &stream)?;
    }

    let mut builder = GroupLayoutBuilder::new();
    let keys = [(); 16].map(|()| builder.add::<i32>([64, 5]));
    let mut group = BufferGroup::new(&builder.build()?, device)?;
    for (index, key) in keys.iter().enumerate() {
        group.cpu_mut(*key)?.fill(index as i32);
    }
    let rows = keys.map(|key| key.rows(3..9));
    // So many ranges at once go by the other kernel.
    group.copy_to_gpu(&rows, &stream)?;
    for key in keys {
        group.cpu_mut(key)?.fill(-1);
    }
    group.copy_to_cpu(&rows, &stream)?;
    for (index, key) in keys.iter().enumerate() {
        assert!(group.cpu(*key)?[15..45].iter().all(|element| *element == index as i32));
    }

    let mut ring = BufferRing::<f32>::new(256, device, 3)?;
    for step in 0..30 {
        ring.advance()?.fill(step as f32);
        ring.copy_to_gpu(.., &stream)?;
    }
    ring.synchronize()?;

    let runtime =
        sys::runtime().map_or_else(|_| "none".into(), |runtime| runtime.version().to_string());
    println!(
        "{device}, pinned: {}, CUDA runtime: {runtime}; every byte came back",
        buffer.is_pinned()
    );
    Ok(())
}
