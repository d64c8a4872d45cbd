"""Where a pass's time goes between the ranks: computing, reducing, or waiting for the other rank.

    timeline.py --model DIR --backend p2p        # or native, nccl, ceiling

GPU events stand around every all_reduce of a pass on every rank. A call ends on all ranks together,
so the shortest of its times is what the operation takes, and what a rank takes longer is how long it
waited for the slowest: `waiting`, of which `first` in the first call. `longest` is the longest time
between two calls. `rate` is measured before, without events. Invariant: the model runs as it is; only the backend's method is wrapped. The
events cost some microseconds of CPU per call, which shows in decode.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from passes import Loaded, page_up, token_ids

WARM, PASSES, RATE_PASSES = 3, 8, 30


def watch(local: dict[str, Any]) -> None:
    """Runs on every rank: from the next call on, events stand around the backend's all_reduce."""
    import torch

    backend = local["backend"]
    plain, marks = backend.all_reduce, []
    local["bench_marks"] = marks

    def all_reduce(tensor: Any, contribution: bool = True) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        plain(tensor, contribution)
        end.record()
        marks.append((begin, end))

    backend.all_reduce = all_reduce


def collect(local: dict[str, Any]) -> list[tuple[float, float]]:
    """Runs on every rank: begin and end of each call since the last time, in us after the first."""
    import torch

    torch.cuda.synchronize()
    marks = local["bench_marks"]
    first = marks[0][0]
    found = [(first.elapsed_time(begin) * 1e3, first.elapsed_time(end) * 1e3) for begin, end in marks]
    marks.clear()
    return found


def split(ranks: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """One pass's sums, in us: `reducing` alike on all ranks, the rest rank by rank."""
    calls = list(zip(*ranks))
    reducing = sum(min(end - begin for begin, end in call) for call in calls)
    waiting = [sum(end - begin for begin, end in rank) - reducing for rank in ranks]
    first = [rank[0][1] - rank[0][0] - min(end - begin for begin, end in calls[0]) for rank in ranks]
    gaps = [[after[0] - before[1] for before, after in zip(rank, rank[1:])] for rank in ranks]
    computing, longest = [sum(rank) for rank in gaps], [max(rank) for rank in gaps]
    return {
        "calls": len(calls), "reducing": reducing, "waiting": waiting, "first": first, "computing": computing, "longest": longest,
    }  # fmt: skip


def summary(name: str, passes: list[dict[str, Any]]) -> dict[str, Any]:
    def middle(key: str) -> Any:
        values = [one[key] for one in passes]
        return [round(median(rank)) for rank in zip(*values)] if isinstance(values[0], list) else round(median(values))

    keys = [key for key in passes[0] if key != "calls"]
    return {"pass": name, "calls": passes[0]["calls"], **{key: middle(key) for key in keys}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", default="p2p")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    args.decode, args.prefill = [1], [args.tokens]
    loaded = Loaded(args, lambda name, value: None)
    loaded.warm_up()
    devices = loaded.model.active_devices
    ask = loaded.model.tp_worker_dispatch_wait_multi
    ids, length = token_ids(1, args.tokens, loaded.vocab), page_up(args.tokens)
    kinds = {
        f"prefill {args.tokens}": lambda: loaded.prefill(ids, length),
        "decode 1": lambda: loaded.next_ids(loaded.forward(ids[:, :1], 32)),
    }
    rates = {}
    for name, action in kinds.items():
        for _ in range(WARM):
            action()
        begin = time.perf_counter()
        for _ in range(RATE_PASSES):
            action()
        torch.cuda.synchronize()
        rates[name] = round(RATE_PASSES / (time.perf_counter() - begin), 1)
    ask(devices, watch, ())
    found = []
    for name, action in kinds.items():
        passes = []
        for _ in range(PASSES):
            action()
            passes.append(split(ask(devices, collect, ())))
        found.append({**summary(name, passes), "rate": rates[name]})
        print(f"{args.backend}, devices {devices}, us: {json.dumps(found[-1])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"backend": args.backend, "devices": devices, "passes": found}, indent=1) + "\n")
    loaded.model.unload()


if __name__ == "__main__":
    main()
