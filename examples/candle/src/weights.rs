//! All tensors of `.safetensors` files.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::tensor::Metadata;

use crate::loader::{self, Failure, Loader, Part};
use crate::ours;
use crate::source::Source;

/// As in the `safetensors` crate.
const LONGEST_HEADER: u64 = 100_000_000;

/// A way to load.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    /// Readers, pinned memory and candle's stream.
    Ours,
    /// `candle_core::safetensors::load`.
    Load,
    /// A `VarBuilder` over mapped files.
    Mmap,
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Way, String> {
        match text {
            "ours" => Ok(Way::Ours),
            "load" => Ok(Way::Load),
            "mmap" => Ok(Way::Mmap),
            _ => Err("--way is ours, load or mmap".into()),
        }
    }
}

/// What the command line says.
pub struct Options {
    /// `None` for each.
    pub way: Option<Way>,
    pub readers: usize,
    pub direct: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { way: None, readers: loader::readers(), direct: false }
    }
}

/// A tensor in a file.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    source: usize,
    bytes: Range<u64>,
}

/// The tensors of a file.
fn entries(source: &Source, index: usize) -> Result<Vec<Entry>, Failure> {
    let path = source.path().display();
    let wrong = |what: &str| -> Failure { format!("{path}: {what}").into() };
    let mut length = [0; 8];
    if source.len() < 8 {
        return Err(wrong("it is too short for a header"));
    }
    source.read(0, &mut length, 8)?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER || 8 + length > source.len() {
        return Err(wrong("its header is longer than the file, or than any header"));
    }
    let mut header = vec![0; length as usize];
    source.read(8, &mut header, length as usize)?;
    // This checks each tensor's shape against its bytes, and that they follow each other.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| wrong(&format!("its header is not that of safetensors: {error}")))?;
    let begin = 8 + length;
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let wrong = |what: &str| wrong(&format!("tensor {name}: {what}"));
        let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let (from, to) = match (from.checked_add(begin), to.checked_add(begin)) {
            (Some(from), Some(to)) if from <= to && to <= source.len() => (from, to),
            _ => return Err(wrong("its bytes are beyond the end of the file")),
        };
        let dtype = DType::try_from(info.dtype).map_err(|error| wrong(&error.to_string()))?;
        let size = dtype.size_in_bytes();
        if size == 0 || !(from - begin).is_multiple_of(size as u64) {
            return Err(wrong("its bytes are not aligned"));
        }
        let shape = info.shape.clone();
        entries.push(Entry { name, dtype, shape, source: index, bytes: from..to });
    }
    Ok(entries)
}

/// Loads all tensors of the files to candle's device.
fn load(
    paths: &[PathBuf],
    device: &Device,
    loader: &Loader,
    direct: bool,
) -> Result<BTreeMap<String, Tensor>, Failure> {
    let sources: Result<Vec<_>, _> = paths.iter().map(|path| Source::open(path, direct)).collect();
    let sources = sources?;
    let mut all = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        all.extend(entries(source, index)?);
    }
    let mut names = HashSet::new();
    if let Some(twice) = all.iter().find(|entry| !names.insert(&entry.name)) {
        return Err(format!("tensor {} is in two files", twice.name).into());
    }
    let (mut storages, mut parts) = (Vec::new(), Vec::new());
    for entry in &all {
        let len = entry.shape.iter().product();
        let (storage, to) = ours::uninitialized(entry.dtype, len, device)?;
        parts.push(Part { source: entry.source, bytes: entry.bytes.clone(), to });
        storages.push(storage);
    }
    // SAFETY: each storage has the bytes of its entry, on the device of the loader's stream, and
    // lives beyond the call. It was allocated on this stream, and nothing else uses it.
    unsafe { loader.load(&sources, parts, |_| {}) }?;
    for source in &sources {
        if let Some(reason) = source.refused() {
            eprintln!("through the page cache, because the file system refuses: {reason}");
        }
    }
    let tensors = all.into_iter().zip(storages).map(|(entry, storage)| {
        (entry.name, Tensor::from_storage(storage, entry.shape, BackpropOp::none(), false))
    });
    Ok(tensors.collect())
}

/// Loads by a way. Returns the tensors and the time in seconds.
fn timed(
    paths: &[PathBuf],
    device: &Device,
    way: Way,
    loader: &Loader,
    options: &Options,
) -> Result<(BTreeMap<String, Tensor>, f64), Failure> {
    let start = Instant::now();
    let mut tensors = BTreeMap::new();
    match way {
        Way::Ours => tensors = load(paths, device, loader, options.direct)?,
        Way::Load => {
            for path in paths {
                tensors.extend(candle_core::safetensors::load(path, device)?);
            }
        }
        Way::Mmap => {
            // SAFETY: the example's files do not change meanwhile.
            let files = unsafe { candle_core::safetensors::MmapedSafetensors::multi(paths) }?;
            let named: Vec<_> = files
                .tensors()
                .into_iter()
                .map(|(name, view)| Ok((name, DType::try_from(view.dtype())?)))
                .collect::<candle_core::Result<_>>()?;
            let builder = VarBuilder::from_backend(Box::new(files), DType::F32, device.clone());
            for (name, dtype) in named {
                let tensor = builder.get_unchecked_dtype(&name, dtype)?;
                tensors.insert(name, tensor);
            }
        }
    }
    device.synchronize()?;
    Ok((tensors, start.elapsed().as_secs_f64()))
}

/// Loads by each way, prints the rates and compares the tensors.
pub fn compare(paths: &[PathBuf], device: &Device, options: &Options) -> Result<(), Failure> {
    let ways = [(Way::Ours, "cpu-gpu-buffer"), (Way::Mmap, "mmap VarBuilder"), (Way::Load, "load")];
    let ways = ways.iter().filter(|(way, _)| options.way.is_none_or(|only| only == *way));
    // A program makes this once, for all of its files.
    let start = Instant::now();
    let loader = Loader::new(&ours::stream(device)?, options.readers)?;
    println!("{:16} {:.3} s for the readers' pinned memory", "", start.elapsed().as_secs_f64());
    let mut expected: Option<BTreeMap<String, Tensor>> = None;
    for (way, name) in ways {
        let (tensors, seconds) = timed(paths, device, *way, &loader, options)?;
        let bytes: usize = tensors
            .values()
            .map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes())
            .sum();
        let (count, rate) = (tensors.len(), bytes as f64 / seconds.max(1e-9) / 1e9);
        println!("{name:16} {count} tensors, {bytes} bytes, {seconds:.3} s, {rate:.2} GB/s");
        let Some(expected) = &expected else {
            expected = Some(tensors);
            continue;
        };
        if let Some(name) = first_difference(expected, &tensors)? {
            return Err(format!("tensor {name} differs").into());
        }
        println!("{:16} the same tensors", "");
    }
    Ok(())
}

/// The name of a tensor that is not the same in both.
fn first_difference(
    all: &BTreeMap<String, Tensor>,
    others: &BTreeMap<String, Tensor>,
) -> Result<Option<String>, Failure> {
    if let Some(name) = all
        .keys()
        .chain(others.keys())
        .find(|name| !all.contains_key(*name) || !others.contains_key(*name))
    {
        return Ok(Some(name.clone()));
    }
    for (name, tensor) in all {
        let other = &others[name];
        let same = tensor.dims() == other.dims() && tensor.dtype() == other.dtype();
        // The generator makes no NaN, so that equal bytes are equal numbers.
        if !same
            || tensor.ne(other)?.flatten_all()?.to_dtype(DType::F32)?.max(0)?.to_scalar::<f32>()?
                != 0.0
        {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}
