//! How ranks meet: as threads of one process, or as processes of one machine.

mod processes;
mod threads;

pub use processes::Processes;
pub use threads::Meeting;
