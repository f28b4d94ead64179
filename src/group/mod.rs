#[allow(clippy::module_inception)] // The room has the name of its main type.
pub(crate) mod group;
pub(crate) mod layout;
pub(crate) mod ring;
pub(crate) mod storage;
