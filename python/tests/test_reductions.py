"""all_reduce and reduce_scatter against numpy: types, operators, wires, sizes, places."""

import functools

import numpy as np
import pytest
from conftest import Group, declared, integers, load, store, synchronize

DTYPES = ["float32", "float16", "bfloat16"]
SIZES = [1, 2, 3, 5, 8, 127, 1024, 4099, 20_001]
COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def reference(values: list[np.ndarray], op: str) -> np.ndarray:
    if op == "avg":
        return functools.reduce(np.add, values) * np.float32(1 / len(values))
    return functools.reduce(COMBINE[op], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_sums_of_all_sizes_in_place(group: Group, world: int, dtype: str) -> None:
    ranks = group(world)
    for size in SIZES:
        values = [integers(size + rank, (size,)) for rank in range(world)]
        arrays = [store(rank, mine, dtype) for rank, mine in zip(ranks, values)]
        for rank, array in zip(ranks, arrays):
            assert rank.all_reduce(array, **declared(array)) is None
        synchronize(ranks)
        for array in arrays:
            np.testing.assert_array_equal(load(array, dtype), reference(values, "sum"))


@pytest.mark.parametrize("op", ["sum", "max", "min", "avg"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_into_another_tensor(group: Group, dtype: str, op: str) -> None:
    ranks = group(4)
    values = [integers(rank, (7, 13)) for rank in range(4)]
    arrays = [store(rank, mine, dtype) for rank, mine in zip(ranks, values)]
    outs = [rank.empty((7, 13), dtype) for rank in ranks]
    for rank, array, out in zip(ranks, arrays, outs):
        rank.all_reduce(array, out, op=op, **declared(array))
    synchronize(ranks)
    for mine, array, out in zip(values, arrays, outs):
        np.testing.assert_array_equal(load(array, dtype), mine)
        np.testing.assert_array_equal(load(out, dtype), reference(values, op))


def test_a_bf16_wire_rounds_what_travels(group: Group) -> None:
    ranks = group(2)
    # 257 has one bit more than bfloat16 holds.
    arrays = [store(rank, np.full(1000, 257, np.float32), "float32") for rank in ranks]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array, wire="bf16")
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array, np.full(1000, 512, np.float32))


@pytest.mark.parametrize("algorithm", ["auto", "packet", "full", "two-shot", "ring", "tree"])
def test_every_algorithm(group: Group, algorithm: str) -> None:
    ranks = group(3, algorithm=algorithm, max_blocks=2, mailbox_bytes=1 << 20)
    values = [integers(rank, (3001,)) for rank in range(3)]
    arrays = [store(rank, mine, "float16") for rank, mine in zip(ranks, values)]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array)
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array.astype(np.float32), reference(values, "sum"))


@pytest.mark.parametrize("transport", ["auto", "p2p", "host"])
def test_every_transport(group: Group, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERLANE_TRANSPORT", transport)
    inherited = group(2, max_blocks=2)
    # What the caller says goes before what the environment says.
    monkeypatch.setenv("PEERLANE_TRANSPORT", "p2p" if transport == "host" else "host")
    for ranks in (inherited, group(2, max_blocks=2, transport=transport)):
        used = "host" if transport == "host" else "p2p"
        assert [ranks[0].transport(0, 1), ranks[1].transport(1, 0)] == [used, used]
        values = [integers(rank, (40_000,)) for rank in range(2)]
        arrays = [store(rank, mine, "float32") for rank, mine in zip(ranks, values)]
        for rank, array in zip(ranks, arrays):
            rank.all_reduce(array)
        synchronize(ranks)
        for array in arrays:
            np.testing.assert_array_equal(array, reference(values, "sum"))


def test_a_transport_that_does_not_exist(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERLANE_TRANSPORT", "nvlink")
    with pytest.raises(
        ValueError, match="PEERLANE_TRANSPORT: expected auto, p2p, host, got nvlink"
    ):
        group(2)
    monkeypatch.delenv("PEERLANE_TRANSPORT")
    with pytest.raises(ValueError, match="transport: from and to: expected a rank from 0 to 1"):
        group(2)[0].transport(0, 2)


def test_a_rank_without_contribution_receives(group: Group) -> None:
    ranks = group(3)
    arrays = [store(rank, np.full(33, np.nan, np.float32), "float32") for rank in ranks]
    arrays[0][:] = 2
    arrays[2][:] = 5
    for index, (rank, array) in enumerate(zip(ranks, arrays)):
        rank.all_reduce(array, contribution=index != 1)
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array, np.full(33, 7, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1, 3, 1001])
def test_reduce_scatter(group: Group, part: int, dtype: str) -> None:
    ranks = group(4)
    values = [integers(rank, (4, part)) for rank in range(4)]
    arrays = [store(rank, mine, dtype) for rank, mine in zip(ranks, values)]
    outs = [rank.empty(part, dtype) for rank in ranks]
    # Ranks 2 and 3 work in place: out is their own part.
    outs[2:] = [array[index] for index, array in list(enumerate(arrays))[2:]]
    for rank, array, out in zip(ranks, arrays, outs):
        rank.reduce_scatter(array, out, op="max", **declared(array))
    synchronize(ranks)
    expected = reference(values, "max")
    for index, out in enumerate(outs):
        np.testing.assert_array_equal(load(out, dtype), expected[index])


def test_reduce_scatter_over_a_bf16_wire_without_a_contribution(group: Group) -> None:
    ranks = group(2)
    arrays = [store(rank, np.full(600, 257, np.float32), "float32") for rank in ranks]
    outs = [rank.empty(300, "float32") for rank in ranks]
    for index, rank in enumerate(ranks):
        rank.reduce_scatter(arrays[index], outs[index], wire="bf16", contribution=index == 0)
    synchronize(ranks)
    for out in outs:
        np.testing.assert_array_equal(out, np.full(300, 256, np.float32))


@pytest.mark.parametrize("shape", [0, (0,), (3, 0), ()])
def test_empty_tensors_and_scalars(group: Group, shape: int | tuple[int, ...]) -> None:
    ranks = group(2)
    arrays = [rank.empty(shape, "float32") for rank in ranks]
    for array in arrays:
        array[...] = 3
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array)
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array, np.full(shape, 6, np.float32))


def test_uint16_is_bfloat16_only_if_declared(group: Group) -> None:
    ranks = group(2)
    arrays = [rank.empty(10, "uint16") for rank in ranks]
    for array in arrays:
        array[:] = 0x3F80  # 1.0
    with pytest.raises(TypeError, match="^all_reduce: tensor: expected .*bfloat16, got uint16$"):
        ranks[0].all_reduce(arrays[0])
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array, dtype="bfloat16")
    synchronize(ranks)
    for array in arrays:
        np.testing.assert_array_equal(array, np.full(10, 0x4000, np.uint16))


def test_strings_made_at_run_time_are_choices_too(group: Group) -> None:
    (rank,) = group(1)
    array = store(rank, integers(0, (5,)), "float32")
    rank.all_reduce(array, op="".join(["su", "m"]), wire="".join(["nat", "ive"]))
    rank.all_reduce(array, dtype="".join(["float", "32"]))
    rank.synchronize()
    np.testing.assert_array_equal(array, integers(0, (5,)))


@pytest.mark.parametrize("op", ["sum", "max"])
def test_a_prepared_call_is_the_call(group: Group, op: str) -> None:
    ranks = group(3)
    values = [np.linspace(0.1, 1, 1001, dtype=np.float32) * (rank + 1) for rank in range(3)]
    plain = [store(rank, mine, "float32") for rank, mine in zip(ranks, values)]
    prepared = [store(rank, mine, "float32") for rank, mine in zip(ranks, values)]
    runs = [rank.prepare_all_reduce(op=op, wire="bf16").run for rank in ranks]
    for number, (rank, run) in enumerate(zip(ranks, runs)):
        rank.all_reduce(plain[number], op=op, wire="bf16", contribution=number != 1)
        run(prepared[number], number != 1)
    synchronize(ranks)
    for one, other in zip(plain, prepared):
        np.testing.assert_array_equal(load(one, "float32"), load(other, "float32"))


@pytest.mark.parametrize("algorithm", ["auto", "two-shot", "copy-one-shot", "copy-ring"])
def test_a_call_with_an_algorithm_of_its_own(group: Group, algorithm: str) -> None:
    ranks = group(3, staging_bytes=1 << 20, chunk_bytes=1 << 10)
    values = [integers(rank, (1001,)) for rank in range(3)]
    arrays = [store(rank, value, "float32") for rank, value in zip(ranks, values)]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array, algorithm=algorithm)
    synchronize(ranks)
    assert all((array == sum(values)).all() for array in arrays)
    copies = ranks[0].usage()["scheduled"]["calls"]
    assert copies == (1 if algorithm.startswith("copy-") else 0)
    for rank, array in zip(ranks, arrays):
        rank.all_reduce_async(array, algorithm=algorithm).wait()
    synchronize(ranks)


def test_an_algorithm_that_a_call_cannot_have(group: Group) -> None:
    (rank,) = group(1)
    array = store(rank, integers(0, (64,)), "float32")
    with pytest.raises(
        ValueError, match="^all_reduce: algorithm: expected one of 'auto', 'packet'"
    ):
        rank.all_reduce(array, algorithm="rin")
    registration = rank.register(array)
    with pytest.raises(ValueError, match="^all_reduce: algorithm: expected None beside"):
        rank.all_reduce(array, algorithm="ring", registration=registration)
    rank.deregister(registration)
