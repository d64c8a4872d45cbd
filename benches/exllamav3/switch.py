"""Several backends in the processes of one loaded model, one of them in use at a time.

ExLlamaV3 asks its local context for the backend at the start of every pass and keeps no other
reference to it, so replacing it there between passes is all it takes. Loading a model costs most of
a run's time, and backends measured seconds apart in the same processes compare better than runs
minutes apart. Invariant: all ranks and the reduce helper change together, between passes.
"""

from __future__ import annotations

import uuid
from typing import Any


def make(local: dict[str, Any], kind: str, args: dict[str, str]) -> Any:
    """A further backend of this rank. Its class comes from the module that defines it: the names that
    the loader uses may have been replaced."""
    if kind == "ceiling":
        from null_backend import NullBackend

        return NullBackend()
    from exllamav3.model import model_tp_backend

    device, output = local["device"], local["output_device"]
    common = {
        "device": device,
        "active_devices": local["active_devices"],
        "output_device": output,
        "master": device == output,
        **args,
    }
    if kind == "nccl":
        return model_tp_backend.TPBackendNCCL(**common)
    if kind == "native":
        return model_tp_backend.TPBackendNative(**common, cpu=device < 0)
    raise ValueError(f"{kind} can only be the backend that the model was loaded with")


def use(local: dict[str, Any], loaded_with: str, kind: str, args: dict[str, str], hash_again: bool) -> str:
    """Runs on every rank: `kind` is the backend from the next pass on. Returns its class."""
    backends = local.setdefault("bench_backends", {loaded_with: local["backend"]})
    if kind not in backends:
        backends[kind] = make(local, kind, args)
    local["backend"] = backends[kind]
    if hash_again:
        local["_hash_passes"] = 0
    return type(backends[kind]).__name__


def close(local: dict[str, Any], loaded_with: str) -> None:
    """Runs on every rank: only the backend that the model was loaded with is left, as unload expects."""
    backends = local.get("bench_backends", {})
    local["backend"] = backends.get(loaded_with, local["backend"])
    for kind in [kind for kind in backends if kind != loaded_with]:
        backends.pop(kind).close()


class Switch:
    """The parent's side."""

    def __init__(self, model: Any, loaded_with: str):
        self.model, self.loaded_with = model, loaded_with
        self.args: dict[str, dict[str, str]] = {}
        # The helper first: the last one dispatched, this process's own rank, runs while the others
        # wait for it.
        self.ranks = [-1, *model.active_devices]

    def use(self, kind: str, hash_again: bool) -> str:
        from exllamav3.util import find_free_port

        if kind == "native" and not getattr(self.model.mp_children[-1], "pid", None):
            raise RuntimeError("native needs the reduce helper, and this model was loaded without that process")
        if kind not in self.args:
            self.args[kind] = {"init_method": f"tcp://127.0.0.1:{find_free_port()}", "uuid": uuid.uuid4().hex}
        words = (self.loaded_with, kind, self.args[kind], hash_again)
        return self.model.tp_worker_dispatch_wait_multi(self.ranks, use, words)[-1]

    def close(self) -> None:
        self.model.tp_worker_dispatch_wait_multi(self.ranks, close, (self.loaded_with,))
