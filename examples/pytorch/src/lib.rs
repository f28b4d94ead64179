//! Paired buffers for Python. `torch.from_dlpack` takes over their sides without a copy.
//!
//! ```python
//! ours = cgb.Stream("cuda:0")
//! batch = cgb.Buffer([32, 64], "f32", "cuda:0")
//! batch.write(values)              # the pinned host side
//! batch.upload(ours)               # returns at once
//! tensor = torch.from_dlpack(batch) # the device side; the current stream waits for the upload
//! host = torch.from_dlpack(batch.host())
//! ```
//!
//! While a tensor lives, operations on its side raise `BufferError`. After that, the next operation
//! waits for the work that PyTorch has queued. See `cpu_gpu_buffer::dlpack`.
//!
//! Every call that may reach CUDA runs without Python's lock (the GIL). Such a call may wait for a
//! device, and the device for a host function that needs the lock. [`Detached`] covers the drop of
//! an object, which Python begins while it holds the lock.

use std::ffi::{CStr, c_void};
use std::mem::{self, ManuallyDrop};
use std::ops::{Deref, DerefMut};

use cpu_gpu_buffer::dlpack::{
    self, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned, Tensor,
};
use cpu_gpu_buffer::{CpuGpuBuffer, Device, Element, Error};
use num_traits::AsPrimitive;
use pyo3::exceptions::{PyBufferError, PyIndexError, PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

/// The Python exception for an error.
fn raised(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Exported { .. } | Error::StreamCapturing => PyBufferError::new_err(text),
        Error::OutOfRange { .. } => PyIndexError::new_err(text),
        Error::InvalidShape { .. } | Error::InvalidDevice { .. } | Error::DeviceMismatch { .. } => {
            PyValueError::new_err(text)
        }
        _ => PyRuntimeError::new_err(text),
    }
}

/// A value whose drop may wait for a device. It is dropped without Python's lock.
///
/// Python drops an object while it holds the lock. If the drop waits for a device, and the device
/// for a host function that needs the lock, neither goes on.
///
/// While the interpreter ends, the value is leaked: a host function cannot take the lock any more,
/// and the wait might never end. The end of the process frees the memory.
struct Detached<T: Send>(ManuallyDrop<T>);

impl<T: Send> Detached<T> {
    fn new(value: T) -> Detached<T> {
        Detached(ManuallyDrop::new(value))
    }
}

impl<T: Send> Deref for Detached<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send> DerefMut for Detached<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Send> Drop for Detached<T> {
    fn drop(&mut self) {
        // SAFETY: only this drop takes the value, and nothing reads the field afterwards.
        let value = unsafe { ManuallyDrop::take(&mut self.0) };
        // SAFETY: this may be called at any time, with the lock or without it.
        if unsafe { ffi::Py_IsInitialized() } == 0 {
            return mem::forget(value);
        }
        // A thread that cannot take the lock does not hold it: the value is dropped at the end.
        let mut value = Some(value);
        Python::try_attach(|py| py.detach(|| drop(value.take())));
    }
}

/// A queue of work on a device.
#[pyclass(frozen)]
struct Stream(Detached<cpu_gpu_buffer::Stream>);

#[pymethods]
impl Stream {
    #[new]
    fn new(py: Python<'_>, device: &str) -> PyResult<Stream> {
        let device = device.parse().map_err(raised)?;
        // The device's first stream loads the kernels, which may wait for the device.
        let stream = py.detach(|| cpu_gpu_buffer::Stream::new(device)).map_err(raised)?;
        Ok(Stream(Detached::new(stream)))
    }

    /// The `cudaStream_t`, for `torch.cuda.ExternalStream`.
    #[getter]
    fn cuda_stream(&self) -> usize {
        self.0.as_raw().addr()
    }

    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.synchronize()).map_err(raised)
    }
}

/// A buffer of any of the element types.
trait Sides: Send + Sync {
    fn dtype(&self) -> String;
    fn shape(&self) -> Vec<usize>;
    fn device(&self) -> Device;
    fn is_pinned(&self) -> bool;
    fn device_ptr(&self) -> usize;
    fn read(&self) -> cpu_gpu_buffer::Result<Vec<f64>>;
    fn write(&mut self, values: &[f64]) -> cpu_gpu_buffer::Result<bool>;
    fn fill(&mut self, value: f64, stream: &Stream) -> cpu_gpu_buffer::Result<()>;
    fn upload(&mut self, rows: Option<usize>, stream: &Stream) -> cpu_gpu_buffer::Result<()>;
    fn download(&mut self, rows: Option<usize>, stream: &Stream) -> cpu_gpu_buffer::Result<()>;
    fn use_on(&mut self, stream: &Stream) -> cpu_gpu_buffer::Result<()>;
    fn synchronize(&self) -> cpu_gpu_buffer::Result<()>;
    fn export_gpu(&mut self, stream: &cpu_gpu_buffer::Stream) -> cpu_gpu_buffer::Result<Tensor>;
    fn export_cpu(&mut self) -> cpu_gpu_buffer::Result<Tensor>;
    /// # Safety
    ///
    /// As for [`CpuGpuBuffer::export_gpu_unordered`].
    unsafe fn export_gpu_unordered(&mut self) -> cpu_gpu_buffer::Result<Tensor>;
    /// # Safety
    ///
    /// As for [`CpuGpuBuffer::export_gpu_unguarded`].
    unsafe fn export_gpu_unguarded(&mut self) -> cpu_gpu_buffer::Result<Tensor>;
}

impl<T: Element + Send + Sync + AsPrimitive<f64>> Sides for CpuGpuBuffer<T>
where
    f64: AsPrimitive<T>,
{
    fn dtype(&self) -> String {
        T::DTYPE.to_string()
    }

    fn shape(&self) -> Vec<usize> {
        self.shape().to_vec()
    }

    fn device(&self) -> Device {
        self.device()
    }

    fn is_pinned(&self) -> bool {
        self.is_pinned()
    }

    fn device_ptr(&self) -> usize {
        self.device_ptr().addr()
    }

    fn read(&self) -> cpu_gpu_buffer::Result<Vec<f64>> {
        Ok(self.cpu()?.iter().map(|element| element.as_()).collect())
    }

    fn write(&mut self, values: &[f64]) -> cpu_gpu_buffer::Result<bool> {
        let host = self.cpu_mut()?;
        if host.len() != values.len() {
            return Ok(false);
        }
        host.iter_mut().zip(values).for_each(|(element, value)| *element = value.as_());
        Ok(true)
    }

    fn fill(&mut self, value: f64, stream: &Stream) -> cpu_gpu_buffer::Result<()> {
        self.fill(value.as_(), &stream.0)
    }

    fn upload(&mut self, rows: Option<usize>, stream: &Stream) -> cpu_gpu_buffer::Result<()> {
        let rows = rows.unwrap_or(self.shape()[0]);
        self.copy_to_gpu(..rows, &stream.0)
    }

    fn download(&mut self, rows: Option<usize>, stream: &Stream) -> cpu_gpu_buffer::Result<()> {
        let rows = rows.unwrap_or(self.shape()[0]);
        self.copy_to_cpu(..rows, &stream.0)
    }

    fn use_on(&mut self, stream: &Stream) -> cpu_gpu_buffer::Result<()> {
        self.gpu_on(&stream.0).map(drop)
    }

    fn synchronize(&self) -> cpu_gpu_buffer::Result<()> {
        self.synchronize()
    }

    fn export_gpu(&mut self, stream: &cpu_gpu_buffer::Stream) -> cpu_gpu_buffer::Result<Tensor> {
        self.export_gpu(stream)
    }

    fn export_cpu(&mut self) -> cpu_gpu_buffer::Result<Tensor> {
        self.export_cpu()
    }

    unsafe fn export_gpu_unordered(&mut self) -> cpu_gpu_buffer::Result<Tensor> {
        // SAFETY: the caller vouches for the consumer.
        unsafe { self.export_gpu_unordered() }
    }

    unsafe fn export_gpu_unguarded(&mut self) -> cpu_gpu_buffer::Result<Tensor> {
        // SAFETY: the caller vouches for the consumer.
        unsafe { self.export_gpu_unguarded() }
    }
}

fn made<T: Element + Send + Sync + AsPrimitive<f64>>(
    shape: Vec<usize>,
    device: Device,
) -> PyResult<Box<dyn Sides>>
where
    f64: AsPrimitive<T>,
{
    let mut buffer = CpuGpuBuffer::<T>::new(shape, device).map_err(raised)?;
    let stream = cpu_gpu_buffer::Stream::new(device).map_err(raised)?;
    // The first use zeroes the device side. A consumer that orders itself does not wait for it.
    buffer.gpu_on(&stream).map_err(raised)?;
    buffer.synchronize().map_err(raised)?;
    Ok(Box::new(buffer))
}

/// A pinned host side and a device side of one shape. `__dlpack__` exports the device side.
#[pyclass]
struct Buffer(Detached<Box<dyn Sides>>);

#[pymethods]
impl Buffer {
    #[new]
    #[pyo3(signature = (shape, dtype = "f32", device = "cuda:0"))]
    fn new(py: Python<'_>, shape: Vec<usize>, dtype: &str, device: &str) -> PyResult<Buffer> {
        let device = device.parse().map_err(raised)?;
        // Allocating may wait for the devices.
        let sides = py.detach(|| match dtype {
            "u8" => made::<u8>(shape, device),
            "i8" => made::<i8>(shape, device),
            "u16" => made::<u16>(shape, device),
            "i16" => made::<i16>(shape, device),
            "u32" => made::<u32>(shape, device),
            "i32" => made::<i32>(shape, device),
            "u64" => made::<u64>(shape, device),
            "i64" => made::<i64>(shape, device),
            "f16" => made::<half::f16>(shape, device),
            "bf16" => made::<half::bf16>(shape, device),
            "f32" => made::<f32>(shape, device),
            "f64" => made::<f64>(shape, device),
            _ => Err(PyValueError::new_err(format!("{dtype:?} is no element type"))),
        });
        Ok(Buffer(Detached::new(sides?)))
    }

    #[getter]
    fn dtype(&self) -> String {
        self.0.dtype()
    }

    #[getter]
    fn shape(&self) -> Vec<usize> {
        self.0.shape()
    }

    #[getter]
    fn device(&self) -> String {
        self.0.device().to_string()
    }

    #[getter]
    fn is_pinned(&self) -> bool {
        self.0.is_pinned()
    }

    #[getter]
    fn device_ptr(&self) -> usize {
        self.0.device_ptr()
    }

    /// The elements of the host side, row after row. Waits for pending downloads.
    fn tolist(&self, py: Python<'_>) -> PyResult<Vec<f64>> {
        py.detach(|| self.0.read()).map_err(raised)
    }

    /// Sets the host side. Waits for pending transfers.
    fn write(&mut self, py: Python<'_>, values: Vec<f64>) -> PyResult<()> {
        match py.detach(|| self.0.write(&values)).map_err(raised)? {
            true => Ok(()),
            false => {
                Err(PyValueError::new_err(format!("{} values are not the shape's", values.len())))
            }
        }
    }

    /// Sets every element of both sides.
    fn fill(&mut self, py: Python<'_>, value: f64, stream: &Stream) -> PyResult<()> {
        py.detach(|| self.0.fill(value, stream)).map_err(raised)
    }

    /// Copies the first rows, or all, from the host side to the device side.
    #[pyo3(signature = (stream, rows = None))]
    fn upload(&mut self, py: Python<'_>, stream: &Stream, rows: Option<usize>) -> PyResult<()> {
        py.detach(|| self.0.upload(rows, stream)).map_err(raised)
    }

    /// Copies the first rows, or all, from the device side to the host side.
    #[pyo3(signature = (stream, rows = None))]
    fn download(&mut self, py: Python<'_>, stream: &Stream, rows: Option<usize>) -> PyResult<()> {
        py.detach(|| self.0.download(rows, stream)).map_err(raised)
    }

    /// Orders the stream after all pending work, before it uses an unguarded tensor.
    fn use_on(&mut self, py: Python<'_>, stream: &Stream) -> PyResult<()> {
        py.detach(|| self.0.use_on(stream)).map_err(raised)
    }

    /// Waits for all pending work, including that of consumers.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.synchronize()).map_err(raised)
    }

    /// The host side, for export by its own `__dlpack__`.
    fn host(slf: Py<Buffer>) -> Host {
        Host(slf)
    }

    /// A capsule of the device side that is not guarded.
    ///
    /// `torch.from_dlpack` makes one tensor of it for all steps. Before each use, call `use_on`
    /// with a stream of this module. Queue the work on that stream before the next operation on the
    /// buffer.
    ///
    /// `max_version` is as for `__dlpack__`. Without it, the consumer is older than DLPack 1.0.
    #[pyo3(signature = (*, max_version = None))]
    fn unguarded(
        &mut self,
        py: Python<'_>,
        max_version: Option<(u32, u32)>,
    ) -> PyResult<Py<PyAny>> {
        let sides = &mut self.0;
        // SAFETY: the caller in Python vouches for the consumer, as documented.
        let tensor = py.detach(|| unsafe { sides.export_gpu_unguarded() });
        capsule(py, tensor.map_err(raised)?, max_version)
    }

    /// The device side as a DLPack capsule: the array API's `__dlpack__`.
    ///
    /// `stream` names the stream that the consumer uses the tensor on. That stream then waits for
    /// everything that is pending. `None` and 1 are the legacy default stream, 2 is the per-thread
    /// default stream, and a larger number is a `cudaStream_t`. 0 is refused, because it could mean
    /// `None`, 1 or 2. For 2 the host waits: this module cannot send work to that stream.
    ///
    /// With -1 no stream of the consumer's waits, and the host waits for nothing that is pending.
    /// The buffer guards the side as for any tensor. The consumer takes on the ordering: call
    /// `use_on` with a stream first, and use the tensor on that stream, or after its work.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__(
        &mut self,
        py: Python<'_>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        refuse(dl_device, self.__dlpack_device__(), copy)?;
        let device = self.0.device();
        let consumer = match (device, stream) {
            (Device::Cpu, None) => Consumer::Unordered,
            (Device::Cpu, Some(_)) => return Err(PyValueError::new_err("the CPU has no streams")),
            (_, Some(UNORDERED)) => Consumer::Unordered,
            (_, Some(PER_THREAD)) => Consumer::Unnamed,
            (_, None) => Consumer::Stream(LEGACY as usize),
            (_, Some(raw @ LEGACY..)) => Consumer::Stream(raw as usize),
            (_, Some(other)) => {
                return Err(PyValueError::new_err(format!("{other} names no stream")));
            }
        };
        let sides = &mut self.0;
        let tensor = py.detach(|| match consumer {
            Consumer::Stream(raw) => {
                let raw = std::ptr::without_provenance_mut(raw);
                // SAFETY: the consumer names a live stream of the device's primary context. The
                // buffer does not touch it once the tensor is made, nor after a driver's error.
                let stream = unsafe { cpu_gpu_buffer::Stream::from_raw(raw, device, None) }?;
                sides.export_gpu(&stream)
            }
            Consumer::Unnamed => {
                let ours = cpu_gpu_buffer::Stream::new(device)?;
                let tensor = sides.export_gpu(&ours)?;
                ours.synchronize()?;
                Ok(tensor)
            }
            // SAFETY: with -1, the consumer takes on the ordering. The side has been zeroed since
            // the buffer was created.
            Consumer::Unordered => unsafe { sides.export_gpu_unordered() },
        });
        capsule(py, tensor.map_err(raised)?, max_version)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        match self.0.device() {
            Device::Cpu => (DLDeviceType::kDLCPU.0, 0),
            Device::Cuda(ordinal) => (DLDeviceType::kDLCUDA.0, ordinal as i32),
        }
    }
}

// The stream numbers with a special meaning in the array API.
const UNORDERED: i64 = -1;
const LEGACY: i64 = 1;
const PER_THREAD: i64 = 2;

/// The order of a consumer's work after pending work.
enum Consumer {
    /// This stream, by its address or number, waits for pending work.
    Stream(usize),
    /// The host waits in place of a stream that this module cannot name.
    Unnamed,
    /// Nothing waits, and no CUDA is called.
    Unordered,
}

/// The host side of a buffer.
///
/// It is exported as CPU memory even if it is pinned: PyTorch takes no other host memory.
#[pyclass(frozen)]
struct Host(Py<Buffer>);

#[pymethods]
impl Host {
    /// The host side as a DLPack capsule. Waits for pending transfers.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        refuse(dl_device, self.__dlpack_device__(), copy)?;
        if stream.is_some() {
            return Err(PyValueError::new_err("host memory has no streams"));
        }
        let mut buffer = self.0.try_borrow_mut(py)?;
        let sides = &mut buffer.0;
        let tensor = py.detach(|| sides.export_cpu()).map_err(raised)?.as_plain_cpu();
        capsule(py, tensor, max_version)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (DLDeviceType::kDLCPU.0, 0)
    }
}

/// Refuses a request for another device or for a copy.
fn refuse(asked: Option<(i32, i32)>, device: (i32, i32), copy: Option<bool>) -> PyResult<()> {
    if asked.is_some_and(|asked| asked != device) {
        return Err(PyBufferError::new_err(format!(
            "the side is on device {device:?}, and stays there"
        )));
    }
    match copy {
        Some(true) => Err(PyBufferError::new_err("sides are handed out, and not copied")),
        _ => Ok(()),
    }
}

const VERSIONED: &CStr = c"dltensor_versioned";
const UNVERSIONED: &CStr = c"dltensor";

/// A capsule of a tensor, with the newest struct that the consumer knows.
///
/// A consumer that takes the tensor renames the capsule. Otherwise the capsule deletes the tensor.
fn capsule(py: Python<'_>, tensor: Tensor, max_version: Option<(u32, u32)>) -> PyResult<Py<PyAny>> {
    let capsule = match max_version {
        Some((1.., _)) => {
            let raw = tensor.into_raw();
            let name = VERSIONED.as_ptr();
            // SAFETY: the name is static, and the destructor is that of its struct.
            let capsule = unsafe { ffi::PyCapsule_New(raw.cast(), name, Some(let_versioned_go)) };
            if capsule.is_null() {
                // SAFETY: the tensor is unused, since there is no capsule.
                unsafe { delete_versioned(raw) };
            }
            capsule
        }
        _ => {
            let raw = tensor.into_raw_unversioned();
            let name = UNVERSIONED.as_ptr();
            // SAFETY: as above.
            let capsule = unsafe { ffi::PyCapsule_New(raw.cast(), name, Some(let_unversioned_go)) };
            if capsule.is_null() {
                // SAFETY: as above.
                unsafe { delete_unversioned(raw) };
            }
            capsule
        }
    };
    // SAFETY: a new reference, or null with an error set.
    unsafe { Bound::from_owned_ptr_or_err(py, capsule) }.map(Bound::unbind)
}

/// Deletes an unused tensor.
///
/// # Safety
///
/// - `tensor` comes from `into_raw`.
/// - Nothing uses it any more.
unsafe fn delete_versioned(tensor: *mut DLManagedTensorVersioned) {
    // SAFETY: the caller vouches for the tensor.
    let deleter = unsafe { (*tensor).deleter };
    // SAFETY: the deleter is called once, and nothing uses the tensor any more.
    unsafe { deleter.expect("ours have one")(tensor) };
}

/// Deletes an unused tensor.
///
/// # Safety
///
/// - `tensor` comes from `into_raw_unversioned`.
/// - Nothing uses it any more.
unsafe fn delete_unversioned(tensor: *mut DLManagedTensor) {
    // SAFETY: the caller vouches for the tensor.
    let deleter = unsafe { (*tensor).deleter };
    // SAFETY: the deleter is called once, and nothing uses the tensor any more.
    unsafe { deleter.expect("ours have one")(tensor) };
}

/// The tensor in a capsule, unless a consumer has taken it.
///
/// # Safety
///
/// - `capsule` is a capsule.
/// - The interpreter is attached.
unsafe fn untaken(capsule: *mut ffi::PyObject, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the caller vouches for the capsule.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name.as_ptr()) } == 0 {
        return None;
    }
    // SAFETY: the capsule has this name.
    Some(unsafe { ffi::PyCapsule_GetPointer(capsule, name.as_ptr()) })
}

unsafe extern "C" fn let_versioned_go(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with a capsule that `capsule` made.
    if let Some(tensor) = unsafe { untaken(capsule, VERSIONED) } {
        // SAFETY: `capsule` put the tensor there, and no consumer has taken it.
        unsafe { delete_versioned(tensor.cast()) };
    }
}

unsafe extern "C" fn let_unversioned_go(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with a capsule that `capsule` made.
    if let Some(tensor) = unsafe { untaken(capsule, UNVERSIONED) } {
        // SAFETY: `capsule` put the tensor there, and no consumer has taken it.
        unsafe { delete_unversioned(tensor.cast()) };
    }
}

/// Frees memory that tensors have left behind.
#[pyfunction]
fn reclaim(py: Python<'_>) -> PyResult<()> {
    py.detach(dlpack::reclaim).map_err(raised)
}

/// The number of CUDA devices.
#[pyfunction]
fn cuda_count(py: Python<'_>) -> usize {
    // The first call loads and starts the driver.
    py.detach(Device::cuda_count)
}

/// Paired buffers whose sides PyTorch takes over without a copy.
#[pymodule]
fn cpu_gpu_buffer_pytorch(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Stream>()?;
    module.add_class::<Buffer>()?;
    module.add_class::<Host>()?;
    module.add_function(wrap_pyfunction!(reclaim, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_count, module)?)?;
    Ok(())
}
