"""What each stage of a pass takes, with pipes and with channels: `peerlane trace` of the same run, side by side.

  stages.py --model DIR --peerlane PROGRAM --out FILE [--backends p2p,p2p-channel] [--rounds 2] [--gpus 2]

Each backend and round is a process of its own (`run_one.py`) under `peerlane trace`, every other round backwards. Tracing itself takes
some microseconds a call, so these are no speeds: `bench.py` has those. Invariant: the result file is whole after every run; one
that fails is in it with its exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
# What passes are called in a trace.
KINDS = ["decode", "prefill"]
PLACES = ["host", "gpu", "message"]

Json = dict[str, Any]
Stage = tuple[str, str, str]


def order(backends: list[str], rounds: int) -> list[tuple[int, str]]:
    """Rounds and backends, every other round backwards."""
    return [(turn, kind) for turn in range(1, rounds + 1) for kind in (backends if turn % 2 else backends[::-1])]


def trace(args: argparse.Namespace, kind: str, folder: Path) -> Json:
    """One run: its stages, or how it ended."""
    summary = folder / "summary.json"
    run = [sys.executable, HERE / "run_one.py", "--model", args.model, "--backend", kind, "--gpus", args.gpus]
    run += ["--out", folder / "run.json", "--decode", "1", "--prefill", args.tokens, "--repeats", "3"]
    command = [args.peerlane, "trace", "--out", folder / "timeline.json", "--json", summary, "--", *run]
    summary.unlink(missing_ok=True)
    with subprocess.Popen([str(word) for word in command], start_new_session=True) as process:
        try:
            status = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            # The ranks too: they would keep the GPUs.
            os.killpg(process.pid, signal.SIGKILL)
            return {"failed": f"took more than {args.limit} s"}
    if status != 0 or not summary.exists():
        return {"failed": f"exit status {status}"}
    return json.loads(summary.read_text())["trace"]


def stages(runs: list[Json], kind: str) -> dict[Stage, tuple[float, ...]]:
    """p50, p99, number a pass, and all of a pass, in microseconds, of each stage: medians of a backend's rounds."""
    found: dict[Stage, list[tuple[float, ...]]] = {}
    for run in runs:
        for one in run.get("stages", []) if run["backend"] == kind else []:
            if one["pass"] in KINDS:
                figures = one["p50_us"], one["p99_us"], one["per_pass"], one["pass_us"]
                found.setdefault((one["pass"], one["name"], one["place"]), []).append(figures)
    return {stage: tuple(median(column) for column in zip(*figures)) for stage, figures in found.items()}


def table(runs: list[Json]) -> str:
    """All backends beside each other, in Markdown."""
    backends = list(dict.fromkeys(run["backend"] for run in runs))
    of = {kind: stages(runs, kind) for kind in backends}
    every = {stage for kind in backends for stage in of[kind]}
    weight = {stage: max(of[kind].get(stage, (0,) * 4)[3] for kind in backends) for stage in every}
    lines = []
    for kind in KINDS:
        rows = sorted((stage for stage in every if stage[0] == kind), key=lambda stage: (-weight[stage], stage))
        if not rows:
            continue
        lines += ["", f"**{kind}** | | " + " | ".join(f"{name}: n | p50 us | p99 us | us/pass" for name in backends)]
        lines[-1] = f"| {lines[-1]} |"
        lines.append("|---|---|" + "---:|---:|---:|---:|" * len(backends))
        for stage in rows:
            cells = []
            for name in backends:
                p50, p99, count, all_of_it = of[name].get(stage, (None,) * 4)
                none = p50 is None
                cells += ["-"] * 4 if none else [f"{count:.1f}", f"{p50:.1f}", f"{p99:.1f}", f"{all_of_it:.1f}"]
            lines.append(f"| {stage[1]} | {stage[2]} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{run['backend']}, round {run['round']}: {run['failed']}" for run in runs if "failed" in run)]
    return "\n".join(lines).strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peerlane", default="peerlane", help="the program")
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["p2p", "p2p-channel"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON); the table is beside it (.md)")
    args = parser.parse_args()
    runs: list[Json] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn, kind in order(args.backends, args.rounds):
            runs.append({"backend": kind, "round": turn, **trace(args, kind, Path(folder))})
            args.out.write_text(json.dumps({"model": args.model.name, "gpus": args.gpus, "runs": runs}, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(runs))
    print(table(runs))
    return any("failed" in run for run in runs)


if __name__ == "__main__":
    sys.exit(main())
