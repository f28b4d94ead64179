//! A kernel as a graph of one node, launched again and again with other parameters.
//!
//! Setting the parameters of the node and launching the graph costs the caller 2.4 us where launching the kernel costs
//! 3.9 (H100, driver 580), as long as the grid stays as it was.
//!
//! An executable graph runs once at a time: each launch waits for the one before, on whatever stream that is ("CUDA
//! Driver API, `cuGraphLaunch`"). So each handle of a stream has one of its own, whose launches follow each other anyway.

use std::ffi::c_void;
use std::mem;
use std::ptr;

use crate::cuda::calls;
use crate::cuda::context::Context;
use crate::cuda::fork;
use crate::error::Result;
use crate::sys;

pub(crate) struct KernelGraph {
    graph: sys::CUgraph,
    node: sys::CUgraphNode,
    exec: sys::CUgraphExec,
    context: &'static Context,
}

// SAFETY: graphs may be used from any thread, by one at a time ("CUDA Driver API, Graph object thread safety"), and only
// an exclusive reference uses one.
unsafe impl Send for KernelGraph {}

impl KernelGraph {
    /// A graph of a kernel of `context`, which is current.
    ///
    /// # Safety
    ///
    /// `parameters` are the kernel's, each a valid address of a value of its type.
    pub(crate) unsafe fn new(
        kernel: sys::CUfunction,
        grid: [u32; 2],
        threads: u32,
        parameters: &mut [*mut c_void],
        context: &'static Context,
    ) -> Result<KernelGraph> {
        // Whatever of it is made goes with it.
        let mut graph = KernelGraph {
            graph: calls::graph::create()?,
            node: ptr::null_mut(),
            exec: ptr::null_mut(),
            context,
        };
        let node = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the graph was just made; the context is the kernel's, and the caller vouches for the parameters.
        graph.node = unsafe { calls::graph::add_kernel(graph.graph, &node) }?;
        // SAFETY: as above.
        graph.exec = unsafe { calls::graph::instantiate(graph.graph) }?;
        Ok(graph)
    }

    /// Sets what the next launches do.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new), and the kernel's context is current.
    pub(crate) unsafe fn set(
        &mut self,
        kernel: sys::CUfunction,
        grid: [u32; 2],
        threads: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let node = calls::graph::kernel_node(kernel, grid, threads, parameters);
        // SAFETY: the exclusive reference keeps other threads from it, and all three live as long as this; the caller
        // vouches for the rest.
        unsafe { calls::graph::set_kernel(self.exec, self.node, &node) }
    }

    /// # Safety
    ///
    /// As for [`calls::module::launch`] with what was set last, on the stream that it was made for.
    pub(crate) unsafe fn launch(&mut self, stream: sys::cudaStream_t) -> Result<()> {
        // SAFETY: the exclusive reference keeps other threads from it, and the caller vouches for what the kernel does.
        unsafe { calls::graph::launch(self.exec, stream) }
    }
}

/// The graph of a stream's handle.
#[derive(Default)]
pub(crate) enum StreamGraph {
    /// Nothing was launched.
    #[default]
    Unused,
    /// Once something was: the next time is worth a graph.
    Used,
    Made(KernelGraph),
    /// It could not be made.
    Without,
}

impl StreamGraph {
    /// The graph for a launch, which `make` makes for the second one. It only makes launches cheaper: where it cannot
    /// be made, they do without.
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
        // Its own context: a broken one would refuse. The handles say enough, should the context
        // not be had.
        let _current = self.context.ensure_current();
        // Nobody could act on the errors, and there is nothing left to give back.
        if !self.exec.is_null() {
            // SAFETY: the value owns it, and this is its end.
            let _ = unsafe { calls::graph::destroy_exec(self.exec) };
        }
        // SAFETY: as above.
        let _ = unsafe { calls::graph::destroy(self.graph) };
    }
}
