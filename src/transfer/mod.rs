pub(crate) mod fill;
pub(crate) mod gather;
pub(crate) mod plan;
