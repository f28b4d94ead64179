pub(crate) mod copy;
pub(crate) mod fill;
pub(crate) mod gather;
pub(crate) mod plan;
