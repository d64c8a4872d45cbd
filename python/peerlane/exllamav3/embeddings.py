"""The table of token embeddings, in memory once for all ranks of a model.

ExLlamaV3 gives each rank a copy of it, in which the rank's CPU looks tokens up; the rows of a whole prompt are then widened
to fp32 and uploaded from pageable memory. Here all ranks look at what the main process has exported, and the rows of
more than a few tokens are read by the rank's GPU where they lie: half the bytes go over the bus, and none through a CPU.

Invariants:
- A lookup has the same bits either way: it copies rows, and widening them to fp32 is exact. (Models with a `multiplier` scale them
  where they are, on the GPU too: torch rounds alike there by its sources, which was not compared.)
- Token ids are checked on the CPU before a GPU follows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peerlane import Error

from .options import announce
from .tensors import Consumer, Producer

if TYPE_CHECKING:
    import torch

# Fewer tokens than that are looked up by the CPU. On an H200 the GPU is faster from 12 on; but such few are a decoding pass's, whose
# rows ExLlamaV3 may upload from pinned memory without waiting.
PROMPT = 32


class Table:
    """Stands for the `torch.nn.Embedding` of a rank."""

    def __init__(self, weight: torch.Tensor, on_gpu: torch.Tensor) -> None:
        """`weight`, of shape (tokens, width), is in host memory; `on_gpu` is the same memory as the GPU finds it."""
        from torch import aminmax
        from torch.nn.functional import embedding

        self.weight = weight
        self.on_gpu = on_gpu
        self.last: torch.Tensor | None = None
        self.look_up = embedding
        self.range = aminmax

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, which are in host memory: in host memory too if they are few, else in the GPU's."""
        if ids.numel() < PROMPT:
            return self.look_up(ids, self.weight)
        least, most = self.range(ids)
        if least < 0 or most >= len(self.weight):
            raise IndexError(
                f"token ids: expected 0 to {len(self.weight) - 1}, got {int(least)} to {int(most)}"
            )
        # CUDA has read memory that is not pinned when the call returns; GPUs that read it themselves may do so later.
        self.last = ids
        return self.look_up(ids.to(self.on_gpu.device, non_blocking=True), self.on_gpu)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, where these are: so ExLlamaV3 asks for tokens between images, whose rows it puts
        together in host memory."""
        return self.look_up(ids, self.weight)


def tp_export(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Embedding.tp_export`, for the main process."""

    @functools.wraps(original)
    def export(self: Any, plan: Any, producer: Any) -> Any:
        # Quantized tables, and those that stay on disk, have no weight.
        if isinstance(producer, Producer) and hasattr(self.embedding, "weight"):
            producer = SimpleNamespace(send=producer.share)
        return original(self, plan, producer)

    return export


def tp_import(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """`Embedding.tp_import`, for every rank."""

    @functools.wraps(original.__func__)
    def import_(local_context: dict[str, Any], exported: dict[str, Any], plan: Any) -> Any:
        module = original.__func__(local_context, exported, plan)
        sent, consumer = exported.get("embedding.weight"), local_context["consumer"]
        if sent is not None and isinstance(consumer, Consumer):
            name = local_context["backend"].options.device_format
            adopt(module, consumer, sent, name.format(device=local_context["device"]))
        return module

    return staticmethod(import_)


def adopt(module: Any, consumer: Consumer, sent: bytes, device: str) -> None:
    """Lets the GPU read an embedding's table, if it can."""
    if not device.startswith("cuda"):
        return
    try:
        mapped = consumer.importer.import_(sent[1:]).map(device)
        on_gpu = consumer.from_dlpack(mapped.__dlpack__())
    except (Error, BufferError, RuntimeError, ValueError) as error:
        announce(f"Peerlane: {device}: prompts are looked up by the CPU ({error})")
        return
    module.embedding = Table(module.embedding.weight.data, on_gpu)
