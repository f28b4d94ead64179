//! Environment variables that turn features off, for machines on which these work badly.
//!
//! WSL and containers are examples. Each variable is read once, when it is first needed. The value
//! `never` turns the feature off. All other values are ignored.

use std::env;
use std::sync::OnceLock;

/// `CPU_GPU_BUFFER_PINNING=never`: no host memory is pinned.
pub(crate) fn is_pinning_off() -> bool {
    static OFF: OnceLock<bool> = OnceLock::new();
    *OFF.get_or_init(|| says_never("CPU_GPU_BUFFER_PINNING"))
}

/// `CPU_GPU_BUFFER_MAPPED_KERNELS=never`: no kernel of this crate reads or writes host memory.
pub(crate) fn are_mapped_kernels_off() -> bool {
    static OFF: OnceLock<bool> = OnceLock::new();
    *OFF.get_or_init(|| says_never("CPU_GPU_BUFFER_MAPPED_KERNELS"))
}

fn says_never(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| value == "never")
}
