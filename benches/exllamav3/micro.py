"""What one collective costs from Python, backend by backend, without a model.

One process per GPU, as in ExLlamaV3, and native's reduce helper. For every operation and size:
  call   host time of one call while the GPU has nothing to do
  done   from that call until the GPU has finished
  each   time of one of many calls that are queued together, by GPU events
  host   host time of one of those: where it is near `each`, the CPU is the limit
all in microseconds, on the output rank. The sizes are those of a decode step and of a 2048-token
prefill of Llama-3.1-8B and -70B. Invariant: a figure is only kept if the result was right, and what
was measured before a backend fails or hangs stays.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import backends
import subrun

KIB, MIB = 1024, 1024 * 1024
IDLE_CALLS = 40
QUEUE_REPEATS = 5
START_S = 60
VOCAB = 128256


@dataclass(frozen=True)
class Case:
    """One operation on tensors of one shape. For a gather the shape is that of the joined tensor."""

    op: str
    rows: int
    width: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * {"float32": 4, "float16": 2, "int64": 8}[self.dtype]

    @property
    def queued(self) -> int:
        """How many calls to queue: enough to hide the start, few enough to end within a second."""
        return 100 if self.nbytes <= MIB else 10


def cases(world: int) -> list[Case]:
    found = [Case("all_reduce", 1, kib * 256, "float32") for kib in (16, 32, 128, 256)]
    found += [
        Case("all_reduce", rows, width, "float32")
        for rows, width in ((64, 4096), (256, 4096), (2048, 4096), (2048, 8192))
    ]
    found += [Case("broadcast", 1, size // 4, "float32") for size in (2 * KIB, 16 * KIB, MIB, 32 * MIB)]
    found += [Case("gather", rows, VOCAB, "float16") for rows in (1, 4, 16)]
    return found + [Case("gather_small", rows, world, dtype) for rows in (1, 16) for dtype in ("float32", "int64")]


def shares(width: int, world: int, unit: int) -> list[int]:
    """A width split over the ranks in multiples of `unit`, as ExLlamaV3 splits a vocabulary."""
    units = width // unit
    return [unit * (units * (rank + 1) // world - units * rank // world) for rank in range(world)]


class Start:
    """Lets the ranks start together, within a microsecond or two: they spin on counters that they
    share, since a process woken by a semaphore comes some 50 us late."""

    def __init__(self, counters: Any, rank: int):
        self.counters, self.rank = counters, rank

    def wait(self) -> None:
        self.counters[self.rank] += 1
        turn, deadline = self.counters[self.rank], time.monotonic() + START_S
        while min(self.counters) < turn:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {self.rank}: the others did not come to start {turn} in {START_S} s")


class Rank:
    """One GPU's process."""

    def __init__(self, kind: str, device: int, world: int, meeting: tuple[str, str], start: Start):
        import torch

        self.torch, self.device, self.world, self.start = torch, device, world, start
        torch.cuda.set_device(device)
        self.backend = backends.make(kind, device, active(world), 0, *meeting)
        self.noise = kind == "ceiling"

    def operation(self, case: Case) -> tuple[Any, Any, Any]:
        """A call to time, the tensor whose value decides the result, and a check of the result."""
        torch, backend = self.torch, self.backend
        dtype, place = getattr(torch, case.dtype), f"cuda:{self.device}"
        if case.op in ("all_reduce", "broadcast"):
            tensor = torch.full((case.rows, case.width), self.device + 1, dtype=dtype, device=place)
            if case.op == "broadcast":
                # From the last GPU: the output rank then receives.
                source = self.world - 1
                return lambda: backend.broadcast(tensor, source), tensor, lambda: bool((tensor == source + 1).all())
            total = self.world * (self.world + 1) // 2
            return lambda: backend.all_reduce(tensor, True), tensor, lambda: bool((tensor == total).all())
        widths = shares(case.width, self.world, 1 if case.op == "gather_small" else 64)
        mine = torch.full((case.rows, widths[self.device]), self.device + 1, dtype=dtype, device=place)
        joined = torch.empty((case.rows, case.width), dtype=dtype, device=place) if self.device == 0 else None
        method, devices = getattr(backend, case.op), list(range(self.world))

        def right() -> bool:
            if joined is None:
                return True
            parts = joined.split(widths, dim=-1)
            return all(bool((part == device + 1).all()) for device, part in enumerate(parts))

        return lambda: method(mine, joined, devices, 0, widths), mine, right

    def measure(self, case: Case) -> dict[str, Any]:
        call, tensor, right = self.operation(case)
        call()
        self.torch.cuda.synchronize()
        correct = self.noise or right()
        # Zeros stay zeros however often they are summed.
        tensor.zero_()
        called, done = [], []
        for _ in range(IDLE_CALLS):
            self.torch.cuda.synchronize()
            self.start.wait()
            started = time.perf_counter()
            call()
            called.append(time.perf_counter() - started)
            self.torch.cuda.synchronize()
            done.append(time.perf_counter() - started)
        each, host = [], []
        for _ in range(QUEUE_REPEATS):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start.wait()
            begin.record()
            started = time.perf_counter()
            for _ in range(case.queued):
                call()
            host.append((time.perf_counter() - started) / case.queued)
            end.record()
            self.torch.cuda.synchronize()
            each.append(begin.elapsed_time(end) * 1e3 / case.queued)
        self.backend.end_cpu_reduce_jobs()
        micro = {
            "call": median(called) * 1e6,
            "done": median(done) * 1e6,
            "each": median(each),
            "host": median(host) * 1e6,
        }
        return {**case.__dict__, "bytes": case.nbytes, "correct": correct, **{k: round(v, 2) for k, v in micro.items()}}


def active(world: int) -> list[int]:
    """The devices in ExLlamaV3's order: the output device, 0, last."""
    return [*range(1, world), 0]


def rank_main(kind: str, device: int, world: int, meeting: tuple[str, str], counters: Any, out: Path | None) -> None:
    import torch

    with torch.inference_mode():
        start = Start(counters, device)
        rank = Rank(kind, device, world, meeting, start)
        for case in cases(world):
            row = rank.measure(case)
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        start.wait()
        rank.backend.end_cpu_reduce_jobs()
        rank.backend.close()


def helper_main(world: int, meeting: tuple[str, str], rounds: int) -> None:
    """Native's reducing process: one round of jobs per case, and one at the end."""
    backend = backends.make("native", -1, active(world), 0, *meeting)
    for _ in range(rounds):
        backend.run_cpu_reduce_jobs()


def one(kind: str, world: int, out: Path) -> None:
    """All ranks of one backend. Ends as soon as one of them fails."""
    from exllamav3.util import find_free_port

    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", world)
    meeting = (f"tcp://127.0.0.1:{find_free_port()}", uuid.uuid4().hex)
    processes = [
        context.Process(target=rank_main, args=(kind, device, world, meeting, counters, None if device else out))
        for device in range(world)
    ]
    if kind == "native":
        processes.append(context.Process(target=helper_main, args=(world, meeting, len(cases(world)) + 1)))
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.1)
    # The caller ends the whole process group, so a rank that waits for a dead one needs no care here.
    os._exit(0 if all(process.exitcode == 0 for process in processes) else 1)


def size(nbytes: int) -> str:
    return f"{nbytes / MIB:.4g} MiB" if nbytes >= MIB else f"{nbytes / KIB:.4g} KiB" if nbytes >= KIB else f"{nbytes} B"


def table(found: dict[str, Any]) -> str:
    """Rows are operations and sizes; a cell has call / done / each."""
    kinds = list(found["backends"])
    titles = ["operation", *(f"{kind}: call / done / each, us" for kind in kinds)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    rows: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for kind in kinds:
        for row in found["backends"][kind]["rows"]:
            key = (row["op"], f"{row['rows']} x {row['width']} {row['dtype']}", size(row["bytes"]))
            rows.setdefault(key, {})[kind] = row
    for (op, shape, nbytes), cells in rows.items():
        texts = []
        for kind in kinds:
            row = cells.get(kind)
            text = f"{row['call']:.1f} / {row['done']:.1f} / {row['each']:.1f}" if row else ""
            texts.append(text if not row or row["correct"] else "WRONG RESULT")
        lines.append(f"| {op} {nbytes} ({shape}) | " + " | ".join(texts) + " |")
    trouble = [f"- {kind}: {entry['status']}" for kind, entry in found["backends"].items() if entry["status"] != "ok"]
    return "\n".join(lines + [""] * bool(trouble) + trouble) + "\n"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows on disk; the last line of a killed process may be cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def main() -> int:
    import bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--versions", type=bench.names, default=["1.6.5"], help="the first is used")
    parser.add_argument("--site", type=Path, default=Path("/tmp/peerlane-exl"))
    parser.add_argument("--carry", type=Path)
    parser.add_argument("--pythonpath", type=Path, action="append", default=[])
    parser.add_argument("--backends", type=bench.names, default=["native", "nccl", "p2p", "ceiling"])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for one backend")
    parser.add_argument("--work", type=Path, default=Path("/tmp/peerlane-bench"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.gpus, args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.stream_hash = False
    version = args.versions[0]
    if args.carry:
        bench.unpack(args.carry, args.site, [version])
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "program": "micro.py",
        "version": version,
        "gpus": args.gpus,
        "machine": bench.machine(),
        "backends": {},
    }
    for kind in args.backends:
        rows = args.work / f"micro-{kind}.jsonl"
        rows.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--one", kind, "--gpus", str(args.gpus), "--out", str(rows)]
        outcome = subrun.run(command, bench.environment(args, version), args.timeout, args.work / f"micro-{kind}")
        status = "timeout" if outcome.timed_out else "ok" if outcome.returncode == 0 else "failed"
        found["backends"][kind] = {"status": status, "rows": rows_of(rows), "stderr_tail": outcome.stderr_tail}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{kind}: {status}, {outcome.seconds:.0f} s, {len(found['backends'][kind]['rows'])} rows", flush=True)
    print(table(found))
    return 0 if all(entry["status"] == "ok" for entry in found["backends"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
