//! A kernel as a graph of one node, launched repeatedly with new parameters.
//!
//! Setting the node's parameters and launching the graph costs the caller 2.4 us. Launching the
//! kernel costs 3.9 us (H100, driver 580). The gain needs an unchanged grid.
//!
//! An executable graph runs once at a time. Each launch waits for the one before, even on another
//! stream ("CUDA Driver API, `cuGraphLaunch`"). So each stream handle has its own graph. Launches
//! on one stream follow each other anyway.

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

// SAFETY: any thread may use a graph, one at a time ("CUDA Driver API, Graph object thread
// safety"). Every use needs an exclusive reference.
unsafe impl Send for KernelGraph {}

impl KernelGraph {
    /// Makes a graph of a kernel of `context`, which must be current.
    ///
    /// # Safety
    ///
    /// - `parameters` are those of the kernel.
    /// - Each is the valid address of a value of its type.
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
        let node = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the graph was just made. The current context is the kernel's. The caller vouches
        // for the parameters.
        graph.node = unsafe { calls::graph::add_kernel(graph.graph, &node) }?;
        // SAFETY: as above.
        graph.exec = unsafe { calls::graph::instantiate(graph.graph) }?;
        Ok(graph)
    }

    /// Sets the kernel, grid and parameters of the next launches.
    ///
    /// # Safety
    ///
    /// - The conditions of [`new`](Self::new) hold.
    /// - The kernel's context is current.
    pub(crate) unsafe fn set(
        &mut self,
        kernel: sys::CUfunction,
        grid: [u32; 2],
        threads: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let node = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the exclusive reference keeps other threads out. The graph, its node and its
        // executable form live as long as this value. The caller vouches for the rest.
        unsafe { calls::graph::set_kernel(self.exec, self.node, &node) }
    }

    /// Launches the kernel with the parameters that were set last.
    ///
    /// # Safety
    ///
    /// - The conditions of [`calls::module::launch`] hold for this kernel and these parameters.
    /// - `stream` is the one that the graph was made for.
    pub(crate) unsafe fn launch(&mut self, stream: sys::cudaStream_t) -> Result<()> {
        // SAFETY: the exclusive reference keeps other threads out. The caller vouches for the work
        // of the kernel.
        unsafe { calls::graph::launch(self.exec, stream) }
    }
}

/// The graph of a stream handle, made for its second launch.
#[derive(Default)]
pub(crate) enum StreamGraph {
    /// Nothing was launched yet.
    #[default]
    Unused,
    /// There was one launch. The next one makes a graph.
    Used,
    Made(KernelGraph),
    /// The graph could not be made.
    Without,
}

impl StreamGraph {
    /// Returns the graph for a launch, if there is one.
    ///
    /// The second launch calls `make` for it. If that fails, launches do without. A graph only
    /// makes them cheaper.
    pub(crate) fn for_launch(
        &mut self,
        make: impl FnOnce() -> Result<KernelGraph>,
    ) -> Option<&mut KernelGraph> {
        *self = match mem::take(self) {
            StreamGraph::Unused => StreamGraph::Used,
            StreamGraph::Used => make().map_or(StreamGraph::Without, StreamGraph::Made),
            known => known,
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
        // Another context may be broken and refuse. If this context cannot be entered, the
        // handles alone are enough.
        let _current = self.context.ensure_current();
        // No caller could act on the errors, and nothing is left to release.
        if !self.exec.is_null() {
            // SAFETY: this value owns the executable graph, and nothing uses it later.
            let _ = unsafe { calls::graph::destroy_exec(self.exec) };
        }
        // SAFETY: this value owns the graph and its node. Nothing uses them later.
        let _ = unsafe { calls::graph::destroy(self.graph) };
    }
}
