"""What the tests share: groups of simulated ranks, and arrays of every element type.

Values are small integers, so that every sum is exact in every type and results are compared bit by
bit.
"""

from collections.abc import Callable, Iterator, Sequence

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
