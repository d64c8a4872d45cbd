"""Real GPUs through torch: tensors, streams, graphs. Skipped where there are none.

Each rank has a stream of its own: two ranks may share a GPU, and the kernels of ranks that wait for
each other must not queue up behind each other.
"""

from collections.abc import Callable, Iterator

import pytest

from peerlane import Communicator, UnsupportedError

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

WORLD = 2
GPUS = [rank % torch.cuda.device_count() for rank in range(WORLD)]


class Rank:
    """A communicator with a stream that is torch's current one inside run()."""

    def __init__(self, communicator: Communicator, gpu: int) -> None:
        self.communicator, self.gpu = communicator, torch.device("cuda", gpu)
        self.stream = torch.cuda.Stream(self.gpu)

    def run(self, call: Callable[[Communicator], None]) -> None:
        with torch.cuda.device(self.gpu), torch.cuda.stream(self.stream):
            call(self.communicator)

    def full(self, shape: tuple[int, ...], value: float, **keywords: object) -> "torch.Tensor":
        with torch.cuda.stream(self.stream):
            return torch.full(shape, float(value), device=self.gpu, **keywords)


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    communicators = Communicator.connect([torch.device("cuda", gpu) for gpu in GPUS])
    yield [Rank(communicator, gpu) for communicator, gpu in zip(communicators, GPUS)]
    for communicator in communicators:
        communicator.close()


def synchronize(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.communicator.synchronize(rank.stream)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_collectives_on_the_current_stream(ranks: list[Rank], dtype: str) -> None:
    kind = getattr(torch, dtype)
    tensors = [rank.full((3, 1001), index + 1, dtype=kind) for index, rank in enumerate(ranks)]
    outs = [rank.full((6, 1001), 0, dtype=kind) for rank in ranks]
    for rank, tensor, out in zip(ranks, tensors, outs):
        rank.run(lambda c, t=tensor, o=out: (c.all_reduce(t), c.all_gather(t, o), c.barrier()))
    synchronize(ranks)
    for tensor, out in zip(tensors, outs):
        assert bool((tensor == 3).all()) and bool((out == 3).all())


def test_a_stream_may_be_named(ranks: list[Rank]) -> None:
    tensors = [rank.full((5,), 1) for rank in ranks]
    for rank, tensor in zip(ranks, tensors):
        rank.communicator.all_reduce(tensor, stream=rank.stream)
    for rank, tensor in zip(ranks, tensors):
        rank.communicator.all_reduce(tensor, stream=rank.stream.cuda_stream)
    synchronize(ranks)
    for tensor in tensors:
        assert bool((tensor == 4).all())


def test_a_call_in_a_graph_runs_at_every_replay(ranks: list[Rank]) -> None:
    tensors = [rank.full((64,), 1) for rank in ranks]
    for rank, tensor in zip(ranks, tensors):
        rank.run(lambda c, t=tensor: c.all_reduce(t))
    synchronize(ranks)
    graphs = []
    for rank, tensor in zip(ranks, tensors):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream, capture_error_mode="thread_local"):
            rank.communicator.all_reduce(tensor)
        graphs.append(graph)
    for _ in range(3):
        for rank, graph in zip(ranks, graphs):
            rank.run(lambda _, g=graph: g.replay())
    synchronize(ranks)
    for tensor in tensors:
        assert bool((tensor == 16).all())


def test_works_beside_the_current_stream(ranks: list[Rank]) -> None:
    tensors = [rank.full((1000, 7), 1) for rank in ranks]
    works = []
    for rank, tensor in zip(ranks, tensors):
        # CUDA may wait for the GPU while it loads a kernel, and this thread still has to call for rank 1.
        rank.run(lambda _, t=tensor: t.div_(1))
    for rank, tensor in zip(ranks, tensors):
        # The division waits for the call, since the current stream does.
        rank.run(lambda c, t=tensor: (c.all_reduce_async(t).wait(), t.div_(4)))
        rank.run(lambda c, t=tensor: works.append(c.all_reduce_async(t)))
    for work, tensor in zip(works, tensors):
        work.synchronize()
        assert work.query() and bool((tensor == 1).all())


def test_chunks_of_torch_events(ranks: list[Rank]) -> None:
    tensors = [rank.full((9, 500), 0) for rank in ranks]
    works = []

    def produce(communicator: Communicator, tensor: "torch.Tensor") -> None:
        chunks = []
        for first in (0, 3):
            tensor[first : first + 3] = 1
            event = torch.cuda.Event()
            event.record()
            chunks.append((first, 3, event))
        works.extend(communicator.all_reduce_chunks(tensor, chunks))

    for rank, tensor in zip(ranks, tensors):
        rank.run(lambda c, t=tensor: produce(c, t))
    for work in works:
        work.synchronize()
    for tensor in tensors:
        assert bool((tensor[:6] == 2).all()) and bool((tensor[6:] == 0).all())
    with pytest.raises(ValueError, match="event: expected an event that was recorded, got 0"):
        ranks[0].communicator.all_reduce_chunks(tensors[0], [(0, 1, torch.cuda.Event())])


def test_memory_is_not_given_away_before_the_call_is_done(ranks: list[Rank]) -> None:
    first, second = ranks
    tensor = first.full((1 << 20,), 1)
    address = tensor.data_ptr()
    first.communicator.all_reduce_async(tensor, stream=first.stream)
    del tensor
    others = [first.full((1 << 20,), 2) for _ in range(4)]
    assert address not in [other.data_ptr() for other in others]
    mine = second.full((1 << 20,), 3)
    second.run(lambda c: c.all_reduce_async(mine).synchronize())
    assert bool((mine == 4).all()) and all(bool((other == 2).all()) for other in others)


def test_a_work_in_a_graph(ranks: list[Rank]) -> None:
    tensors = [rank.full((64,), 1) for rank in ranks]
    for rank, tensor in zip(ranks, tensors):
        rank.run(lambda c, t=tensor: c.all_reduce_async(t).wait())
    synchronize(ranks)
    graphs = []
    for rank, tensor in zip(ranks, tensors):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream, capture_error_mode="thread_local"):
            work = rank.communicator.all_reduce_async(tensor)
            work.wait()
        with pytest.raises(UnsupportedError, match="part of a graph"):
            work.query()
        graphs.append(graph)
    for _ in range(3):
        for rank, graph in zip(ranks, graphs):
            rank.run(lambda _, g=graph: g.replay())
    synchronize(ranks)
    for tensor in tensors:
        assert bool((tensor == 16).all())


def test_mistakes(ranks: list[Rank]) -> None:
    communicator = ranks[0].communicator
    with pytest.raises(
        TypeError, match="^all_reduce: tensor: expected a tensor on cuda:0, got .*cpu"
    ):
        communicator.all_reduce(torch.zeros(4))
    with pytest.raises(ValueError, match="^all_reduce: tensor: expected a contiguous tensor"):
        communicator.all_reduce(ranks[0].full((4, 5), 0).T)
    if GPUS[1] != GPUS[0]:
        with pytest.raises(
            ValueError, match="expected a tensor on cuda:0, got a tensor on cuda:1$"
        ):
            communicator.all_reduce(ranks[1].full((4,), 0))


def test_arrays_of_cupy(ranks: list[Rank]) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = []
    for rank in ranks:
        with cupy.cuda.Device(rank.gpu.index):
            arrays.append(cupy.ones(33, "float32"))
            cupy.cuda.Device().synchronize()
    for rank, array in zip(ranks, arrays):
        rank.communicator.all_reduce(array, stream=rank.stream)
    synchronize(ranks)
    for rank, array in zip(ranks, arrays):
        with cupy.cuda.Device(rank.gpu.index):
            assert bool((array == 2).all())
