//! Streams that wait for words and store them, here, at a peer, in host memory and in graphs.

use super::gpus;
use crate::gpu::{DevicePtr, GpuRef, MemoryOp, Stream};

fn ops(gpu: &GpuRef, stream: Stream, operations: &[MemoryOp]) {
    // SAFETY: every test's words are aligned and its own.
    unsafe { gpu.stream_memory(stream, operations).unwrap() };
}

/// A word of 0.
fn word(gpu: &GpuRef) -> DevicePtr {
    let memory = gpu.alloc(4).unwrap();
    let stream = gpu.stream_create().unwrap();
    // SAFETY: the memory is 4 bytes.
    unsafe { gpu.fill(memory, 0, 4, stream).unwrap() };
    gpu.stream_synchronize(stream).unwrap();
    memory
}

fn value(gpu: &GpuRef, at: DevicePtr) -> u32 {
    let mut bytes = [0; 4];
    let stream = gpu.stream_create().unwrap();
    // SAFETY: the memory is 4 bytes.
    unsafe { gpu.download(&mut bytes, at, stream).unwrap() };
    u32::from_le_bytes(bytes)
}

#[test]
#[ignore = "needs a GPU"]
fn a_stream_waits_for_a_word_that_another_stores() {
    for gpu in gpus() {
        let (flag, host) = (word(&gpu), gpu.alloc_host(4096).unwrap());
        let streams = [gpu.stream_create_urgent().unwrap(), gpu.stream_create().unwrap()];
        let wait =
            [MemoryOp::Wait(flag, 1), MemoryOp::Write(flag, 0), MemoryOp::Write(host.device, 7)];
        ops(&gpu, streams[0], &wait);
        let event = gpu.event_create().unwrap();
        gpu.event_record(event, streams[0]).unwrap();
        assert!(!gpu.event_query(event).unwrap());
        ops(&gpu, streams[1], &[MemoryOp::Write(flag, 1)]);
        gpu.event_synchronize(event).unwrap();
        assert!(gpu.event_query(event).unwrap());
        assert_eq!(value(&gpu, flag), 0);
        // SAFETY: the memory is there, and the stream that wrote it is done.
        assert_eq!(unsafe { host.host.cast::<u32>().read_volatile() }, 7);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_graph_waits_for_words_each_time_it_runs() {
    for gpu in gpus() {
        let (flag, answer) = (word(&gpu), word(&gpu));
        let streams = [gpu.stream_create().unwrap(), gpu.stream_create().unwrap()];
        gpu.capture_begin(streams[0]).unwrap();
        let wait = [MemoryOp::Wait(flag, 1), MemoryOp::Write(flag, 0), MemoryOp::Write(answer, 1)];
        ops(&gpu, streams[0], &wait);
        let graph = gpu.capture_end(streams[0]).unwrap();
        for _ in 0..3 {
            gpu.graph_launch(graph, streams[0]).unwrap();
            assert!(!gpu.stream_query(streams[0]).unwrap());
            let answered = [MemoryOp::Write(flag, 1), MemoryOp::Wait(answer, 1)];
            ops(&gpu, streams[1], &answered);
            ops(&gpu, streams[1], &[MemoryOp::Write(answer, 0)]);
            gpu.stream_synchronize(streams[1]).unwrap();
            gpu.stream_synchronize(streams[0]).unwrap();
        }
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn what_was_copied_to_a_peer_is_there_when_its_word_is() {
    const BYTES: usize = 1 << 20;
    let gpus = gpus();
    let [from, to, ..] = &gpus[..] else { panic!("it needs two GPUs, and there is one") };
    from.enable_peer(to.properties().ordinal).unwrap();
    let (flag, data) = (word(to), to.alloc(BYTES).unwrap());
    let (source, kept) = (from.alloc(BYTES).unwrap(), to.alloc(BYTES).unwrap());
    let (out, into) = (from.stream_create_urgent().unwrap(), to.stream_create_urgent().unwrap());
    for round in 1..100u8 {
        ops(to, into, &[MemoryOp::Wait(flag, 1), MemoryOp::Write(flag, 0)]);
        let mut found = vec![0; BYTES];
        // SAFETY: all of them have that many bytes.
        unsafe {
            to.copy(kept, data, BYTES, into).unwrap();
            from.fill(source, round, BYTES, out).unwrap();
            from.copy(data, source, BYTES, out).unwrap();
            ops(from, out, &[MemoryOp::Write(flag, 1)]);
            to.download(&mut found, kept, into).unwrap();
        }
        assert!(found.iter().all(|byte| *byte == round), "round {round}");
    }
}
