//! A substitute for the model: the kernel of `sample.ptx`, or the same sums on the host.
//!
//! The kernel takes a given time.

use std::borrow::Cow;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::time::Duration;

use cpu_gpu_buffer::{CpuGpuBuffer, Device, Stream, sys};

use crate::Failure;
use crate::engine::mix;
use crate::inputs::{ARRAYS, By, Column, Way};

/// The substitute for the model.
pub enum Model {
    Kernel {
        launch: Launch,
        function: sys::CUfunction,
        time: Duration,
    },
    /// Computes the sums on the host, from the contents of the device side.
    Host,
}

type Launch = unsafe extern "C" fn(
    sys::CUfunction,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    sys::CUstream,
    *mut *mut c_void,
    *mut *mut c_void,
) -> sys::CUresult;

/// As in `sample.ptx`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    words: *const u32,
    width: u32,
    by: u32,
}

const THREADS: u32 = 128;

impl Model {
    /// Loads the kernel. On the CPU, or if the driver has no kernels, the host computes the sums.
    pub fn load(device: Device, time: Duration) -> Result<Model, Failure> {
        let Device::Cuda(ordinal) = device else { return Ok(Model::Host) };
        // A launch needs the device's context to be current.
        // SAFETY: the function takes any ordinal, and returns an error for one that does not exist.
        checked(unsafe { sys::cudaSetDevice(ordinal as i32) })?;
        let load: sys::PFN_cuModuleLoadData_v2000 = entry(c"cuModuleLoadData")?;
        let get: sys::PFN_cuModuleGetFunction_v2000 = entry(c"cuModuleGetFunction")?;
        let launch: sys::PFN_cuLaunchKernel_v4000 = entry(c"cuLaunchKernel")?;
        let (load, get, launch) =
            (load.expect("found"), get.expect("found"), launch.expect("found"));
        let text = concat!(include_str!("sample.ptx"), "\0");
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: PTX that ends with a NUL. The module stays loaded until the process ends.
        done(unsafe { load(&mut module, text.as_ptr().cast()) })?;
        // SAFETY: the module was just loaded.
        match unsafe { get(&mut function, module, c"sample".as_ptr()) } {
            // A simulated driver loads the module, but has no kernels.
            sys::CUresult::CUDA_ERROR_NOT_FOUND => Ok(Model::Host),
            status => done(status).map(|()| Model::Kernel { launch, function, time }),
        }
    }

    /// Computes the sums of `requests` requests in stream order: their samples.
    pub fn run(&self, requests: usize, way: &mut impl Way, stream: &Stream) -> Result<(), Failure> {
        let (columns, mut to) = way.columns(stream)?;
        let Model::Kernel { launch, function, time } = self else {
            let mut samples = vec![0; requests];
            sums(&columns, &mut samples, stream)?;
            return Ok(way.sample(&samples, stream)?);
        };
        let mut entries = columns.map(|Column { words, width, by, .. }| Entry {
            words,
            width: width as u32,
            by: by as u32,
        });
        let mut nanoseconds = time.as_nanos() as u64;
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut entries).cast(), (&raw mut to).cast(), (&raw mut nanoseconds).cast()];
        let (blocks, parameters, none) =
            (requests as u32, parameters.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the parameters are those of `sample`. It reads rows of arrays whose views are of
        // this stream, and writes one word for each block, of which there is one for each request.
        // The stream is live.
        done(unsafe {
            let raw = stream.as_raw();
            launch(*function, blocks, 1, 1, THREADS, 1, 1, 0, raw, parameters, none)
        })
    }
}

/// Computes the kernel's sums on the host.
fn sums(columns: &[Column<'_>; ARRAYS], sums: &mut [u32], stream: &Stream) -> Result<(), Failure> {
    let all = columns.iter().map(|column| words(column, stream));
    let all = all.collect::<Result<Vec<_>, _>>()?;
    let starts = &all[0];
    for (row, sum) in sums.iter_mut().enumerate() {
        *sum = 0;
        for (number, (column, words)) in columns.iter().zip(&all).enumerate() {
            let rows = match column.by {
                By::Request => row..row + 1,
                By::Token => starts[row] as usize..starts[row + 1] as usize,
                By::Bound => row..row + 2,
            };
            let salt = (number as u32).wrapping_mul(0x85eb_ca6b);
            let first = rows.start * column.width;
            for (at, word) in (first..).zip(&words[first..rows.end * column.width]) {
                let word = word.wrapping_add((at as u32).wrapping_mul(0x9e37_79b9));
                *sum = sum.wrapping_add(mix(word.wrapping_add(salt)));
            }
        }
    }
    Ok(())
}

/// The contents of a column's device side.
fn words<'a>(column: &Column<'a>, stream: &Stream) -> Result<Cow<'a, [u32]>, Failure> {
    if let Some(host) = column.host {
        return Ok(Cow::Borrowed(host));
    }
    let mut words = CpuGpuBuffer::<u32>::new(column.len, stream.device())?;
    // SAFETY: the column has `column.len` words, and outlives the wait for the copy.
    unsafe { words.copy_from_device_ptr(.., column.words, stream) }?;
    Ok(Cow::Owned(words.cpu()?.to_vec()))
}

fn checked(status: sys::cudaError_t) -> Result<(), Failure> {
    match status {
        sys::cudaError::cudaSuccess => Ok(()),
        status => Err(status.to_string().into()),
    }
}

fn done(status: sys::CUresult) -> Result<(), Failure> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        status => Err(format!("the driver returned {status:?}").into()),
    }
}

/// Asks the runtime for a driver function. `F` is the type of the function of that name.
fn entry<F>(name: &CStr) -> Result<F, Failure> {
    let mut address = ptr::null_mut();
    let mut found = sys::cudaDriverEntryPointQueryResult(0);
    // SAFETY: the name is a C string, and both pointers are valid for writes.
    let mut status = unsafe {
        sys::cudaGetDriverEntryPointByVersion(name.as_ptr(), &mut address, 12000, 0, &mut found)
    };
    if status == sys::cudaError::SYMBOL_NOT_FOUND {
        // Runtimes before 12.5 have this function instead.
        // SAFETY: as above.
        status =
            unsafe { sys::cudaGetDriverEntryPoint(name.as_ptr(), &mut address, 0, &mut found) };
    }
    checked(status)?;
    if address.is_null() {
        return Err(format!("the driver has no {name:?}").into());
    }
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the address is that of the function, and the callers give its type.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}
