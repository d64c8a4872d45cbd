"""One process: one ExLlamaV3, one model, and one backend, or several in turns.

bench.py starts this; it also runs by itself. Invariant: the result file is whole after every
finished measurement, so a run that hangs, fails or is killed keeps what it had. Keep the top of this file light:
every spawned rank imports it again.

Alone (no --also), a backend's memory is measured too. With --also the model is loaded once, with
--backend, and the others are switched to between passes, so that all are measured in turns within
seconds; "sets" in the result file has one entry for each backend and round.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import backends
import probe
from passes import Loaded
from switch import Switch


# Loading takes that many times as long as anything else.
LOAD_FACTOR = 3.0
CLOSE_S = 30.0


def expect(seconds: float) -> None:
    """Ends the process, its stack printed, unless this is called again in time: a hang should not cost
    all the time that the whole run was given. The caller ends the other ranks."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)


class Result:
    """The measurements so far, on disk after each `put`."""

    def __init__(self, path: Path, head: dict[str, Any], patience: float):
        self.path, self.patience = path, patience
        self.data: dict[str, Any] = {**head, "complete": False, "seconds": {}}
        self.started = time.monotonic()
        self.save()

    def put(self, name: str, value: Any) -> None:
        self.data[name] = value
        self.data["seconds"][name] = self.clock()
        self.save()
        expect(self.patience * (LOAD_FACTOR if name == "backend_ready" else 1.0))
        print(f"[{self.clock():7.2f} s] {name}", flush=True)

    def clock(self) -> float:
        return round(time.monotonic() - self.started, 2)

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data))
        part.replace(self.path)


def alone(loaded: Loaded, result: Result) -> None:
    if loaded.args.backend != "ceiling":
        result.put("greedy", loaded.check(result.path.with_suffix(".npy")))
    result.put("memory", loaded.memory())
    for name, measure in loaded.measurements().items():
        result.put(name, measure())


def in_turns(loaded: Loaded, result: Result) -> None:
    """What each backend says first, then the timing, round by round, every other round backwards.
    A backend that raises is left out from then on, and the rest go on if the ranks still answer."""
    args = loaded.args
    switch = Switch(loaded.model, args.backend)
    living = [args.backend, *args.also]
    sets = {
        (kind, turn): {"backend": kind, "round": turn, "result": {}}
        for turn in range(1, args.rounds + 1)
        for kind in living
    }
    result.data["sets"] = list(sets.values())

    def attempt(kind: str, turn: int, check: bool) -> None:
        found = sets[kind, turn]["result"]
        try:
            found["backend_class"] = switch.use(kind, hash_again=check)
            print(f"backend-in-use {kind}", flush=True)
            if not check:
                for name, measure in loaded.measurements().items():
                    found[name] = measure()
                    result.put(f"{kind} {turn} {name}", True)
            elif kind != "ceiling":
                found["greedy"] = loaded.check(result.path.with_name(f"{result.path.stem}-{kind}.npy"))
                result.put(f"{kind} greedy", True)
        except Exception as error:
            traceback.print_exc()
            found["error"] = repr(error)
            living.remove(kind)
            result.save()
            switch.settle()

    for kind in list(living):
        attempt(kind, 1, check=True)
    for turn in range(1, args.rounds + 1):
        for kind in list(living) if turn % 2 else living[::-1]:
            attempt(kind, turn, check=False)
    result.put("all_lived", len(living) == 1 + len(args.also))
    switch.close()


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", choices=backends.NAMES, required=True)
    parser.add_argument("--also", type=lambda text: [part for part in text.split(",") if part], default=[])
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--decode", type=sizes, default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--prefill", type=sizes, default=[512, 2048], help="prompt lengths")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in a block")
    parser.add_argument("--repeats", type=int, default=6, help="blocks, and prefills")
    parser.add_argument("--rounds", type=int, default=2, help="with --also")
    parser.add_argument("--patience", type=float, default=100.0, help="seconds that one measurement may take")
    args = parser.parse_args()
    head = {"backend": args.backend, "gpus": 1 if args.backend == "single" else args.gpus}
    result = Result(args.out, head, args.patience)
    try:
        measure(args, result)
    except BaseException:
        # Not by way of ExLlamaV3's exit handler, which waits for GPUs that may never be done.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def measure(args: argparse.Namespace, result: Result) -> None:
    expect(args.patience * LOAD_FACTOR)
    loaded = Loaded(args, result.put)
    loaded.warm_up()
    if args.also:
        in_turns(loaded, result)
    else:
        alone(loaded, result)
    result.data["complete"] = True
    result.save()
    before = time.monotonic()
    expect(CLOSE_S)
    loaded.model.unload()
    result.put("closed", {"seconds": time.monotonic() - before, "shm_left": probe.new_segments(loaded.shm_before)})


if __name__ == "__main__":
    main()
