//! Environment variables that turn off what a machine promises and does not do well, under WSL and
//! in containers for instance. Each is read once, when it is first needed. `never` turns off; every
//! other value has no meaning and is ignored, as an absent variable is.

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
