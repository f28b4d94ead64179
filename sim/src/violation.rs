//! The end of a program that breaks a rule of CUDA.

/// Prints the broken rule and aborts the program.
pub(crate) fn violation(what: &str) -> ! {
    eprintln!("cudart-sim: {what}");
    std::process::abort()
}
