"""Objects with __cuda_array_interface__, as cupy's arrays have it: here over simulated memory."""

import numpy as np
import pytest
from conftest import Group, synchronize


class Foreign:
    """An array of another library, in versions 2 and 3 of the interface."""

    def __init__(self, array: np.ndarray, **changes: object) -> None:
        facts = array.__array_interface__
        shown = {name: facts[name] for name in ("data", "shape", "typestr")}
        self.__cuda_array_interface__ = {**shown, "version": 3, "strides": None, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"stream": None},
        {"stream": 1},
        {"strides": (20, 4)},
    ],
)
def test_reductions(group: Group, changes: dict[str, object]) -> None:
    ranks = group(2)
    arrays = [rank.empty((3, 5), "float32") for rank in ranks]
    for rank, array in zip(ranks, arrays):
        array[...] = 3
        rank.all_reduce(Foreign(array, **changes), op="sum")
    synchronize(ranks)
    assert (arrays[0] == 6).all() and (arrays[1] == 6).all()


def test_movement(group: Group) -> None:
    ranks = group(2)
    arrays = [rank.empty((2, 3), "int16") for rank in ranks]
    for index, array in enumerate(arrays):
        array[...] = index
    out = ranks[1].empty((2, 6), "int16")
    ranks[0].gather(Foreign(arrays[0]), None, 1, [3, 3])
    ranks[1].gather(Foreign(arrays[1]), Foreign(out), 1, [3, 3])
    synchronize(ranks)
    np.testing.assert_array_equal(out, np.concatenate(arrays, axis=1))


@pytest.mark.parametrize(
    ("kind", "message", "changes"),
    [
        (ValueError, "expected a contiguous tensor, got one with gaps", {"strides": (24, 4)}),
        (ValueError, "expected a stream of GPU 0, where rank 0 is, got no stream", {"stream": 9}),
        (TypeError, "expected float32, float16 or bfloat16, got .*Foreign", {"typestr": ">f4"}),
        (ValueError, "expected elements of a fixed size, got O", {"typestr": "O"}),
        (TypeError, "got .*Foreign in host memory", {"data": (4096, False)}),
        (ValueError, "expected a writable array, got a read-only one", {"read_only": True}),
        (ValueError, "expected typestr in the array interface, got none", {"typestr": None}),
    ],
)
def test_mistakes(group: Group, kind: type[Exception], message: str, changes: dict) -> None:
    rank = group(2)[0]
    array = rank.empty((3, 5), "float32")
    foreign = Foreign(array, **changes)
    facts = foreign.__cuda_array_interface__
    if facts.pop("read_only", False):
        facts["data"] = (facts["data"][0], True)
    if facts["typestr"] is None:
        del facts["typestr"]
    with pytest.raises(kind, match=f"^all_reduce: .*{message}"):
        rank.all_reduce(foreign)


def test_a_tensor_must_end_in_the_memory_where_it_begins(group: Group) -> None:
    rank = group(2)[0]
    array = rank.empty(64, "float32")
    message = "^all_reduce: tensor: expected memory of sim:0/2, got memory that GPU 0 lacks"
    with pytest.raises(ValueError, match=message):
        rank.all_reduce(Foreign(array, shape=(1 << 30,)))
