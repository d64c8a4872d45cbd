"""Every mistake has its exception, and a message that names the call, the argument, what was
expected and what came. A refused call has changed nothing."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Group, integers, store, synchronize

import peerlane
from peerlane import Communicator

Call = Callable[[Communicator, np.ndarray], object]


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def misaligned(rank: Communicator) -> np.ndarray:
    return rank.empty(17, "uint8")[1:].view("float32")


# Rank 0 of two; the array has 6 x 4 float32.
WRONG: list[tuple[type[Exception], str, Call]] = [
    (
        TypeError,
        "all_reduce: tensor: expected memory of sim:0/2, got numpy.ndarray in host memory",
        lambda r, a: r.all_reduce(np.zeros(4, np.float32)),
    ),
    (
        TypeError,
        "all_reduce: tensor: expected an array in memory of sim:0/2, as Communicator.empty makes "
        "it, got list",
        lambda r, a: r.all_reduce([1.0]),
    ),
    (
        TypeError,
        "all_reduce: tensor: expected float32, float16 or bfloat16, got int64",
        lambda r, a: r.all_reduce(r.empty(4, np.int64)),
    ),
    (
        TypeError,
        "all_reduce: tensor: expected float16, got float32",
        lambda r, a: r.all_reduce(a, dtype="float16"),
    ),
    (
        ValueError,
        "all_reduce: dtype: expected one of 'float32', 'float16', 'bfloat16', got 'int8'",
        lambda r, a: r.all_reduce(a, dtype="int8"),
    ),
    (
        ValueError,
        "all_reduce: op: expected one of 'sum', 'max', 'min', 'avg', got 'mul'",
        lambda r, a: r.all_reduce(a, op="mul"),
    ),
    (
        TypeError,
        "all_reduce: op: expected one of 'sum', 'max', 'min', 'avg', got int",
        lambda r, a: r.all_reduce(a, op=1),
    ),
    (
        ValueError,
        "reduce_scatter: wire: expected one of 'native', 'bf16', got 'fp8'",
        lambda r, a: r.reduce_scatter(a, r.empty(12, "float32"), wire="fp8"),
    ),
    (
        TypeError,
        "all_reduce: contribution: expected a bool, got int",
        lambda r, a: r.all_reduce(a, contribution=1),
    ),
    (
        ValueError,
        "all_reduce: tensor: expected a contiguous tensor, got one with gaps or in another order",
        lambda r, a: r.all_reduce(a.T),
    ),
    (
        ValueError,
        "all_reduce: tensor: expected a writable array, got a read-only one",
        lambda r, a: r.all_reduce(read_only(a)),
    ),
    (
        ValueError,
        "all_reduce: tensor: expected an address aligned to 4 bytes, got 0x",
        lambda r, a: r.all_reduce(misaligned(r)),
    ),
    (
        ValueError,
        "all_reduce: out: expected 24 elements (as many as tensor has), got 23",
        lambda r, a: r.all_reduce(a, r.empty(23, "float32")),
    ),
    (
        TypeError,
        "all_reduce: out: expected float32, got float16",
        lambda r, a: r.all_reduce(a, r.empty(24, "float16")),
    ),
    (
        ValueError,
        "all_reduce: out: expected memory that is tensor's or does not overlap it, got 0x",
        lambda r, a: r.all_reduce(a[:4], a[1:5]),
    ),
    (
        TypeError,
        "all_reduce: stream: expected a torch.cuda.Stream, the int of a CUDA stream, or None, got "
        "str",
        lambda r, a: r.all_reduce(a, stream="side"),
    ),
    (
        ValueError,
        "all_reduce: stream: expected a stream of GPU 0, where rank 0 is, got no stream",
        lambda r, a: r.all_reduce(a, stream=77),
    ),
    (
        ValueError,
        "reduce_scatter: tensor: expected a number of elements that 2 ranks can share, got 5",
        lambda r, a: r.reduce_scatter(r.empty(5, "float32"), r.empty(2, "float32")),
    ),
    (
        ValueError,
        "reduce_scatter: out: expected 12 elements (one rank's part of tensor), got 24",
        lambda r, a: r.reduce_scatter(a, a),
    ),
    (
        ValueError,
        "reduce_scatter: out: expected memory that is tensor's or does not overlap it, got",
        lambda r, a: r.reduce_scatter(a, a[3:]),
    ),
    (
        ValueError,
        "all_gather: out: expected 48 elements (tensor's, times the world size), got 24",
        lambda r, a: r.all_gather(a, r.empty(24, "float32")),
    ),
    (
        TypeError,
        "all_gather: out: expected elements of 4 bytes, as in tensor, got 2 bytes",
        lambda r, a: r.all_gather(a, r.empty(48, "int16")),
    ),
    (
        TypeError,
        "all_gather: out: expected an array in memory of sim:0/2, as Communicator.empty makes it, "
        "got None",
        lambda r, a: r.all_gather(a, None),
    ),
    (
        ValueError,
        "broadcast: root: expected a rank from 0 to 1, got 2",
        lambda r, a: r.broadcast(a, 2),
    ),
    (
        ValueError,
        "broadcast: root: expected an int of 0 or more, got -1",
        lambda r, a: r.broadcast(a, -1),
    ),
    (
        TypeError,
        "broadcast: root: expected an int of 0 or more, got str",
        lambda r, a: r.broadcast(a, "0"),
    ),
    (
        ValueError,
        "broadcast: tensor: expected a writable array, got a read-only one",
        lambda r, a: r.broadcast(read_only(a), 1),
    ),
    (
        ValueError,
        "gather: widths: expected 2 widths, one a rank, got 3",
        lambda r, a: r.gather(a, None, 1, [4, 4, 4]),
    ),
    (
        TypeError,
        "gather: widths: expected a sequence of ints, got int",
        lambda r, a: r.gather(a, None, 1, 4),
    ),
    (
        TypeError,
        "gather: widths: expected an int of 0 or more, got float",
        lambda r, a: r.gather(a, None, 1, [4.0, 4]),
    ),
    (
        ValueError,
        "gather: tensor: expected a last dimension of 3 (widths[0]), got 4",
        lambda r, a: r.gather(a, None, 1, [3, 4]),
    ),
    (
        TypeError,
        "gather: tensor: expected a tensor whose last dimension is 4 (widths[0]), got None",
        lambda r, a: r.gather(None, None, 1, [4, 4]),
    ),
    (
        TypeError,
        "gather: out: expected a tensor whose last dimension is 8 (the sum of widths), got None",
        lambda r, a: r.gather(a, None, 0, [4, 4]),
    ),
    (
        ValueError,
        "gather: out: expected None on rank 0, since the root is 1, got numpy.ndarray",
        lambda r, a: r.gather(a, r.empty((6, 8), "float32"), 1, [4, 4]),
    ),
    (
        ValueError,
        "gather: out: expected 48 elements (tensor's rows of all widths), got 40",
        lambda r, a: r.gather(a, r.empty((5, 8), "float32"), 0, [4, 4]),
    ),
    (
        ValueError,
        "gather: out: expected memory that does not overlap tensor, got 0x",
        lambda r, a: r.gather(a, a, 0, [4, 0]),
    ),
    (
        ValueError,
        "gather: root: expected a rank from 0 to 1, got 2",
        lambda r, a: r.gather(a, None, 2, [4, 4]),
    ),
    (
        TypeError,
        "set_deadline: seconds: expected seconds, as a number, got str",
        lambda r, a: r.set_deadline("soon"),
    ),
    (
        ValueError,
        "set_deadline: seconds: expected seconds, more than 0, got -1",
        lambda r, a: r.set_deadline(-1),
    ),
    (
        ValueError,
        "empty: shape: expected an int of 0 or more, got -1",
        lambda r, a: r.empty((3, -1), "float32"),
    ),
    (
        TypeError,
        "empty: shape: expected an int or a sequence of ints, got None",
        lambda r, a: r.empty(None, "float32"),
    ),
    (
        ValueError,
        "empty: shape: expected a size that memory can have, got (9223372036854775807, 9)",
        lambda r, a: r.empty((2**63 - 1, 9), "float32"),
    ),
    (
        peerlane.DriverError,
        "cuMemAlloc on GPU 0: CUDA_ERROR_OUT_OF_MEMORY (2)",
        lambda r, a: r.empty(1 << 40, "uint8"),
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[wrong[1] for wrong in WRONG])
def test_wrong_arguments(group: Group, kind: type[Exception], message: str, call: Call) -> None:
    ranks = group(2)
    values = integers(0, (6, 4))
    arrays = [store(rank, values, "float32") for rank in ranks]
    with pytest.raises(kind, match="^" + re.escape(message)):
        call(ranks[0], arrays[0])
    # Nothing was queued and nothing counted: the group works as if nothing had happened.
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array)
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array, 2 * values)


def test_a_tensor_of_another_gpu(group: Group) -> None:
    ranks = group(2)
    other = ranks[1].empty(4, "float32")
    message = "^all_reduce: tensor: expected memory of sim:0/2, got memory of GPU 1$"
    with pytest.raises(ValueError, match=message):
        ranks[0].all_reduce(other)


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "Communicator: rank: expected an int of 0 or more, got str", {"rank": "0"}),
        (ValueError, "Communicator: rank: expected an int of 0 or more, got -1", {"rank": -1}),
        (TypeError, "Communicator: name: expected a str, got bytes", {"name": b"x"}),
        (ValueError, "Communicator: device: expected the index of a GPU", {"device": "cuda"}),
        (ValueError, "Communicator: device: expected the index of a GPU", {"device": "sim:2/2"}),
        (ValueError, "Communicator: device: expected the index of a GPU", {"device": "sim:0/17"}),
        (ValueError, "Communicator: device: expected the index of a GPU", {"device": -1}),
        (ValueError, "Communicator: device: expected the index of a GPU", {"device": True}),
        (TypeError, "Communicator: device: expected the index of a GPU", {"device": 0.0}),
        (ValueError, "Communicator: deadline: expected seconds, more than 0", {"deadline": 0}),
        (ValueError, "Communicator: patience: expected seconds", {"patience": float("nan")}),
        (
            ValueError,
            "Communicator: algorithm: expected one of 'auto', 'packet'",
            {"algorithm": "rin"},
        ),
        (ValueError, "Communicator: route: expected one of 'auto', 'direct'", {"route": "ring"}),
        (TypeError, "Communicator: fixed: expected a bool, got int", {"fixed": 1}),
        (ValueError, "Communicator: tuning: expected 'auto', 'off' or a path", {"tuning": ""}),
        (
            TypeError,
            "Communicator: tuning: expected 'auto', 'off' or a path, got int",
            {"tuning": 7},
        ),
        (TypeError, "Communicator: staging_bytes: expected an int", {"staging_bytes": "1M"}),
        (ValueError, "Communicator: chunk_bytes: expected an int of 0", {"chunk_bytes": -1}),
        (
            ValueError,
            "Communicator: transport: expected one of 'auto', 'p2p', 'host', got 'nvlink'",
            {"transport": "nvlink"},
        ),
        (TypeError, "Communicator: transport: expected one of", {"transport": 1}),
        (ValueError, "Communicator: max_blocks: expected at most", {"max_blocks": 1 << 40}),
    ],
)
def test_wrong_ways_to_join(kind: type[Exception], message: str, arguments: dict) -> None:
    valid = {"rank": 0, "world_size": 2, "name": "nobody", "device": "sim:0/2"}
    with pytest.raises(kind, match="^" + re.escape(message)):
        Communicator(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PEERLANE_ALGORITHM", "rings", "one of auto, packet, full"),
        ("PEERLANE_ROUTE", "ring", "one of auto, direct, hub"),
        ("PEERLANE_FIXED", "maybe", "1, true, on, yes"),
    ],
)
def test_an_environment_that_means_nothing(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = f"environment: {variable}: expected {expected}"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Communicator.connect(["sim:0/2", "sim:1/2"])


def test_an_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # A ring's bits depend on size, so fixed refuses it; the argument's two-shot it takes.
    monkeypatch.setenv("PEERLANE_ALGORITHM", "ring")
    devices = [f"sim:{rank}/3" for rank in range(3)]
    with pytest.raises(ValueError, match="one whose sums are the same at any size"):
        Communicator.connect(devices, fixed=True)
    for rank in Communicator.connect(devices, fixed=True, algorithm="two-shot"):
        rank.close()


@pytest.mark.parametrize(
    ("kind", "message", "devices"),
    [
        (TypeError, "connect: devices: expected a list of GPUs, got str", "sim:0/2"),
        (TypeError, "connect: devices: expected a list of GPUs, got int", 2),
        (
            ValueError,
            "connect: devices: expected GPUs of one machine, like sim:0/2, got sim:1/3",
            ["sim:0/2", "sim:1/3"],
        ),
    ],
)
def test_wrong_ways_to_connect(kind: type[Exception], message: str, devices: object) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        Communicator.connect(devices)


def test_exceptions_are_what_python_programs_expect() -> None:
    assert issubclass(peerlane.Error, RuntimeError)
    assert issubclass(peerlane.DeadlineError, TimeoutError)
    named = [getattr(peerlane, name) for name in peerlane.__all__ if name.endswith("Error")]
    assert len(named) == 12
    for kind in named:
        assert issubclass(kind, peerlane.Error)
        assert str(kind("why")) == "why"
