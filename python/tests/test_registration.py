"""Registered tensors: values, parts, what is refused, and who keeps them alive."""

import gc
import os
import weakref
from multiprocessing.connection import Connection

import numpy as np
import pytest
from conftest import Group, Processes, declared, integers, load, store, synchronize

import peerlane
from peerlane import Communicator, Registration


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("world", [1, 3])
def test_sums_and_parts(group: Group, world: int, dtype: str) -> None:
    ranks = group(world)
    values = [integers(rank, (640,)) for rank in range(world)]
    arrays = [store(rank, mine, dtype) for rank, mine in zip(ranks, values)]
    registrations = Communicator.register_all(ranks, arrays)
    assert [one.nbytes for one in registrations] == [array.nbytes for array in arrays]
    for rank, array, registration in zip(ranks, arrays, registrations):
        part = array[64:600]
        assert rank.all_reduce(part, registration=registration, **declared(part)) is None
    synchronize(ranks)
    for mine, array in zip(values, arrays):
        expected = mine.copy()
        expected[64:600] = np.sum(values, axis=0, dtype=np.float32)[64:600]
        np.testing.assert_array_equal(load(array, dtype), expected)
    Communicator.deregister_all(ranks, registrations)


def test_what_is_refused(group: Group) -> None:
    ranks = group(2)
    arrays = [rank.empty(64, "float32") for rank in ranks]
    others = [rank.empty(64, "float32") for rank in ranks]
    registrations = Communicator.register_all(ranks, arrays)
    with pytest.raises(ValueError, match="tensor: expected the registered"):
        ranks[0].all_reduce(others[0], registration=registrations[0])
    with pytest.raises(ValueError, match="offset: expected a multiple of 16"):
        ranks[0].all_reduce(arrays[0][1:], registration=registrations[0])
    with pytest.raises(ValueError, match="out: expected None"):
        ranks[0].all_reduce(arrays[0], others[0], registration=registrations[0])
    with pytest.raises(TypeError, match="registration: expected a peerlane.Registration"):
        ranks[0].all_reduce(arrays[0], registration=5)
    theirs = Communicator.register_all(group(2), arrays)
    with pytest.raises(ValueError, match="registration: expected one of this communicator"):
        ranks[1].all_reduce(arrays[1], registration=theirs[1])
    with pytest.raises(ValueError, match="tensors: expected 2, one a rank"):
        Communicator.register_all(ranks, arrays[:1])
    with pytest.raises(ValueError, match="ranks"):
        Communicator.register_all([ranks[1], ranks[1]], [arrays[1], arrays[1]])
    message = "bytes: expected 256, as rank 0 brings, got 128 from rank 1"
    with pytest.raises(ValueError, match=message):
        Communicator.register_all(ranks, [arrays[0], arrays[1][:32]])
    Communicator.deregister_all(ranks, registrations)
    with pytest.raises(ValueError, match="has been deregistered"):
        ranks[0].all_reduce(arrays[0], registration=registrations[0])


def test_a_rank_that_never_registers_is_named(group: Group) -> None:
    ranks = group(2, deadline=0.2)
    with pytest.raises(peerlane.RendezvousError, match="in vain for rank 0"):
        ranks[1].register(ranks[1].empty(64, "float32"))


def test_tensors_live_until_the_end(group: Group) -> None:
    ranks = group(2)
    arrays = [rank.empty(64, "float32") for rank in ranks]
    seen = [weakref.ref(array) for array in arrays]
    registrations: list[Registration] = Communicator.register_all(ranks, arrays)
    del arrays
    gc.collect()
    assert all(ref() is not None for ref in seen)
    Communicator.deregister_all(ranks, registrations)
    gc.collect()
    assert all(ref() is None for ref in seen)


def unshared(rank: int, name: str, answers: Connection) -> None:
    with Communicator(rank, 2, name, f"sim:{rank}/2", patience=60) as communicator:
        try:
            communicator.register(communicator.empty(64, "float32"))
        except peerlane.UnsupportedError as error:
            answers.send(str(error))
        communicator.barrier()


def test_simulated_arrays_are_not_shared_between_processes(processes: Processes) -> None:
    processes.start(unshared, 2, f"peerlane-test-registration-{os.getpid()}")
    said = [processes.answer(rank) for rank in range(2)]
    assert all("cannot be shared with other processes" in text for text in said), said
    assert processes.exit_codes() == [0, 0]
