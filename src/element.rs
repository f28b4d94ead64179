//! Element types that array libraries know.

use std::any::TypeId;
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// An element type that array libraries know.
///
/// ```
/// use cpu_gpu_buffer::DType;
///
/// /// The spelling of NumPy's array interface.
/// fn typestr(dtype: DType) -> Option<&'static str> {
///     Some(match dtype {
///         DType::U8 => "|u1",
///         DType::I8 => "|i1",
///         DType::U16 => "<u2",
///         DType::I16 => "<i2",
///         DType::U32 => "<u4",
///         DType::I32 => "<i4",
///         DType::U64 => "<u8",
///         DType::I64 => "<i8",
///         DType::F16 => "<f2",
///         DType::F32 => "<f4",
///         DType::F64 => "<f8",
///         DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => return None, // no spelling there
///         _ => return None,
///     })
/// }
/// assert_eq!(typestr(DType::I32), Some("<i4"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum DType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    /// 8 bits, 4 of them exponent and 3 mantissa, without infinities: NVIDIA's E4M3.
    F8E4M3,
    /// 8 bits, 5 of them exponent and 2 mantissa.
    F8E5M2,
    F16,
    BF16,
    F32,
    F64,
}

/// All types, in the order of their declaration.
const ALL: [DType; 14] = [
    DType::U8,
    DType::I8,
    DType::U16,
    DType::I16,
    DType::U32,
    DType::I32,
    DType::U64,
    DType::I64,
    DType::F8E4M3,
    DType::F8E5M2,
    DType::F16,
    DType::BF16,
    DType::F32,
    DType::F64,
];

impl DType {
    /// The name that array libraries use: `f32`, `bf16`.
    ///
    /// ```
    /// use cpu_gpu_buffer::DType;
    ///
    /// assert_eq!(DType::BF16.name(), "bf16");
    /// assert_eq!(DType::U8.to_string(), "u8");
    /// assert_eq!("f32".parse(), Ok(DType::F32));
    /// ```
    pub fn name(self) -> &'static str {
        match self {
            DType::U8 => "u8",
            DType::I8 => "i8",
            DType::U16 => "u16",
            DType::I16 => "i16",
            DType::U32 => "u32",
            DType::I32 => "i32",
            DType::U64 => "u64",
            DType::I64 => "i64",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl DType {
    /// The size of one element, in bytes.
    ///
    /// ```
    /// use cpu_gpu_buffer::DType;
    ///
    /// /// The bytes of a tensor in a file.
    /// fn bytes(dtype: DType, shape: &[usize]) -> usize {
    ///     shape.iter().product::<usize>() * dtype.size_of()
    /// }
    /// assert_eq!(bytes(DType::BF16, &[4, 8]), 64);
    /// ```
    pub const fn size_of(self) -> usize {
        match self {
            DType::U8 | DType::I8 | DType::F8E4M3 | DType::F8E5M2 => 1,
            DType::U16 | DType::I16 | DType::F16 | DType::BF16 => 2,
            DType::U32 | DType::I32 | DType::F32 => 4,
            DType::U64 | DType::I64 | DType::F64 => 8,
        }
    }
}

impl FromStr for DType {
    type Err = Error;

    /// Reads a [`name`](DType::name).
    fn from_str(text: &str) -> Result<DType> {
        let named = ALL.into_iter().find(|dtype| dtype.name() == text);
        named.ok_or_else(|| Error::InvalidDType { text: text.into() })
    }
}

/// An element type with a [`DType`].
///
/// ```
/// use cpu_gpu_buffer::{DType, Element};
///
/// assert_eq!(f32::DTYPE, DType::F32);
/// ```
///
/// You can implement it for your own type. If the size of `DTYPE` is not that of the type,
/// exporting a side does not compile:
///
#[cfg_attr(feature = "dlpack", doc = "```compile_fail,E0080")]
#[cfg_attr(not(feature = "dlpack"), doc = "```ignore")]
/// use cpu_gpu_buffer::{CpuGpuBuffer, DType, Device, Element};
///
/// #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
/// #[repr(transparent)]
/// struct Byte(u8);
/// impl Element for Byte {
///     const DTYPE: DType = DType::F64;
/// }
///
/// let tensor = CpuGpuBuffer::<Byte>::new(8, Device::Cpu)?.export_cpu()?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no `DType`",
    label = "expected an element type that array libraries know",
    note = "`half::f16` and `half::bf16` are elements with the feature `half`",
    note = "`float8::F8E4M3` and `float8::F8E5M2` are elements with the feature `fp8`"
)]
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The element type's name as a value.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($(#[$attribute:meta])? $type:ty => $dtype:ident,)*) => {
        $($(#[$attribute])? impl Element for $type {
            const DTYPE: DType = DType::$dtype;
        })*

        impl DType {
            /// The [`DType`] of `T`, if it has one.
            pub(crate) fn of<T: 'static>() -> Option<DType> {
                let id = TypeId::of::<T>();
                $($(#[$attribute])? if id == TypeId::of::<$type>() {
                    return Some(DType::$dtype);
                })*
                None
            }
        }
    };
}

elements! {
    u8 => U8,
    i8 => I8,
    u16 => U16,
    i16 => I16,
    u32 => U32,
    i32 => I32,
    u64 => U64,
    i64 => I64,
    #[cfg(feature = "half")] half::f16 => F16,
    #[cfg(feature = "half")] half::bf16 => BF16,
    #[cfg(feature = "fp8")] float8::F8E4M3 => F8E4M3,
    #[cfg(feature = "fp8")] float8::F8E5M2 => F8E5M2,
    f32 => F32,
    f64 => F64,
}
