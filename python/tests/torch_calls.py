"""Calls with torch tensors, run by test_torch.py in processes of their own, with torch or with the
little of it that fake_torch has. The tensors are CPU tensors in simulated memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peerlane import Communicator


def raises(
    kind: type[Exception], message: str, call: Callable[..., None], *arguments: Any, **keywords: Any
) -> None:
    try:
        call(*arguments, **keywords)
    except kind as error:
        assert str(error).startswith(message), str(error)
    else:
        raise AssertionError(f"nothing raised: {message}")


class Own(torch.Tensor):
    """A subclass, which calls recognise the long way."""


ranks = Communicator.connect(["sim:0/2", "sim:1/2"])


def tensors(shape: tuple[int, ...], dtype: str, value: float) -> tuple[list, list]:
    arrays = [rank.empty(shape, dtype) for rank in ranks]
    for array in arrays:
        array[...] = value
    return arrays, [torch.from_numpy(array) for array in arrays]


def run(call: Callable[[Communicator, int], None]) -> None:
    for rank in ranks:
        call(rank, rank.rank)
    for rank in ranks:
        rank.synchronize()


for kind in ("float32", "float16"):
    for wrap in (
        lambda tensor: tensor,
        lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
        lambda tensor: tensor.as_subclass(Own),
    ):
        arrays, plain = tensors((3, 7), kind, 4)
        wrapped = [wrap(tensor) for tensor in plain]
        run(lambda rank, i: rank.all_reduce(wrapped[i]))
        assert all((array == 8).all() for array in arrays)

# bfloat16 from torch's own dtype, and declared on torch.uint16.
for arguments, dtype in (({}, torch.bfloat16), ({"dtype": "bfloat16"}, None)):
    arrays, plain = tensors((9,), "uint16", 0x3F80)
    halves = [tensor.view(dtype) if dtype else tensor for tensor in plain]
    run(lambda rank, i: rank.all_reduce(halves[i], **arguments))
    assert all((array == 0x4000).all() for array in arrays)

arrays, plain = tensors((4,), "float32", 1)
outs, into = tensors((2,), "float32", 0)
run(lambda rank, i: rank.reduce_scatter(plain[i], into[i], op="sum"))
assert all((out == 2).all() for out in outs)

arrays, plain = tensors((3,), "int64", 5)
outs, into = tensors((2, 3), "int64", 0)
run(lambda rank, i: rank.all_gather(plain[i], into[i]))
assert all((out == 5).all() for out in outs)
arrays[1][:] = 6
run(lambda rank, i: rank.broadcast(plain[i], 1))
assert (arrays[0] == 6).all()

arrays, plain = tensors((2, 3), "uint8", 1)
arrays[1][...] = 2
outs, into = tensors((2, 6), "uint8", 0)
run(lambda rank, i: rank.gather(plain[i], into[i] if i == 0 else None, 0, [3, 3]))
assert np.array_equal(outs[0], np.concatenate(arrays, axis=1))
# torch and numpy may meet in one call.
run(lambda rank, i: rank.gather(plain[i], outs[i] if i == 0 else None, 0, [3, 3]))

rank = ranks[0]
_, plain = tensors((2, 3), "float32", 1)
raises(
    TypeError,
    "all_reduce: tensor: expected memory of sim:0/2, got torch.Tensor in host",
    rank.all_reduce,
    torch.from_numpy(np.zeros(4, np.float32)),
)
raises(
    ValueError,
    "all_reduce: tensor: expected memory of sim:0/2, got memory of GPU 1",
    rank.all_reduce,
    plain[1],
)
raises(ValueError, "all_reduce: tensor: expected a contiguous tensor", rank.all_reduce, plain[0].T)
raises(
    TypeError,
    "all_reduce: tensor: expected float32, float16 or bfloat16, got torch.int64",
    rank.all_reduce,
    torch.from_numpy(rank.empty(3, "int64")),
)
raises(
    TypeError,
    "all_reduce: tensor: expected float16, got torch.float32",
    rank.all_reduce,
    plain[0],
    dtype="float16",
)
raises(
    ValueError,
    "gather: tensor: expected a last dimension of 2 (widths[0]), got 3",
    rank.gather,
    plain[0],
    None,
    1,
    [2, 3],
)
raises(
    ValueError,
    "connect: devices: expected the index of a GPU, 'cuda:0', a torch.device with an "
    "index, or 'sim:0/8', got device(type='cpu')",
    Communicator.connect,
    [torch.device("cpu")],
)
run(lambda rank, i: rank.barrier())
for rank in ranks:
    rank.close()
print("torch is", getattr(torch, "__version__", "faked"))
