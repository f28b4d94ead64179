//! Shapes, and the arithmetic of rows and bytes that follows from them.

use std::fmt;
use std::ops::{Bound, Range, RangeBounds};

use crate::error::{Error, Result};

/// The most dimensions a shape can have.
const MAX_RANK: usize = 8;

/// The dimensions of a buffer, outermost first: 1 to 8 of them, any of which may be 0.
///
/// Numbers, arrays, slices, vectors and tuples of up to four numbers convert to shapes. The
/// constructor that takes a shape checks the number of dimensions.
///
/// ```
/// use cpu_gpu_buffer::Shape;
///
/// assert_eq!(Shape::from([32, 768]).dims(), [32, 768]);
/// assert_eq!(Shape::from((32, 768)), Shape::from(&vec![32, 768]));
/// assert_eq!(Shape::from(7).dims(), [7]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    // More than `MAX_RANK` if the shape is invalid.
    rank: usize,
}

impl Shape {
    fn new(dims: &[usize]) -> Shape {
        let mut shape = Shape { dims: [0; MAX_RANK], rank: dims.len() };
        for (to, from) in shape.dims.iter_mut().zip(dims) {
            *to = *from;
        }
        shape
    }

    /// The dimensions, outermost first. An invalid shape has at most its first 8 here.
    ///
    /// ```
    /// use cpu_gpu_buffer::Shape;
    ///
    /// let shape = Shape::from(vec![2, 3, 4]);
    /// assert_eq!(shape.dims().iter().product::<usize>(), 24);
    /// ```
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank.min(MAX_RANK)]
    }

    /// The number of elements. An invalid shape is an error, and so are more than `isize::MAX`
    /// bytes at `size` an element.
    pub(crate) fn numel(&self, size: usize) -> Result<usize> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            return Err(Error::InvalidShape {
                reason: format!("{} dimensions, and 1 to {MAX_RANK} are possible", self.rank),
            });
        }
        let dims = self.dims();
        if dims.contains(&0) {
            return Ok(0);
        }
        let numel = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        numel
            .filter(|numel| {
                let bytes = numel.checked_mul(size);
                bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok())
            })
            .ok_or_else(|| Error::InvalidShape {
                reason: format!("{dims:?} elements of {size} bytes overflow isize"),
            })
    }

    /// The first dimension.
    pub(crate) fn rows(&self) -> usize {
        self.dims[0]
    }

    /// The number of elements of a row. At most `usize::MAX`, which is wrong for shapes that have
    /// no row alone.
    pub(crate) fn row_len(&self) -> usize {
        let dims = self.dims().get(1..).unwrap_or_default();
        match dims.contains(&0) {
            true => 0,
            false => dims.iter().fold(1, |product, dim| product.saturating_mul(*dim)),
        }
    }

    /// The same shape with another first dimension.
    pub(crate) fn with_rows(mut self, rows: usize) -> Shape {
        self.dims[0] = rows;
        self
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dims().fmt(f)
    }
}

impl From<usize> for Shape {
    fn from(dim: usize) -> Shape {
        Shape::new(&[dim])
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Shape {
        Shape::new(&dims)
    }
}

impl<const N: usize> From<&[usize; N]> for Shape {
    fn from(dims: &[usize; N]) -> Shape {
        Shape::new(dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Shape {
        Shape::new(dims)
    }
}

impl From<&Vec<usize>> for Shape {
    fn from(dims: &Vec<usize>) -> Shape {
        Shape::new(dims)
    }
}

impl From<(usize,)> for Shape {
    fn from((dim,): (usize,)) -> Shape {
        Shape::new(&[dim])
    }
}

impl From<(usize, usize)> for Shape {
    fn from((a, b): (usize, usize)) -> Shape {
        Shape::new(&[a, b])
    }
}

impl From<(usize, usize, usize)> for Shape {
    fn from((a, b, c): (usize, usize, usize)) -> Shape {
        Shape::new(&[a, b, c])
    }
}

impl From<(usize, usize, usize, usize)> for Shape {
    fn from((a, b, c, d): (usize, usize, usize, usize)) -> Shape {
        Shape::new(&[a, b, c, d])
    }
}

impl From<Vec<usize>> for Shape {
    fn from(dims: Vec<usize>) -> Shape {
        Shape::new(&dims)
    }
}

/// Rows of the first dimension: `..`, `..n`, `a..b`, `a..=b`. Every range of `usize` is one.
///
/// ```
/// use cpu_gpu_buffer::{CpuGpuBuffer, Device, Result, Rows, Stream};
///
/// fn send(buffer: &mut CpuGpuBuffer<f32>, rows: impl Rows, stream: &Stream) -> Result<()> {
///     buffer.copy_to_gpu(rows, stream)
/// }
/// let stream = Stream::new(Device::Cpu)?;
/// let mut buffer = CpuGpuBuffer::new([8, 4], Device::Cpu)?;
/// send(&mut buffer, ..2, &stream)?;
/// send(&mut buffer, 7..=7, &stream)?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no range of rows",
    label = "expected a range of rows",
    note = "for the first `n` rows write `..n`, for row `n` alone `n..n + 1`, for all rows `..`"
)]
pub trait Rows {
    /// Both bounds, each read once: `RangeBounds` is a safe trait, and may return another bound the
    /// second time.
    #[doc(hidden)]
    fn bounds(&self) -> (Bound<usize>, Bound<usize>);
}

// The compiler then speaks of `Rows` instead of `RangeBounds`.
#[diagnostic::do_not_recommend]
impl<R: RangeBounds<usize> + ?Sized> Rows for R {
    #[inline]
    fn bounds(&self) -> (Bound<usize>, Bound<usize>) {
        (self.start_bound().cloned(), self.end_bound().cloned())
    }
}

/// The rows of a buffer, or of the `member` of a group, that the bounds select.
#[inline]
pub(crate) fn select(
    (start, end): (Bound<usize>, Bound<usize>),
    rows: usize,
    member: Option<usize>,
) -> Result<Range<usize>> {
    let start = match start {
        Bound::Included(row) => Some(row),
        Bound::Excluded(row) => row.checked_add(1),
        Bound::Unbounded => Some(0),
    };
    let end = match end {
        Bound::Included(row) => row.checked_add(1),
        Bound::Excluded(row) => Some(row),
        Bound::Unbounded => Some(rows),
    };
    match (start, end) {
        (Some(start), Some(end)) if start <= end && end <= rows => Ok(start..end),
        _ => Err(Error::OutOfRange {
            start: start.unwrap_or(usize::MAX),
            end: end.unwrap_or(usize::MAX),
            rows,
            member,
        }),
    }
}
