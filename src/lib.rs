//! Pinned host memory and CUDA device memory of one shape, with asynchronous copies between them that
//! no safe program can race with. It builds with nothing but Rust, uses CUDA where the machine has it,
//! and otherwise runs the same program on [`Device::Cpu`].
//!
//! The same step over the raw runtime, and with this crate:
//!
//! ```c
//! cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream);
//! host[0] = next; // a race: the copy may not have read `host` yet, and nothing says so
//! ```
//!
//! ```
//! # use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream};
//! # let (stream, next) = (Stream::new(Device::auto())?, 1);
//! # let mut buffer = CpuGpuBuffer::<i32>::new(1024, Device::auto())?;
//! buffer.copy_to_gpu(.., &stream)?;
//! buffer.cpu_mut()?[0] = next; // waits for the copy, and for nothing else
//! # Ok::<(), cpu_gpu_buffer::Error>(())
//! ```
//!
//! A [`BufferPool`] hands such buffers out again and again, to any number of threads, without locks. A [`BufferGroup`] moves
//! rows of many arrays by one call, and a ring has several host halves.
//!
//! The [guide] says what waits for what, how to launch your own kernels, what each error means, and how to [come over] from
//! vLLM's `CpuGpuBuffer`, raw CUDA calls and cudarc.
//!
//! [come over]: guide::moving
//!
//! # What it refuses to do
//!
//! - It hands out no guard whose forgetting would make a race: a buffer itself knows what is in flight.
//! - It enqueues nothing on a stream that is being captured into a graph, where it would not run.
//! - It frees no memory while the driver cannot say that nothing uses it: it leaks it.
//! - It links to no CUDA library, unless the feature `static` asks for it, and never panics for want of one.
//! - It uses neither managed nor write-combined memory.
//!
//! # Features
//!
//! - `half`: `f16` and `bf16` elements, those of the `half` crate.
//! - `ndarray`: the host half as an array: `cpu_array` and `cpu_array_mut` of buffers, groups and rings.
//! - `dlpack`: either half as a DLPack tensor, for PyTorch and others: the module `dlpack`.
//! - `bindgen`: regenerates the CUDA bindings from the machine's own headers.
//! - `static`: links the static CUDA runtime instead of loading one.

// docs.rs says of each item which feature it needs.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod buffer;
#[cfg(unix)]
mod chunks;
mod device;
mod device_memory;
#[cfg(feature = "dlpack")]
pub mod dlpack;
mod element;
mod error;
mod event;
#[cfg(feature = "dlpack")]
mod exports;
mod fill;
mod fork;
mod gather;
mod graph;
mod group;
mod host;
mod host_limit;
mod kernels;
mod layout;
mod members;
mod moves;
#[cfg(feature = "ndarray")]
mod ndarray;
#[cfg(unix)]
mod pages;
mod pool;
mod raw;
mod record;
#[cfg(unix)]
mod registered;
mod ring;
/// The unit tests choose their runtime as the others do.
#[cfg(test)]
#[path = "../tests/common/runtime.rs"]
mod runtime;
mod shape;
mod slab;
mod slots;
mod storage;
mod stream;
mod switches;
mod sync;
mod ticket;
mod view;

pub use cudart_sys as sys;

pub use buffer::{BufferOptions, CpuGpuBuffer};
pub use device::{Device, MemoryInfo};
pub use element::{DType, Element};
pub use error::{Error, Result, Side};
pub use event::Event;
pub use group::{BufferGroup, GroupView, MembersMut};
pub use host::{HostFlags, Pinning, is_pinned_memory_available};
pub use layout::{GroupLayout, GroupLayoutBuilder, Key, MemberRows};
pub use pool::{BufferPool, PoolGrowth, PoolOptions, PoolStats};
pub use ring::{GroupRing, UploadRing};
pub use shape::Shape;
pub use stream::{Stream, StreamFlags, StreamOptions, WaitPolicy};
pub use view::GpuView;

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
