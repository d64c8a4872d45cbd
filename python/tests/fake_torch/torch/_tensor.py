"""The tensor itself."""

from __future__ import annotations

from typing import Any

import numpy as np


class Tensor:
    def __init__(self, array: np.ndarray, dtype: Any, device: Any) -> None:
        self.array, self.dtype, self.device = array, dtype, device

    is_cuda = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def T(self) -> Tensor:
        return Tensor(self.array.T, self.dtype, self.device)

    def as_subclass(self, kind: type[Tensor]) -> Tensor:
        return kind(self.array, self.dtype, self.device)

    def view(self, dtype: Any) -> Tensor:
        return Tensor(self.array, dtype, self.device)

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.dtype.size

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def data_ptr(self) -> int:
        return self.array.__array_interface__["data"][0]
