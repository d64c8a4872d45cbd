//! Test only: ranks that die at their n-th message, as a process does that is killed. Outside of tests there is nothing
//! in here but empty functions.
//!
//! Invariant: a life that has ended does nothing more. Its sockets are closed, and each of its threads stays for ever
//! where it next sends, has received, waits for or looks at something.

#[cfg(not(test))]
pub(super) use alive::*;
#[cfg(test)]
pub(super) use mortal::*;

#[cfg(not(test))]
mod alive {
    use rustix::fd::OwnedFd;

    pub(in super::super) struct Entry;

    impl Entry {
        pub(in super::super) fn of(_: &OwnedFd) -> Entry {
            Entry
        }
    }

    pub(in super::super) fn message() {}

    pub(in super::super) fn look() {}

    pub(in super::super) fn pid() -> u32 {
        std::process::id()
    }

    pub(in super::super) fn inherited<F>(run: F) -> F {
        run
    }
}

#[cfg(test)]
mod mortal {
    use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
    use std::cell::RefCell;
    use std::mem::ManuallyDrop;
    use std::process::{Child, Command};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};
    use std::thread;

    thread_local! {
        static OWN: RefCell<Option<Arc<Life>>> = const { RefCell::new(None) };
    }

    /// What stands for a process.
    pub(in super::super) struct Life {
        messages: AtomicU64,
        /// The message at which it ends.
        last: u64,
        ended: AtomicBool,
        sockets: Mutex<Vec<RawFd>>,
        /// Whose number it has, if it is to end.
        process: Mutex<Option<Child>>,
        pid: u32,
    }

    impl Life {
        /// One that ends at message number `last`, counted from 1, if it has one.
        pub(in super::super) fn new(last: Option<u64>) -> Arc<Life> {
            let process = last.map(|_| Command::new("sleep").arg("600").spawn().unwrap());
            Arc::new(Life {
                messages: AtomicU64::new(0),
                last: last.unwrap_or(u64::MAX),
                ended: AtomicBool::new(false),
                sockets: Mutex::default(),
                pid: process.as_ref().map_or_else(std::process::id, Child::id),
                process: Mutex::new(process),
            })
        }

        /// Makes this thread one of its own.
        pub(in super::super) fn begin(self: Arc<Life>) {
            OWN.set(Some(self));
        }

        pub(in super::super) fn has_ended(&self) -> bool {
            self.ended.load(Ordering::SeqCst)
        }

        pub(in super::super) fn has_socket(&self) -> bool {
            !self.sockets.lock().unwrap().is_empty()
        }

        fn end(&self) {
            self.ended.store(true, Ordering::SeqCst);
            self.kill();
            let nothing = std::fs::File::open("/dev/null").unwrap();
            for socket in self.sockets.lock().unwrap().iter() {
                // SAFETY: registered, so open: who closes it takes it out first.
                let open = unsafe { BorrowedFd::borrow_raw(*socket) };
                // Wakes whoever waits at it.
                let _ = rustix::net::shutdown(open, rustix::net::Shutdown::Both);
                // SAFETY: as above. What owns the number closes what it stands for from now on.
                let mut open = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(*socket) });
                rustix::io::dup2(&nothing, &mut open).unwrap();
            }
        }

        fn kill(&self) {
            if let Some(mut process) = self.process.lock().unwrap().take() {
                process.kill().unwrap();
                process.wait().unwrap();
            }
        }
    }

    impl Drop for Life {
        fn drop(&mut self) {
            self.kill();
        }
    }

    /// A socket that goes with its life.
    pub(in super::super) struct Entry(Option<(Arc<Life>, RawFd)>);

    impl Entry {
        pub(in super::super) fn of(socket: &OwnedFd) -> Entry {
            let own = OWN.with_borrow(Clone::clone);
            let entry = own.map(|life| {
                life.sockets.lock().unwrap().push(socket.as_raw_fd());
                (life, socket.as_raw_fd())
            });
            Entry(entry)
        }
    }

    impl Drop for Entry {
        fn drop(&mut self) {
            if let Some((life, socket)) = &self.0 {
                life.sockets.lock().unwrap().retain(|other| other != socket);
            }
        }
    }

    /// A message is about to be sent, or has come.
    pub(in super::super) fn message() {
        let Some(life) = OWN.with_borrow(Clone::clone) else { return };
        look();
        if life.messages.fetch_add(1, Ordering::SeqCst) + 1 == life.last {
            life.end();
        }
        look();
    }

    /// Stays here if the life of this thread has ended.
    pub(in super::super) fn look() {
        let ended = OWN.with_borrow(|own| own.as_ref().is_some_and(|life| life.has_ended()));
        if ended {
            loop {
                thread::park();
            }
        }
    }

    /// The number of this thread's process.
    pub(in super::super) fn pid() -> u32 {
        OWN.with_borrow(|own| own.as_ref().map_or_else(std::process::id, |life| life.pid))
    }

    /// What a thread does that belongs to the same life as this one.
    pub(in super::super) fn inherited<T>(run: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let own = OWN.with_borrow(Clone::clone);
        move || {
            OWN.set(own);
            run()
        }
    }
}
