//! A simulated CUDA runtime: a shared library with the runtime's C interface, which the loader takes for
//! the real one.
//!
//! Device memory is host memory at addresses that the host cannot touch. Streams are threads, and
//! what is sent to them happens *late*: after a pseudo-random delay, in stream order, on that
//! thread. A wait that is missing is then a real data race and a real wrong byte. Where CUDA
//! promises nothing, the simulation does the worst: memory comes with garbage in it and at the
//! address of what was given back last, releasing memory waits for nothing, or where that is asked
//! for always, and a transfer or kernel that touches memory which was given back in the meantime
//! ends the program. `tests/rules.rs` compares with CUDA rule by rule. What a broken context
//! answers, and what is answered from the runtime's end on in the exit of the process, is what CUDA
//! 13.0 was seen to answer on an H100.
//!
//! | variable | what it sets |
//! |---|---|
//! | `CUDART_SIM_DEVICES` | how many devices there are, 2 unless given |
//! | `CUDART_SIM_SEED` | how late what is sent happens |
//! | `CUDART_SIM_WAITING` | 1: releasing memory and loading modules waits for the device; 2: allocating and pinning, too |
//! | `CUDART_SIM_VERSION` | the runtime's version, 13000 unless given |
//! | `CUDART_SIM_DRIVER` | the driver's version, 13000 unless given; 0 where there is none |
//!
//! | file | what it simulates |
//! |---|---|
//! | `runtime.rs` | the functions of the runtime, one by one |
//! | `driver.rs` | the driver's functions that come through `cudaGetDriverEntryPoint`, and the kernels |
//! | `graph.rs` | graphs of one kernel |
//! | `stream.rs` | streams as threads, events, capture |
//! | `memory.rs` | device memory and pinned memory |
//! | `context.rs` | devices, contexts, the thread's current one, errors that stick |
//! | `control.rs` | counting calls, making them fail, breaking contexts, and holding a call back |

mod context;
mod control;
mod driver;
mod graph;
mod memory;
mod runtime;
mod stream;

use cudart_sys::cudaError;

type Status = cudaError;
type Result<T = (), E = Status> = std::result::Result<T, E>;

/// Writes a result where the caller of a C function wants it.
fn put<T>(place: *mut T, value: T) -> Result {
    if place.is_null() {
        return Err(Status::cudaErrorInvalidValue);
    }
    // SAFETY: not null, and the caller of a C function passes valid places.
    unsafe { place.write(value) };
    Ok(())
}
