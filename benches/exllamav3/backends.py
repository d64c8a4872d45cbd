"""The backends by the names they have here: how a model is loaded with one, and how one is made.

  single     no tensor parallelism: the whole model on cuda:0
  native     ExLlamaV3's own, through host memory
  nccl       ExLlamaV3's own, through NCCL for sums and host memory for the rest
  p2p        Peerlane; p2p-late, p2p-exact, p2p-rounded and p2p-channel are it with another option (see VARIANTS)
  auto       Peerlane's choice among p2p, nccl and native
  ceiling    collectives that do nothing

Invariant: nothing here is imported from torch, ExLlamaV3 or Peerlane before it is needed.
"""

from __future__ import annotations

from typing import Any

NAMES = ["native", "p2p", "nccl", "single", "ceiling", "auto", "p2p-late", "p2p-exact", "p2p-rounded", "p2p-channel"]
# p2p-late reports a failed wait at a later call, so a pass need not wait for the GPU; p2p-exact sends
# fp32 sums without rounding them to bf16; p2p-rounded rounds before and after such a sum as native does.
# p2p-channel does without pipes and the helper process; it has to be there when the model is loaded, so not with --turns.
VARIANTS: dict[str, dict[str, Any]] = {
    "p2p-late": {"check": "late"},
    "p2p-exact": {"wire": "native"},
    "p2p-rounded": {"wire": "native"},
    "p2p-channel": {"channel": True},
}


def peerlane_options(kind: str) -> Any:
    from dataclasses import replace

    from peerlane.exllamav3 import Options

    return replace(Options.from_env(), **VARIANTS.get(kind, {}))


def round_as_native(tensor: Any) -> None:
    """Rounds fp32 to bf16 in place, ties away from zero."""
    import torch

    if tensor.dtype == torch.float32:
        tensor.view(torch.int32).add_(0x8000).bitwise_and_(-0x10000)


def rounded(local: dict[str, Any]) -> None:
    """Runs on every rank: from here on its backend sums as native does, so that the difference
    between the two can be told from rounding. For two ranks only: native rounds after each addition."""
    backend = local["backend"]
    exact = backend.all_reduce

    def all_reduce(tensor: Any, contribution: bool = True) -> None:
        round_as_native(tensor)
        exact(tensor, contribution)
        round_as_native(tensor)

    backend.all_reduce = all_reduce


def prepare(kind: str) -> str:
    """Makes ExLlamaV3 know the backend, and returns what `model.load` calls it."""
    if kind == "ceiling":
        import null_backend

        null_backend.install()
        return "native"
    if kind == "auto" or kind.startswith("p2p"):
        import peerlane.exllamav3

        peerlane.exllamav3.install(options=peerlane_options(kind))
        return kind.partition("-")[0]
    return kind


def make(kind: str, device: int, active_devices: list[int], output_device: int, init_method: str, uuid: str) -> Any:
    """This process's part of a backend. Blocks until the other ranks make theirs. Classes come from the
    modules that define them: the names that ExLlamaV3's loader uses may have been replaced."""
    common: dict[str, Any] = {
        "device": device,
        "active_devices": active_devices,
        "output_device": output_device,
        "init_method": init_method,
        "master": device == output_device,
        "uuid": uuid,
    }
    if kind == "ceiling":
        from null_backend import NullBackend

        return NullBackend()
    if kind.startswith("p2p"):
        from peerlane.exllamav3 import TPBackendP2P

        return TPBackendP2P(**common, options=peerlane_options(kind))
    from exllamav3.model import model_tp_backend

    if kind == "nccl":
        return model_tp_backend.TPBackendNCCL(**common)
    if kind == "native":
        return model_tp_backend.TPBackendNative(**common, cpu=device < 0)
    raise ValueError(f"no backend of this process alone is called {kind}")


def describe(backend: Any) -> str:
    """The class, and whether Peerlane handed its work back to ExLlamaV3."""
    name = type(backend).__name__
    return f"{name}, fallen back to native" if getattr(backend, "native", None) is not None else name
