"""Recorded lists on a thread for each rank: results, order, errors and what is kept alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import peerlane
from peerlane import Communicator, Workers, WorkList

WORLD = 3
COUNT = 1000


@pytest.fixture
def ranks() -> list[Communicator]:
    return Communicator.connect([f"sim:{rank}/{WORLD}" for rank in range(WORLD)], deadline=30)


@pytest.fixture
def workers(ranks: list[Communicator]) -> Iterator[Workers]:
    with Workers(ranks) as workers:
        yield workers


def filled(ranks: list[Communicator], count: int = COUNT) -> list[Any]:
    """A tensor on each rank, of the rank's number and one."""
    tensors = [rank.empty(count, "float32") for rank in ranks]
    for rank, tensor in enumerate(tensors):
        tensor[...] = rank + 1
    return tensors


def test_a_list_is_run_as_often_as_wanted(ranks: list[Communicator], workers: Workers) -> None:
    tensors, copy = filled(ranks), ranks[1].empty(COUNT, "float32")
    everything = [rank.empty(WORLD * COUNT, "float32") for rank in ranks]
    work = workers.list()
    work.all_reduce(tensors)
    work.copy(1, copy, tensors[1])
    work.all_gather(tensors, everything)
    work.barrier()
    assert (len(work), len(workers)) == (4, WORLD)
    for expected in (6.0, 18.0, 54.0):
        workers.run(work)
        workers.synchronize()
        for tensor in (*tensors, *everything, copy):
            assert (tensor == expected).all()
    # What is added is part of the next run.
    work.broadcast(tensors, 2)
    tensors[2][...] = 5
    work.all_reduce(tensors, op="max")
    workers.run(work)
    workers.synchronize()
    # 54 + 54 + 5, sent to all, of which the largest is.
    assert all((tensor == 113.0).all() for tensor in tensors)


def test_a_broadcast_and_other_reductions(ranks: list[Communicator], workers: Workers) -> None:
    sent, largest, rounded = filled(ranks), filled(ranks), filled(ranks)
    work = workers.list()
    work.broadcast(sent, 1)
    work.all_reduce(largest, op="max")
    work.all_reduce(rounded, op="avg", wire="bf16")
    workers.run(work)
    workers.synchronize()
    assert [float(tensor[0]) for tensor in (*sent, *largest, *rounded)] == [2.0] * 3 + [3.0] * 3 + [
        2.0
    ] * 3


def test_callbacks_run_in_order_on_the_ranks_threads(workers: Workers) -> None:
    seen: dict[int, list[Any]] = {rank: [] for rank in range(WORLD)}
    work = workers.list()
    for step in "abc":
        for rank in range(WORLD):
            work.callback(
                rank,
                lambda number, stream, step=step: seen[number].append(
                    (step, stream, threading.get_native_id())
                ),
            )
    workers.run(work)
    for rank, steps in seen.items():
        assert [step for step, _, _ in steps] == ["a", "b", "c"]
        assert {stream for _, stream, _ in steps} == {workers.stream(rank)}
    threads = {thread for steps in seen.values() for _, _, thread in steps}
    assert len(threads) == WORLD and threading.get_native_id() not in threads


def test_an_exception_of_a_callback_ends_all_waits(
    ranks: list[Communicator], workers: Workers
) -> None:
    def fail(rank: int, stream: int) -> None:
        raise KeyError(f"rank {rank}")

    tensors, good = filled(ranks), workers.list()
    good.all_reduce(tensors)
    wrong = workers.list()
    wrong.callback(1, fail)
    wrong.all_reduce(tensors)
    with pytest.raises(KeyError, match="rank 1"):
        workers.run(wrong)
    with pytest.raises(peerlane.Error):
        workers.synchronize()
    workers.recover()
    for rank, tensor in enumerate(tensors):
        tensor[...] = rank + 1
    workers.run(good)
    workers.synchronize()
    assert all((tensor == 6.0).all() for tensor in tensors)


def test_a_callback_that_would_wait_for_itself_is_refused(workers: Workers) -> None:
    work, other = workers.list(), workers.list()
    refused: list[str] = []

    def wait(rank: int, stream: int) -> None:
        for call in (
            workers.synchronize,
            workers.recover,
            workers.close,
            lambda: workers.run(other),
            lambda: workers.stream(0),
        ):
            with pytest.raises(peerlane.UnsupportedError, match="got a callback") as raised:
                call()
            refused.append(str(raised.value))

    work.callback(1, wait)
    workers.run(work)
    assert len(refused) == 5, refused
    workers.run(other)


def test_an_abort_ends_a_run_that_waits(ranks: list[Communicator], workers: Workers) -> None:
    tensors, work = filled(ranks), workers.list()
    entered = threading.Event()

    def late(rank: int, stream: int) -> None:
        entered.set()
        threading.Event().wait(0.2)
        raise RuntimeError("too late")

    work.callback(0, late)
    work.all_reduce(tensors)
    aborting = threading.Thread(target=lambda: (entered.wait(), workers.abort()))
    aborting.start()
    with pytest.raises(RuntimeError, match="too late"):
        workers.run(work)
    aborting.join()


def test_what_a_list_names_lives_until_it_is_done(
    ranks: list[Communicator], workers: Workers
) -> None:
    class Function:
        def __call__(self, rank: int, stream: int) -> None:
            pass

    function = Function()
    alive = weakref.ref(function)
    work = workers.list()
    work.callback(0, function)
    work.all_reduce(filled(ranks))
    del function
    workers.run(work)
    del work
    gc.collect()
    assert alive() is not None
    workers.synchronize()
    gc.collect()
    assert alive() is None


def test_communicators_are_taken_over(ranks: list[Communicator]) -> None:
    tensors = filled(ranks)
    ranks[2].close()
    with pytest.raises(peerlane.ClosedError):
        Workers(ranks)
    # A refusal has changed nothing.
    ranks[0].health()
    ranks = Communicator.connect(["sim:0/2", "sim:1/2"])
    tensors = filled(ranks)
    workers = Workers(ranks, spin=1e-6, near=False)
    with pytest.raises(peerlane.ClosedError):
        ranks[0].all_reduce(tensors[0])
    with pytest.raises(peerlane.ClosedError):
        Workers(ranks)
    assert [workers.is_near(rank) for rank in range(2)] == [False, False]
    workers.close()
    workers.close()
    with pytest.raises(peerlane.ClosedError):
        workers.run(workers.list())


def test_wrong_arguments_are_named(ranks: list[Communicator], workers: Workers) -> None:
    tensors, work = filled(ranks), workers.list()
    for call, expected in (
        (
            lambda: work.all_reduce(tensors[:2]),
            "all_reduce: tensors: expected 3, one a rank, got 2",
        ),
        (lambda: work.all_gather(tensors, tensors[:1]), "outs: expected 3, one a rank, got 1"),
        (lambda: work.all_reduce(tensors[::-1]), "tensor: "),
        (lambda: work.copy(3, tensors[0], tensors[0]), "copy: rank: expected below 3, got 3"),
        (lambda: work.copy(0, tensors[0], tensors[0][:5]), "out: expected 20 bytes"),
        (lambda: work.copy(1, tensors[1], tensors[1]), "out"),
        (lambda: work.callback(0, 7), "function: expected a callable, got int"),
        (lambda: workers.run(Workers(two()).list()), "list: expected one of these workers"),
        (lambda: Workers(two(), spin=-1.0), "spin"),
        (lambda: workers.stream(3), "stream: index: expected below 3, got 3"),
        (lambda: Workers([]), "ranks: expected at least one, got none"),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        assert expected in str(raised.value), raised.value
    assert len(work) == 0 and isinstance(work, WorkList)
    workers.run(work)


def two() -> list[Communicator]:
    return Communicator.connect(["sim:0/2", "sim:1/2"])


def test_numpy_memory_of_the_host_is_refused(workers: Workers) -> None:
    with pytest.raises((ValueError, TypeError)):
        workers.list().all_reduce([np.zeros(4, np.float32)] * WORLD)
