//! The environment variables that set the simulation up.

use std::sync::LazyLock;

/// The most devices that there can be.
pub(crate) const MOST_DEVICES: usize = 8;

fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// The version of the runtime, by default 13000 (`CUDART_SIM_VERSION`).
pub(crate) fn version() -> i32 {
    setting("CUDART_SIM_VERSION", 13000)
}

/// The newest version that the driver supports, by default 13000 (`CUDART_SIM_DRIVER`). 0 is no
/// driver.
pub(crate) fn driver_version() -> i32 {
    static VERSION: LazyLock<i32> = LazyLock::new(|| setting("CUDART_SIM_DRIVER", 13000));
    *VERSION
}

/// True if the driver is missing or has an older major version than the runtime.
///
/// Calls that need the driver return the same error in both cases. Real runtimes from 12.0 to 13.5
/// do so without a driver.
pub(crate) fn is_driver_too_old() -> bool {
    static TOO_OLD: LazyLock<bool> = LazyLock::new(|| driver_version() / 1000 < version() / 1000);
    *TOO_OLD
}

/// The calls that wait for the device without need (`CUDART_SIM_WAITING`).
///
/// - 0, the default: none.
/// - 1: releasing memory and loading modules.
/// - 2: allocating and pinning memory, too.
///
/// CUDA allows each and promises none. The settings hide different faults, so a run uses only one.
/// Waiting hides work that still uses released memory. Not waiting hides a wait for blocked work.
pub(crate) fn waiting() -> u32 {
    static WAITING: LazyLock<u32> = LazyLock::new(|| setting("CUDART_SIM_WAITING", 0));
    *WAITING
}

/// The number of devices, by default 2 and at most 8 (`CUDART_SIM_DEVICES`).
pub(crate) fn device_count() -> usize {
    setting("CUDART_SIM_DEVICES", 2).min(MOST_DEVICES)
}

/// The seed of the pseudo-random numbers, by default 1 (`CUDART_SIM_SEED`).
pub(crate) fn seed() -> u64 {
    setting("CUDART_SIM_SEED", 1).max(1)
}

/// True if devices can use each other's memory (`CUDART_SIM_PEERS`, by default 1).
pub(crate) fn has_peers() -> bool {
    setting("CUDART_SIM_PEERS", 1) != 0
}
