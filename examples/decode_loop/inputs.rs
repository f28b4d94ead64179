//! The arrays of a step's input, and three ways to keep them.
//!
//! The ways are separate buffers, a group, and a group with several host slots.

use std::ops::RangeTo;
use std::time::{Duration, Instant};

use bytemuck::Pod;
use cpu_gpu_buffer::{
    BufferGroup, CpuGpuBuffer, Device, GpuView, GroupLayout, GroupLayoutBuilder, GroupRing,
    GroupView, MemberKey, MemberRows, MembersMut, Result, Shape, Stream,
};

use crate::engine::{BLOCK, BLOCKS, Engine, MAX_REQUESTS, MAX_TOKENS};

/// The number of arrays.
pub const ARRAYS: usize = 16;

/// The relation of an array's rows to requests.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum By {
    /// One row for each request.
    Request = 0,
    /// One row for each token.
    Token = 1,
    /// One row for each request, and one more at the end.
    Bound = 2,
}

/// The type of each array in an [`Inputs`], for example a shape, a key or a slice.
pub trait Form {
    type Of<T: Pod>;
}

/// The arrays, in the order of `sample.ptx`.
pub struct Inputs<F: Form> {
    query_starts: F::Of<i32>,
    ids: F::Of<i32>,
    positions: F::Of<i64>,
    slots: F::Of<i64>,
    sequence_lengths: F::Of<i32>,
    computed: F::Of<i32>,
    logits: F::Of<i32>,
    temperatures: F::Of<f32>,
    top_p: F::Of<f32>,
    min_p: F::Of<f32>,
    top_k: F::Of<i32>,
    seeds: F::Of<i64>,
    presence: F::Of<f32>,
    frequency: F::Of<f32>,
    repetition: F::Of<f32>,
    /// The largest array is last, because uploads of mirrored members include rows in between.
    table: F::Of<i32>,
}

/// A conversion from one form to another.
trait Map<F: Form, G: Form> {
    fn one<T: Pod + Send + Sync>(&mut self, of: F::Of<T>, by: By) -> Result<G::Of<T>>;
}

impl<F: Form> Inputs<F> {
    fn map<G: Form>(self, map: &mut impl Map<F, G>) -> Result<Inputs<G>> {
        Ok(Inputs {
            query_starts: map.one(self.query_starts, By::Bound)?,
            ids: map.one(self.ids, By::Token)?,
            positions: map.one(self.positions, By::Token)?,
            slots: map.one(self.slots, By::Token)?,
            sequence_lengths: map.one(self.sequence_lengths, By::Request)?,
            computed: map.one(self.computed, By::Request)?,
            logits: map.one(self.logits, By::Request)?,
            temperatures: map.one(self.temperatures, By::Request)?,
            top_p: map.one(self.top_p, By::Request)?,
            min_p: map.one(self.min_p, By::Request)?,
            top_k: map.one(self.top_k, By::Request)?,
            seeds: map.one(self.seeds, By::Request)?,
            presence: map.one(self.presence, By::Request)?,
            frequency: map.one(self.frequency, By::Request)?,
            repetition: map.one(self.repetition, By::Request)?,
            table: map.one(self.table, By::Request)?,
        })
    }
}

struct Shapes;
impl Form for Shapes {
    type Of<T: Pod> = Shape;
}

fn shapes() -> Inputs<Shapes> {
    let of = |rows: usize| Shape::from(rows);
    Inputs {
        query_starts: of(MAX_REQUESTS + 1),
        ids: of(MAX_TOKENS),
        positions: of(MAX_TOKENS),
        slots: of(MAX_TOKENS),
        sequence_lengths: of(MAX_REQUESTS),
        computed: of(MAX_REQUESTS),
        logits: of(MAX_REQUESTS),
        temperatures: of(MAX_REQUESTS),
        top_p: of(MAX_REQUESTS),
        min_p: of(MAX_REQUESTS),
        top_k: of(MAX_REQUESTS),
        seeds: of(MAX_REQUESTS),
        presence: of(MAX_REQUESTS),
        frequency: of(MAX_REQUESTS),
        repetition: of(MAX_REQUESTS),
        table: Shape::from([MAX_REQUESTS, BLOCKS]),
    }
}

// ---- the input of a step ----

/// The form of host sides to write.
pub struct Slices<'a>(std::marker::PhantomData<&'a mut ()>);
impl<'a> Form for Slices<'a> {
    type Of<T: Pod> = &'a mut [T];
}

/// The numbers of requests and tokens of a step.
#[derive(Clone, Copy)]
pub struct Counts {
    pub requests: usize,
    pub tokens: usize,
}

impl Counts {
    fn rows(self, by: By) -> RangeTo<usize> {
        match by {
            By::Request => ..self.requests,
            By::Token => ..self.tokens,
            By::Bound => ..self.requests + 1,
        }
    }
}

impl Inputs<Slices<'_>> {
    /// Writes a step's input.
    ///
    /// The host sides were last written in step `since`. With a ring, that is a varying number of
    /// steps ago. Rows that have not changed since then are not written, if their arrays change
    /// rarely. Rows after the last request's are skipped: a new request marks its row as changed.
    pub fn write(self, engine: &Engine, sampled: &[u32], since: u64) -> Counts {
        let mut at = 0;
        self.query_starts[0] = 0;
        for (row, request) in engine.live.iter().enumerate() {
            let blocks = engine.blocks(row);
            for (token, position) in request.tokens(sampled) {
                self.ids[at] = token;
                self.positions[at] = position.into();
                let block = i64::from(blocks[(position / BLOCK) as usize]);
                self.slots[at] = block * i64::from(BLOCK) + i64::from(position % BLOCK);
                at += 1;
            }
            self.query_starts[row + 1] = at as i32;
            self.sequence_lengths[row] = (request.computed + request.scheduled) as i32;
            self.computed[row] = request.computed as i32;
            self.logits[row] = at as i32 - 1;
            if engine.has_changed(row, since) {
                self.temperatures[row] = request.parameter(0) / 128.0;
                self.top_p[row] = request.parameter(1) / 256.0;
                self.min_p[row] = request.parameter(2) / 1024.0;
                self.top_k[row] = request.parameter(3) as i32;
                self.seeds[row] = request.seed as i64;
                self.presence[row] = request.parameter(4) / 256.0;
                self.frequency[row] = request.parameter(5) / 256.0;
                self.repetition[row] = 1.0 + request.parameter(6) / 256.0;
                self.table[row * BLOCKS..(row + 1) * BLOCKS].copy_from_slice(blocks);
            }
        }
        Counts { requests: engine.live.len(), tokens: at }
    }
}

// ---- the input of a kernel ----

/// An array in the device side, as words.
#[derive(Clone, Copy)]
pub struct Column<'a> {
    pub words: *const u32,
    pub len: usize,
    /// The words of a row.
    pub width: usize,
    pub by: By,
    /// The words themselves, if the device is the CPU.
    pub host: Option<&'a [u32]>,
}

/// The form of arrays without a result.
struct Nothing;
impl Form for Nothing {
    type Of<T: Pod> = ();
}

/// A collection of columns that allocates nothing.
struct Columns<'a> {
    all: [Column<'a>; ARRAYS],
    count: usize,
}

impl<'a> Columns<'a> {
    fn new() -> Columns<'a> {
        let none =
            Column { words: std::ptr::null(), len: 0, width: 0, by: By::Request, host: None };
        Columns { all: [none; ARRAYS], count: 0 }
    }

    fn push<T: Pod>(&mut self, view: GpuView<'a, T>, by: By) {
        let words = size_of::<T>() / 4;
        let row: usize = view.shape()[1..].iter().product();
        self.all[self.count] = Column {
            words: view.as_ptr().cast(),
            len: view.len() * words,
            width: row * words,
            by,
            host: view.into_host_slice().map(|elements| bytemuck::cast_slice(elements)),
        };
        self.count += 1;
    }
}

// ---- the ways ----

/// The waits before host sides could be written.
#[derive(Default)]
pub struct Stalls {
    pub count: usize,
    pub time: Duration,
}

impl Stalls {
    fn since(&mut self, start: Instant) {
        self.count += 1;
        self.time += start.elapsed();
    }
}

/// A way to keep the arrays.
pub trait Way {
    /// Writes a step's input to the host sides: the whole input, or the latest changes.
    fn write(
        &mut self,
        engine: &Engine,
        sampled: &[u32],
        all: bool,
        stalls: &mut Stalls,
    ) -> Result<Counts>;

    /// Uploads the rows that the step uses.
    fn upload(&mut self, counts: Counts, stream: &Stream) -> Result<()>;

    /// The device sides, for the kernel, and the address that it writes the samples to.
    fn columns(&mut self, stream: &Stream) -> Result<([Column<'_>; ARRAYS], *mut u32)>;

    /// Writes the samples to their device side, in place of a kernel.
    fn sample(&mut self, samples: &[u32], stream: &Stream) -> Result<()>;

    /// Enqueues the download of the step's samples, one for each request.
    fn download(&mut self, requests: usize, stream: &Stream) -> Result<()>;

    /// The samples of `steps` steps ago, 0 or 1. Waits for their download.
    fn samples(&self, steps: usize) -> Result<&[u32]>;
}

/// The samples of the last two steps, for a way that keeps them in buffers of their own.
struct Samples {
    buffers: [CpuGpuBuffer<u32>; 2],
    /// The buffer of the current step.
    current: usize,
}

impl Samples {
    fn new(device: Device) -> Result<Samples> {
        let buffer = || CpuGpuBuffer::new(MAX_REQUESTS, device);
        Ok(Samples { buffers: [buffer()?, buffer()?], current: 0 })
    }

    fn advance(&mut self) {
        self.current = 1 - self.current;
    }

    fn address(&mut self, stream: &Stream) -> Result<*mut u32> {
        Ok(self.buffers[self.current].gpu_on(stream)?.as_mut_ptr())
    }

    fn put(&mut self, samples: &[u32], stream: &Stream) -> Result<()> {
        self.buffers[self.current].write_rows(..samples.len(), samples, stream)
    }

    fn download(&mut self, requests: usize, stream: &Stream) -> Result<()> {
        self.buffers[self.current].copy_to_cpu(..requests, stream)
    }

    fn get(&self, steps: usize) -> Result<&[u32]> {
        self.buffers[(self.current + steps) % 2].cpu()
    }
}

struct Buffers;
impl Form for Buffers {
    type Of<T: Pod> = CpuGpuBuffer<T>;
}

struct BuffersMut<'a>(std::marker::PhantomData<&'a mut ()>);
impl<'a> Form for BuffersMut<'a> {
    type Of<T: Pod> = &'a mut CpuGpuBuffer<T>;
}

impl Inputs<Buffers> {
    fn each_mut(&mut self) -> Inputs<BuffersMut<'_>> {
        Inputs {
            query_starts: &mut self.query_starts,
            ids: &mut self.ids,
            positions: &mut self.positions,
            slots: &mut self.slots,
            sequence_lengths: &mut self.sequence_lengths,
            computed: &mut self.computed,
            logits: &mut self.logits,
            temperatures: &mut self.temperatures,
            top_p: &mut self.top_p,
            min_p: &mut self.min_p,
            top_k: &mut self.top_k,
            seeds: &mut self.seeds,
            presence: &mut self.presence,
            frequency: &mut self.frequency,
            repetition: &mut self.repetition,
            table: &mut self.table,
        }
    }
}

/// A buffer for each array. Each upload is a copy of its own.
pub struct Single {
    inputs: Inputs<Buffers>,
    samples: Samples,
    /// The step in which the buffers were last written.
    written: u64,
}

impl Single {
    pub fn new(device: Device) -> Result<Single> {
        let inputs = shapes().map(&mut Make(device))?;
        Ok(Single { inputs, samples: Samples::new(device)?, written: 0 })
    }
}

struct Make(Device);
impl Map<Shapes, Buffers> for Make {
    fn one<T: Pod + Send + Sync>(&mut self, shape: Shape, _: By) -> Result<CpuGpuBuffer<T>> {
        CpuGpuBuffer::new(shape, self.0)
    }
}

impl<'a> Map<BuffersMut<'a>, Slices<'a>> for Stalls {
    fn one<T: Pod>(&mut self, buffer: &'a mut CpuGpuBuffer<T>, _: By) -> Result<&'a mut [T]> {
        if buffer.try_cpu_mut()?.is_none() {
            let start = Instant::now();
            buffer.cpu_mut()?;
            self.since(start);
        }
        buffer.cpu_mut()
    }
}

struct Upload<'a>(Counts, &'a Stream);
impl<'a> Map<BuffersMut<'a>, Nothing> for Upload<'_> {
    fn one<T: Pod>(&mut self, buffer: &'a mut CpuGpuBuffer<T>, by: By) -> Result<()> {
        buffer.copy_to_gpu(self.0.rows(by), self.1)
    }
}

struct Use<'a, 's>(Columns<'a>, &'s Stream);
impl<'a> Map<BuffersMut<'a>, Nothing> for Use<'a, '_> {
    fn one<T: Pod>(&mut self, buffer: &'a mut CpuGpuBuffer<T>, by: By) -> Result<()> {
        self.0.push(buffer.gpu_on(self.1)?, by);
        Ok(())
    }
}

impl Way for Single {
    fn write(
        &mut self,
        engine: &Engine,
        sampled: &[u32],
        all: bool,
        stalls: &mut Stalls,
    ) -> Result<Counts> {
        self.samples.advance();
        let since = std::mem::replace(&mut self.written, engine.step);
        let slices = self.inputs.each_mut().map(stalls)?;
        Ok(slices.write(engine, sampled, if all { 0 } else { since }))
    }

    fn upload(&mut self, counts: Counts, stream: &Stream) -> Result<()> {
        self.inputs.each_mut().map(&mut Upload(counts, stream)).map(drop)
    }

    fn columns(&mut self, stream: &Stream) -> Result<([Column<'_>; ARRAYS], *mut u32)> {
        let to = self.samples.address(stream)?;
        let mut views = Use(Columns::new(), stream);
        self.inputs.each_mut().map(&mut views)?;
        Ok((views.0.all, to))
    }

    fn sample(&mut self, samples: &[u32], stream: &Stream) -> Result<()> {
        self.samples.put(samples, stream)
    }

    fn download(&mut self, requests: usize, stream: &Stream) -> Result<()> {
        self.samples.download(requests, stream)
    }

    fn samples(&self, steps: usize) -> Result<&[u32]> {
        self.samples.get(steps)
    }
}

struct Keys;
impl Form for Keys {
    type Of<T: Pod> = MemberKey<T>;
}

impl Clone for Inputs<Keys> {
    fn clone(&self) -> Self {
        *self
    }
}

impl Copy for Inputs<Keys> {}

/// The members of a group.
#[derive(Clone, Copy)]
struct Members {
    inputs: Inputs<Keys>,
    /// The step in which the host side was last written. It is not uploaded.
    ///
    /// Each slot of a ring has its own value, so that its next write includes all later changes.
    written: MemberKey<u64>,
    /// The samples that the kernel writes.
    sampled: MemberKey<u32>,
}

struct Add {
    builder: GroupLayoutBuilder,
    mirrored: bool,
}
impl Map<Shapes, Keys> for Add {
    fn one<T: Pod + Send + Sync>(&mut self, shape: Shape, _: By) -> Result<MemberKey<T>> {
        Ok(match self.mirrored {
            true => self.builder.add_mirrored(shape),
            false => self.builder.add(shape),
        })
    }
}

struct Access<'g>(MembersMut<'g>);
impl<'g> Map<Keys, Slices<'g>> for Access<'g> {
    fn one<T: Pod>(&mut self, key: MemberKey<T>, _: By) -> Result<&'g mut [T]> {
        self.0.cpu_mut(key)
    }
}

struct Rows {
    counts: Counts,
    all: [MemberRows; ARRAYS],
    count: usize,
}
impl Map<Keys, Nothing> for Rows {
    fn one<T: Pod>(&mut self, key: MemberKey<T>, by: By) -> Result<()> {
        self.all[self.count] = key.rows(self.counts.rows(by));
        self.count += 1;
        Ok(())
    }
}

struct Views<'a>(GroupView<'a>, Columns<'a>);
impl<'a> Map<Keys, Nothing> for Views<'a> {
    fn one<T: Pod>(&mut self, key: MemberKey<T>, by: By) -> Result<()> {
        self.1.push(self.0.member(key)?, by);
        Ok(())
    }
}

impl Members {
    /// With `mirrored`, an upload may include the rows between requested ranges, and is one copy.
    ///
    /// This is possible because the kernel writes to no array but `sampled`.
    fn new(mirrored: bool) -> Result<(Members, GroupLayout)> {
        let mut add = Add { builder: GroupLayoutBuilder::new(), mirrored };
        let inputs = shapes().map(&mut add)?;
        let (written, sampled) = (add.builder.add(1), add.builder.add(MAX_REQUESTS));
        Ok((Members { inputs, written, sampled }, add.builder.build()?))
    }

    /// The host sides, and the step in which they were last written.
    fn access<'g>(&self, members: MembersMut<'g>) -> Result<(Inputs<Slices<'g>>, &'g mut u64)> {
        let mut access = Access(members);
        let slices = self.inputs.map(&mut access)?;
        Ok((slices, &mut access.0.cpu_mut(self.written)?[0]))
    }

    fn rows(&self, counts: Counts) -> Result<[MemberRows; ARRAYS]> {
        let none = self.written.rows(..0);
        let mut rows = Rows { counts, all: [none; ARRAYS], count: 0 };
        self.inputs.map(&mut rows)?;
        Ok(rows.all)
    }

    fn columns<'a>(&self, view: GroupView<'a>) -> Result<([Column<'a>; ARRAYS], *mut u32)> {
        let mut views = Views(view, Columns::new());
        self.inputs.map(&mut views)?;
        Ok((views.1.all, views.0.member(self.sampled)?.as_mut_ptr()))
    }
}

/// A group whose members are the arrays.
pub struct Group {
    group: BufferGroup,
    members: Members,
    samples: Samples,
}

impl Group {
    pub fn new(device: Device, mirrored: bool) -> Result<Group> {
        let (members, layout) = Members::new(mirrored)?;
        let (group, samples) = (BufferGroup::new(&layout, device)?, Samples::new(device)?);
        Ok(Group { group, members, samples })
    }
}

/// The time from which an access counts as a wait. Polling all copies takes less.
const ASKING: Duration = Duration::from_micros(5);

impl Way for Group {
    fn write(
        &mut self,
        engine: &Engine,
        sampled: &[u32],
        all: bool,
        stalls: &mut Stalls,
    ) -> Result<Counts> {
        self.samples.advance();
        let start = Instant::now();
        let (slices, written) = self.members.access(self.group.members_mut())?;
        // A group does not report its waits.
        if start.elapsed() > ASKING {
            stalls.since(start);
        }
        let since = std::mem::replace(written, engine.step);
        Ok(slices.write(engine, sampled, if all { 0 } else { since }))
    }

    fn upload(&mut self, counts: Counts, stream: &Stream) -> Result<()> {
        self.group.copy_to_gpu(&self.members.rows(counts)?, stream)
    }

    fn columns(&mut self, stream: &Stream) -> Result<([Column<'_>; ARRAYS], *mut u32)> {
        let to = self.samples.address(stream)?;
        let (columns, _) = self.members.columns(self.group.gpu_on(stream)?)?;
        Ok((columns, to))
    }

    fn sample(&mut self, samples: &[u32], stream: &Stream) -> Result<()> {
        self.samples.put(samples, stream)
    }

    fn download(&mut self, requests: usize, stream: &Stream) -> Result<()> {
        self.samples.download(requests, stream)
    }

    fn samples(&self, steps: usize) -> Result<&[u32]> {
        self.samples.get(steps)
    }
}

/// A ring whose members are the arrays and the samples. It has several host slots: the samples of
/// the step before are read from its slot, beside the current one.
pub struct Ring {
    ring: GroupRing,
    members: Members,
}

impl Ring {
    pub fn new(device: Device, depth: usize, mirrored: bool) -> Result<Ring> {
        let (members, layout) = Members::new(mirrored)?;
        Ok(Ring { ring: GroupRing::new(&layout, device, depth)?, members })
    }
}

impl Way for Ring {
    fn write(
        &mut self,
        engine: &Engine,
        sampled: &[u32],
        all: bool,
        stalls: &mut Stalls,
    ) -> Result<Counts> {
        if !self.ring.try_advance()? {
            let start = Instant::now();
            self.ring.advance()?;
            stalls.since(start);
        }
        let (slices, written) = self.members.access(self.ring.members_mut())?;
        let since = std::mem::replace(written, engine.step);
        Ok(slices.write(engine, sampled, if all { 0 } else { since }))
    }

    fn upload(&mut self, counts: Counts, stream: &Stream) -> Result<()> {
        self.ring.copy_to_gpu(&self.members.rows(counts)?, stream)
    }

    fn columns(&mut self, stream: &Stream) -> Result<([Column<'_>; ARRAYS], *mut u32)> {
        self.members.columns(self.ring.gpu_on(stream)?)
    }

    fn sample(&mut self, samples: &[u32], stream: &Stream) -> Result<()> {
        let sampled = self.members.sampled;
        self.ring.cpu_mut(sampled)?[..samples.len()].copy_from_slice(samples);
        self.ring.copy_to_gpu(&[sampled.rows(..samples.len())], stream)
    }

    fn download(&mut self, requests: usize, stream: &Stream) -> Result<()> {
        self.ring.copy_to_cpu(&[self.members.sampled.rows(..requests)], stream)
    }

    fn samples(&self, steps: usize) -> Result<&[u32]> {
        self.ring.cpu_back(steps, self.members.sampled)
    }
}
