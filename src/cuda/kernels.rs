//! The kernels of this crate, loaded into a context when its device is first used: loading waits for the device,
//! so that it is not left to the first fill, which may come while work is held up.

use crate::cuda::calls;
use crate::error::{Error, Result};
use crate::sys;

/// Made by `build.rs` from `kernels/kernels.cu`, or committed.
pub(crate) static IMAGE: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// As nvcc aligns the images that it embeds, and more.
#[repr(C, align(16))]
pub(crate) struct Aligned<Bytes: ?Sized>(pub(crate) Bytes);

/// The same source as PTX that every driver since CUDA 12.0's compiles, for one that refuses the image.
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
        // SAFETY: a whole fat binary.
        let image = unsafe { Kernels::of(&IMAGE.0) };
        // What the image was refused for is the better reason: the PTX is the second choice.
        // SAFETY: PTX that ends with a NUL.
        image.or_else(|refused| unsafe { Kernels::of(PTX.as_bytes()) }.map_err(|_| refused))
    }

    /// # Safety
    ///
    /// As for [`calls::module::load`].
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
            // SAFETY: loaded above, and nothing of it was launched.
            let _ = unsafe { calls::module::unload(module) };
        })
    }
}
