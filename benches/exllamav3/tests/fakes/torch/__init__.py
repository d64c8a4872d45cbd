"""As much of torch as run_one.py touches, on numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

__version__ = "fake"
long = np.int64


class Tensor(np.ndarray):
    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return np.asarray(self)

    def argmax(self, dim: int) -> Tensor:
        return np.asarray(self).argmax(axis=dim).view(Tensor)


def tensor(values: Any, dtype: Any = None) -> Tensor:
    return np.array(values, dtype).view(Tensor)


def device(name: str) -> str:
    return name


class cuda:
    @staticmethod
    def synchronize() -> None:
        pass
