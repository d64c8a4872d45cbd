//! `peerlane.ChannelWriter` and `peerlane.ChannelReader`: messages between processes through shared memory.
//!
//! Invariant: an end's lock is taken only without the interpreter's, so no thread waits for one of them with the other. A
//! wait looks for signals every now and then, and `poison` from another thread ends it.

use crate::error;
use crate::options::{self, Given};
use peerlane::channel::{EVERYBODY, Fault, Info, Poisoner, Reader, Side, Writer};
use peerlane::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks for signals.
const SLICE: Duration = Duration::from_millis(100);
/// How long a call waits unless it says.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An end, until it is closed.
struct End<T> {
    end: Mutex<Option<T>>,
    poisoner: Poisoner,
    side: Side,
}

impl<T: Send> End<T> {
    fn new(end: T, poisoner: Poisoner, side: Side) -> End<T> {
        End { end: Mutex::new(Some(end)), poisoner, side }
    }

    /// Does something with the end, without the interpreter's lock.
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        op: &'static str,
        action: impl FnOnce(&mut T) -> Result<R> + Send,
    ) -> Result<R> {
        py.detach(|| {
            // Every change of an end is whole before it can panic.
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            match end.as_mut() {
                Some(end) => action(end),
                None => Err(Error::Channel { op, fault: Fault::Closed { who: self.side } }),
            }
        })
    }

    /// The same for something that waits, in slices of `timeout`; or the fault that says who was waited for in vain.
    fn attempt<R: Send>(
        &self,
        py: Python<'_>,
        op: &'static str,
        timeout: Duration,
        mut action: impl FnMut(&mut T, Duration) -> Result<R> + Send,
    ) -> PyResult<std::result::Result<R, Fault>> {
        let begin = Instant::now();
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            match self.with(py, op, |end| action(end, left.min(SLICE))) {
                Err(Error::Channel { fault: Fault::Timeout { who, .. }, .. }) => {
                    py.check_signals()?;
                    if left <= SLICE {
                        return Ok(Err(Fault::Timeout { who, waited: begin.elapsed() }));
                    }
                }
                outcome => return outcome.map(Ok).map_err(|e| error::raise(py, e)),
            }
        }
    }

    /// As `attempt`, and a wait in vain is an error.
    fn wait<R: Send>(
        &self,
        py: Python<'_>,
        op: &'static str,
        timeout: Duration,
        action: impl FnMut(&mut T, Duration) -> Result<R> + Send,
    ) -> PyResult<R> {
        let outcome = self.attempt(py, op, timeout, action)?;
        outcome.map_err(|fault| error::raise(py, Error::Channel { op, fault }))
    }

    fn close(&self, py: Python<'_>) {
        let end = py.detach(|| self.end.lock().unwrap_or_else(PoisonError::into_inner).take());
        py.detach(|| drop(end));
    }
}

fn timeout(call: &str, given: Given<'_, '_>) -> PyResult<Duration> {
    given.map_or(Ok(TIMEOUT), |given| options::seconds(call, "timeout", given))
}

fn short(call: &str, argument: &str, given: Given<'_, '_>) -> PyResult<u16> {
    let number = given.map_or(Ok(0), |given| options::whole(call, argument, given))?;
    u16::try_from(number)
        .map_err(|_| error::value(call, argument, format_args!("at most {}", u16::MAX), number))
}

/// Indices of readers, as a mask.
fn mask(call: &str, given: Given<'_, '_>) -> PyResult<u32> {
    let Some(given) = given else { return Ok(EVERYBODY) };
    let mut mask = 0;
    for reader in options::ranks(call, "readers", given)? {
        let bit = 1u32.checked_shl(reader);
        mask |= bit.ok_or_else(|| error::value(call, "readers", "indices below 32", reader))?;
    }
    Ok(mask)
}

/// The bytes of anything that has some.
fn bytes<'py>(call: &str, payload: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    if let Ok(bytes) = payload.cast::<PyBytes>() {
        return Ok(bytes.clone());
    }
    let expected = "an object with bytes";
    let wrong = |_| error::wrong_type(call, "payload", expected, error::kind(payload));
    let copied = PyMemoryView::from(payload).map_err(wrong)?.call_method0("tobytes")?;
    Ok(copied.cast_into()?)
}

/// The end of a channel that sends.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct ChannelWriter {
    end: End<Writer>,
    handle: String,
    max_payload: u64,
    readers: u32,
}

#[pymethods]
impl ChannelWriter {
    #[new]
    #[pyo3(signature = (capacity, readers, *, spin=None))]
    fn new(
        py: Python<'_>,
        capacity: &Bound<'_, PyAny>,
        readers: &Bound<'_, PyAny>,
        spin: Given<'_, '_>,
    ) -> PyResult<ChannelWriter> {
        const CALL: &str = "channel create";
        let capacity = options::whole(CALL, "capacity", capacity)? as u64;
        let readers = options::whole32(CALL, "readers", readers)?;
        let spin = spin.map(|given| options::seconds(CALL, "spin", given)).transpose()?;
        let made = py.detach(|| Writer::create(capacity, readers));
        let mut writer = made.map_err(|e| error::raise(py, e))?;
        spin.into_iter().for_each(|spin| writer.set_spin(spin));
        let (handle, max_payload, poisoner) =
            (writer.handle(), writer.max_payload(), writer.poisoner());
        let end = End::new(writer, poisoner, Side::Writer);
        Ok(ChannelWriter { end, handle, max_payload, readers })
    }

    /// The text by which a reader opens the channel.
    #[getter]
    fn handle(&self) -> &str {
        &self.handle
    }

    /// Most bytes of a payload.
    #[getter]
    fn max_payload(&self) -> u64 {
        self.max_payload
    }

    /// Number of readers.
    #[getter]
    fn readers(&self) -> u32 {
        self.readers
    }

    /// Sends a message, and what was staged; returns its sequence number.
    #[pyo3(signature = (payload, *, kind=None, flags=None, readers=None, timeout=None))]
    fn send(
        &self,
        py: Python<'_>,
        payload: &Bound<'_, PyAny>,
        kind: Given<'_, '_>,
        flags: Given<'_, '_>,
        readers: Given<'_, '_>,
        timeout: Given<'_, '_>,
    ) -> PyResult<u64> {
        let sequence = self.stage(py, payload, kind, flags, readers, timeout)?;
        self.publish(py)?;
        Ok(sequence)
    }

    /// Puts a message into a batch, which readers see with the next publish or send.
    #[pyo3(signature = (payload, *, kind=None, flags=None, readers=None, timeout=None))]
    fn stage(
        &self,
        py: Python<'_>,
        payload: &Bound<'_, PyAny>,
        kind: Given<'_, '_>,
        flags: Given<'_, '_>,
        readers: Given<'_, '_>,
        timeout: Given<'_, '_>,
    ) -> PyResult<u64> {
        const CALL: &str = "channel send";
        let what = (short(CALL, "kind", kind)?, short(CALL, "flags", flags)?);
        let (readers, patience) = (mask(CALL, readers)?, self::timeout(CALL, timeout)?);
        let payload = bytes(CALL, payload)?;
        let payload = payload.as_bytes();
        self.end
            .wait(py, CALL, patience, |writer, slice| writer.stage(readers, what, payload, slice))
    }

    /// Lets the readers see what was staged, with one wake-up at most.
    fn publish(&self, py: Python<'_>) -> PyResult<()> {
        let publish = |writer: &mut Writer| {
            writer.publish();
            Ok(())
        };
        self.end.with(py, "channel send", publish).map_err(|e| error::raise(py, e))
    }

    /// Whether this reader has opened the channel.
    fn attached(&self, py: Python<'_>, reader: &Bound<'_, PyAny>) -> PyResult<bool> {
        const CALL: &str = "channel attached";
        let reader = options::whole32(CALL, "reader", reader)?;
        if reader >= self.readers {
            let expected = format!("below {}", self.readers);
            return Err(error::value(CALL, "reader", expected, reader));
        }
        let there = |writer: &mut Writer| Ok(writer.attached(1 << reader).is_ok());
        self.end.with(py, CALL, there).map_err(|e| error::raise(py, e))
    }

    /// Goes on without a reader.
    fn forget(&self, py: Python<'_>, reader: &Bound<'_, PyAny>) -> PyResult<()> {
        const CALL: &str = "channel forget";
        let reader = options::whole32(CALL, "reader", reader)?;
        let forget = |writer: &mut Writer| writer.forget(reader);
        self.end.with(py, CALL, forget).map_err(|e| error::raise(py, e))
    }

    /// Ends the channel at once, from any thread.
    #[pyo3(signature = (reason=0))]
    fn poison(&self, reason: u32) {
        self.end.poisoner.poison(reason);
    }

    /// Closes the channel; readers receive what was sent before.
    fn close(&self, py: Python<'_>) {
        self.end.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        format!("<peerlane.ChannelWriter to {} readers>", self.readers)
    }
}

/// The end of a channel that receives.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct ChannelReader {
    end: End<Reader>,
    index: u32,
}

/// A message of a channel.
#[pyclass(frozen, get_all, module = "peerlane")]
pub(crate) struct ChannelMessage {
    /// Its bytes.
    payload: Py<PyBytes>,
    /// What the writer calls it.
    kind: u16,
    /// More of that.
    flags: u16,
    /// Its number among all messages of the channel, counted from 1.
    sequence: u64,
}

#[pymethods]
impl ChannelReader {
    #[new]
    #[pyo3(signature = (handle, index, *, spin=None))]
    fn new(
        py: Python<'_>,
        handle: &Bound<'_, PyAny>,
        index: &Bound<'_, PyAny>,
        spin: Given<'_, '_>,
    ) -> PyResult<ChannelReader> {
        const CALL: &str = "channel open";
        let wrong = |_| error::wrong_type(CALL, "handle", "a str", error::kind(handle));
        let text: String = handle.extract().map_err(wrong)?;
        let index = options::whole32(CALL, "index", index)?;
        let spin = spin.map(|given| options::seconds(CALL, "spin", given)).transpose()?;
        let opened = py.detach(|| Reader::open(&text, index));
        let mut reader = opened.map_err(|e| error::raise(py, e))?;
        spin.into_iter().for_each(|spin| reader.set_spin(spin));
        let poisoner = reader.poisoner();
        Ok(ChannelReader { end: End::new(reader, poisoner, Side::Reader(index)), index })
    }

    /// Which reader it is.
    #[getter]
    fn index(&self) -> u32 {
        self.index
    }

    /// The next message.
    #[pyo3(signature = (timeout=None))]
    fn recv(&self, py: Python<'_>, timeout: Given<'_, '_>) -> PyResult<ChannelMessage> {
        const CALL: &str = "channel receive";
        let patience = self::timeout(CALL, timeout)?;
        let received = self.end.wait(py, CALL, patience, |reader, slice| reader.recv(slice))?;
        Ok(message(py, received.info, &received.payload))
    }

    /// Whether there is a message to receive.
    #[pyo3(signature = (timeout=None))]
    fn poll(&self, py: Python<'_>, timeout: Given<'_, '_>) -> PyResult<bool> {
        const CALL: &str = "channel receive";
        let now = timeout.is_none_or(|given| given.extract::<f64>().is_ok_and(|time| time == 0.0));
        let patience = if now { Duration::ZERO } else { self::timeout(CALL, timeout)? };
        let look = |reader: &mut Reader, slice| reader.peek(slice).map(drop);
        Ok(self.end.attempt(py, CALL, patience, look)?.is_ok())
    }

    /// The next message, or None if there is none yet.
    fn try_recv(&self, py: Python<'_>) -> PyResult<Option<ChannelMessage>> {
        let received = self.end.with(py, "channel receive", Reader::try_recv);
        let received = received.map_err(|e| error::raise(py, e))?;
        Ok(received.map(|received| message(py, received.info, &received.payload)))
    }

    /// Ends the channel at once, from any thread.
    #[pyo3(signature = (reason=0))]
    fn poison(&self, reason: u32) {
        self.end.poisoner.poison(reason);
    }

    /// Closes this end; sending to it is an error from then on.
    fn close(&self, py: Python<'_>) {
        self.end.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        format!("<peerlane.ChannelReader {}>", self.index)
    }
}

fn message(py: Python<'_>, info: Info, payload: &[u8]) -> ChannelMessage {
    let Info { kind, flags, sequence, .. } = info;
    ChannelMessage { payload: PyBytes::new(py, payload).unbind(), kind, flags, sequence }
}
