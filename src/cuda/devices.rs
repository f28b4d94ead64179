//! The CUDA devices of this machine, and the reasons why one is unusable.

use std::str::FromStr;
use std::sync::{Mutex, OnceLock};

use crate::cuda::calls;
use crate::cuda::context::{self, Context};
use crate::cuda::fork;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::sys;

impl Device {
    /// Returns the first usable CUDA device, or [`Device::Cpu`] if there is none.
    ///
    /// Never fails and never panics.
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

    /// Returns the CUDA device with this ordinal.
    ///
    /// # Errors
    ///
    /// - [`Error::Unavailable`] if the device cannot be used. Its text gives the reason. The
    ///   runtime library, the driver or the device may be missing. The driver may be too old, or
    ///   the context cannot be made.
    /// - [`Error::Forked`] in the forked child of a process that used CUDA.
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

    /// Returns the number of CUDA devices, or 0 if CUDA is unusable.
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
            "auto" => Some(Device::auto()),
            _ => text
                .strip_prefix("cuda:")
                .filter(|ordinal| ordinal.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Device::Cuda),
        };
        device.ok_or_else(|| Error::InvalidDevice { text: text.into() })
    }
}

/// Returns the context of a device. The first call that succeeds makes it.
pub(crate) fn context(ordinal: u32) -> Result<&'static Context> {
    fork::refuse_heir()?;
    let cell = context_cell(ordinal)?;
    if let Some(context) = cell.made.get() {
        return Ok(context);
    }
    // Each device has its own lock, because making a context may wait for the device.
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

/// Waits for all work that this process sent to any device.
///
/// Work of other libraries counts too, because every device can reach pinned memory. A device
/// without a primary context is unused and gets none. Captures end as in
/// [`calls::context::synchronize`].
#[cfg(feature = "dlpack")]
pub(crate) fn synchronize_all() -> Result<()> {
    for ordinal in 0..count()? as u32 {
        if calls::context::has_primary(ordinal)? {
            let handle = calls::context::retain_primary(ordinal)?;
            // SAFETY: the context was retained above and is released below.
            let waited = unsafe { calls::context::enter(handle) }
                .and_then(|_current| calls::context::synchronize());
            let released = calls::context::release_primary(ordinal);
            waited.and(released)?;
        }
    }
    Ok(())
}

/// Keeps the context of a device.
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
    // The lock is free during this call. A child that is forked meanwhile would find it held.
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

/// Returns the number of CUDA devices, or why there is none.
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

/// Returns why there is no device, according to the status `code`.
fn reason(code: sys::cudaError_t, error: &Error) -> Result<String> {
    match code {
        sys::cudaError::cudaErrorNoDevice => {
            Ok(format!("this machine has no CUDA device: {error}{}", visible_devices()))
        }
        sys::cudaError::cudaErrorInsufficientDriver => insufficient_driver(),
        _ => Ok(error.to_string()),
    }
}

/// Names the variable that hides devices, if it is set. An empty value hides all.
fn visible_devices() -> String {
    let name = "CUDA_VISIBLE_DEVICES";
    std::env::var_os(name).map_or_else(String::new, |value| format!("; {name} is {value:?}"))
}

/// Returns why the runtime reports `cudaErrorInsufficientDriver`.
///
/// The runtime reports it without a driver, too.
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
