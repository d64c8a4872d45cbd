"""What the tests share: groups of simulated ranks, and arrays of every element type.

Values are small integers, so that every sum is exact in every type and results are compared bit by
bit.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np
import pytest

from peerlane import Communicator

Group = Callable[..., list[Communicator]]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes groups of ranks on a simulated machine, and closes them."""
    made: list[Communicator] = []

    def connect(world: int, **config: object) -> list[Communicator]:
        ranks = Communicator.connect([f"sim:{rank}/{world}" for rank in range(world)], **config)
        made.extend(ranks)
        return ranks

    yield connect
    for rank in made:
        rank.abort()
    for rank in made:
        try:
            rank.close()
        except RuntimeError:
            pass  # what a test provoked


class Processes:
    """One process for each rank, each with a pipe of its own for what it answers.

    Not one queue for all: whoever is killed while it holds a queue's lock leaves the others waiting
    for that lock for ever.
    """

    PATIENCE = 120.0

    def __init__(self) -> None:
        self.running: list[multiprocessing.process.BaseProcess] = []
        self.answers: list[Connection] = []

    def start(
        self,
        target: Callable[[int, str, Connection], None],
        world: int,
        name: str,
        *,
        duplex: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(world):
            ours, theirs = context.Pipe(duplex)
            # Python joins what is not a daemon when it ends, and so would hang with it.
            process = context.Process(target=target, args=(rank, name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.running.append(process)
            self.answers.append(ours)

    def answer(self, rank: int) -> object:
        """What the rank answers next."""
        assert self.answers[rank].poll(self.PATIENCE), f"rank {rank} answers nothing"
        return self.answers[rank].recv()

    def exit_codes(self) -> list[int | None]:
        """Waits for the end of all processes; None for one that does not end."""
        for process in self.running:
            process.join(self.PATIENCE)
        return [process.exitcode for process in self.running]


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Starts one process for each rank, and leaves none behind."""
    made = Processes()
    yield made
    for process in made.running:
        process.kill()
        process.join()


def synchronize(ranks: Sequence[Communicator]) -> None:
    for rank in ranks:
        rank.synchronize()


def integers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 integers that every element type holds exactly, and their sums over 8 ranks too."""
    return np.random.default_rng(seed).integers(-15, 16, shape).astype(np.float32)


def store(rank: Communicator, values: np.ndarray, dtype: str) -> np.ndarray:
    """An array on the rank's GPU with these values."""
    array = rank.empty(values.shape, dtype)
    if dtype == "bfloat16":
        array.view(np.uint16)[...] = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        array[...] = values
    return array


def load(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array, as float32."""
    if dtype == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def declared(array: np.ndarray) -> dict[str, str]:
    """The dtype argument that the array needs: uint16 does not say that it is bfloat16."""
    return {"dtype": "bfloat16"} if array.dtype == np.uint16 else {}
