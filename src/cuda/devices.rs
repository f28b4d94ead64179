//! The CUDA devices of this machine, and the reasons why one cannot be used.

use std::str::FromStr;
use std::sync::{Mutex, OnceLock};

use crate::cuda::calls;
use crate::cuda::context::{self, Context};
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::sys;

impl Device {
    /// The first CUDA device that can be used, or else [`Device::Cpu`]. Never fails and never panics.
    ///
    /// ```
    /// use cpu_gpu_buffer::Device;
    ///
    /// println!("running on {}", Device::auto());
    /// ```
    pub fn auto() -> Device {
        (0..Device::cuda_count() as u32)
            .find(|ordinal| context(*ordinal).is_ok())
            .map_or(Device::Cpu, Device::Cuda)
    }

    /// The CUDA device of this ordinal.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] says why it cannot be used: no library, no driver, no such device.
    ///
    /// ```
    /// use cpu_gpu_buffer::Device;
    ///
    /// match Device::cuda(0) {
    ///     Ok(device) => println!("{device}"),
    ///     Err(error) => println!("{error}"),
    /// }
    /// ```
    pub fn cuda(ordinal: u32) -> Result<Device> {
        context(ordinal).map(|_| Device::Cuda(ordinal))
    }

    /// The number of CUDA devices; 0 where CUDA cannot be used.
    ///
    /// ```
    /// println!("{} CUDA devices", cpu_gpu_buffer::Device::cuda_count());
    /// ```
    pub fn cuda_count() -> usize {
        count().unwrap_or(0)
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        let device = match text {
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .filter(|ordinal| ordinal.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Device::Cuda),
        };
        device.ok_or_else(|| Error::InvalidDevice { text: text.into() })
    }
}

/// The context of a device, made by the first call that succeeds.
pub(crate) fn context(ordinal: u32) -> Result<&'static Context> {
    fork::refuse_heir()?;
    let cell = context_cell(ordinal)?;
    if let Some(context) = cell.made.get() {
        return Ok(context);
    }
    // Making a context may wait for its device, and for no other.
    let _making = cell.making.lock().unwrap_or_else(|poison| poison.into_inner());
    if let Some(context) = cell.made.get() {
        return Ok(context);
    }
    let made = context::make(ordinal).map_err(|error| match error {
        Error::Cuda { .. } => {
            Error::Unavailable { reason: format!("{}: {error}", Device::Cuda(ordinal)) }
        }
        error => error,
    })?;
    Ok(cell.made.get_or_init(|| made))
}

/// Waits for everything that was sent to any device of this process, by whomever: pinned memory serves them all. Devices
/// that nobody uses have no primary context, and get none. Ends captures: see [`calls::context::synchronize`].
#[cfg(feature = "dlpack")]
pub(crate) fn synchronize_all() -> Result<()> {
    for ordinal in 0..count()? as u32 {
        if calls::context::has_primary(ordinal)? {
            let handle = calls::context::retain_primary(ordinal)?;
            // SAFETY: retained above, and released below.
            let waited = unsafe { calls::context::enter(handle) }
                .and_then(|_current| calls::context::synchronize());
            let released = calls::context::release_primary(ordinal);
            waited.and(released)?;
        }
    }
    Ok(())
}

/// Where a device's context is kept.
#[derive(Default)]
struct ContextCell {
    made: OnceLock<Context>,
    making: Mutex<()>,
}

fn context_cell(ordinal: u32) -> Result<&'static ContextCell> {
    static CELLS: Mutex<Vec<&'static ContextCell>> = Mutex::new(Vec::new());
    let cells = || CELLS.lock().unwrap_or_else(|poison| poison.into_inner());
    let index = ordinal as usize;
    if let Some(cell) = cells().get(index) {
        return Ok(cell);
    }
    // Not under the lock, which a child that is forked meanwhile would find held.
    let devices = count()?;
    if index >= devices {
        return Err(Error::Unavailable {
            reason: format!(
                "there is no device cuda:{ordinal}: this machine has {devices}{}",
                visible_devices()
            ),
        });
    }
    let mut cells = cells();
    while cells.len() < devices {
        cells.push(Box::leak(Box::default()));
    }
    Ok(cells[index])
}

/// The number of CUDA devices, or why there is none.
fn count() -> Result<usize> {
    let call = "cudaGetDeviceCount";
    let counted = || match calls::context::device_count()? {
        0 => Err(Error::Cuda { code: sys::cudaError::cudaErrorNoDevice, call }),
        count => Ok(count),
    };
    fork::ask(|| {
        counted().map_err(|error| match error {
            Error::Cuda { code, .. } => match reason(code, &error) {
                Ok(reason) => Error::Unavailable { reason },
                Err(error) => error,
            },
            error => error,
        })
    })
}

/// Why there is no device, by the status that says so.
fn reason(code: sys::cudaError_t, error: &Error) -> Result<String> {
    match code {
        sys::cudaError::cudaErrorNoDevice => {
            Ok(format!("this machine has no CUDA device: {error}{}", visible_devices()))
        }
        sys::cudaError::cudaErrorInsufficientDriver => insufficient_driver(),
        _ => Ok(error.to_string()),
    }
}

/// The variable that hides devices, if it is set: an empty one hides all.
fn visible_devices() -> String {
    let name = "CUDA_VISIBLE_DEVICES";
    std::env::var_os(name).map_or_else(String::new, |value| format!("; {name} is {value:?}"))
}

/// Why the runtime returns `cudaErrorInsufficientDriver`, which it does without a driver, too.
fn insufficient_driver() -> Result<String> {
    let version = |version: i32| format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let (runtime, passed_over) = match sys::runtime() {
        Ok(runtime) => (
            format!("{} is {}", runtime.path().display(), version(runtime.version())),
            runtime.passed_over(),
        ),
        Err(error) => (error.to_string(), &[][..]),
    };
    let driver = calls::context::driver_version()?;
    if driver == 0 {
        return Ok(format!("there is no CUDA driver on this machine; {runtime}"));
    }
    let cure = match cfg!(feature = "static") {
        true => "a program that is built with an older one can use it",
        false => "CUDART_LIBRARY may name an older one",
    };
    let mut text = format!(
        "the driver is one of {}, too old for the runtime: {runtime}; {cure}",
        version(driver)
    );
    if !passed_over.is_empty() {
        text += &format!("; also tried: {}", passed_over.join("; "));
    }
    Ok(text)
}
