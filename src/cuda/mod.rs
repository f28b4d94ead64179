pub(crate) mod calls;
pub(crate) mod capture;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod fork;
pub(crate) mod kernel_graph;
pub(crate) mod kernels;
pub(crate) mod status;
