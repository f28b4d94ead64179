//! The layout of a group: members of any types and shapes, each at its own offset in one slab.
//!
//! ```text
//!  offset    0        256      512                                   640      768
//!            | ids    | lens   | table                             | pad    | temps
//! ```
//!
//! A layout never changes. Its keys name its members, and work with all groups of that layout.

use std::alloc::Layout;
use std::any::{TypeId, type_name};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::ops::{Bound, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Pod;

use crate::device::Device;
use crate::error::{Error, Result, reserve};
use crate::memory::device_memory::DeviceMemory;
use crate::shape::{Rows, Shape, select};

/// Collects the members of a [`GroupLayout`].
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let ids = builder.add::<i32>(1024);
/// let table = builder.add::<i32>([256, 128]);
/// let layout = builder.build()?;
///
/// let group = BufferGroup::new(&layout, Device::auto())?;
/// assert_eq!(group.cpu(ids)?.len(), 1024);
/// assert_eq!(group.shape(table)?, [256, 128]);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct GroupLayoutBuilder {
    id: u64,
    // An `Err` once there was too little memory for a member: the error of `build`.
    members: Result<Vec<Requested>>,
}

impl fmt::Debug for GroupLayoutBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.members {
            Ok(members) => {
                write!(f, "GroupLayoutBuilder(layout={}, members={})", self.id, members.len())
            }
            Err(error) => write!(f, "GroupLayoutBuilder(layout={}, error={error:?})", self.id),
        }
    }
}

/// A member before the layout is made.
struct Requested {
    shape: Shape,
    /// The layout of one element.
    element: Layout,
    kind: TypeId,
    mirrored: bool,
}

impl GroupLayoutBuilder {
    /// A layout without members.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, Error, GroupLayoutBuilder};
    ///
    /// let (mut one, mut other) = (GroupLayoutBuilder::new(), GroupLayoutBuilder::new());
    /// let (ids, same_on_paper) = (one.add::<i32>(8), other.add::<i32>(8));
    /// let group = BufferGroup::new(&one.build()?, Device::Cpu)?;
    /// assert!(group.cpu(ids).is_ok());
    /// assert_eq!(group.cpu(same_on_paper).err(), Some(Error::InvalidKey));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    #[allow(clippy::new_without_default)] // Two of them are never equal.
    pub fn new() -> GroupLayoutBuilder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        GroupLayoutBuilder { id: NEXT.fetch_add(1, Ordering::Relaxed), members: Ok(Vec::new()) }
    }

    /// Adds a member, and returns the key that names it.
    ///
    /// [`build`](Self::build) checks the shape, and returns the error if there was too little
    /// memory for this entry.
    ///
    /// # Panics
    ///
    /// Panics beyond 2^32 members.
    ///
    /// ```
    /// use cpu_gpu_buffer::{GroupLayoutBuilder, MemberKey};
    ///
    /// /// The arrays of a step, as one value that is cheap to copy.
    /// #[derive(Clone, Copy)]
    /// struct Inputs {
    ///     ids: MemberKey<i32>,
    ///     temperatures: MemberKey<f32>,
    ///     table: MemberKey<i32>,
    /// }
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let inputs = Inputs {
    ///     ids: builder.add(1024),
    ///     temperatures: builder.add(64),
    ///     table: builder.add([64, 256]),
    /// };
    /// ```
    pub fn add<T: Pod + Send + Sync>(&mut self, shape: impl Into<Shape>) -> MemberKey<T> {
        self.add_member(shape.into(), false)
    }

    /// Adds a mirrored member: nothing on the device writes it, so its device side only mirrors its
    /// host side.
    ///
    /// An upload may include rows of this member that were not requested, if that makes one copy of
    /// several. It may include a mirrored member that the call does not name, if the member lies
    /// between two named ones. The rows are copied from the host side as it is then.
    ///
    /// - At most 96 KB are included between two ranges. Between ranges of one member it is 96 KB in
    ///   all, if a kernel can copy the ranges at the cost of one copy.
    /// - Included rows count as being uploaded: [`cpu_mut`](crate::BufferGroup::cpu_mut) of the
    ///   member waits for the copy.
    /// - Rows of other members are never included.
    /// - A ring of several host slots includes nothing, because another slot may hold older rows.
    /// - [`Device::Cpu`] includes the same rows as a GPU with pinned, mapped host memory. A member
    ///   that the device does write shows there, too.
    ///
    /// # Panics
    ///
    /// As for [`add`](Self::add).
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add_mirrored::<i32>(1024);
    /// let positions = builder.add_mirrored::<i32>(1024);
    /// let sampled = builder.add::<u32>(64); // a kernel writes it
    /// let stream = Stream::new(Device::auto())?;
    /// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
    /// // One copy: what lies between the two ranges goes along, a few KB.
    /// group.copy_to_gpu(&[ids.rows(..9), positions.rows(..9)], &stream)?;
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn add_mirrored<T: Pod + Send + Sync>(&mut self, shape: impl Into<Shape>) -> MemberKey<T> {
        self.add_member(shape.into(), true)
    }

    fn add_member<T: Pod>(&mut self, shape: Shape, mirrored: bool) -> MemberKey<T> {
        // After an error the key names no member: `build` will fail.
        let mut index = 0;
        if let Ok(members) = &mut self.members {
            index = u32::try_from(members.len()).expect("more members than can be told apart");
            match reserve(members, 1, Device::Cpu) {
                Ok(()) => members.push(Requested {
                    shape,
                    element: Layout::new::<T>(),
                    kind: TypeId::of::<T>(),
                    mirrored,
                }),
                Err(error) => self.members = Err(error),
            }
        }
        MemberKey { layout: self.id, index, element: PhantomData }
    }

    /// Makes the layout, which never changes.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidGroup`]: there are no members.
    /// - [`Error::InvalidShape`]: a member's shape is invalid, or all members together overflow
    ///   `isize`.
    /// - [`Error::OutOfMemory`]: there was too little memory for the list of members. Its device is
    ///   the CPU.
    ///
    /// ```
    /// use cpu_gpu_buffer::{Error, GroupLayoutBuilder};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// builder.add::<u8>([1; 9]); // no error yet
    /// assert!(matches!(builder.build(), Err(Error::InvalidShape { .. })));
    /// ```
    pub fn build(self) -> Result<GroupLayout> {
        Ok(GroupLayout(Arc::new(lay_out(self.id, &self.members?)?)))
    }
}

/// Gives each member its offset.
fn lay_out(id: u64, requested: &[Requested]) -> Result<GroupTable> {
    if requested.is_empty() {
        return Err(Error::InvalidGroup { reason: "it has no members" });
    }
    let too_large = || Error::InvalidShape {
        reason: format!("the {} members of a group overflow isize", requested.len()),
    };
    let mut members = Vec::new();
    reserve(&mut members, requested.len(), Device::Cpu)?;
    let mut whole = Layout::from_size_align(0, DeviceMemory::ALIGN).map_err(|_| too_large())?;
    for Requested { shape, element, kind, mirrored } in requested {
        let numel = shape.numel(element.size())?;
        let align = element.align().max(DeviceMemory::ALIGN);
        let bytes = numel * element.size();
        let member = Layout::from_size_align(bytes, align).map_err(|_| too_large())?;
        let (with, offset) = whole.extend(member).map_err(|_| too_large())?;
        members.push(Member {
            bytes: offset..offset + bytes,
            row: bytes.checked_div(shape.rows()).unwrap_or(0),
            shape: *shape,
            numel,
            kind: *kind,
            mirrored: *mirrored,
        });
        whole = with;
    }
    Ok(GroupTable { id, members, layout: whole })
}

/// The members of a group and their offsets. Cheap to clone.
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let ids = builder.add::<i32>(1024);
/// let layout = builder.build()?;
/// let of_a_worker = layout.clone(); // of the same members, not a copy of them
/// let worker = std::thread::spawn(move || BufferGroup::new(&of_a_worker, Device::auto()));
/// let group = worker.join().unwrap()?;
/// assert_eq!(group.cpu(ids)?.len(), 1024);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone)]
pub struct GroupLayout(Arc<GroupTable>);

impl fmt::Debug for GroupLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GroupTable { id, members, layout } = self.table();
        write!(f, "GroupLayout(layout={id}, members={}, bytes={})", members.len(), layout.size())
    }
}

/// The members of a layout, and the layout of them together.
pub(crate) struct GroupTable {
    id: u64,
    /// In the order of their offsets.
    pub(crate) members: Vec<Member>,
    /// The layout of one side.
    pub(crate) layout: Layout,
}

pub(crate) struct Member {
    /// Its bytes within a side.
    pub(crate) bytes: Range<usize>,
    /// The bytes of one row.
    row: usize,
    pub(crate) shape: Shape,
    pub(crate) numel: usize,
    kind: TypeId,
    pub(crate) mirrored: bool,
}

impl GroupLayout {
    pub(crate) fn table(&self) -> &GroupTable {
        &self.0
    }

    /// The member that a key names, and its index.
    pub(crate) fn find<T: Pod>(&self, key: MemberKey<T>) -> Result<(usize, &Member)> {
        let (index, member) = self.at(key.layout, key.index)?;
        match member.kind == TypeId::of::<T>() {
            true => Ok((index, member)),
            false => Err(Error::InvalidKey),
        }
    }

    /// The index of the member that has the rows, and their bytes within a side.
    pub(crate) fn locate(&self, rows: &MemberRows) -> Result<(usize, Range<usize>)> {
        let (index, member) = self.at(rows.layout, rows.index)?;
        let selected = select(rows.bounds, member.shape.rows(), Some(index))?;
        let start = member.bytes.start;
        Ok((index, start + selected.start * member.row..start + selected.end * member.row))
    }

    fn at(&self, layout: u64, index: u32) -> Result<(usize, &Member)> {
        let index = index as usize;
        let member = match layout == self.0.id {
            true => self.0.members.get(index),
            false => None,
        };
        member.map(|member| (index, member)).ok_or(Error::InvalidKey)
    }
}

/// Names a member of a [`GroupLayout`], with elements of `T`.
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, MemberKey};
///
/// # use cpu_gpu_buffer::Result;
/// fn count(group: &BufferGroup, ids: MemberKey<i32>, wanted: i32) -> Result<usize> {
///     Ok(group.cpu(ids)?.iter().filter(|id| **id == wanted).count())
/// }
/// let mut builder = GroupLayoutBuilder::new();
/// let (prompt, output) = (builder.add(8), builder.add(4));
/// let group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
/// assert_eq!(count(&group, prompt, 0)? + count(&group, output, 0)?, 12);
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
pub struct MemberKey<T> {
    layout: u64,
    index: u32,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for MemberKey<T> {
    fn clone(&self) -> MemberKey<T> {
        *self
    }
}

impl<T> Copy for MemberKey<T> {}

impl<T> PartialEq for MemberKey<T> {
    fn eq(&self, other: &MemberKey<T>) -> bool {
        (self.layout, self.index) == (other.layout, other.index)
    }
}

impl<T> Eq for MemberKey<T> {}

impl<T> Hash for MemberKey<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.layout, self.index).hash(state);
    }
}

impl<T> fmt::Debug for MemberKey<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (element, index, layout) = (type_name::<T>(), self.index, self.layout);
        write!(f, "MemberKey<{element}>(member={index}, layout={layout})")
    }
}

impl<T> MemberKey<T> {
    /// Rows of the member for a copy: `..`, `..n`, `a..b`. The copy checks that they are within its
    /// shape.
    ///
    /// ```
    /// use cpu_gpu_buffer::{BufferGroup, Device, Error, GroupLayoutBuilder, Stream};
    ///
    /// let mut builder = GroupLayoutBuilder::new();
    /// let ids = builder.add::<i32>(8);
    /// let stream = Stream::new(Device::Cpu)?;
    /// let mut group = BufferGroup::new(&builder.build()?, Device::Cpu)?;
    /// group.copy_to_gpu(&[ids.rows(2..=5)], &stream)?;
    /// let beyond = group.copy_to_gpu(&[ids.rows(..9)], &stream);
    /// assert_eq!(beyond, Err(Error::OutOfRange { start: 0, end: 9, rows: 8, member: Some(0) }));
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn rows(self, rows: impl Rows) -> MemberRows {
        MemberRows { layout: self.layout, index: self.index, bounds: rows.bounds() }
    }
}

/// Rows of one member for a copy: see [`MemberKey::rows`].
///
/// ```
/// use cpu_gpu_buffer::{BufferGroup, Device, GroupLayoutBuilder, MemberRows, Stream};
///
/// let mut builder = GroupLayoutBuilder::new();
/// let (ids, positions) = (builder.add::<i32>(8), builder.add::<i64>(8));
/// let table = builder.add::<i32>([8, 4]);
/// let stream = Stream::new(Device::auto())?;
/// let mut group = BufferGroup::new(&builder.build()?, stream.device())?;
/// // Members of any types in one list, and the list may differ in each step.
/// let mut moved: Vec<MemberRows> = vec![ids.into(), positions.rows(..3)];
/// let table_changed = true;
/// if table_changed {
///     moved.push(table.rows(1..2));
/// }
/// group.copy_to_gpu(&moved, &stream)?;
/// # Ok::<(), cpu_gpu_buffer::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct MemberRows {
    layout: u64,
    index: u32,
    bounds: (Bound<usize>, Bound<usize>),
}

/// All rows of the member.
impl<T> From<MemberKey<T>> for MemberRows {
    fn from(key: MemberKey<T>) -> MemberRows {
        key.rows(..)
    }
}

impl fmt::Debug for MemberRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemberRows { layout, index, bounds } = self;
        write!(f, "MemberRows(member={index}, rows={bounds:?}, layout={layout})")
    }
}
