pub(crate) mod buffer_ring;
#[allow(clippy::module_inception)] // The room has the name of its main type.
pub(crate) mod group;
mod host_slots;
pub(crate) mod layout;
pub(crate) mod ring;
pub(crate) mod storage;
mod submissions;
mod transfers;
