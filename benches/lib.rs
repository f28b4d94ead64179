//! What is written about cudarc is compiled with it. Nothing else is a library here.

/// The page's programs are tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/cudarc.md")]
struct Cudarc;
