#[cfg(feature = "dlpack")]
pub(crate) mod exports;
pub(crate) mod record;
