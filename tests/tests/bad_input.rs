//! Calls that cannot be: each is refused by name, changes nothing, and the next right call works.

mod bad_input {
    pub(crate) mod calls;
    pub(crate) mod meetings;
    pub(crate) mod waits;
}
