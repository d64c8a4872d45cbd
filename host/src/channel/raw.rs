//! A channel whose memory says any bytes: for `host/src/fuzzing.rs`.

use super::segment::Segment;
use super::{Reader, Writer};
use crate::error::Error;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Writes what `data` says, ten bytes at a time (which word, its value), into the memory of a channel in use, whose
/// ends go on after each. `seen` is told every error.
pub(crate) fn channel(data: &[u8], mut seen: impl FnMut(&Error)) {
    let Ok(mut writer) = Writer::create(4096, 2) else { return };
    let handle = writer.handle();
    let Some(memory) = handle.parse().ok().and_then(|handle| Segment::open(&handle).ok()) else {
        return;
    };
    let mut reader = Reader::open(&handle, 0);
    for change in data.as_chunks::<10>().0.iter().take(64) {
        let [low, high, value @ ..] = *change;
        let word = usize::from(u16::from_le_bytes([low, high])) % (memory.bytes() / 8);
        memory.wide(8 * word).store(u64::from_le_bytes(value), Ordering::Relaxed);
        let payload = [low; 300];
        for length in [0, usize::from(high)] {
            let sent = writer.send(1, (1, 2), &payload[..length], Duration::ZERO);
            let _ = sent.inspect_err(&mut seen);
        }
        if let Ok(Ok(Some(message))) = reader.as_mut().map(Reader::try_recv) {
            assert!(message.payload.len() as u64 <= writer.max_payload());
        }
    }
    let _ = reader.inspect_err(&mut seen);
    let _ = Reader::open(&handle, 1).inspect_err(&mut seen);
}
