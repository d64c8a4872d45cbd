"""How long a command takes to ExLlamaV3's workers and their answers back: pipes beside channels, without GPUs.

  dispatch.py [--workers 1,3,7] [--gaps 0,1,5] [--rounds 2000] [--json FILE]

A round is what `forward_tp` does without the pass: a command is pickled once, sent to every worker, and each answers None.
Between rounds the main process is busy for GAP milliseconds, as torch is while it waits for the GPU, and the workers wait for it.
  pipe          ExLlamaV3's own, whose workers sleep
  pipe-hot      with EXL3_TP_SPIN_RECV=4: workers poll for 4 ms, then sleep
  channel       `install(channel=True)`, whose workers look for 4 ms, then sleep
  channel-sleep with PEERLANE_TP_SPIN=1e-6
Figures are microseconds per round, and how much of a core each worker keeps busy. Invariant: only one way has workers at a time, since workers that spin take the cores of others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import statistics
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from peerlane.exllamav3.dispatch import SPIN, Dispatch

HOT_S = 4e-3
BLOCKS = 10
# What forward_tp sends for one token: descriptors of four tensors, and the rest of `params`.
TENSOR = {"method": "buffer", "nbytes": 4, "dtype": "torch.int32", "shape": (1, 1), "cache_id": None}
NAMES = ("block_table", "cache_seqlens", "positions")
PARAMS = {name: TENSOR | {"offset": 128 * place} for place, name in enumerate(NAMES)}
PARAMS |= {"attn_mode": "flash_attn", "cache": 140000000000000}
COMMAND = (len, (TENSOR | {"offset": 384}, PARAMS, 31, False, None))


def worker(connection: Any, device: int, _active: list[int], _output: int, args: dict[str, Any]) -> None:
    """ExLlamaV3's loop."""
    while True:
        if args["hot"] and not connection.poll(0):
            end = time.monotonic() + HOT_S
            while not connection.poll(0) and time.monotonic() < end:
                pass
        if connection.recv() == "quit":
            return
        connection.send(None)


class Way:
    """Workers that are reached in one way."""

    def __init__(self, name: str, workers: int) -> None:
        self.name, self.connections, self.processes = name, [], []
        self.times: dict[float, list[float]] = {}
        self.cores: dict[float, list[float]] = {}
        spin = SPIN if name == "channel" else 1e-6
        dispatch = Dispatch(spin) if name.startswith("channel") else None
        for device in range(workers):
            pipe = dispatch.pipe if dispatch else multiprocessing.Pipe
            process = dispatch.process if dispatch else multiprocessing.Process
            ours, theirs = pipe()
            args = {"hot": name == "pipe-hot", "uuid": ""}
            made = process(target=worker, args=(theirs, device, [], 0, args))
            made.start()
            self.connections.append(ours)
            self.processes.append(made)
        self.round()

    def round(self) -> float:
        begin = time.perf_counter()
        message = ForkingPickler.dumps(COMMAND)
        for connection in self.connections:
            connection.send_bytes(message)
        for connection in self.connections:
            if not connection.poll(60):
                raise TimeoutError(f"{self.name}: no answer")
            assert connection.recv() is None
        return (time.perf_counter() - begin) * 1e6

    def busy(self) -> float:
        """Seconds of processor time that the workers have used."""
        ticks = 0
        for process in self.processes:
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def block(self, gap_ms: float, rounds: int) -> None:
        busy, begin = self.busy(), time.perf_counter()
        for _ in range(rounds):
            end = time.perf_counter() + gap_ms / 1e3
            while time.perf_counter() < end:
                pass
            self.times.setdefault(gap_ms, []).append(self.round())
        cores = (self.busy() - busy) / (time.perf_counter() - begin) / len(self.processes)
        self.cores.setdefault(gap_ms, []).append(cores)

    def end(self) -> None:
        for connection in self.connections:
            connection.send("quit")
        for process in self.processes:
            process.join(10)


def percentile(times: list[float], percent: int) -> float:
    return round(statistics.quantiles(times, n=100, method="inclusive")[percent - 1], 1)


def measure(workers: int, gaps: list[float], rounds: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        way = Way(name, workers)
        for _ in range(BLOCKS):
            for gap in gaps:
                way.block(gap, max(1, rounds // BLOCKS))
        way.end()
        for gap in gaps:
            times = way.times[gap]
            row = {"workers": workers, "gap_ms": gap, "way": name, "rounds": len(times)}
            cores = round(statistics.mean(way.cores[gap]), 2)
            rows.append(row | {"p50_us": percentile(times, 50), "p99_us": percentile(times, 99), "worker_cores": cores})
            print("{workers:7} {gap_ms:6} {way:14} {p50_us:9} {p99_us:9} {worker_cores:9}".format(**rows[-1]), flush=True)
    return rows


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=numbers, default=[1, 3, 7])
    parser.add_argument("--gaps", type=numbers, default=[0, 1, 5], help="milliseconds between rounds")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--ways", default="pipe,pipe-hot,channel,channel-sleep")
    parser.add_argument("--json")
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    cores = len(os.sched_getaffinity(0))
    print(f"# {cores} cores, {len(pickle.dumps(COMMAND))} bytes a command\n# workers gap_ms way              p50_us    p99_us     cores")
    rows = []
    for workers in options.workers:
        rows += measure(int(workers), options.gaps, options.rounds, options.ways.split(","))
    if options.json:
        report = {"machine": platform.processor() or platform.machine(), "cores": cores, "python": platform.python_version()}
        with open(options.json, "w") as file:
            json.dump(report | {"command_bytes": len(pickle.dumps(COMMAND)), "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
