//! A kernel as a graph of one node, launched repeatedly with new parameters.
//!
//! `transfer/gather` launches the gather kernel this way. Setting the parameters and launching the
//! graph costs the calling thread 2.4 us, and launching the kernel without a graph 3.9 us (H100,
//! driver 580). If the grid changes, too, the graph saves almost nothing.
//!
//! The device runs the launches of one executable graph one after another, even on different
//! streams ("CUDA Driver API, `cuGraphLaunch`"). So each stream has its own graph, which the clones
//! of a `Stream` share. Work on one stream runs in order anyway.

use std::ffi::c_void;
use std::mem;
use std::ptr;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::Result;
use crate::sys;

/// A graph of one kernel node, and its executable form.
pub(crate) struct KernelGraph {
    graph: sys::CUgraph,
    node: sys::CUgraphNode,
    exec: sys::CUgraphExec,
    context: &'static Context,
}

// SAFETY: any thread may use a graph, but two threads must not use it at once ("CUDA Driver API,
// Graph object thread safety"). Every use needs an exclusive reference.
unsafe impl Send for KernelGraph {}

impl KernelGraph {
    /// Makes a graph that launches `kernel`.
    ///
    /// # Safety
    ///
    /// - `kernel` belongs to `context`, which is current.
    /// - `parameters` has one entry for each parameter of the kernel, in their order.
    /// - Each entry is the valid address of a value of the parameter's type.
    pub(crate) unsafe fn new(
        kernel: sys::CUfunction,
        grid: [u32; 2],
        threads: u32,
        parameters: &mut [*mut c_void],
        context: &'static Context,
    ) -> Result<KernelGraph> {
        // After an error, dropping this destroys the parts that were made.
        let mut graph = KernelGraph {
            graph: calls::graph::create()?,
            node: ptr::null_mut(),
            exec: ptr::null_mut(),
            context,
        };
        let node_params = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the graph was just made, so no other thread has it. The caller vouches that the
        // kernel belongs to the current context, and for the parameters.
        graph.node = unsafe { calls::graph::add_kernel(graph.graph, &node_params) }?;
        // SAFETY: the graph was just made, so no other thread has it.
        graph.exec = unsafe { calls::graph::instantiate(graph.graph) }?;
        Ok(graph)
    }

    /// Changes the executable graph: later launches use this kernel, grid and these parameters.
    ///
    /// CUDA copies the parameters. Launches that are already queued do not change.
    ///
    /// # Safety
    ///
    /// - `kernel` belongs to the context of the graph, which is current.
    /// - The parameters meet the conditions of [`new`](Self::new).
    pub(crate) unsafe fn set(
        &mut self,
        kernel: sys::CUfunction,
        grid: [u32; 2],
        threads: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let node_params = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the exclusive reference keeps other threads out. The graph, its node and its
        // executable form live as long as this value. The caller vouches for the rest.
        unsafe { calls::graph::set_kernel(self.exec, self.node, &node_params) }
    }

    /// Launches the kernel with the parameters that were set last.
    ///
    /// # Safety
    ///
    /// - The work of the kernel, with the parameters that [`new`](Self::new) or [`set`](Self::set)
    ///   copied last, meets the conditions of [`calls::copy::memcpy`].
    /// - `stream` belongs to the context of the graph.
    pub(crate) unsafe fn launch(&mut self, stream: sys::cudaStream_t) -> Result<()> {
        // SAFETY: the executable graph lives as long as this value. The exclusive reference keeps
        // other threads out. The caller vouches for the work of the kernel, and for the stream,
        // which belongs to the graph's context.
        unsafe { calls::graph::launch(self.exec, stream) }
    }
}

/// A kernel's graph for one stream, made at the second launch through [`for_launch`].
///
/// The first launch makes none, because making one costs more than one launch saves.
///
/// [`for_launch`]: Self::for_launch
#[derive(Default)]
pub(crate) enum StreamGraph {
    /// `for_launch` was not called yet.
    #[default]
    NoLaunch,
    /// `for_launch` was called once. The next call makes the graph.
    OneLaunch,
    Made(KernelGraph),
    /// Making the graph failed. It is not tried again.
    Failed,
}

impl StreamGraph {
    /// Counts a launch, and returns the graph for it. The first launch gets none.
    ///
    /// The second launch makes the graph by `make`. If that fails, this returns `None` from then
    /// on, and the caller launches the kernel itself.
    pub(crate) fn for_launch(
        &mut self,
        make: impl FnOnce() -> Result<KernelGraph>,
    ) -> Option<&mut KernelGraph> {
        *self = match mem::take(self) {
            StreamGraph::NoLaunch => StreamGraph::OneLaunch,
            StreamGraph::OneLaunch => make().map_or(StreamGraph::Failed, StreamGraph::Made),
            decided => decided,
        };
        match self {
            StreamGraph::Made(graph) => Some(graph),
            _ => None,
        }
    }
}

impl Drop for KernelGraph {
    fn drop(&mut self) {
        if fork::forked() {
            return;
        }
        // The calls are made in the graph's own context, because another one that is current may
        // be broken and make them fail. If entering fails, the calls are tried all the same.
        let _current = self.context.ensure_current();
        // No caller could act on their errors.
        if !self.exec.is_null() {
            // SAFETY: this value owns the executable graph, and nothing uses it later.
            let _ = unsafe { calls::graph::destroy_exec(self.exec) };
        }
        // SAFETY: this value owns the graph and its node, and nothing uses them later.
        let _ = unsafe { calls::graph::destroy(self.graph) };
    }
}
