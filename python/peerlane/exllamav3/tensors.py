"""Tensors from a model's main process to its workers, through Peerlane's arenas: ExLlamaV3's `SMProducer` and `SMConsumer`.

What is exported is a descriptor of some 100 bytes, which ExLlamaV3 pickles into its commands. The arena grows with what is
exported between two clears, up to 16 GiB, and shrinks again. Tensors with a
`cache_id` are copied once and looked at by all ranks where they are.

Invariants:
- What `recv` returns is the caller's, a copy, but for tensors with a `cache_id`, which ExLlamaV3 does not write.
- Both sides are Peerlane's or both ExLlamaV3's: a consumer is made from what its producer has exported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peerlane import TensorExporter, TensorImporter

if TYPE_CHECKING:
    import torch

# The key by which `consumer` knows a producer of this module.
ARENA = "peerlane_arena"
# Most bytes of an arena, and of what is kept in it.
MOST = 16 << 30
# What stands for no tensor, and what comes before the descriptor of a tensor with a `cache_id`.
NOTHING, OWN, SHARED = b"", b"o", b"s"


class Producer:
    """Stands for `SMProducer`."""

    def __init__(self, shm_name: str | None = None, buffer_size: int | None = None) -> None:
        """The arguments are `SMProducer`'s, and without effect: there is no name, and no fixed size."""
        # Tensors that are kept need a limit above the largest table of embeddings.
        self.exporter = TensorExporter(named=MOST)
        # What has to be done before anything is given up.
        self.settle: Callable[[], None] = lambda: None

    def export(self) -> dict[str, Any]:
        """What another process makes its consumer from."""
        return {ARENA: self.exporter.handle}

    def send(self, tensor: torch.Tensor | None, cache_id: int | None = None) -> bytes:
        """Copies a tensor into the arena and returns what `Consumer.recv` takes."""
        if tensor is None:
            return NOTHING
        if cache_id is not None and (found := self.exporter.find(cache_id)) is not None:
            return SHARED + found
        host = _in_host_memory(tensor)
        if cache_id is None:
            return OWN + self.exporter.export(host)
        # The caller's object is kept, so that nothing else can have its identity.
        return SHARED + self.exporter.export(host, name=cache_id, owner=tensor)

    def share(self, tensor: torch.Tensor) -> bytes:
        """As `send`, for a tensor that is sent once and that all consumers look at: what they receive outlives this producer, and
        the caller's copy may go."""
        key = object()
        return SHARED + self.exporter.export(_in_host_memory(tensor), name=id(key), owner=key)

    def clear(self) -> None:
        """Gives up all tensors without a `cache_id`. ExLlamaV3 calls it when all ranks are done with them; only between
        passes of its warm-up it asks nobody, so it is done here."""
        self.settle()
        self.exporter.clear()

    def close(self) -> None:
        self.exporter.close()


def _in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and without a history."""
    if tensor.device.type != "cpu" or tensor.requires_grad:
        tensor = tensor.detach().cpu()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class Consumer:
    """Stands for `SMConsumer`."""

    def __init__(
        self, producer_imp: dict[str, Any] | Producer, device: int, pin_memory: bool = False
    ) -> None:
        """`pin_memory` is without effect: what is uploaded in a pass are some kilobytes, and CUDA says that it has read memory
        that is not pinned when the call returns. (Not tried on machines whose GPUs read such memory themselves.)"""
        import torch
        from torch.utils.dlpack import from_dlpack

        self.contiguous = torch.contiguous_format
        self.from_dlpack = from_dlpack
        self.device = device
        # As ExLlamaV3's consumer does, and its passes rely on.
        self.set_device = torch.cuda.set_device
        if device >= 0:
            self.set_device(device)
        exported = producer_imp.export() if isinstance(producer_imp, Producer) else producer_imp
        # One importer of an arena for each process; the helper (device -1) is none of the GPUs.
        self.importer = TensorImporter(exported[ARENA], device % 32)

    def recv(
        self,
        imp: bytes,
        cuda: bool = False,
        slice_dim: int | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> torch.Tensor | None:
        """The tensor that `Producer.send` has described, or a part of it, on this rank's GPU if `cuda`."""
        if imp == NOTHING:
            return None
        view = self.importer.import_(imp[1:])
        if slice_dim is not None:
            assert first is not None and last is not None
            view = view.narrow(slice_dim % max(1, len(view.shape)), first, last)
        # A capsule rather than the view: half of the time goes into asking what the view could do.
        tensor = self.from_dlpack(view.__dlpack__())
        if cuda:
            self.set_device(self.device)
            return tensor.to(
                self.device, non_blocking=True, copy=True, memory_format=self.contiguous
            )
        if imp[:1] == SHARED:
            return tensor
        return tensor.clone(memory_format=self.contiguous)

    def close(self) -> None:
        """Views that are left keep their memory."""


def consumer(original: Any) -> Any:
    """`SMConsumer` that is Peerlane's for Peerlane's producers, and ExLlamaV3's for its own."""

    def make(
        producer_imp: Any, device: int | None = None, pin_memory: bool = False
    ) -> Consumer | Any:
        ours = isinstance(producer_imp, Producer) or (
            isinstance(producer_imp, dict) and ARENA in producer_imp
        )
        kind = Consumer if ours else original
        return kind(producer_imp, device=device, pin_memory=pin_memory)

    return make
