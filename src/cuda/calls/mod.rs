//! The crate's calls into CUDA.
//!
//! Three files make calls of their own: `driver` looks up functions, `capture` changes a thread's
//! capture mode, and `status` clears the last error.
//!
//! Each function returns its status as a [`Result`](crate::error::Result).
//!
//! Some calls end another thread's stream capture ("CUDA C++ Programming Guide, Prohibited and
//! Unhandled Operations"). These are allocation, release, queries and waiting. Allocation includes
//! that of graphs. They run within a [`RelaxedCapture`](crate::cuda::capture::RelaxedCapture).
//! Copies, fills, launches and event records need none.

pub(crate) mod context;
pub(crate) mod copy;
pub(crate) mod event;
pub(crate) mod graph;
pub(crate) mod memory;
pub(crate) mod module;
pub(crate) mod stream;
