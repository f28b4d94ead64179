//! The kernels of this crate.
//!
//! They are loaded at the first use of a device. The module [`context`](crate::cuda::context) says
//! why.

use crate::cuda::calls;
use crate::error::{Error, Result};
use crate::sys;

/// The fat binary of the kernels, committed or made by `build.rs` from `kernels/kernels.cu`.
pub(crate) static IMAGE: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// Aligns an image at least as much as nvcc aligns those that it embeds.
#[repr(C, align(16))]
pub(crate) struct Aligned<Bytes: ?Sized>(pub(crate) Bytes);

/// The same source as PTX, for a driver that refuses the image.
///
/// Every driver since CUDA 12.0 compiles it.
pub(crate) static PTX: &str = concat!(include_str!("../../kernels/kernels.ptx"), "\0");

/// The kernels, loaded into a context for the life of the process.
pub(crate) struct Kernels {
    pub(crate) short: sys::CUfunction,
    pub(crate) long: sys::CUfunction,
    pub(crate) repeat1: sys::CUfunction,
    pub(crate) repeat16: sys::CUfunction,
    pub(crate) gather_32: sys::CUfunction,
    pub(crate) gather_224: sys::CUfunction,
}

impl Kernels {
    /// Loads the kernels into the current context.
    pub(crate) fn load() -> Result<Kernels> {
        // SAFETY: `IMAGE` is a whole fat binary.
        let image = unsafe { Kernels::of(&IMAGE.0) };
        // If both fail, the error of the image is returned, because the PTX is the second choice.
        // SAFETY: `PTX` is PTX that ends with a NUL.
        image.or_else(|refused| unsafe { Kernels::of(PTX.as_bytes()) }.map_err(|_| refused))
    }

    /// Loads the kernels of `image` into the current context.
    ///
    /// # Safety
    ///
    /// The conditions of [`calls::module::load`] hold.
    pub(crate) unsafe fn of(image: &[u8]) -> Result<Kernels> {
        // SAFETY: the caller vouches for the image.
        let module = unsafe { calls::module::load(image) }?;
        // SAFETY: the module was just loaded.
        let function = |name| unsafe { calls::module::function(module, name) };
        let load = || {
            Ok(Kernels {
                short: function(c"cgb_fill_short")?,
                long: function(c"cgb_fill_long")?,
                repeat1: function(c"cgb_repeat1")?,
                repeat16: function(c"cgb_repeat16")?,
                gather_32: function(c"cgb_gather_32")?,
                gather_224: function(c"cgb_gather_224")?,
            })
        };
        load().inspect_err(|_: &Error| {
            // SAFETY: the module was loaded above, and none of its kernels was launched.
            let _ = unsafe { calls::module::unload(module) };
        })
    }
}
