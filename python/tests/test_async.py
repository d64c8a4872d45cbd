"""Calls beside the stream: what their works say, how long their tensors live, what is refused."""

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Group, integers, store

import peerlane
from peerlane import Communicator, Event, Work


def ones(rank: Communicator, count: int = 64) -> np.ndarray:
    return store(rank, np.ones(count, np.float32), "float32")


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_work_is_done_when_it_says_so(group: Group) -> None:
    ranks = group(3)
    values = [integers(rank, (40, 25)) for rank in range(3)]
    arrays = [store(rank, value, "float32") for rank, value in zip(ranks, values)]
    works = [ranks[0].all_reduce_async(arrays[0])]
    assert isinstance(works[0], Work) and not works[0].query()
    assert repr(works[0]) == "<peerlane.Work of rank 0>"
    works += [rank.all_reduce_async(array) for rank, array in zip(ranks[1:], arrays[1:])]
    for work, array in zip(works, arrays):
        work.synchronize()
        work.synchronize()
        assert work.query()
        assert (array == sum(values)).all()


def test_a_stream_waits(group: Group) -> None:
    ranks = group(2)
    arrays = [ones(rank) for rank in ranks]
    for rank, array in zip(ranks, arrays):
        rank.all_reduce_async(array).wait()
        rank.all_reduce_async(array).wait(0)
    for rank in ranks:
        rank.synchronize()
    assert all((array == 4).all() for array in arrays)


def test_every_collective_runs_beside(group: Group) -> None:
    ranks = group(2)
    values = [integers(rank, (2, 6)) for rank in range(2)]
    tensors = [store(rank, value, "float32") for rank, value in zip(ranks, values)]
    copies = [store(rank, value, "float32") for rank, value in zip(ranks, values)]
    parts = [rank.empty((2, 3), "float32") for rank in ranks]
    both = [rank.empty((2, 6), "float32") for rank in ranks]
    sums = [rank.empty((2, 6), "float32") for rank in ranks]
    joined = ranks[1].empty((2, 12), "float32")
    works: list[Work] = []
    for r, rank in enumerate(ranks):
        works.append(rank.reduce_scatter_async(tensors[r], parts[r], op="max"))
        works.append(rank.all_gather_async(parts[r], both[r]))
        works.append(rank.all_reduce_async(tensors[r], sums[r], contribution=r == 0))
        works.append(rank.gather_async(tensors[r], joined if r == 1 else None, 1, [6, 6]))
        works.append(rank.broadcast_async(copies[r], 1))
    for work in works:
        work.synchronize()
    for r in range(2):
        assert (both[r] == np.maximum(*values)).all()
        assert (sums[r] == values[0]).all()
        assert (copies[r] == values[1]).all()
    assert (joined == np.concatenate(values, axis=1)).all()


def test_calls_beside_and_on_the_stream_keep_their_order(group: Group) -> None:
    ranks = group(2)
    arrays = [ones(rank) for rank in ranks]
    for turn in range(6):
        for rank, array in zip(ranks, arrays):
            if turn % 2:
                rank.all_reduce(array)
            else:
                rank.all_reduce_async(array)
    for rank in ranks:
        rank.synchronize()
    assert all((array == 2**6).all() for array in arrays)


def test_a_work_keeps_its_tensors_until_it_is_done(group: Group) -> None:
    ranks = group(2)
    array, out = ones(ranks[0]), ranks[0].empty(64, "float32")
    gone = [weakref.ref(array), weakref.ref(out)]
    work = ranks[0].all_reduce_async(array, out)
    del array, out
    gc.collect()
    assert not work.query()
    assert all(reference() is not None for reference in gone)
    other = ones(ranks[1])
    ranks[1].all_reduce_async(other).synchronize()
    until(work.query)
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    work.synchronize()


def test_a_work_that_goes_first_leaves_its_tensors_to_the_communicator(group: Group) -> None:
    ranks = group(2)
    array = ones(ranks[0])
    gone = weakref.ref(array)
    ranks[0].all_reduce_async(array)
    del array
    gc.collect()
    ranks[0].synchronize()
    assert gone() is not None, "rank 1 has not come: the GPU still uses it"
    ranks[1].all_reduce_async(ones(ranks[1])).synchronize()

    def swept() -> bool:
        ranks[0].synchronize()
        return gone() is None

    until(swept)


def test_the_next_call_sweeps(group: Group) -> None:
    ranks = group(1)
    array = ones(ranks[0])
    gone = weakref.ref(array)
    ranks[0].all_reduce_async(array)
    del array
    small = ones(ranks[0])

    def swept() -> bool:
        ranks[0].all_reduce_async(small)
        return gone() is None

    until(swept)


def test_closing_lets_go_of_tensors(group: Group) -> None:
    ranks = group(2, deadline=0.05)
    array = ones(ranks[0])
    gone = weakref.ref(array)
    ranks[0].all_reduce_async(array)
    del array
    with pytest.raises(peerlane.DeadlineError):
        ranks[0].close()
    assert gone() is None


def test_a_work_outlives_the_closing(group: Group) -> None:
    (rank,) = group(1)
    work = rank.all_reduce_async(ones(rank))
    rank.close()
    assert work.query()
    work.synchronize()
    with pytest.raises(peerlane.ClosedError, match="^all_reduce: the communicator of rank 0 is"):
        rank.all_reduce_async(np.zeros(0, np.float32))


def test_a_rank_that_does_not_come(group: Group) -> None:
    ranks = group(2, deadline=0.05, first_deadline=0.05)
    work = ranks[0].all_reduce_async(ones(ranks[0]))
    for _ in range(2):
        with pytest.raises(peerlane.DeadlineError, match="^all_reduce: rank 0 waited 50ms for"):
            work.synchronize()
    assert work.query()


def test_other_threads_run_while_one_waits_for_a_work(group: Group) -> None:
    ranks = group(2, deadline=600)
    work = ranks[0].all_reduce_async(ones(ranks[0]))
    waiter = threading.Thread(target=work.synchronize)
    waiter.start()
    time.sleep(0.05)
    assert waiter.is_alive()
    ranks[1].all_reduce_async(ones(ranks[1])).synchronize()
    waiter.join(60)
    assert not waiter.is_alive()


def test_chunks_are_reduced_and_the_rest_is_not(group: Group) -> None:
    ranks = group(2)
    values = [integers(rank, (10, 7)) for rank in range(2)]
    arrays = [store(rank, value, "bfloat16") for rank, value in zip(ranks, values)]
    gone = [weakref.ref(array) for array in arrays]
    works = []
    for rank, array in zip(ranks, arrays):
        first, second = rank.record_event(), rank.record_event(stream=0)
        assert isinstance(first, Event) and first.cuda_event != second.cuda_event
        chunks = [(6, 4, first), (0, 3, second.cuda_event), (3, 0, first)]
        kind = {"dtype": "bfloat16"} if array.dtype == np.uint16 else {}
        works.append(rank.all_reduce_chunks(array, chunks, **kind))
    assert [len(each) for each in works] == [3, 3]
    for each in works:
        for work in each:
            work.synchronize()
    expected = values[0] + values[1]
    for array, value in zip(arrays, values):
        found = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert (found[:3] == expected[:3]).all() and (found[6:] == expected[6:]).all()
        assert (found[3:6] == value[3:6]).all()
    del array, arrays
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert ranks[0].all_reduce_chunks(ones(ranks[0]), []) == []


def test_refused_chunks_keep_their_tensor_if_some_had_begun(group: Group) -> None:
    ranks = group(2)
    events = [rank.record_event() for rank in ranks]
    ranks[1].all_reduce_chunks(ones(ranks[1]), [(0, 4, events[1]), (4, 2, events[1])])
    array = ones(ranks[0])
    gone = weakref.ref(array)
    with pytest.raises(peerlane.MismatchError):
        ranks[0].all_reduce_chunks(array, [(0, 4, events[0]), (4, 4, events[0])])
    del array
    gc.collect()
    assert gone() is not None, "the first chunk has begun"
    ranks[0].close()
    assert gone() is None


def test_refused_chunks_let_go_of_their_tensor_if_none_had_begun(group: Group) -> None:
    def is_kept(rank: Communicator, kind: type[Exception]) -> bool:
        array = ones(rank, 8)
        gone = weakref.ref(array)
        with pytest.raises(kind):
            rank.all_reduce_chunks(array, [(0, 8, event)])
        del array
        gc.collect()
        return gone() is not None

    # No slot of the staging area has room for such copies: nothing begins.
    ranks = group(2, algorithm="copy-ring", staging_bytes=1 << 20, chunk_bytes=1 << 20)
    event = ranks[0].record_event()
    assert not is_kept(ranks[0], ValueError)
    ranks[0].close()
    assert not is_kept(ranks[0], peerlane.ClosedError)


Call = Callable[[Communicator, np.ndarray], object]

# Rank 0 of two; the array has 6 x 4 float32.
WRONG: list[tuple[type[Exception], str, Call]] = [
    (
        TypeError,
        "all_reduce: tensor: expected memory of sim:0/2, got numpy.ndarray in host memory",
        lambda r, a: r.all_reduce_async(np.zeros(4, np.float32)),
    ),
    (
        ValueError,
        "all_reduce: op: expected one of 'sum', 'max', 'min', 'avg', got 'mul'",
        lambda r, a: r.all_reduce_async(a, op="mul"),
    ),
    (
        ValueError,
        "all_reduce: stream: expected a stream of GPU 0, where rank 0 is, got no stream",
        lambda r, a: r.all_reduce_async(a, stream=77),
    ),
    (
        ValueError,
        "reduce_scatter: out: expected 12 elements (one rank's part of tensor), got 24",
        lambda r, a: r.reduce_scatter_async(a, a),
    ),
    (
        ValueError,
        "broadcast: root: expected a rank from 0 to 1, got 2",
        lambda r, a: r.broadcast_async(a, 2),
    ),
    (
        ValueError,
        "gather: widths: expected 2 widths, one a rank, got 3",
        lambda r, a: r.gather_async(a, None, 1, [4, 4, 4]),
    ),
    (
        TypeError,
        "all_gather: out: expected an array in memory of sim:0/2",
        lambda r, a: r.all_gather_async(a, None),
    ),
    (
        TypeError,
        "all_reduce_chunks: chunks: expected a sequence of (first_row, rows, event), got int",
        lambda r, a: r.all_reduce_chunks(a, 3),
    ),
    (
        TypeError,
        "all_reduce_chunks: chunks: expected a sequence of (first_row, rows, event), got int",
        lambda r, a: r.all_reduce_chunks(a, [0, 1, 2]),
    ),
    (
        ValueError,
        "all_reduce_chunks: chunks: expected a sequence of (first_row, rows, event), got (0, 1)",
        lambda r, a: r.all_reduce_chunks(a, [(0, 1)]),
    ),
    (
        ValueError,
        "all_reduce_chunks: chunks: expected an int of 0 or more, got -1",
        lambda r, a: r.all_reduce_chunks(a, [(-1, 1, r.record_event())]),
    ),
    (
        ValueError,
        "all_reduce_chunks: chunks: expected parts of a tensor of 6 rows, got chunk 1 of 3 rows "
        "from 4 on",
        lambda r, a: r.all_reduce_chunks(a, [(0, 4, r.record_event()), (4, 3, r.record_event())]),
    ),
    (
        TypeError,
        "all_reduce_chunks: event: expected a torch.cuda.Event, a peerlane.Event or the int of a "
        "CUDA event, got str",
        lambda r, a: r.all_reduce_chunks(a, [(0, 1, "ready")]),
    ),
    (
        ValueError,
        "all_reduce_chunks: event: expected an event that was recorded, got 0",
        lambda r, a: r.all_reduce_chunks(a, [(0, 1, 0)]),
    ),
    (
        ValueError,
        "all_reduce_chunks: tensor: expected a tensor with rows, got a scalar",
        lambda r, a: r.all_reduce_chunks(a[0, :1].reshape(()), []),
    ),
    (
        ValueError,
        "all_reduce_chunks: tensor: expected a contiguous tensor, got one with gaps",
        lambda r, a: r.all_reduce_chunks(a.T, []),
    ),
    (
        ValueError,
        "record_event: stream: expected a stream of sim:0/2, got no stream",
        lambda r, a: r.record_event(stream=77),
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[m for _, m, _ in WRONG])
def test_wrong_arguments(group: Group, kind: type[Exception], message: str, call: Call) -> None:
    ranks = group(2)
    arrays = [store(rank, integers(rank.rank, (6, 4)), "float32") for rank in ranks]
    before = arrays[0].copy()
    with pytest.raises(kind, match="^" + re.escape(message)):
        call(ranks[0], arrays[0])
    assert (arrays[0] == before).all()
    works = [rank.all_reduce_async(array) for rank, array in zip(ranks, arrays)]
    for work in works:
        work.synchronize()


def test_wrong_streams_of_a_wait(group: Group) -> None:
    (rank,) = group(1)
    work = rank.all_reduce_async(ones(rank))
    with pytest.raises(TypeError, match="^wait: stream: expected a torch.cuda.Stream, .* got str"):
        work.wait("side")
    with pytest.raises(ValueError, match="^wait: stream: expected a stream of sim:0/1, got no"):
        work.wait(77)
    with pytest.raises(TypeError):
        Work()
    work.wait()
