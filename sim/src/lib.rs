//! A simulated CUDA runtime.
//!
//! This shared library has the C interface of the runtime, and the loader takes it for the real
//! one. Device memory is host memory at addresses that the host cannot access. Streams are threads.
//! They run their work *late*, in stream order and after a pseudo-random delay. A missing wait is
//! therefore a real data race and a real wrong byte.
//!
//! The simulation does the worst that CUDA allows:
//!
//! - Memory contains garbage, and reuses the address of the last released allocation.
//! - Releasing memory waits for nothing, or always waits if a variable says so.
//! - A copy or kernel that uses released memory aborts the program.
//!
//! `tests/rules.rs` compares these rules with CUDA. The errors of a broken context and of calls
//! after the end of the runtime are those of CUDA 13.0 on an H100.
//!
//! | variable | setting |
//! |---|---|
//! | `CUDART_SIM_DEVICES` | the number of devices, by default 2 |
//! | `CUDART_SIM_SEED` | the seed of the delays |
//! | `CUDART_SIM_WAITING` | 1: releasing memory and loading modules waits for the device; 2: allocating and pinning, too |
//! | `CUDART_SIM_VERSION` | the version of the runtime, by default 13000 |
//! | `CUDART_SIM_DRIVER` | the version of the driver, by default 13000; 0 is no driver |
//!
//! Each file uses only files below it:
//!
//! | file | content |
//! |---|---|
//! | `runtime.rs` | the functions of the runtime |
//! | `graph.rs` | graphs of one kernel |
//! | `driver.rs` | the functions of the driver, which `cudaGetDriverEntryPoint` returns |
//! | `kernel.rs` | the kernels |
//! | `work.rs` | copies and fills |
//! | `event.rs` | events |
//! | `stream.rs` | streams by handle, and the rules between streams |
//! | `queue.rs` | streams as queues with a thread |
//! | `capture.rs` | stream capture |
//! | `control.rs` | controls for tests |
//! | `memory.rs` | device memory and pinned memory |
//! | `context.rs` | devices, contexts, sticky errors |
//! | `live.rs`, `random.rs`, `settings.rs`, `status.rs`, `violation.rs` | counts, random numbers, variables, statuses, aborts |

mod capture;
mod context;
mod control;
mod driver;
mod event;
mod graph;
mod kernel;
mod live;
mod memory;
mod queue;
mod random;
mod runtime;
mod settings;
mod status;
mod stream;
mod violation;
mod work;
