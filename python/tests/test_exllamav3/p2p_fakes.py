"""Stand-ins for `peerlane.Communicator`: one that records calls, one whose ranks meet through files.

`FileCommunicator` follows the documented behaviour between real processes: rank-ordered sums, errors
that show at a later call and stay, and names for ranks that are gone. It works on plain host memory,
and can be told to refuse: for tests of ExLlamaV3's own processes, which have no simulated machine.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import peerlane


def topology(
    count: int,
    *,
    refused: tuple = (),
    nvlinks: int | None = None,
    capability: tuple = (9, 0),
    first: int = 0,
) -> dict[str, Any]:
    """What `peerlane.topology()` says of `count` GPUs; `refused` are pairs of positions."""
    nodes = [
        {"ordinal": first + place, "name": "Test GPU", "compute_capability": list(capability)}
        for place in range(count)
    ]
    links = [
        {"from": a, "to": b, "access": (a, b) not in refused, "nvlinks": nvlinks}
        for a in range(count)
        for b in range(count)
        if a != b
    ]
    return {"backend": "cuda", "nodes": nodes, "links": links, "notes": []}


class Prepares:
    """A prepared all-reduce is an all-reduce."""

    def prepare_all_reduce(self, *, wire: str = "native", retry: Any = None) -> Any:
        def run(tensor: Any, contribution: bool = True) -> None:
            self.all_reduce(tensor, wire=wire, contribution=contribution)  # type: ignore[attr-defined]

        return SimpleNamespace(run=run)


class Recorder(Prepares):
    """Keeps what it was called with. `failure`, if set, is raised by the calls that can notice one;
    `refusal` by the constructor."""

    refusal: Exception | None = None
    failure: Exception | None = None

    def __init__(self, rank: int, world_size: int, name: str, device: str, **options: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.rank, self.world_size, self.name, self.device = rank, world_size, name, device
        self.options = options
        self.calls: list[tuple] = []

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> None:
            self.calls.append((method, args, kwargs))
            if self.failure is not None and method != "set_deadline":
                raise self.failure

        return call


class FileCommunicator(Prepares):
    """Ranks in any processes that share the folder named by PEERLANE_TEST_FOLDER."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        name: str,
        device: str,
        *,
        deadline: float = 10,
        first_deadline: float | None = None,
        patience: float = 120,
        transport: str = "auto",
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.folder = Path(os.environ["PEERLANE_TEST_FOLDER"]) / name
        self.folder.mkdir(exist_ok=True)
        self.deadline, self.first_deadline = deadline, first_deadline
        self.failure: Exception | None = None
        self.closed = False
        self.calls = 0
        self.counts: dict[tuple[int, int], int] = {}
        refusal = os.environ.get("PEERLANE_TEST_REFUSAL")
        self._write(f"join-{rank}", np.array([os.getpid()]))
        for peer in range(world_size):
            path = self.folder / f"join-{peer}.npy"
            end = time.monotonic() + patience
            while not path.exists():
                if time.monotonic() > end:
                    raise peerlane.RendezvousError(
                        f"rendezvous of {world_size} ranks: rank {peer} did not come"
                    )
                time.sleep(0.002)
        if refusal:
            raise peerlane.UnreachableError(refusal)
        self.pids = [
            int(np.load(self.folder / f"join-{peer}.npy")[0]) for peer in range(world_size)
        ]

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def all_reduce(
        self, tensor: Any, out: Any = None, *, wire: str = "native", contribution: bool = True
    ) -> None:
        self._check(tensor)
        if tensor.size == 0:
            return
        mine = _travelled(tensor, wire) if contribution else np.zeros_like(tensor)
        for peer in self._peers():
            self._put(peer, mine)
        parts = [mine if rank == self.rank else self._take(rank) for rank in range(self.world_size)]
        if self.failure is None:
            tensor[...] = sum(part.astype(np.float32) for part in parts).astype(tensor.dtype)

    def broadcast(self, tensor: Any, root: int) -> None:
        self._check(tensor)
        if tensor.size == 0:
            return
        if root == self.rank:
            for peer in self._peers():
                self._put(peer, tensor)
        elif (part := self._take(root)) is not None:
            tensor[...] = part

    def gather(self, tensor: Any, out: Any, root: int, widths: list[int]) -> None:
        self._check(tensor if tensor is not None else out)
        if root != self.rank:
            if widths[self.rank] and tensor.size:
                self._put(root, tensor)
            return
        if out.size == 0:
            return
        at = 0
        for rank, width in enumerate(widths):
            part = tensor if rank == self.rank else self._take(rank) if width else None
            if width and part is not None:
                out[..., at : at + width] = part
            at += width

    def barrier(self) -> None:
        self._ready()
        for peer in self._peers():
            self._put(peer, np.zeros(1))
        for peer in self._peers():
            self._take(peer)

    def health(self) -> None:
        self._ready()

    synchronize = health

    def abort(self) -> None:
        """The others find out by themselves."""

    def recover(self) -> None:
        raise self.failure or peerlane.Error("nothing to recover from")

    def set_deadline(self, seconds: float) -> None:
        self.deadline = seconds

    def close(self) -> None:
        self._write(f"left-{self.rank}", np.zeros(1))
        self.closed = True
        if self.failure is not None:
            raise self.failure

    def _check(self, tensor: Any) -> None:
        self._ready()
        if not isinstance(tensor, np.ndarray):
            raise TypeError(
                f"tensor: expected one of simulated device memory, got {type(tensor).__name__}"
            )
        if not tensor.flags.c_contiguous:
            raise ValueError("tensor: expected contiguous, got strides")

    def _ready(self) -> None:
        if self.closed:
            raise peerlane.ClosedError(f"the communicator of rank {self.rank} is closed")
        if self.failure is not None:
            raise self.failure
        self.calls += 1

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.world_size) if peer != self.rank]

    def _put(self, peer: int, data: np.ndarray) -> None:
        self._write(f"{self.rank}-to-{peer}-{self._next(self.rank, peer)}", data)

    def _take(self, peer: int) -> np.ndarray | None:
        path = self.folder / f"{peer}-to-{self.rank}-{self._next(peer, self.rank)}.npy"
        end = time.monotonic() + self.deadline
        while self.failure is None:
            if path.exists():
                data = np.load(path)
                path.unlink()
                return data
            if _is_gone(self.pids[peer]) and not path.exists():
                self.failure = peerlane.PeerLostError(
                    f"rank {self.rank}: the process of rank {peer} is gone"
                )
            elif time.monotonic() > end:
                self.failure = peerlane.DeadlineError(f"rank {self.rank} waited for rank {peer}")
            time.sleep(0.0005)
        return None

    def _next(self, source: int, target: int) -> int:
        self.counts[source, target] = self.counts.get((source, target), 0) + 1
        return self.counts[source, target]

    def _write(self, name: str, data: np.ndarray) -> None:
        partial = self.folder / f"{name}.{self.rank}.partial"
        with partial.open("wb") as file:
            np.save(file, data)
        partial.rename(self.folder / f"{name}.npy")


def _travelled(tensor: np.ndarray, wire: str) -> np.ndarray:
    """What of fp32 arrives over a bf16 wire; other types travel as they are."""
    if tensor.dtype != np.float32 or wire != "bf16":
        return tensor
    bits = tensor.view(np.uint32) if tensor.shape else tensor.reshape(1).view(np.uint32)
    return (
        ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32).reshape(tensor.shape)
    )


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
