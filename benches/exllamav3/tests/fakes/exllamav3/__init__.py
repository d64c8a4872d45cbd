"""A model of ExLlamaV3's outside for run_one.py: the calls it makes, and nothing behind them.

All ranks live in this process. Each pass asks its local context for a backend, as the real one does,
and FAKE_TROUBLE names a backend that fails ("BACKEND raises") or never ends ("BACKEND hangs").
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from .model import model_tp

VOCAB = 64


class Config:
    vocab_size = VOCAB

    @staticmethod
    def from_directory(directory: str) -> Config:
        assert os.path.exists(os.path.join(directory, "config.json"))
        return Config()


class Cache:
    def __init__(self, model: Model, max_num_tokens: int):
        self.model = model


class Connection:
    def __init__(self, local: dict[str, Any]):
        self.local_context = local
        self.answers: list[Any] = []

    def send(self, command: tuple[Any, tuple[Any, ...]]) -> None:
        function, args = command
        self.answers.append(function(self.local_context, *args))

    def poll(self, timeout: float) -> bool:
        return bool(self.answers)

    def recv(self) -> Any:
        return self.answers.pop(0)


class Child:
    pid = os.getpid()


class Model(model_tp.Model_TPMixin):
    @staticmethod
    def from_config(config: Config) -> Model:
        return Model()

    def load(self, device: str | None = None, tp_backend: str = "", use_per_device: Any = None, **_: Any) -> None:
        self.local = {}
        if device is None:
            self.active_devices, self.tp_output_device = [1, 0], 0
            for rank in (-1, 1, 0):
                self.local[rank] = model_tp.init_pg(rank, [1, 0], 0, {"type": tp_backend})
            self.mp_parent_conn = [Connection(self.local[0]), Connection(self.local[1]), Connection(self.local[-1])]
            self.mp_children = [object(), Child(), Child()]
            self.tp_worker_dispatch_wait_multi([1, 0], model_tp.touch_device_measure_vram, ())

    def step(self, params: dict[str, Any]) -> None:
        if params.get("tp_warmup") or not self.local:
            return
        backend = type(self.local[0]["backend"]).__name__
        name, _, trouble = os.environ.get("FAKE_TROUBLE", "").partition(" ")
        if name == backend and trouble == "raises":
            raise RuntimeError("no more")
        if name == backend and trouble == "hangs":
            time.sleep(600)
        for rank in (0, 1):
            turn = self.local[rank]["_hash_passes"] = self.local[rank].get("_hash_passes", 0) + 1
            if turn <= int(os.environ.get("EXL3_TP_STREAM_HASH", "0")):
                print(
                    f"stream-hash dev={rank} pass={turn}   1 model.layers.0       {turn:012x} (1, 4) float", flush=True
                )

    def forward(self, ids: Any, params: dict[str, Any]) -> Any:
        self.step(params)
        rows, tokens = ids.shape
        seed = int(ids[0, -1]) + params["past_len"]
        return np.random.default_rng(seed).standard_normal((rows, tokens, VOCAB)).astype(np.float16).view(torch.Tensor)

    def prefill(self, ids: Any, params: dict[str, Any]) -> None:
        self.step(params)

    def unload(self) -> None:
        for local in self.local.values():
            local["backend"].close()
