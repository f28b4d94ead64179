pub(crate) mod adopting;
mod between;
#[allow(clippy::module_inception)] // The room has the name of its main type.
pub(crate) mod buffer;
pub(crate) mod handle;
#[cfg(feature = "dlpack")]
mod lending;
mod rows;
pub(crate) mod side_layout;
pub(crate) mod storage;
pub(crate) mod transfers;
pub(crate) mod view;
