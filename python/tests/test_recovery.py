"""Groups that recover after an abort, and groups that go on without some of their ranks."""

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
from conftest import Group, Processes, store, synchronize

import peerlane
from peerlane import Communicator


def check_sum(ranks: list[Communicator]) -> None:
    """An all-reduce of every rank's number plus one."""
    arrays = [store(rank, np.full(500, rank.rank + 1, np.float32), "float32") for rank in ranks]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array)
    synchronize(ranks)
    world = len(ranks)
    assert all((array == world * (world + 1) // 2).all() for array in arrays)


def leave_alone(ranks: list[Communicator]) -> None:
    """Lets the first rank wait in vain."""
    ranks[0].all_reduce(store(ranks[0], np.ones(500, np.float32), "float32"))
    with pytest.raises(peerlane.DeadlineError, match="rank 0 waited"):
        ranks[0].synchronize()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_thread_recovers(group: Group, world: int) -> None:
    ranks = group(world, deadline=0.05)
    check_sum(ranks)
    assert [rank.generation for rank in ranks] == [0] * world
    for generation in (1, 2):
        if world > 1:
            leave_alone(ranks)
        ranks[-1].abort()
        with pytest.raises((peerlane.AbortedError, peerlane.DeadlineError)):
            ranks[0].health()
        Communicator.recover_all(ranks)
        assert [rank.generation for rank in ranks] == [generation] * world
        check_sum(ranks)


def test_threads_recover(group: Group) -> None:
    ranks = group(2, deadline=30)
    ranks[0].abort()
    threads = [threading.Thread(target=rank.recover) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    check_sum(ranks)


def test_a_rank_that_does_not_recover_is_named(group: Group) -> None:
    ranks = group(2, deadline=0.1)
    with pytest.raises(peerlane.RendezvousError, match="in vain for rank 1"):
        ranks[0].recover()
    with pytest.raises(peerlane.AbortedError):
        ranks[1].health()
    Communicator.recover_all(ranks)
    check_sum(ranks)


def test_works_and_registrations(group: Group) -> None:
    ranks = group(2, deadline=0.05)
    arrays = [store(rank, np.ones(64, np.float32), "float32") for rank in ranks]
    registrations = Communicator.register_all(ranks, arrays)
    work = ranks[0].all_reduce_async(store(ranks[0], np.ones(500, np.float32), "float32"))
    time.sleep(0.01)
    Communicator.recover_all(ranks)
    with pytest.raises(peerlane.Error, match="rank 0"):
        work.synchronize()
    for rank, array, registration in zip(ranks, arrays, registrations):
        rank.all_reduce(array, registration=registration)
    synchronize(ranks)
    assert all((array == 2).all() for array in arrays)


def test_one_thread_shrinks(group: Group) -> None:
    ranks = group(4, deadline=0.05)
    leave_alone(ranks)
    left = [ranks[0], ranks[2], ranks[3]]
    Communicator.shrink_all(left, without=[1])
    assert [(rank.rank, rank.world_size) for rank in left] == [(0, 3), (1, 3), (2, 3)]
    assert "rank 1 of 3" in repr(left[1])
    check_sum(left)
    with pytest.raises(peerlane.AbortedError):
        ranks[1].barrier()
    Communicator.shrink_all(left[1:], without=(0,))
    assert left[1].generation == 2
    check_sum(left[1:])


def test_mistakes(group: Group) -> None:
    ranks = group(3)
    for without, message in (
        ([], "at least one rank"),
        ([3], "ranks from 0 to 2"),
        ([1, 1], "each rank once"),
        ([0], "other ranks than 0"),
        ([-1], "shrink: without: "),
    ):
        with pytest.raises(ValueError, match=message):
            ranks[0].shrink(without)
    for wrong in (1, ["one"]):
        with pytest.raises(TypeError, match="^shrink: without: "):
            ranks[0].shrink(wrong)
    with pytest.raises(ValueError, match="one of them twice"):
        Communicator.recover_all([ranks[0], ranks[0], ranks[1]])
    with pytest.raises(ValueError, match="2 of 3 ranks"):
        Communicator.recover_all(ranks[:2])
    check_sum(ranks)
    ranks[0].close()
    with pytest.raises(peerlane.ClosedError, match="^recover: "):
        ranks[0].recover()


def live(rank: int, name: str, answers: Connection) -> None:
    with Communicator(rank, 3, name, f"sim:{rank}/3", patience=60) as communicator:
        answers.send("joined")
        if rank == 2:
            time.sleep(600)
        try:
            communicator.barrier()
            communicator.synchronize()
        except peerlane.PeerLostError:
            pass
        try:
            communicator.recover()
        except peerlane.PeerLostError as error:
            answers.send("shrink, naming every rank" in str(error))
        communicator.shrink([2])
        array = communicator.empty(100, "float32")
        array[:] = 1
        communicator.all_reduce(array)
        communicator.synchronize()
        answers.send(bool((array == 2).all()))
        communicator.barrier()
        communicator.synchronize()


def test_processes_go_on_without_one_that_was_killed(processes: Processes) -> None:
    processes.start(live, 3, f"peerlane-test-shrink-{os.getpid()}")
    assert [processes.answer(rank) for rank in range(3)] == ["joined"] * 3
    processes.running[2].kill()
    for rank in range(2):
        assert [processes.answer(rank) for _ in range(2)] == [True, True]
    assert processes.exit_codes() == [0, 0, -signal.SIGKILL]
