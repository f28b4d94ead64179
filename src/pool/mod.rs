pub(crate) mod options;
#[allow(clippy::module_inception)] // The room has the name of its main type.
pub(crate) mod pool;
