"""The ceiling: ExLlamaV3 with collectives that do nothing.

Every rank computes on its own partial sums, so the output is noise, and the speed is what a
backend without any cost would reach. ExLlamaV3 1.6.5 has such a backend for its warm-up, but its
prefill still waits for the reduce helper, and 1.4.1 has none; this one replaces the native class in
the parent and in every spawned worker, for both versions and for decode and prefill alike.
Invariant: nothing is patched until `install` runs.
"""

from __future__ import annotations

from typing import Any


class NullBackend:
    """The methods that a tensor-parallel pass calls, doing nothing."""

    def __init__(self, **_: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def fwd_barrier(self) -> None:
        pass

    def all_reduce(self, tensor: Any, contribution: bool = True) -> None:
        pass

    def broadcast(self, tensor: Any, src_device: int) -> None:
        pass

    def gather(self, tensor: Any, out_tensor: Any, gather_devices: Any, out_device: int, ldims: Any) -> None:
        pass

    def gather_small(self, tensor: Any, out_tensor: Any, gather_devices: Any, out_device: int, ldims: Any) -> None:
        pass

    def run_cpu_reduce_jobs(self) -> None:
        pass

    def end_cpu_reduce_jobs(self) -> None:
        pass


def worker(*args: Any) -> None:
    """A spawned rank's main function: a fresh interpreter knows nothing of the parent's patch."""
    from exllamav3.model import model_tp_fn

    model_tp_fn.TPBackendNative = NullBackend
    model_tp_fn.mp_model_worker(*args)


def install() -> None:
    """From here on, `tp_backend="native"` means no communication at all."""
    from exllamav3.model import model_tp, model_tp_fn

    model_tp_fn.TPBackendNative = NullBackend
    model_tp.mp_model_worker = worker
