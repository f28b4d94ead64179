pub(crate) mod device_side;
#[cfg(feature = "dlpack")]
pub(crate) mod exports;
pub(crate) mod host_uses;
pub(crate) mod left_behind;
pub(crate) mod record;
