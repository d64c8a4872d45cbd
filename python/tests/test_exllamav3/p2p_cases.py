"""What every backend for ExLlamaV3 must do, as functions that all ranks of a team run together.

The shapes are those of ExLlamaV3's call sites. Values are small integers wherever the result is
compared exactly, so that a bf16 wire and any order of sums give the same bits as the reference.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from p2p_ranks import Rank, address, host

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=2000)
def values(device: int, shape: Shape, dtype: Any, salt: int = 0) -> np.ndarray:
    """What a device brings: integers from 0 to 15, sums of which bf16 holds exactly."""
    return np.random.default_rng([device, salt]).integers(0, 16, shape).astype(dtype)


def same(tensor: Any, expected: np.ndarray, what: str) -> None:
    got = host(tensor)
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    np.testing.assert_array_equal(got, expected, err_msg=what)


def all_reduce(rank: Rank, shape: Shape, dtype: str, silent: tuple[int, ...] = ()) -> None:
    """The end of an attention, MLP or MoE block. Devices in `silent` hold a stub of it: they pass
    zeros and say so."""
    mine = rank.device not in silent
    tensor = rank.tensor(values(rank.device, shape, dtype) if mine else np.zeros(shape, dtype))
    before = address(tensor)
    rank.backend.all_reduce(tensor, mine)
    rank.backend.end_cpu_reduce_jobs()
    assert address(tensor) == before
    parts = [values(device, shape, dtype) for device in rank.devices if device not in silent]
    same(tensor, np.sum(parts, axis=0).astype(dtype), f"sum of {shape} {dtype}")


def all_reduce_of_a_view(rank: Rank, rows: int, hidden: int) -> None:
    """MoE at batch 1: the first row of a buffer that stays; the other rows stay as they are."""
    whole = rank.tensor(values(rank.device, (rows, hidden), np.float32))
    rank.backend.all_reduce(whole[:1])
    rank.backend.end_cpu_reduce_jobs()
    parts = [values(device, (rows, hidden), np.float32) for device in rank.devices]
    same(whole[:1], np.sum(parts, axis=0)[:1].astype(np.float32), "the row")
    same(whole[1:], values(rank.device, (rows, hidden), np.float32)[1:], "the rows beside it")


def all_reduce_of_reals(rank: Rank, shape: Shape, dtype: str) -> tuple[str, float]:
    """A digest, which must be equal on all ranks, and the largest error over the largest sum."""
    parts = [
        np.random.default_rng(device).standard_normal(shape).astype(dtype)
        for device in rank.devices
    ]
    tensor = rank.tensor(parts[rank.devices.index(rank.device)])
    rank.backend.all_reduce(tensor)
    rank.backend.end_cpu_reduce_jobs()
    exact = np.sum([part.astype(np.float64) for part in parts], axis=0)
    got = host(tensor)
    error = np.abs(got.astype(np.float64) - exact).max() / np.abs(exact).max()
    return hashlib.sha256(got.tobytes()).hexdigest(), float(error)


def broadcast(rank: Rank, shape: Shape, dtype: str, source: int, skip: int = 0) -> None:
    """Routing tables, and whole activations of a block that one rank owns. `skip` elements at the
    start of the buffer make for an odd address."""
    size = int(np.prod(shape)) + skip
    buffer = rank.tensor(values(rank.device, (size,), dtype, salt=1))
    rank.backend.broadcast(buffer[skip:].reshape(shape), source)
    rank.backend.end_cpu_reduce_jobs()
    expected = values(source, (size,), dtype, salt=1)
    same(buffer[skip:], expected[skip:], f"{shape} {dtype} from device {source}")
    same(buffer[:skip], values(rank.device, (size,), dtype, salt=1)[:skip], "the bytes before it")


def queue_gather(
    rank: Rank, rows: Shape, dtype: str, widths: dict[int, int], small: bool = False
) -> tuple[Any, np.ndarray]:
    """Logits (or the best of them, `small`) to the output device; only devices in `widths` take part.

    Returns what arrives and what should, on the output device; two empty arrays elsewhere.
    """
    members = sorted(widths)
    ldims = [widths[device] for device in members]
    brought = {device: values(device, (*rows, widths[device]), dtype, salt=2) for device in members}
    mine = rank.tensor(brought.get(rank.device, np.zeros((*rows, 0), dtype)))
    is_output = rank.device == rank.output_device
    out = rank.tensor(np.full((*rows, sum(ldims)), 77, dtype)) if is_output else None
    call = rank.backend.gather_small if small else rank.backend.gather
    call(mine, out, members, rank.output_device, ldims)
    if out is None:
        return np.empty(0), np.empty(0)
    return out, np.concatenate([brought[device] for device in members], axis=-1)


def gather(
    rank: Rank, rows: Shape, dtype: str, widths: dict[int, int], small: bool = False
) -> None:
    """A gather on its own."""
    out, expected = queue_gather(rank, rows, dtype, widths, small)
    rank.backend.end_cpu_reduce_jobs()
    same(out, expected, f"joined {widths}")


def forward(rank: Rank, layers: int, hidden: int, vocab: dict[int, int]) -> None:
    """One token of a dense model with span-heads norms: small sums between large ones, then logits."""
    for layer in range(layers):
        tiny = rank.tensor(values(rank.device, (8,), np.float32, salt=layer))
        rank.backend.all_reduce(tiny)
        large = rank.tensor(values(rank.device, (1, 1, hidden), np.float32, salt=layer))
        rank.backend.all_reduce(large, True)
        if layer % 2:
            owner = rank.devices[layer % len(rank.devices)]
            rank.backend.broadcast(large, owner)
    logits, joined = queue_gather(rank, (1, 1), "float16", vocab)
    rank.backend.end_cpu_reduce_jobs()
    same(logits, joined, "logits")
    expected = np.sum([values(d, (8,), np.float32, salt=layers - 1) for d in rank.devices], axis=0)
    same(tiny, expected.astype(np.float32), "the last small sum")


def stress(rank: Rank, count: int, seed: int) -> None:
    """Calls of random kinds and sizes, back to back, in passes of up to 50."""
    random = np.random.default_rng(seed)
    # Few different inputs, so that 100,000 calls are made and compared rather than drawn.
    pending: list[tuple[Any, np.ndarray, str]] = []
    for number in range(count):
        salt = number % 13
        kind = random.integers(4)
        size = int(random.choice([8, 24, 4096, 8192, 40960, 65544]))
        if kind < 2:
            silent = (
                rank.devices[int(random.integers(len(rank.devices)))]
                if random.integers(2)
                else None
            )
            mine = rank.device != silent
            brought = values(rank.device, (size,), np.float32, salt)
            tensor = rank.tensor(brought if mine else np.zeros_like(brought))
            rank.backend.all_reduce(tensor, mine)
            parts = [values(d, (size,), np.float32, salt) for d in rank.devices if d != silent]
            expected = np.sum(parts, axis=0).astype(np.float32)
        elif kind == 2:
            source = rank.devices[int(random.integers(len(rank.devices)))]
            tensor = rank.tensor(values(rank.device, (size + 1,), np.uint8, salt))
            rank.backend.broadcast(tensor, source)
            expected = values(source, (size + 1,), np.uint8, salt)
        else:
            widths = {d: int(random.integers(3)) * 128 for d in rank.devices}
            rows = (1, int(random.integers(1, 4)))
            tensor, expected = queue_gather(rank, rows, "float16", widths)
        pending.append((tensor, expected, f"call {number}, seed {seed}"))
        if len(pending) == 50 or number == count - 1:
            rank.backend.end_cpu_reduce_jobs()
            while pending:
                same(*pending.pop())


def empty_tensors(rank: Rank) -> None:
    """No-ops, which post nothing: only some of the ranks make these calls."""
    if rank.device == rank.output_device:
        rank.backend.all_reduce(rank.tensor(np.zeros((0, 4096), np.float32)))
        rank.backend.broadcast(rank.tensor(np.zeros((0,), np.int64)), rank.device)
    gather(rank, (0, 1), "float16", {device: 128 for device in rank.devices})
    all_reduce(rank, (1, 1, 4096), "float32")


def barrier(rank: Rank) -> None:
    rank.backend.fwd_barrier()
    rank.backend.end_cpu_reduce_jobs()


def wrong(rank: Rank, what: str) -> None:
    """A call that must raise before anything is launched, on one rank only."""
    backend, other = rank.backend, next(d for d in rank.devices if d != rank.device)
    tensor = rank.tensor(np.ones((4, 128), np.float32))
    out = rank.tensor(np.ones((4, 256), np.float32))
    calls = {
        "host memory": lambda: backend.all_reduce([1.0, 2.0]),
        "strides": lambda: backend.all_reduce(tensor[:, ::2]),
        "element type": lambda: backend.all_reduce(rank.tensor(np.ones(8, np.int64))),
        "source": lambda: backend.broadcast(tensor, 99),
        "gather device": lambda: backend.gather(
            tensor, out, [rank.device, 99], rank.device, [128, 128]
        ),
        "ldims count": lambda: backend.gather(
            tensor, out, [rank.device, other], rank.device, [128]
        ),
        "own width": lambda: backend.gather(
            tensor, out, [rank.device, other], rank.device, [64, 192]
        ),
        "output width": lambda: backend.gather(
            tensor, tensor, [rank.device, other], rank.device, [128, 128]
        ),
        "output missing": lambda: backend.gather(
            tensor, None, [rank.device, other], rank.device, [128, 128]
        ),
    }
    calls[what]()


def idle(rank: Rank) -> None:
    """A pass without collectives."""
    rank.backend.end_cpu_reduce_jobs()


def abort(rank: Rank) -> None:
    """What somebody outside the pass may do."""
    rank.backend.communicator.abort()


def leave(rank: Rank) -> None:
    rank.backend.close()
    rank.backend.close()


def pid(rank: Rank) -> int:
    import os

    return os.getpid()
