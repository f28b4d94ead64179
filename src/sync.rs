//! The primitives under [`ticket`](crate::ticket), in one place so that its model (`tests/ticket_model.rs`)
//! can put loom's in their stead.

pub(crate) use std::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
