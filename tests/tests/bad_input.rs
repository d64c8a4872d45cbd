//! Calls that cannot be: each is refused by name, changes nothing, and the next right call works.

// A test target's modules lie beside it; this one gathers them in a folder of its own.
mod bad_input {
    pub(crate) mod calls;
    pub(crate) mod meetings;
    pub(crate) mod waits;
}
