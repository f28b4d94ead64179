//! Compiles the page about cudarc together with cudarc. The library has no other content.

/// The page's programs are tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/cudarc.md")]
struct Cudarc;
