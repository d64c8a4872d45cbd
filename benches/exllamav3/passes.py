"""A loaded ExLlamaV3 model, its passes, and what is measured on them.

Invariant: every pass works on ids made from a fixed seed, so that two backends do the same work and
their outputs can be compared.

  greedy   the prompt's 16 tokens, then 64 greedy steps at batch 1, twice: the ids, a hash over all
           logits, and whether the second time gave the same.
  decode   steps per second: blocks of forward passes of one token per sequence, each step ending when
           the argmax is on the host, as ExLlamaV3's generator ends one.
  prefill  tokens per second of model.prefill(n tokens), until the output GPU is idle. As in the
           generator this fills the cache and computes no logits.
  ttft     time to first token of an n-token prompt, as the generator goes about it: model.prefill of
           n-1 tokens, then model.forward of the last one, until the argmax is on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backends
import probe

PROMPT_TOKENS, GREEDY_STEPS = 16, 64
CACHE_TOKENS, ROW_TOKENS, DECODE_PAST = 8192, 512, 32
GPU_GIB = 60.0
# The first passes compile kernels; ExLlamaV3's 20 s for a worker's answer is for a warm model.
FIRST_PASS_TIMEOUT_S = 180


def token_ids(rows: int, count: int, vocab: int, seed: int = 7) -> Any:
    import torch

    draw = random.Random(seed)
    return torch.tensor([[draw.randrange(vocab) for _ in range(count)] for _ in range(rows)], dtype=torch.long)


def timed(action: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return seconds


def page_up(tokens: int) -> int:
    """Cache rows for so many tokens: ExLlamaV3 hands them out in pages of 256."""
    return -(-tokens // 256) * 256


class Loaded:
    """The model on its GPUs."""

    def __init__(self, args: argparse.Namespace, note: Callable[[str, Any], None]):
        """`note` is told what was reached, as it is reached."""
        self.args, self.note = args, note
        self.nvml = probe.Nvml()
        self.shm_before = probe.shared_segments()
        self.marks: dict[str, Any] = {"before": self.nvml.used()}
        self.single = args.backend == "single"
        import torch
        from exllamav3 import Cache, Config, Model
        from exllamav3.model import model_tp, model_tp_fn

        known_as = backends.prepare(args.backend)
        model_tp.DISPATCH_TIMEOUT = FIRST_PASS_TIMEOUT_S
        self.torch = torch
        self.has_warmup_passes = hasattr(model_tp_fn, "TPBackendNull")
        self.mark_backend_memory(model_tp)
        note("torch", torch.__version__)
        config = Config.from_directory(str(args.model))
        self.model = Model.from_config(config)
        self.vocab = config.vocab_size
        self.cache = Cache(self.model, max_num_tokens=CACHE_TOKENS)
        if self.single:
            self.model.load(device=torch.device("cuda:0"))
        else:
            self.model.load(
                tensor_p=True,
                tp_backend=known_as,
                tp_output_device="cuda:0",
                use_per_device=[GPU_GIB] * args.gpus,
                max_chunk_size=2048,
            )
            local = self.model.mp_parent_conn[self.model.tp_output_device].local_context
            note("backend_class", backends.describe(local["backend"]))
            if args.backend == "p2p-rounded":
                self.model.tp_worker_dispatch_wait_multi(self.model.active_devices, backends.rounded, ())
        torch.cuda.synchronize()
        self.marks["loaded"] = self.nvml.used()
        note("loaded", True)

    def mark_backend_memory(self, model_tp: Any) -> None:
        """GPU memory once every rank has its context and its backend and nothing else: the moment
        at which the loader asks each rank how much is free."""
        original = model_tp.Model_TPMixin.tp_worker_dispatch_wait_multi
        question = model_tp.touch_device_measure_vram

        def watched(model: Any, devices: Any, function: Any, *rest: Any, **named: Any) -> Any:
            answer = original(model, devices, function, *rest, **named)
            if function is question:
                self.marks["backend"] = self.nvml.used()
                self.note("backend_ready", True)
            return answer

        model_tp.Model_TPMixin.tp_worker_dispatch_wait_multi = watched

    def params(self, rows: int, past: int, length: int, **more: Any) -> dict[str, Any]:
        """A pass's parameters: always a new dict, because the pass writes into it."""
        return {"attn_mode": "flash_attn", "cache": self.cache, "past_len": past, "batch_shape": (rows, length), **more}

    def forward(self, ids: Any, past: int, length: int = ROW_TOKENS, **more: Any) -> Any:
        return self.model.forward(ids, self.params(ids.shape[0], past, length, **more))

    def prefill(self, ids: Any, length: int) -> None:
        self.model.prefill(ids, self.params(ids.shape[0], 0, length))

    def next_ids(self, logits: Any) -> Any:
        """The greedy token of every row, on the host: this is where a step ends."""
        return logits[:, -1:, : self.vocab].argmax(dim=-1).cpu()

    def warm_up(self) -> None:
        """Compiles and tunes what the measurements use, without collectives where ExLlamaV3 can: no rank
        should wait inside one while another compiles."""
        if self.single or not self.has_warmup_passes:
            return
        shapes = [(1, PROMPT_TOKENS)] + [(rows, 1) for rows in [1, *self.args.decode]]
        shapes += [(1, size) for tokens in self.args.prefill for size in (tokens, tokens - 1)]
        for rows, tokens in shapes:
            ids = token_ids(rows, tokens, self.vocab)
            self.forward(ids, 0, max(ROW_TOKENS, page_up(tokens)), tp_warmup=True, last_tokens_only=1)
        self.torch.cuda.synchronize()
        self.note("warm_without_collectives", True)

    def check(self, logits_file: Path | None) -> dict[str, Any]:
        """What the model says. Its first passes are those that EXL3_TP_STREAM_HASH prints."""
        for tokens in self.args.prefill[:1]:
            self.prefill(token_ids(1, tokens, self.vocab), page_up(tokens))
        first, second = self.greedy(logits_file), self.greedy(None)
        return {**first, "repeatable": first == second}

    def greedy(self, logits_file: Path | None) -> dict[str, Any]:
        import numpy as np

        digest, tokens, rows = hashlib.sha1(), [], []
        ids = token_ids(1, PROMPT_TOKENS, self.vocab, seed=1234)
        past = 0
        for _ in range(GREEDY_STEPS + 1):
            logits = self.forward(ids, past)
            past += ids.shape[1]
            rows.append(logits[0, -1, : self.vocab].cpu().numpy())
            digest.update(rows[-1].tobytes())
            ids = self.next_ids(logits)
            tokens.append(int(ids[0, 0]))
        if logits_file:
            np.save(logits_file, rows[0])
        first = hashlib.sha1(rows[0].tobytes()).hexdigest()[:16]
        finite = all(bool(np.isfinite(row).all()) for row in rows)
        return {"tokens": tokens, "first_sha1": first, "logits_sha1": digest.hexdigest()[:16], "finite": finite}

    def memory(self) -> dict[str, Any]:
        names = {os.getpid(): "main"}
        children = getattr(self.model, "mp_children", [])
        for index, child in enumerate(children):
            if getattr(child, "pid", None):
                names[child.pid] = "helper" if index == len(children) - 1 else f"worker cuda:{index}"
        found = [{"role": names.get(pid, "other"), **probe.memory(pid)} for pid in probe.tree(os.getpid())]
        self.marks["running"] = self.nvml.used()
        return {
            "processes": found,
            "pss_total": sum(process.get("pss", 0) for process in found),
            "gpu_used": self.marks,
            "shm": probe.new_segments(self.shm_before),
        }

    def decode(self, rows: int) -> dict[str, Any]:
        prompt = token_ids(rows, DECODE_PAST, self.vocab)

        def block() -> None:
            ids, past = prompt[:, -1:], DECODE_PAST
            for _ in range(self.args.steps):
                ids = self.next_ids(self.forward(ids, past))
                past += 1

        self.prefill(prompt, ROW_TOKENS)
        block()
        family = probe.tree(os.getpid())
        cpu, wall = probe.cpu_seconds(family), time.perf_counter()
        speeds = [self.args.steps / seconds for seconds in timed(block, self.args.repeats)]
        cores = (probe.cpu_seconds(family) - cpu) / (time.perf_counter() - wall)
        return {"steps_per_s": speeds, "busy_cores": round(cores, 2)}

    def time_prefill(self, tokens: int) -> dict[str, Any]:
        ids, length = token_ids(1, tokens, self.vocab), page_up(tokens)

        def throughput() -> None:
            self.prefill(ids, length)
            self.torch.cuda.synchronize()

        def first_token() -> None:
            self.prefill(ids[:, :-1], length)
            self.next_ids(self.forward(ids[:, -1:], tokens - 1, length))

        return {
            "tokens_per_s": [tokens / seconds for seconds in timed(throughput, self.args.repeats)],
            "ttft_ms": [seconds * 1e3 for seconds in timed(first_token, self.args.repeats)],
        }

    def measurements(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Everything that is timed, by the name it has in the results, most telling first."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        for rows in self.args.decode:
            found[f"decode_{rows}"] = lambda rows=rows: self.decode(rows)
        for tokens in reversed(self.args.prefill):
            found[f"prefill_{tokens}"] = lambda tokens=tokens: self.time_prefill(tokens)
        return found
