//! The thread of an autonomous world, and the handle whose end ends it.
//!
//! Invariant: once the handle is dropped, nothing in the world moves any more, and its thread ends
//! within a moment, by itself: nobody waits for it, so no way of ending a process can hang on it.

use super::world::Shared;
use std::ops::Deref;
use std::sync::Arc;
use std::thread;

/// A world as its GPUs hold it, together.
pub(super) struct Handle(Arc<Shared>);

impl Handle {
    /// Starts the world's thread if the world is to have one.
    pub(super) fn new(shared: Shared) -> Handle {
        let shared = Arc::new(shared);
        if shared.config.autonomous {
            let world = Arc::clone(&shared);
            let thread = thread::Builder::new().name(format!("sim {}", world.config.seed));
            thread.spawn(move || world.drive()).expect("an autonomous world needs a thread");
        }
        Handle(shared)
    }
}

impl Deref for Handle {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.end();
    }
}
