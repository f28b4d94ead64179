//! The shape of a side, and its bytes.

use std::alloc::Layout;

use crate::error::{Error, Result};
use crate::memory::device_memory::DeviceMemory;
use crate::shape::Shape;

/// The shape of a side, and its bytes.
#[derive(Clone, Copy)]
pub(crate) struct SideLayout {
    pub(crate) shape: Shape,
    /// The number of elements of the shape.
    pub(crate) numel: usize,
    /// The bytes of all elements.
    pub(crate) layout: Layout,
}

impl SideLayout {
    /// A side of elements of `T`.
    pub(crate) fn of<T>(shape: Shape) -> Result<SideLayout> {
        let numel = shape.numel(size_of::<T>())?;
        let bytes = numel * size_of::<T>();
        let align = align_of::<T>().max(DeviceMemory::ALIGN);
        let layout = Layout::from_size_align(bytes, align).map_err(|_| Error::InvalidShape {
            reason: format!("{bytes} bytes at an alignment of {align} overflow isize"),
        })?;
        Ok(SideLayout { shape, numel, layout })
    }

    /// The memory of `count` sides of this layout, each aligned, and the distance from one to the
    /// next.
    pub(crate) fn many(&self, count: usize) -> Result<(Layout, usize)> {
        u32::try_from(count).map_err(|_| Error::InvalidShape {
            reason: format!("{count} buffers are more than can be told apart"),
        })?;
        let (bytes, stride) = (self.layout.size(), self.layout.pad_to_align().size());
        // The last one needs no padding.
        let whole = match count.checked_sub(1) {
            None => Some(0),
            Some(before) => stride.checked_mul(before).and_then(|start| start.checked_add(bytes)),
        };
        let whole =
            whole.and_then(|whole| Layout::from_size_align(whole, self.layout.align()).ok());
        let whole = whole.ok_or_else(|| Error::InvalidShape {
            reason: format!("{count} buffers of {bytes} bytes overflow isize"),
        })?;
        Ok((whole, stride))
    }
}
