//! CUDA's driver and runtime: devices, contexts, events and kernels.

pub(crate) mod calls;
pub(crate) mod capture;
pub(crate) mod context;
pub(crate) mod devices;
pub(crate) mod driver;
pub(crate) mod event_handle;
pub(crate) mod fork;
pub(crate) mod kernel_graph;
pub(crate) mod kernels;
pub(crate) mod peers;
pub(crate) mod status;
