//! Calls on graphs of one kernel.

use std::ffi::c_void;
use std::ptr;

use crate::cuda::capture::RelaxedCapture;
use crate::cuda::driver::driver;
use crate::cuda::status::check_driver;
use crate::error::Result;
use crate::sys;

/// Describes a graph node: a kernel of one-dimensional blocks in a grid of two dimensions.
pub(crate) fn kernel_node(
    function: sys::CUfunction,
    [x, y]: [u32; 2],
    threads: u32,
    parameters: &mut [*mut c_void],
) -> sys::CUDA_KERNEL_NODE_PARAMS_v2 {
    sys::CUDA_KERNEL_NODE_PARAMS_v2 {
        func: function,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        kernelParams: parameters.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        // Null stands for the current context.
        ctx: ptr::null_mut(),
    }
}

/// Makes a graph without nodes.
pub(crate) fn create() -> Result<sys::CUgraph> {
    let create = driver()?.graph_create;
    let mut graph = ptr::null_mut();
    // SAFETY: `graph` is a valid place.
    check_driver(unsafe { create(&mut graph, 0) }, "cuGraphCreate")?;
    Ok(graph)
}

/// Destroys a graph.
///
/// # Safety
///
/// - `graph` came from [`create`].
/// - Neither it nor its nodes are used again.
pub(crate) unsafe fn destroy(graph: sys::CUgraph) -> Result<()> {
    let destroy = driver()?.graph_destroy;
    // SAFETY: the caller vouches for the graph.
    check_driver(unsafe { destroy(graph) }, "cuGraphDestroy")
}

/// Adds a kernel node to a graph.
///
/// The parameters are copied ("CUDA Driver API, `cuGraphAddKernelNode`").
///
/// # Safety
///
/// - `graph` is live and used by no other thread.
/// - The function of `kernel` belongs to the current context.
/// - Each parameter of `kernel` is the valid address of a value of its type.
pub(crate) unsafe fn add_kernel(
    graph: sys::CUgraph,
    kernel: &sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> Result<sys::CUgraphNode> {
    let add = driver()?.graph_add_kernel;
    let mut node = ptr::null_mut();
    // SAFETY: `node` is a valid place. A list of 0 dependencies may be null. The caller vouches for
    // the rest.
    let status = unsafe { add(&mut node, graph, ptr::null(), 0, kernel) };
    check_driver(status, "cuGraphAddKernelNode")?;
    Ok(node)
}

/// Makes an executable graph.
///
/// # Safety
///
/// `graph` is live and used by no other thread.
pub(crate) unsafe fn instantiate(graph: sys::CUgraph) -> Result<sys::CUgraphExec> {
    let _relaxed = RelaxedCapture::begin();
    let instantiate = driver()?.graph_instantiate;
    let mut exec = ptr::null_mut();
    // Without flags, launches have the priority of the stream ("CUDA Driver API,
    // `CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY`").
    // SAFETY: `exec` is a valid place, and the caller vouches for the graph.
    check_driver(unsafe { instantiate(&mut exec, graph, 0) }, "cuGraphInstantiateWithFlags")?;
    Ok(exec)
}

/// Destroys an executable graph.
///
/// The graph may still be running. CUDA then releases its memory at the end of the run ("CUDA
/// Driver API, `cuGraphExecDestroy`").
///
/// # Safety
///
/// - `exec` came from [`instantiate`].
/// - It is not used again.
pub(crate) unsafe fn destroy_exec(exec: sys::CUgraphExec) -> Result<()> {
    let _relaxed = RelaxedCapture::begin();
    let destroy = driver()?.graph_exec_destroy;
    // SAFETY: the caller vouches for the graph.
    check_driver(unsafe { destroy(exec) }, "cuGraphExecDestroy")
}

/// Sets the kernel of the next launches of a graph.
///
/// Earlier launches stay as they were ("CUDA Driver API, `cuGraphExecKernelNodeSetParams`").
///
/// # Safety
///
/// - `exec` is live and used by no other thread.
/// - It was made from a graph that is live and has `node`.
/// - `kernel` meets the conditions of [`add_kernel`].
pub(crate) unsafe fn set_kernel(
    exec: sys::CUgraphExec,
    node: sys::CUgraphNode,
    kernel: &sys::CUDA_KERNEL_NODE_PARAMS_v2,
) -> Result<()> {
    let set = driver()?.graph_set_kernel;
    // SAFETY: the caller vouches for everything.
    check_driver(unsafe { set(exec, node, kernel) }, "cuGraphExecKernelNodeSetParams")
}

/// Launches an executable graph on a stream.
///
/// # Safety
///
/// - `exec` is live and used by no other thread.
/// - `stream` belongs to the context of `exec`.
/// - The work of the kernel meets the conditions of [`memcpy`](super::copy::memcpy).
pub(crate) unsafe fn launch(exec: sys::CUgraphExec, stream: sys::cudaStream_t) -> Result<()> {
    let launch = driver()?.graph_launch;
    // SAFETY: the caller vouches for both.
    check_driver(unsafe { launch(exec, stream) }, "cuGraphLaunch")
}
