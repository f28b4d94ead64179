//! Buffers of pinned host memory and CUDA device memory of the same shape. Copies between the two
//! are asynchronous, and no safe program can race with them.
//!
//! The crate builds with nothing but Rust. It loads the CUDA runtime when the program first needs
//! CUDA. Without CUDA, the same program runs on [`Device::Cpu`].
//!
//! ```
//! use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
//!
//! fn main() -> cpu_gpu_buffer::Result<()> {
//!     let device = Device::auto(); // the first CUDA device that works, or the CPU
//!     let stream = Stream::new(device)?;
//!     let mut tokens = CpuGpuBuffer::<i32>::new([32, 8], device)?; // both sides zeroed
//!
//!     for step in 0..10 {
//!         // Waits for the previous upload if that still reads this memory.
//!         tokens.cpu_mut()?[..16].fill(step); // a flat slice, row after row: 2 rows of 8
//!         tokens.copy_to_gpu(..2, &stream)?; // rows 0 and 1; enqueued, returns at once
//!         let view = tokens.gpu_on(&stream)?;
//!         // Launch kernels with `view.as_mut_ptr()` on `stream.as_raw()` here.
//!         assert_eq!(view.len(), 32 * 8);
//!         tokens.copy_to_cpu(..1, &stream)?;
//!         assert_eq!(tokens.cpu()?[..8], [step; 8]); // waits for the copy to the host side
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # The in-flight rule
//!
//! A [`CpuGpuBuffer`] has a *host side*, which the program reads and writes, and a *device side*,
//! which kernels read and write. An *upload* copies rows from the host side to the device side, a
//! *download* copies them back. Both run later, on a [`Stream`]. A stream is a queue of work for
//! one device, and runs its work in order. Until a copy has run, it is *in flight*.
//!
//! With the raw runtime, the program must wait before it touches the memory again:
//!
//! ```c
//! cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream);
//! host[0] = next; // a race: the copy may not have read `host` yet
//! ```
//!
//! Here the buffer tracks its own copies. An accessor waits for the copies that make its access
//! unsafe, and for no others:
//!
//! - [`cpu`](CpuGpuBuffer::cpu) waits for downloads.
//! - [`cpu_mut`](CpuGpuBuffer::cpu_mut) waits for uploads and downloads.
//! - Neither waits for kernels of `gpu_on` or for other buffers. If nothing is in flight, each
//!   costs one atomic load.
//! - If the next operation uses another stream, that stream waits for the earlier work. The thread
//!   does not wait.
//!
//! [`gpu_on`](CpuGpuBuffer::gpu_on) returns the device side, for kernels that the caller launches
//! on the named stream. [Your own kernels](guide#your-own-kernels) shows a launch.
//! [`synchronize`](CpuGpuBuffer::synchronize) waits for all work of a buffer.
//!
//! The buffer may be moved, sent to another thread, dropped or forgotten at any time.
//!
//! # Which type
//!
//! - [`CpuGpuBuffer`] is one array.
//! - [`BufferPool`] has buffers of one shape, for any number of threads. Threads take buffers
//!   without locks. Dropping a buffer gives it back.
//! - [`BufferGroup`] keeps many arrays, its *members*. All members share one allocation for each
//!   side, a *slab*. One call moves rows of any members. If nothing on the device writes a member,
//!   the caller may declare it *mirrored* ([`add_mirrored`](GroupLayoutBuilder::add_mirrored)). An
//!   upload may then copy more rows of it than the call names, to save a copy.
//! - [`GroupRing`] and [`BufferRing`] have several host *slots* for one device side. The program
//!   writes the next input into one slot while the previous slot is still queued.
//!
//! The [guide] explains waiting, your own kernels, CUDA graphs, environment variables and each
//! error. [Moving over](guide::moving) compares programs with vLLM's `CpuGpuBuffer` and with raw
//! CUDA calls, [another page](guide::cudarc) with cudarc.
//!
//! # What it refuses to do
//!
//! - The crate returns no guard objects for copies. The buffer itself tracks pending copies, so
//!   `mem::forget` is safe.
//! - It enqueues no work on a stream that is being captured into a CUDA graph. Calls that need the
//!   stream return [`Error::StreamCapturing`].
//! - It never frees memory that may be in use. If the driver cannot confirm that memory is unused,
//!   the crate leaks it.
//! - It links no CUDA library, unless the feature `static` is on. If no library is found,
//!   [`Device::auto`] returns the CPU. Calls for a CUDA device return [`Error::Unavailable`], and
//!   nothing panics.
//! - It uses neither managed nor write-combined memory.
//!
//! # Features
//!
//! No feature is on by default.
//!
//! - `half`: elements `f16` and `bf16` of the `half` crate.
//! - `fp8`: elements `F8E4M3` and `F8E5M2` of the `float8` crate.
//! - `serde`: devices, element types and options can be serialized.
//! - `ndarray`: `cpu_array` and `cpu_array_mut`, the host side as an array of the `ndarray` crate.
//! - `dlpack`: either side as a DLPack tensor, for PyTorch and others. See the module `dlpack`.
//! - `bindgen`: CUDA bindings generated at build time from the machine's headers. Needs libclang.
//! - `static`: the static CUDA runtime, linked instead of loaded. Needs `libcudart_static.a` at
//!   build time. Linux only.

// docs.rs says of each item which feature it needs.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod buffer;
mod cuda;
mod device;
mod element;
mod error;
mod flight;
mod group;
mod interop;
mod memory;
mod pool;
/// The unit tests choose their runtime as the others do.
#[cfg(test)]
#[path = "../tests/common/runtime.rs"]
mod runtime;
mod shape;
mod slots;
mod stream;
mod switches;
mod sync;
mod transfer;

pub use cudart_sys as sys;

pub use buffer::buffer::CpuGpuBuffer;
pub use buffer::view::GpuView;
pub use device::{Device, MemoryInfo};
pub use element::{DType, Element};
pub use error::{Error, Result, Side};
pub use group::buffer_ring::BufferRing;
pub use group::group::{BufferGroup, GroupView, MembersMut};
pub use group::layout::{GroupLayout, GroupLayoutBuilder, MemberKey, MemberRows};
pub use group::ring::GroupRing;
#[cfg(feature = "dlpack")]
pub use interop::dlpack;
pub use memory::host::is_pinned_memory_available;
pub use memory::options::{BufferOptions, HostFlags, Pinning};
pub use pool::options::{PoolGrowth, PoolOptions};
pub use pool::pool::{BufferPool, PoolStats};
pub use shape::{Rows, Shape};
pub use stream::event::Event;
pub use stream::options::{StreamFlags, StreamOptions, WaitPolicy};
pub use stream::stream::Stream;

/// The guide, as a page of the documentation.
///
// Links between the pages are those of the files; here, what is defined before them counts.
#[doc = "[groups]: crate::guide::groups"]
#[doc = "[moving]: crate::guide::moving"]
#[doc = "[cudarc]: crate::guide::cudarc"]
///
#[doc = include_str!("../docs/guide.md")]
#[cfg(any(doc, doctest))]
pub mod guide {
    #[doc = include_str!("../docs/groups.md")]
    pub mod groups {}

    #[doc = "[groups]: crate::guide::groups"]
    #[doc = "[cudarc]: crate::guide::cudarc"]
    ///
    #[doc = include_str!("../docs/moving.md")]
    pub mod moving {}

    // Its programs need cudarc, and are tests of `benches`.
    #[cfg(not(doctest))]
    #[doc = include_str!("../docs/cudarc.md")]
    pub mod cudarc {}
}

/// The README's programs are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
