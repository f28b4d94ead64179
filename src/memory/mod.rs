pub(crate) mod adopted;
#[cfg(unix)]
pub(crate) mod chunks;
pub(crate) mod control_groups;
pub(crate) mod device_memory;
pub(crate) mod host;
pub(crate) mod memory_info;
pub(crate) mod options;
#[cfg(unix)]
pub(crate) mod pages;
#[cfg(unix)]
pub(crate) mod registered;
pub(crate) mod registration;
pub(crate) mod slab;
pub(crate) mod split;
