//! The C interface: what `libpeerlane.so` exports and `host/include/peerlane.h` declares.
//!
//! The header is made from these files by `host/tests/c_header.rs`, comments included, so the
//! comments of public items speak to a C author and the names are C's. Rust programs use the rest
//! of the crate.
//!
//! Invariant: no panic leaves, no bit pattern that C can pass is taken for a Rust value unchecked,
//! and NULL is an error that names the argument. What cannot be checked is the contract below.
//!
//! # Safety
//! Of every function here: a pointer is NULL or leads to what the header says, for the whole call;
//! a handle was made by this library and is not destroyed yet. Device addresses, sizes and streams
//! are what the functions of [`Communicator`](crate::Communicator) and [`Gpu`](crate::gpu::Gpu)
//! ask for.

#![allow(non_camel_case_types, reason = "these are C's names")]
#![allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the module")]

mod arguments;
mod channel;
mod collectives;
mod comm;
mod gpu;
mod recovery;
mod registration;
mod sizing;
mod status;
mod types;
mod work;

pub use channel::*;
pub use collectives::*;
pub use comm::*;
pub use gpu::*;
pub use recovery::*;
pub use registration::*;
pub use sizing::*;
pub use status::*;
pub use types::*;
pub use work::*;
