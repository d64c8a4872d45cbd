"""Channels: messages between the processes and threads of one user."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import peerlane
from peerlane import ChannelReader, ChannelWriter

SPAWN = multiprocessing.get_context("spawn")


def echo(handle: str, index: int, answers: object) -> None:
    """A process that reads until the channel is closed."""
    with ChannelReader(handle, index) as reader:
        while True:
            try:
                message = reader.recv(60)
            except peerlane.ClosedError:
                return
            answers.put((index, message.kind, message.flags, message.sequence, message.payload))


def hang(handle: str, ready: object) -> None:
    """A process that opens the channel and does no more."""
    reader = ChannelReader(handle, 0)
    ready.set()
    time.sleep(60)
    del reader


def write_and_hang(handles: object) -> None:
    """A process that sends one message and does no more."""
    writer = ChannelWriter(4096, 1)
    writer.send(b"last words")
    handles.put(writer.handle)
    time.sleep(60)


def test_processes_receive_what_is_theirs() -> None:
    answers = SPAWN.Queue()
    with ChannelWriter(1 << 14, 2) as writer:
        readers = [SPAWN.Process(target=echo, args=(writer.handle, i, answers)) for i in range(2)]
        for reader in readers:
            reader.start()
        payloads = [os.urandom(size) for size in (0, 1, 63, 64, 1000, writer.max_payload, 7)]
        for number, payload in enumerate(payloads):
            assert writer.send(payload, kind=number, flags=65535, timeout=60) == number + 1
        writer.send(b"to one", readers=[1])
    found = [answers.get(timeout=60) for _ in range(2 * len(payloads) + 1)]
    for index in range(2):
        own = [rest for reader, *rest in found if reader == index]
        expected = [[n, 65535, n + 1, payload] for n, payload in enumerate(payloads)]
        assert own[: len(payloads)] == expected
        assert own[len(payloads) :] == ([[0, 0, len(payloads) + 1, b"to one"]] if index else [])
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0


def test_a_batch_is_seen_when_it_is_published() -> None:
    writer = ChannelWriter(4096, 1)
    assert not writer.attached(0)
    reader = ChannelReader(writer.handle, 0)
    assert writer.attached(0) and (reader.index, writer.readers) == (0, 1)
    for number in range(3):
        writer.stage(bytes([number]), kind=number)
        assert reader.try_recv() is None
    writer.publish()
    assert [reader.recv().kind for _ in range(3)] == [0, 1, 2]
    assert reader.try_recv() is None


@pytest.mark.parametrize("make", [bytearray, memoryview, lambda b: np.frombuffer(b, np.int16)])
def test_payloads_of_any_kind(make: Callable[[bytes], object]) -> None:
    writer = ChannelWriter(4096, 1)
    reader = ChannelReader(writer.handle, 0)
    writer.send(make(b"12345678"))
    assert reader.recv().payload == b"12345678"


def test_waits_end_at_their_deadline() -> None:
    writer = ChannelWriter(4096, 1)
    reader = ChannelReader(writer.handle, 0, spin=1e-6)
    with pytest.raises(peerlane.DeadlineError, match="^channel receive: waited .* for the writer$"):
        reader.recv(0.25)
    writer.send(bytes(writer.max_payload))
    begin = time.monotonic()
    with pytest.raises(peerlane.DeadlineError, match="^channel send: waited .* for reader 0$"):
        writer.send(b"more", timeout=0.25)
    assert 0.25 <= time.monotonic() - begin < 5
    # Nothing was lost.
    assert len(reader.recv().payload) == writer.max_payload
    assert writer.send(b"more") == 2
    assert reader.recv().payload == b"more"


def test_poison_ends_a_wait_in_another_thread() -> None:
    writer = ChannelWriter(4096, 1)
    reader = ChannelReader(writer.handle, 0)
    threading.Timer(0.2, writer.poison, [7]).start()
    with pytest.raises(peerlane.AbortedError, match=r"poisoned by the writer \(reason 7\)"):
        reader.recv(60)
    with pytest.raises(peerlane.AbortedError):
        writer.send(b"")


def test_closing_lets_readers_drain() -> None:
    writer = ChannelWriter(4096, 2)
    reader, other = (ChannelReader(writer.handle, index) for index in range(2))
    writer.send(b"first")
    other.close()
    other.close()
    with pytest.raises(peerlane.ClosedError, match="reader 1 has closed its end"):
        writer.send(b"second")
    with pytest.raises(peerlane.ClosedError, match="reader 1 has closed its end"):
        other.recv()
    writer.forget(1)
    writer.send(b"third")
    writer.close()
    assert [reader.recv().payload for _ in range(2)] == [b"first", b"third"]
    with pytest.raises(peerlane.ClosedError, match="the writer has closed its end"):
        reader.recv()
    with pytest.raises(peerlane.ClosedError):
        writer.send(b"")


def test_killed_processes_are_named() -> None:
    writer, ready = ChannelWriter(4096, 1), SPAWN.Event()
    victim = SPAWN.Process(target=hang, args=(writer.handle, ready))
    victim.start()
    assert ready.wait(60)
    writer.send(bytes(writer.max_payload))
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(peerlane.PeerLostError, match=rf"reader 0 \(pid {victim.pid}\) has ended"):
        writer.send(b"", timeout=30)
    handles = SPAWN.Queue()
    victim = SPAWN.Process(target=write_and_hang, args=(handles,))
    victim.start()
    reader = ChannelReader(handles.get(timeout=60), 0)
    os.kill(victim.pid, signal.SIGKILL)
    assert reader.recv(30).payload == b"last words"
    with pytest.raises(peerlane.PeerLostError, match="the process of the writer"):
        reader.recv(30)


def test_a_signal_ends_a_wait() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        writer = ChannelWriter(4096, 1)
        reader = ChannelReader(writer.handle, 0)
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        begin = time.monotonic()
        with pytest.raises(Interrupted):
            reader.recv(60)
        assert time.monotonic() - begin < 30
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_mistakes_are_named() -> None:
    for capacity, readers, named in [
        (100, 1, "capacity"),
        (4096, 0, "readers"),
        (4096, 33, "readers"),
    ]:
        with pytest.raises(ValueError, match=f"^channel create: {named}: expected"):
            ChannelWriter(capacity, readers)
    with pytest.raises(TypeError, match="^channel create: capacity: expected an int"):
        ChannelWriter("4096", 1)
    writer = ChannelWriter(4096, 1)
    with pytest.raises(ValueError, match="^channel send: payload: expected at most 4064 bytes"):
        writer.send(bytes(4065))
    with pytest.raises(
        TypeError, match="^channel send: payload: expected an object with bytes, got int"
    ):
        writer.send(5)
    with pytest.raises(ValueError, match="^channel send: kind: expected at most 65535, got 65536"):
        writer.send(b"", kind=65536)
    for readers in ([1], [40]):
        with pytest.raises(ValueError, match="^channel send: readers: expected"):
            writer.send(b"", readers=readers)
    with pytest.raises(ValueError, match="^channel attached: reader: expected below 1, got 1"):
        writer.attached(1)
    with pytest.raises(ValueError, match="^channel send: timeout: expected seconds"):
        writer.send(b"", timeout=0)
    for handle in ("", "peerlane-channel:1:1:0:0", writer.handle[:-1], writer.handle + "0"):
        with pytest.raises(ValueError, match="^channel open: handle: expected"):
            ChannelReader(handle, 0)
    with pytest.raises(ValueError, match="^channel open: index: expected below 1, got 1"):
        ChannelReader(writer.handle, 1)
    reader = ChannelReader(writer.handle, 0)
    with pytest.raises(
        ValueError, match="^channel open: index: expected one that nobody has taken"
    ):
        ChannelReader(writer.handle, 0)
    assert (repr(writer), repr(reader)) == (
        "<peerlane.ChannelWriter to 1 readers>",
        "<peerlane.ChannelReader 0>",
    )
