//! A program of cudarc's that keeps its input in buffers: each step uploads some rows on a stream of ours, and a kernel that
//! cudarc launches on a stream of its own multiplies them.
//!
//! ```sh
//! cargo run --release --package cpu-gpu-buffer-cudarc
//! ```
//!
//! Where there is no driver it says what is left out, and does the same on the CPU.

use std::any::Any;
use std::slice;
use std::sync::Arc;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, GpuView, Stream};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

type Failure = Box<dyn std::error::Error>;

const SHAPE: [usize; 2] = [256, 1024];
const STEPS: usize = 200;
const BY: f32 = 3.0;

/// What multiplies numbers on a stream.
enum Scale {
    Kernel { function: CudaFunction, stream: Arc<CudaStream> },
    Host,
}

/// cudarc's kernel and its stream, which is then ours, too; or why not.
fn cudarc() -> Result<(Scale, Stream), Failure> {
    // SAFETY: it looks for the library, and loads it.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("there is no driver".into());
    }
    // The device's primary context, which is this crate's, too.
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let module = context.load_module(Ptx::from_src(include_str!("scale.ptx")))?;
    let function = module.load_function("scale")?;
    let owner: Arc<dyn Any + Send + Sync> = stream.clone();
    let raw = stream.cu_stream().cast();
    // SAFETY: a stream of device 0's primary context, which cudarc destroys when its last owner is gone, and nobody captures.
    let adopted = unsafe { Stream::from_raw(raw, Device::Cuda(0), Some(owner)) }?;
    Ok((Scale::Kernel { function, stream }, adopted))
}

impl Scale {
    /// Multiplies the numbers of a view that was given to this stream.
    fn run(&self, view: GpuView<'_, f32>) -> Result<(), Failure> {
        match self {
            Scale::Kernel { function, stream } => {
                let (numbers, count) = (view.as_mut_ptr().addr() as u64, view.len() as u32);
                let mut launch = stream.launch_builder(function);
                launch.arg(&numbers).arg(&count).arg(&BY);
                // SAFETY: the parameters are those of `scale`, and the numbers those of a view that lives.
                unsafe { launch.launch(LaunchConfig::for_num_elems(count)) }?;
            }
            Scale::Host => {
                // SAFETY: on the CPU the device side is host memory, and the view is the only way to it.
                let numbers = unsafe { slice::from_raw_parts_mut(view.as_mut_ptr(), view.len()) };
                numbers.iter_mut().for_each(|number| *number *= BY);
            }
        }
        Ok(())
    }
}

fn main() -> Result<(), Failure> {
    let (scale, theirs) = match cudarc() {
        Ok(made) => made,
        Err(why) => {
            println!("cudarc's stream and its kernel: left out, {why}");
            (Scale::Host, Stream::new(Device::Cpu)?)
        }
    };
    let device = theirs.device();
    let ours = Stream::new(device)?;
    let mut buffer = CpuGpuBuffer::<f32>::new(SHAPE, device)?;
    for step in 0..STEPS {
        let rows = 1 + step % SHAPE[0];
        // Waits for the last step's download, and for nothing else.
        buffer.cpu_mut()?[..rows * SHAPE[1]].fill(step as f32);
        buffer.copy_to_gpu(..rows, &ours)?;
        // cudarc's stream waits for the upload, and the download for what it is sent here.
        scale.run(buffer.gpu_on(&theirs)?.rows(..rows)?)?;
        buffer.copy_to_cpu(..rows, &ours)?;
        if step % 10 == 0 {
            let expected = step as f32 * BY;
            let wrong = buffer.cpu()?[..rows * SHAPE[1]].iter().position(|x| *x != expected);
            if let Some(at) = wrong {
                return Err(format!("step {step}: number {at} is not {expected}").into());
            }
        }
    }
    // The buffer and our handle keep cudarc's stream: it may be dropped first.
    drop(scale);
    buffer.copy_to_gpu(.., &theirs)?;
    drop((buffer, theirs));
    println!("{STEPS} steps on {device}: each number was multiplied by {BY}");
    Ok(())
}
