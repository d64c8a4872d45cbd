"""Several backends in the processes of one loaded model, one of them in use at a time.

ExLlamaV3 asks its local context for the backend at the start of every pass and keeps no other
reference to it, so replacing it there between passes is all it takes. Loading a model costs most of
a run's time, and backends measured seconds apart in the same processes compare better than runs
minutes apart. Invariant: all ranks and the reduce helper change together, between passes.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import backends

SETTLE_S = 60.0


def use(local: dict[str, Any], loaded_with: str, kind: str, init_method: str, name: str, hash_again: bool) -> str:
    """Runs on every rank: `kind` is the backend from the next pass on. Returns what it is."""
    made = local.setdefault("bench_backends", {loaded_with: local["backend"]})
    if kind not in made:
        made[kind] = backends.make(
            kind, local["device"], local["active_devices"], local["output_device"], init_method, name
        )
    local["backend"] = made[kind]
    if hash_again:
        local["_hash_passes"] = 0
    return backends.describe(made[kind])


def close(local: dict[str, Any], loaded_with: str) -> None:
    """Runs on every rank: only the backend that the model was loaded with is left, as unload expects."""
    made = local.get("bench_backends", {})
    local["backend"] = made.get(loaded_with, local["backend"])
    for kind in [kind for kind in made if kind != loaded_with]:
        made.pop(kind).close()


def echo(_local: dict[str, Any], word: str) -> str:
    """Runs on every rank: this question's answer, and no other's."""
    return word


class Switch:
    """The parent's side."""

    def __init__(self, model: Any, loaded_with: str):
        self.model, self.loaded_with = model, loaded_with
        self.meeting: dict[str, tuple[str, str]] = {}
        # The output device's rank lives in this process and runs when it is dispatched to, so it has
        # to come last, when all others are on their way to meet it.
        self.ranks = [-1, *model.active_devices]

    def use(self, kind: str, hash_again: bool) -> str:
        from exllamav3.util import find_free_port

        where = self.meeting.setdefault(kind, (f"tcp://127.0.0.1:{find_free_port()}", uuid.uuid4().hex))
        words = (self.loaded_with, kind, *where, hash_again)
        found = self.model.tp_worker_dispatch_wait_multi(self.ranks, use, words)[-1]
        if "fallen back" in found and kind != self.loaded_with:
            raise RuntimeError(f"{found}: the helper process was started before and does not know")
        return found

    def settle(self) -> None:
        """After a failure: reads the answers that nobody fetched, until every rank answers a question
        of now. Raises if one no longer does."""
        self.model.tp_pending_acks = []
        word, deadline = uuid.uuid4().hex, time.monotonic() + SETTLE_S
        for rank in self.ranks:
            self.model.mp_parent_conn[rank].send((echo, (word,)))
        for rank in self.ranks:
            pipe = self.model.mp_parent_conn[rank]
            answer = None
            while answer != word:
                if not pipe.poll(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError(f"the rank on device {rank} no longer answers")
                answer = pipe.recv()

    def close(self) -> None:
        self.model.tp_worker_dispatch_wait_multi(self.ranks, close, (self.loaded_with,))
