"""One process, one set of measurements: one ExLlamaV3, one model, one way for the GPUs to talk.

bench.py starts this; it also runs by itself. Invariant: the result file is whole after every
finished measurement, so a run that is killed keeps what it had. Keep the top of this file light:
every spawned rank imports it again.

What is measured, in this order (all on ids made from a fixed seed):
  greedy   the prompt's 16 tokens, then 64 greedy steps at batch 1, twice: the ids, a hash over all
           logits, and whether the second time gave the same.
  decode   steps per second: blocks of `--steps` forward passes of one token per sequence, each
           ending when the argmax is on the host, as ExLlamaV3's generator ends a step.
  prefill  tokens per second of model.prefill(n tokens), until the output GPU is idle. As in the
           generator this fills the cache and computes no logits.
  ttft     time to first token of an n-token prompt, as the generator goes about it: model.prefill of
           n-1 tokens, then model.forward of the last one, until the argmax is on the host.
  memory   after the greedy passes: the processes' host memory, /dev/shm and GPU memory.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe

PROMPT_TOKENS, GREEDY_STEPS = 16, 64
CACHE_TOKENS, ROW_TOKENS, DECODE_PAST = 8192, 512, 32
GPU_GIB = 60.0
# The first passes compile kernels; ExLlamaV3's 20 s for a worker's answer is for a warm model.
FIRST_PASS_TIMEOUT_S = 180


class Result:
    """The measurements so far, on disk after each `put`."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path = path
        self.data: dict[str, Any] = {**head, "complete": False, "seconds": {}}
        self.started = time.monotonic()
        self.save()

    def put(self, name: str, value: Any) -> None:
        self.data[name] = value
        self.data["seconds"][name] = round(time.monotonic() - self.started, 2)
        self.save()
        print(f"[{self.data['seconds'][name]:7.2f} s] {name}", flush=True)

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data))
        part.replace(self.path)


def token_ids(rows: int, count: int, vocab: int, seed: int = 7) -> Any:
    import torch

    draw = random.Random(seed)
    return torch.tensor([[draw.randrange(vocab) for _ in range(count)] for _ in range(rows)], dtype=torch.long)


class Runner:
    """A loaded model and its passes."""

    def __init__(self, args: argparse.Namespace, result: Result):
        self.args, self.result = args, result
        self.nvml = probe.Nvml()
        self.shm_before = probe.shared_segments()
        self.marks: dict[str, Any] = {"before": self.nvml.used()}
        self.single = args.backend == "single"
        self.noise = args.backend == "ceiling"

    def load(self) -> None:
        args = self.args
        import torch
        from exllamav3 import Cache, Config, Model
        from exllamav3.model import model_tp, model_tp_fn

        if args.backend in ("p2p", "auto"):
            import peerlane.exllamav3

            peerlane.exllamav3.install()
        elif self.noise:
            import null_backend

            null_backend.install()
        model_tp.DISPATCH_TIMEOUT = FIRST_PASS_TIMEOUT_S
        self.torch = torch
        self.has_warmup_passes = hasattr(model_tp_fn, "TPBackendNull")
        self.mark_backend_memory(model_tp)
        self.result.put("torch", torch.__version__)
        config = Config.from_directory(str(args.model))
        self.model = Model.from_config(config)
        self.vocab = config.vocab_size
        self.cache = Cache(self.model, max_num_tokens=CACHE_TOKENS)
        if self.single:
            self.model.load(device=torch.device("cuda:0"))
        else:
            self.model.load(
                tensor_p=True,
                tp_backend="native" if self.noise else args.backend,
                tp_output_device="cuda:0",
                use_per_device=[GPU_GIB] * args.gpus,
                max_chunk_size=2048,
            )
            local = self.model.mp_parent_conn[self.model.tp_output_device].local_context
            self.result.put("backend_class", type(local["backend"]).__name__)
        torch.cuda.synchronize()
        self.marks["loaded"] = self.nvml.used()
        self.result.put("loaded", True)

    def mark_backend_memory(self, model_tp: Any) -> None:
        """GPU memory once every rank has its context and its backend and nothing else: the moment
        at which the loader asks each rank how much is free."""
        original = model_tp.Model_TPMixin.tp_worker_dispatch_wait_multi
        question = model_tp.touch_device_measure_vram
        marks, nvml, result = self.marks, self.nvml, self.result

        def watched(model: Any, devices: Any, function: Any, *rest: Any, **named: Any) -> Any:
            answer = original(model, devices, function, *rest, **named)
            if function is question:
                marks["backend"] = nvml.used()
                result.put("backend_ready", True)
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
        """Compiles and tunes what the measurements use. Where ExLlamaV3 can, first without collectives,
        so that no rank waits inside one while another compiles."""
        shapes = [(1, PROMPT_TOKENS)] + [(rows, 1) for rows in self.args.decode]
        shapes += [(1, size) for tokens in self.args.prefill for size in (tokens, tokens - 1)]
        if not self.single and self.has_warmup_passes:
            for rows, tokens in shapes:
                ids = token_ids(rows, tokens, self.vocab)
                self.forward(ids, 0, max(ROW_TOKENS, page_up(tokens)), tp_warmup=True, last_tokens_only=1)
            self.torch.cuda.synchronize()
            self.result.put("warm_without_collectives", True)

    def check(self) -> None:
        """The first real passes, which are also the ones that EXL3_TP_STREAM_HASH prints."""
        for tokens in self.args.prefill[:1]:
            self.prefill(token_ids(1, tokens, self.vocab), page_up(tokens))
        runs = [self.greedy(), self.greedy()]
        same = runs[0]["tokens"] == runs[1]["tokens"] and runs[0]["logits_sha1"] == runs[1]["logits_sha1"]
        self.result.put("greedy", {**runs[0], "repeatable": same})

    def greedy(self) -> dict[str, Any]:
        digest, tokens, rows = hashlib.sha1(), [], []
        ids = token_ids(1, PROMPT_TOKENS, self.vocab, seed=1234)
        past = 0
        for _ in range(GREEDY_STEPS + 1):
            logits = self.forward(ids, past)
            past += ids.shape[1]
            row = logits[0, -1, : self.vocab].cpu().numpy()
            digest.update(row.tobytes())
            rows.append(row)
            ids = self.next_ids(logits)
            tokens.append(int(ids[0, 0]))
        import numpy as np

        np.save(self.result.path.with_suffix(".npy"), np.stack([rows[0], rows[-1]]))
        first = hashlib.sha1(rows[0].tobytes()).hexdigest()[:16]
        finite = all(bool(np.isfinite(row).all()) for row in rows)
        return {"tokens": tokens, "first_sha1": first, "logits_sha1": digest.hexdigest()[:16], "finite": finite}

    def memory(self) -> None:
        names = {os.getpid(): "main"}
        for index, child in enumerate(getattr(self.model, "mp_children", [])):
            if getattr(child, "pid", None):
                last = index == len(self.model.mp_children) - 1
                names[child.pid] = "helper" if last else f"worker cuda:{index}"
        family = probe.tree(os.getpid())
        found = [{"role": names.get(pid, "other"), **probe.memory(pid)} for pid in family]
        self.marks["running"] = self.nvml.used()
        self.result.put("memory", {
            "processes": found,
            "pss_total": sum(process.get("pss", 0) for process in found),
            "gpu_used": self.marks,
            "shm": probe.new_segments(self.shm_before),
        })

    def decode(self, rows: int) -> None:
        prompt = token_ids(rows, DECODE_PAST, self.vocab)

        def block() -> float:
            ids, past = prompt[:, -1:], DECODE_PAST
            started = time.perf_counter()
            for _ in range(self.args.steps):
                ids = self.next_ids(self.forward(ids, past))
                past += 1
            return self.args.steps / (time.perf_counter() - started)

        self.prefill(prompt, ROW_TOKENS)
        block()
        family = probe.tree(os.getpid())
        cpu, wall = probe.cpu_seconds(family), time.perf_counter()
        speeds = [block() for _ in range(self.args.repeats)]
        cores = (probe.cpu_seconds(family) - cpu) / (time.perf_counter() - wall)
        self.result.put(f"decode_{rows}", {"steps_per_s": speeds, "busy_cores": round(cores, 2)})

    def time_prefill(self, tokens: int) -> None:
        ids, length = token_ids(1, tokens, self.vocab), page_up(tokens)

        def throughput() -> None:
            self.prefill(ids, length)
            self.torch.cuda.synchronize()

        def first_token() -> None:
            self.prefill(ids[:, :-1], length)
            self.next_ids(self.model.forward(ids[:, -1:], self.params(1, tokens - 1, length)))

        repeats = max(4, self.args.repeats // 2)
        self.result.put(f"prefill_{tokens}", {
            "tokens_per_s": [tokens / seconds for seconds in timed(throughput, repeats)],
            "ttft_ms": [seconds * 1e3 for seconds in timed(first_token, repeats)],
        })


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


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", choices=["p2p", "auto", "native", "nccl", "single", "ceiling"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--decode", type=sizes, default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--prefill", type=sizes, default=[512, 2048], help="prompt lengths")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--limit", type=float, help="seconds until the stack is printed: the caller is about to kill us")
    args = parser.parse_args()
    if args.limit:
        faulthandler.dump_traceback_later(args.limit, file=sys.stderr)
    result = Result(args.out, {"backend": args.backend, "gpus": 1 if args.backend == "single" else args.gpus})
    runner = Runner(args, result)
    runner.load()
    runner.warm_up()
    if not runner.noise:
        runner.check()
    for rows in args.decode[:1]:
        runner.decode(rows)
    runner.memory()
    for tokens in reversed(args.prefill):
        runner.time_prefill(tokens)
    for rows in args.decode[1:]:
        runner.decode(rows)
    result.data["complete"] = True
    result.save()
    before = time.monotonic()
    runner.model.unload()
    result.put("closed", {"seconds": time.monotonic() - before, "shm_left": probe.new_segments(runner.shm_before)})


if __name__ == "__main__":
    main()
