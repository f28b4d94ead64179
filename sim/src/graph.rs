//! Graphs with one kernel node ("CUDA Driver API, Graph Management").

use std::collections::BTreeMap;
use std::ffi::{c_uint, c_ulonglong};
use std::ptr;

use cudart_sys::{
    CUDA_KERNEL_NODE_PARAMS_v2, CUgraph, CUgraphExec, CUgraphNode, CUresult, CUstream,
};
use parking_lot::Mutex;

use crate::context;
use crate::driver::{call, current, entry_points};
use crate::kernel::{Kernel, kernel};
use crate::live::{self, Kind};
use crate::queue::Point;
use crate::status::{Result, Status, put};
use crate::stream::{next_handle, prohibited, stream};

/// By their handles, which are also those of their nodes.
static GRAPHS: Mutex<BTreeMap<usize, Option<Parameters>>> = Mutex::new(BTreeMap::new());
static EXECS: Mutex<BTreeMap<usize, Exec>> = Mutex::new(BTreeMap::new());

/// The kernel of a node and its device. Adding or setting a node copies the kernel's parameters.
type Parameters = (Kernel, usize);

struct Exec {
    node: usize,
    kernel: Kernel,
    device: usize,
    /// It runs once at a time ("CUDA Driver API, `cuGraphLaunch`").
    last: Option<Point>,
}

/// # Safety
///
/// As for [`kernel`].
unsafe fn parameters(node: *const CUDA_KERNEL_NODE_PARAMS_v2) -> Result<Parameters> {
    if node.is_null() {
        return Err(Status::cudaErrorInvalidValue);
    }
    // SAFETY: the pointer is not null. C callers pass pointers that are valid for reads.
    let node = unsafe { node.read() };
    let grid = [node.gridDimX, node.gridDimY];
    // SAFETY: the caller guarantees the parameters.
    let kernel = unsafe { kernel(node.func, grid, node.blockDimX, node.kernelParams) }?;
    // No context is the current one.
    match node.ctx.is_null() {
        true => Ok((kernel, current()?)),
        false => Err(Status::cudaErrorInvalidValue),
    }
}

unsafe extern "C" fn create(place: *mut CUgraph, flags: c_uint) -> CUresult {
    call("cuGraphCreate", || {
        current()?;
        if flags != 0 {
            return Err(Status::cudaErrorInvalidValue);
        }
        let handle = next_handle();
        GRAPHS.lock().insert(handle, None);
        live::born(Kind::Graph);
        put(place, ptr::without_provenance_mut(handle))
    })
}

unsafe extern "C" fn destroy(graph: CUgraph) -> CUresult {
    call("cuGraphDestroy", || {
        current()?;
        let graph = GRAPHS.lock().remove(&graph.addr());
        graph.ok_or(Status::cudaErrorInvalidValue)?;
        live::died(Kind::Graph);
        Ok(())
    })
}

unsafe extern "C" fn add_kernel(
    place: *mut CUgraphNode,
    graph: CUgraph,
    _dependencies: *const CUgraphNode,
    count: usize,
    node: *const CUDA_KERNEL_NODE_PARAMS_v2,
) -> CUresult {
    call("cuGraphAddKernelNode", || {
        // SAFETY: the caller guarantees the node.
        let parameters = unsafe { parameters(node) }?;
        let mut graphs = GRAPHS.lock();
        let known = graphs.get_mut(&graph.addr()).ok_or(Status::cudaErrorInvalidValue)?;
        if count > 0 || known.is_some() {
            return Err(Status::cudaErrorNotSupported);
        }
        *known = Some(parameters);
        put(place, ptr::without_provenance_mut(graph.addr()))
    })
}

unsafe extern "C" fn instantiate(
    place: *mut CUgraphExec,
    graph: CUgraph,
    flags: c_ulonglong,
) -> CUresult {
    call("cuGraphInstantiateWithFlags", || {
        // It allocates.
        prohibited(context::capture_mode())?;
        let graph = graph.addr();
        let known = GRAPHS.lock().get(&graph).cloned().ok_or(Status::cudaErrorInvalidValue)?;
        if flags != 0 {
            return Err(Status::cudaErrorInvalidValue);
        }
        let (kernel, device) = known.ok_or(Status::cudaErrorNotSupported)?;
        context::sticky(device).map_or(Ok(()), Err)?;
        let handle = next_handle();
        EXECS.lock().insert(handle, Exec { node: graph, kernel, device, last: None });
        live::born(Kind::Graph);
        put(place, ptr::without_provenance_mut(handle))
    })
}

unsafe extern "C" fn exec_destroy(exec: CUgraphExec) -> CUresult {
    call("cuGraphExecDestroy", || {
        current()?;
        prohibited(context::capture_mode())?;
        let exec = EXECS.lock().remove(&exec.addr());
        exec.ok_or(Status::cudaErrorInvalidValue)?;
        live::died(Kind::Graph);
        Ok(())
    })
}

unsafe extern "C" fn set_kernel(
    exec: CUgraphExec,
    node: CUgraphNode,
    parameters_of: *const CUDA_KERNEL_NODE_PARAMS_v2,
) -> CUresult {
    call("cuGraphExecKernelNodeSetParams", || {
        // SAFETY: the caller guarantees the node.
        let (kernel, device) = unsafe { parameters(parameters_of) }?;
        // The node's graph has to live, too.
        let lives = GRAPHS.lock().contains_key(&node.addr());
        let mut execs = EXECS.lock();
        let exec = execs.get_mut(&exec.addr()).ok_or(Status::cudaErrorInvalidValue)?;
        if !lives || exec.node != node.addr() || exec.device != device {
            return Err(Status::cudaErrorInvalidValue);
        }
        exec.kernel = kernel;
        Ok(())
    })
}

unsafe extern "C" fn launch(exec: CUgraphExec, on: CUstream) -> CUresult {
    call("cuGraphLaunch", || {
        let on = stream(on.addr())?;
        let (kernel, device, last) = {
            let mut execs = EXECS.lock();
            let exec = execs.get_mut(&exec.addr()).ok_or(Status::cudaErrorInvalidValue)?;
            (exec.kernel.clone(), exec.device, exec.last.take())
        };
        // As for the launch of a kernel.
        if device != on.device || current()? != on.device {
            return Err(Status::cudaErrorInvalidResourceHandle);
        }
        // Not under the lock: these wait while the queue is full.
        if let Some(last) = last {
            on.enqueue(move || last.wait())?;
        }
        kernel(&on)?;
        if let Some(exec) = EXECS.lock().get_mut(&exec.addr()) {
            exec.last = Some(on.end());
        }
        Ok(())
    })
}

entry_points! {
    cuGraphCreate: create as PFN_cuGraphCreate_v10000;
    cuGraphDestroy: destroy as PFN_cuGraphDestroy_v10000;
    cuGraphAddKernelNode: add_kernel as PFN_cuGraphAddKernelNode_v12000;
    cuGraphInstantiateWithFlags: instantiate as PFN_cuGraphInstantiateWithFlags_v11040;
    cuGraphExecDestroy: exec_destroy as PFN_cuGraphExecDestroy_v10000;
    cuGraphExecKernelNodeSetParams: set_kernel as PFN_cuGraphExecKernelNodeSetParams_v12000;
    cuGraphLaunch: launch as PFN_cuGraphLaunch_v10000;
}
