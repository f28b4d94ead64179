//! A cudarc program that keeps its input in buffers.
//!
//! Each step uploads some rows on a stream of this crate. A kernel that cudarc launches on its own
//! stream multiplies them.
//!
//! ```sh
//! cargo run --release --package cpu-gpu-buffer-cudarc
//! ```
//!
//! Without a driver, the program reports this and runs the same steps on the CPU.

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

/// The multiplication: a kernel on a stream, or a loop on the CPU.
enum Scale {
    Kernel { function: CudaFunction, stream: Arc<CudaStream> },
    Host,
}

/// Loads the kernel with cudarc, and makes a [`Stream`] of cudarc's stream.
fn cudarc() -> Result<(Scale, Stream), Failure> {
    // SAFETY: the function looks for the driver's library and loads it.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("there is no driver".into());
    }
    // This is the device's primary context, which this crate uses as well.
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let module = context.load_module(Ptx::from_src(include_str!("scale.ptx")))?;
    let function = module.load_function("scale")?;
    let owner: Arc<dyn Any + Send + Sync> = stream.clone();
    let raw = stream.cu_stream().cast();
    // SAFETY: a stream of device 0's primary context. cudarc destroys it after `owner` is dropped.
    // Nothing captures it.
    let adopted = unsafe { Stream::from_raw(raw, Device::Cuda(0), Some(owner)) }?;
    Ok((Scale::Kernel { function, stream }, adopted))
}

impl Scale {
    /// Multiplies the numbers of a view. The view is of this stream.
    fn run(&self, view: GpuView<'_, f32>) -> Result<(), Failure> {
        match self {
            Scale::Kernel { function, stream } => {
                let (numbers, count) = (view.as_mut_ptr().addr() as u64, view.len() as u32);
                let mut launch = stream.launch_builder(function);
                launch.arg(&numbers).arg(&count).arg(&BY);
                // SAFETY: the parameters are those of `scale`. The view lives during the launch.
                unsafe { launch.launch(LaunchConfig::for_num_elems(count)) }?;
            }
            Scale::Host => {
                // SAFETY: on the CPU the device side is host memory. Nothing else uses it while the
                // view lives.
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
        // This waits for the last step's copies alone.
        buffer.cpu_mut()?[..rows * SHAPE[1]].fill(step as f32);
        buffer.copy_to_gpu(..rows, &ours)?;
        // cudarc's stream waits for the upload. The download waits for the kernel.
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
    // cudarc's handle may be dropped first: the buffer and `theirs` keep the stream.
    drop(scale);
    buffer.copy_to_gpu(.., &theirs)?;
    drop((buffer, theirs));
    println!("{STEPS} steps on {device}: each number was multiplied by {BY}");
    Ok(())
}
