"""What a model's main process and its workers say to each other, over channels in place of pipes.

`pipe` and `process` stand for the `Pipe` and the `Process` that ExLlamaV3 makes its workers with. Each
end has a `ChannelWriter` and a `ChannelReader`, and the methods of a `multiprocessing` connection that
ExLlamaV3 uses. A worker spins for its next command for as long as `Options.spin` says: waking a
process that sleeps takes longer than all the rest.

The helper process (device -1) adds up in host memory for native, and has nothing to do for Peerlane:
it is not started, and what is sent to it is answered here.

Invariants:
- What is sent arrives whole and in order, whatever its size, or the call raises: an end whose process
  has died is noticed within 100 ms, not after a time-out.
- A worker's first word travels over a pipe, which ends with the process that was to send it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from peerlane import ChannelReader, ChannelWriter, PeerLostError

from .backend import verdict_key
from .options import Options

# Kinds of messages. An acknowledgement is nothing most of the time, and takes no pickle then.
NOTHING, WHOLE, PART = 1, 2, 3
# Bytes of a ring. A command takes half a kilobyte; what is larger than a part goes in parts.
CAPACITY = 1 << 18
LARGEST = CAPACITY // 4
# Seconds: for who is not to give up, as on a pipe.
FOREVER = 1e9
# Seconds of spinning, where there are cores for it and where there are not.
SPIN, SPIN_CROWDED = 4e-3, 20e-6


def spin_of(options: Options, ranks: int) -> float:
    """For how long the ends of a model with so many ranks spin."""
    if options.spin is not None:
        return options.spin
    return SPIN if len(os.sched_getaffinity(0)) >= 2 * ranks else SPIN_CROWDED


class End:
    """What ExLlamaV3 uses of a `multiprocessing` connection."""

    def __init__(self, spin: float) -> None:
        self.spin = spin
        self.writer: ChannelWriter | None = None
        self.reader: ChannelReader | None = None

    def send(self, message: Any) -> None:
        if message is None:
            self._to().send(b"", kind=NOTHING, timeout=FOREVER)
        else:
            self.send_bytes(ForkingPickler.dumps(message))

    def send_bytes(self, data: Any) -> None:
        writer, view = self._to(), memoryview(data)
        while len(view) > LARGEST:
            writer.send(view[:LARGEST], kind=PART, timeout=FOREVER)
            view = view[LARGEST:]
        writer.send(view, kind=WHOLE, timeout=FOREVER)

    def poll(self, timeout: float | None = 0.0) -> bool:
        return self._from().poll(FOREVER if timeout is None else timeout)

    def recv(self) -> Any:
        reader = self._from()
        message = reader.recv(FOREVER)
        if message.kind == NOTHING:
            return None
        if message.kind == WHOLE:
            return pickle.loads(message.payload)
        parts = [message.payload]
        while message.kind == PART:
            message = reader.recv(FOREVER)
            parts.append(message.payload)
        return pickle.loads(b"".join(parts))

    def close(self) -> None:
        for end in (self.writer, self.reader):
            if end is not None:
                end.close()

    def _to(self) -> ChannelWriter:
        if self.writer is None:
            raise OSError("send: expected a connection of this process, got one that is another's")
        return self.writer

    def _from(self) -> ChannelReader:
        if self.reader is None:
            raise OSError("recv: expected a connection of this process, got one that is another's")
        return self.reader


class ParentEnd(End):
    """The main process's end. It opens the worker's channel when it first listens."""

    def __init__(self, introduction: Connection, spin: float) -> None:
        super().__init__(spin)
        self.introduction = introduction
        self.writer = ChannelWriter(CAPACITY, 1)

    def poll(self, timeout: float | None = 0.0) -> bool:
        if self.reader is None and not self.introduction.poll(timeout):
            return False
        return super().poll(timeout)

    def _from(self) -> ChannelReader:
        if self.reader is None:
            try:
                handle = self.introduction.recv()
            except EOFError:
                raise PeerLostError("a worker's process ended before it was ready") from None
            self.reader = ChannelReader(handle, 0, spin=self.spin)
            self.introduction.close()
        return self.reader

    def close(self) -> None:
        super().close()
        self.introduction.close()


class ChildEnd(End):
    """The worker's end, which is one in the process that it has been sent to."""

    def __init__(self, parent: ParentEnd, introduction: Connection) -> None:
        super().__init__(parent.spin)
        self.parent: ParentEnd | None = parent
        self.introduction = introduction

    def __getstate__(self) -> tuple[str, Connection, float]:
        assert self.parent is not None
        return self.parent._to().handle, self.introduction, self.spin

    def __setstate__(self, state: tuple[str, Connection, float]) -> None:
        handle, self.introduction, spin = state
        super().__init__(spin)
        self.parent = None
        self.reader = ChannelReader(handle, 0, spin=spin)
        self.writer = ChannelWriter(CAPACITY, 1)
        self.introduction.send(self.writer.handle)

    def close(self) -> None:
        super().close()
        self.introduction.close()


class Helper:
    """Stands for the helper process and for the main process's connection to it. Answers at once."""

    def __init__(self) -> None:
        self.answers = 0

    def send(self, message: Any) -> None:
        function = getattr(message[0], "__name__", message[0])
        if function != "mp_cpu_reduce":
            raise RuntimeError(
                f"ExLlamaV3's helper process: expected mp_cpu_reduce, which Peerlane's collectives do not need, "
                f"got {function!r}; install(channel=False) starts the process"
            )
        self.answers += 1

    def poll(self, timeout: float | None = 0.0) -> bool:
        return self.answers > 0

    def recv(self) -> None:
        self.answers -= 1

    def is_alive(self) -> bool:
        return False

    def start(self) -> None:
        """There is no process to start, to wait for or to end."""

    def join(self, timeout: float | None = None) -> None:
        """As start."""

    def terminate(self) -> None:
        """As start."""

    def close(self) -> None:
        """As start."""


class Worker(multiprocessing.Process):
    """A process with a `ChildEnd` as its first argument."""

    def start(self) -> None:
        # Both are gone once the process has started.
        connection: ChildEnd = self._args[0]  # type: ignore[attr-defined]
        super().start()
        # The worker has it now; the pipe would not end with the worker if it stayed open here.
        connection.introduction.close()


class Dispatch:
    """The `Pipe` and the `Process` of one model."""

    def __init__(self, spin: float) -> None:
        self.spin = spin
        self.helper: Helper | None = None

    def pipe(self) -> tuple[ParentEnd, ChildEnd]:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        parent = ParentEnd(ours, self.spin)
        return parent, ChildEnd(parent, theirs)

    def process(self, target: Callable[..., None], args: tuple[Any, ...]) -> Worker | Helper:
        """The process of a worker; of the helper only if native does the work."""
        connection, device, _, _, backend_args, *_ = args
        if not isinstance(connection, ChildEnd):
            raise RuntimeError(
                "ExLlamaV3: create_tp_context: expected it to make its connections by the name Pipe, got "
                f"{connection!r}; install(channel=False) leaves them alone"
            )
        if device >= 0 or verdict_key(backend_args["uuid"]) in os.environ:
            return Worker(target=target, args=args)
        self.helper = Helper()
        return self.helper
