"""The parts of torch that Peerlane asks for, over numpy arrays, where torch is not installed.

Its tensors are torch's CPU tensors: their memory is wherever the array's is.
"""

import numpy as np

from . import _C, nn
from ._tensor import Tensor

__all__ = ["_C", "nn"]


class dtype:
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __repr__(self) -> str:
        return f"torch.{self.name}"


Tensor.__module__ = __name__  # as torch names it in messages

float32 = dtype("float32", 4)
float16 = dtype("float16", 2)
bfloat16 = dtype("bfloat16", 2)
int64 = dtype("int64", 8)
uint8 = dtype("uint8", 1)
uint16 = dtype("uint16", 2)


class device:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"device(type='{self.name}')"

    def __str__(self) -> str:
        return self.name


def from_numpy(array: np.ndarray) -> Tensor:
    kinds = {kind.name: kind for kind in (float32, float16, int64, uint8, uint16)}
    return Tensor(array, kinds[array.dtype.name], device("cpu"))
