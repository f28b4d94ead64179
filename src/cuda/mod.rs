pub(crate) mod device;
pub(crate) mod fork;
pub(crate) mod kernel_graph;
pub(crate) mod kernels;
pub(crate) mod raw;
