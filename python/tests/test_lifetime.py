"""Communicators from joining to collection: close orders, deadlines, aborts, threads, memory."""

import gc
import resource
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import Group, integers, store, synchronize

import peerlane
from peerlane import Communicator


def test_what_a_communicator_says_about_itself(group: Group) -> None:
    ranks = group(3, mailbox_bytes=1 << 20)
    assert [rank.rank for rank in ranks] == [0, 1, 2]
    assert {rank.world_size for rank in ranks} == {3}
    assert [rank.device for rank in ranks] == ["sim:0/3", "sim:1/3", "sim:2/3"]
    assert 0 < ranks[0].mailbox_bytes <= 1 << 20
    assert repr(ranks[1]) == "<peerlane.Communicator rank 1 of 3 on sim:1/3>"
    with pytest.raises(AttributeError):
        ranks[0].rank = 1


def test_a_mailbox_of_another_size(group: Group) -> None:
    assert group(2, mailbox_bytes=2 << 20)[0].mailbox_bytes <= 2 << 20
    with pytest.raises(ValueError, match="^connect: mailbox_bytes: expected at least"):
        group(2, mailbox_bytes=16)


def test_mailboxes_follow_the_workload(group: Group) -> None:
    ranks = group(2, mailbox_bytes=1 << 17, max_blocks=2, sizing=(1 << 17, 8 << 20))
    arrays = [store(rank, integers(1, (60_000,)), "float32") for rank in ranks]
    before = ranks[0].mailbox_bytes
    changed = []
    for turn in range(5):
        if turn < 2:
            for rank, array in zip(ranks, arrays):
                rank.all_reduce(array)
        changed.append(Communicator.adapt_all(ranks))
        if turn == 0:
            assert ranks[0].mailbox_bytes == ranks[1].mailbox_bytes > before
    assert changed == [True, False, False, False, True]
    synchronize(ranks)
    np.testing.assert_array_equal(arrays[1], 4 * integers(1, (60_000,)))
    usage = ranks[1].usage()
    counts = {"calls": 2, "bytes": 480_000, "largest": 240_000, "largest_since": 0}
    assert counts.items() <= usage["all_reduce"].items()
    assert usage["gather"]["calls"] == usage["captured"] == 0
    assert (usage["adapts"], usage["resizes"]) == (5, 2)


def test_adapting_alone_ends_at_the_deadline(group: Group) -> None:
    ranks = group(2, deadline=0.5, sizing=True)
    with pytest.raises(RuntimeError, match="in vain for rank 1"):
        ranks[0].adapt()
    threads = [threading.Thread(target=rank.adapt) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rank.usage()["adapts"] for rank in ranks] == [1, 1]


def test_mistakes_in_sizing(group: Group) -> None:
    with pytest.raises(TypeError, match="^connect: sizing: expected a bool, or the least"):
        group(2, sizing="yes")
    with pytest.raises(ValueError, match="^connect: mailbox_bytes: expected sizing.least"):
        group(2, sizing=(1 << 20, 2 << 20))
    ranks = group(2)
    with pytest.raises(ValueError, match="^adapt: sizing: expected a Config with limits"):
        ranks[0].adapt()
    with pytest.raises(ValueError, match="^adapt_all: ranks: expected each rank once"):
        Communicator.adapt_all([ranks[0], ranks[0]])
    with pytest.raises(ValueError, match="^adapt: ranks: expected all ranks of one group"):
        Communicator.adapt_all(ranks[::-1])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_close_in_any_order(group: Group, order: list[int]) -> None:
    ranks = group(3)
    arrays = [store(rank, integers(1, (100,)), "float32") for rank in ranks]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce(array)
    for index in order:
        ranks[index].close()
        ranks[index].close()
    for array in arrays:
        np.testing.assert_array_equal(array, 3 * integers(1, (100,)))


def test_a_closed_communicator_says_so(group: Group) -> None:
    (rank,) = group(1)
    array = rank.empty(4, "float32")
    rank.close()
    calls = {
        "all_reduce": lambda: rank.all_reduce(array),
        "reduce_scatter": lambda: rank.reduce_scatter(array, rank.empty(4, "float32")),
        "all_gather": lambda: rank.all_gather(array, rank.empty(4, "float32")),
        "broadcast": lambda: rank.broadcast(array, 0),
        "gather": lambda: rank.gather(array, rank.empty(4, "float32"), 0, [4]),
        "barrier": rank.barrier,
        "synchronize": rank.synchronize,
        "health": rank.health,
        "set_deadline": lambda: rank.set_deadline(1),
    }
    for name, call in calls.items():
        with pytest.raises(peerlane.ClosedError, match=f"^{name}: the communicator of rank 0 is"):
            call()
    rank.abort()
    assert (rank.rank, rank.device) == (0, "sim:0/1")


def test_a_context_manager_closes() -> None:
    with Communicator.connect(["sim:0/1"])[0] as rank:
        rank.barrier()
    with pytest.raises(peerlane.ClosedError):
        rank.barrier()


def test_a_context_manager_does_not_hide_what_happened() -> None:
    first, second = Communicator.connect(["sim:0/2", "sim:1/2"], deadline=0.05)
    with pytest.raises(KeyError), first:
        first.barrier()
        raise KeyError("mine")
    second.close()
    first, second = Communicator.connect(["sim:0/2", "sim:1/2"], deadline=0.05)
    with pytest.raises(peerlane.DeadlineError), first:
        first.barrier()
    second.close()


def test_collection_closes_and_frees(group: Group) -> None:
    ranks = Communicator.connect(["sim:0/2", "sim:1/2"])
    array = ranks[0].empty(1000, "float32")
    for rank in ranks:
        rank.barrier()
    gone = [weakref.ref(rank) for rank in ranks]
    del ranks, rank
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    # The array outlives its communicator.
    array[:] = 1
    assert array.sum() == 1000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_is_freed(group: Group) -> None:
    (rank,) = group(1)
    before, size = resident_bytes(), 64 << 20
    for _ in range(8):
        array = rank.empty(size, "uint8")
        rank.all_reduce(array[:4096].view("float32"))
        rank.synchronize()
        del array
    assert resident_bytes() - before < 3 * size


def test_an_array_may_go_before_the_call_has_run(group: Group) -> None:
    ranks = group(2)
    for rank in ranks:
        rank.all_reduce(store(rank, integers(2, (5000,)), "float32"))
        gc.collect()
    synchronize(ranks)


def test_two_communicators_at_once(group: Group) -> None:
    first, second = group(2), group(2)
    arrays = [store(rank, np.ones(70, np.float32), "float32") for rank in first]
    others = [store(rank, np.ones(70, np.float32), "float32") for rank in second]
    for index in range(2):
        first[index].all_reduce(arrays[index])
        second[index].all_reduce(others[index], op="max")
    synchronize(first + second)
    for array, other in zip(arrays, others):
        assert (array == 2).all() and (other == 1).all()


def test_a_rank_that_does_not_come(group: Group) -> None:
    # A first call is given six times as long.
    ranks = group(2, deadline=0.05)
    ranks[0].all_reduce(store(ranks[0], integers(0, (10,)), "float32"))
    message = "^all_reduce: rank 0 waited 300ms for rank 1 "
    with pytest.raises(peerlane.DeadlineError, match=message):
        ranks[0].synchronize()
    with pytest.raises(TimeoutError, match=message):
        ranks[0].health()
    with pytest.raises(peerlane.Error, match=message):
        ranks[0].barrier()
    with pytest.raises(peerlane.DeadlineError, match=message):
        ranks[0].close()
    ranks[0].close()


def test_a_deadline_can_be_changed(group: Group) -> None:
    ranks = group(2, first_deadline=0.01)
    ranks[0].set_deadline(0.02)
    ranks[0].barrier()
    with pytest.raises(peerlane.DeadlineError, match="rank 0 waited 20ms"):
        ranks[0].synchronize()


def test_abort_ends_a_wait(group: Group) -> None:
    ranks = group(2, deadline=600)
    ranks[0].barrier()
    ranks[0].health()
    ranks[1].abort()
    with pytest.raises(peerlane.AbortedError, match="^barrier: rank 0 was aborted"):
        ranks[0].synchronize()


def test_other_threads_run_while_one_waits(group: Group) -> None:
    ranks = group(2, deadline=600)
    ranks[0].barrier()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            ranks[0].synchronize()
        except peerlane.Error as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    assert waiter.is_alive()
    ranks[0].set_deadline(5)
    ranks[0].health()
    ranks[0].abort()
    waiter.join(60)
    assert [type(error) for error in raised] == [peerlane.AbortedError]


def test_ranks_that_disagree(group: Group) -> None:
    ranks = group(2)
    arrays = [store(rank, np.ones(8, np.float32), "float32") for rank in ranks]
    ranks[0].all_reduce(arrays[0])
    message = "^all_reduce: rank 1 and rank 0 disagree in call 0: .*max.*sum"
    with pytest.raises(peerlane.MismatchError, match=message):
        ranks[1].all_reduce(arrays[1], op="max")
    ranks[1].all_reduce(arrays[1])
    synchronize(ranks)
    assert (arrays[0] == 2).all() and (arrays[1] == 2).all()
