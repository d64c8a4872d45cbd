"""all_gather, broadcast, gather and barrier: any element type, odd sizes, ranks with nothing."""

import numpy as np
import pytest
from conftest import Group, synchronize

from peerlane import Communicator

DTYPES = ["uint8", "bool", "float16", "int32", "float64", "complex128"]
SHAPES = [(1,), (3,), (5, 7), (2, 3, 11), (4001,)]


def random(rank: Communicator, seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of random bytes (booleans are 0 or 1) on the rank's GPU."""
    array = rank.empty(shape, dtype)
    limit = 2 if dtype == "bool" else 256
    raw = array.reshape(-1).view(np.uint8)
    raw[:] = np.random.default_rng(seed).integers(0, limit, raw.shape, np.uint8)
    return array


def assert_bytes(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather(group: Group, dtype: str) -> None:
    ranks = group(3)
    for shape in SHAPES:
        arrays = [random(rank, index, shape, dtype) for index, rank in enumerate(ranks)]
        outs = [rank.empty((3, *shape), dtype) for rank in ranks]
        expected = np.stack(arrays)
        # Rank 1 works in place.
        outs[1][1] = arrays[1]
        arrays[1] = outs[1][1]
        for rank, array, out in zip(ranks, arrays, outs):
            rank.all_gather(array, out)
        synchronize(ranks)
        for out in outs:
            assert_bytes(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("root", [0, 3])
def test_broadcast(group: Group, root: int, dtype: str) -> None:
    ranks = group(4)
    for shape in SHAPES:
        arrays = [random(rank, index, shape, dtype) for index, rank in enumerate(ranks)]
        expected = arrays[root].copy()
        for rank, array in zip(ranks, arrays):
            rank.broadcast(array, root)
        synchronize(ranks)
        for array in arrays:
            assert_bytes(array, expected)


def test_a_root_may_broadcast_what_it_must_not_write(group: Group) -> None:
    ranks = group(2)
    source = random(ranks[0], 1, (9,), "int32")
    source.flags.writeable = False
    target = ranks[1].empty(9, "int32")
    ranks[0].broadcast(source, 0)
    ranks[1].broadcast(target, root=0)
    synchronize(ranks)
    assert_bytes(target, source)


@pytest.mark.parametrize("widths", [[3, 5, 2], [0, 4, 1], [4, 0, 0], [0, 0, 7], (1, 1, 1)])
@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("rows", [(1,), (6,), (2, 3), ()])
def test_gather(group: Group, rows: tuple[int, ...], root: int, widths: list[int]) -> None:
    ranks = group(3)
    arrays = [
        random(rank, index, (*rows, width), "float16") if width else None
        for index, (rank, width) in enumerate(zip(ranks, widths))
    ]
    out = ranks[root].empty((*rows, sum(widths)), "float16")
    for index, (rank, array) in enumerate(zip(ranks, arrays)):
        rank.gather(array, out if index == root else None, root, widths)
    synchronize(ranks)
    brought = [array for array in arrays if array is not None]
    assert_bytes(out, np.concatenate(brought, axis=-1))


def test_a_gather_of_nothing(group: Group) -> None:
    ranks = group(2)
    for rank in ranks:
        rank.gather(None, None, 0, [0, 0])
    ranks[1].gather(None, None, 0, [4, 0])
    empty = [rank.empty((0, 4), "int32") for rank in ranks]
    ranks[0].gather(empty[0], ranks[0].empty((0, 8), "int32"), 0, [4, 4])
    ranks[1].gather(empty[1], None, 0, [4, 4])
    synchronize(ranks)


def test_barriers_and_streams(group: Group) -> None:
    class Stream:
        cuda_stream = 0

    ranks = group(4)
    for stream in (None, 0, Stream()):
        for rank in ranks:
            assert rank.barrier(stream=stream) is None
        for rank in ranks:
            rank.synchronize(stream)
            rank.synchronize(stream=stream)


@pytest.mark.parametrize("route", ["auto", "chain", "copy-hub", "copy-direct"])
def test_a_broadcast_by_a_route_of_its_own(group: Group, route: str) -> None:
    ranks = group(3, staging_bytes=1 << 20)
    arrays = [random(rank, index, (4001,), "uint8") for index, rank in enumerate(ranks)]
    expected = arrays[1].copy()
    for rank, array in zip(ranks, arrays):
        rank.broadcast(array, 1, route=route)
    synchronize(ranks)
    for array in arrays:
        assert_bytes(array, expected)
    copies = ranks[0].usage()["scheduled"]["calls"]
    assert copies == (1 if route.startswith("copy-") else 0)
    for rank, array in zip(ranks, arrays):
        rank.broadcast_async(array, 1, route=route).wait()
    synchronize(ranks)


def test_a_route_that_is_none(group: Group) -> None:
    (rank,) = group(1)
    array = random(rank, 0, (4,), "uint8")
    with pytest.raises(ValueError, match="^broadcast: route: expected one of 'auto', 'direct', "):
        rank.broadcast(array, 0, route="ring")
    with pytest.raises(TypeError, match="^broadcast: route: expected one of 'auto', 'direct', "):
        rank.broadcast_async(array, 0, route=1)
