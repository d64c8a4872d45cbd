"""Parameters."""

from ._tensor import Tensor


class Parameter(Tensor):
    def __init__(self, data: Tensor, requires_grad: bool = True) -> None:
        super().__init__(data.array, data.dtype, data.device)
