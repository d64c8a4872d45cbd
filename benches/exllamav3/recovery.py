"""Passes of a real model that fail on purpose: each must end in an error, and the passes after it must give the
tokens that they gave before.

Invariant: a round counts only if its failure was seen; tokens are compared with those of the first, undisturbed run.
Needs GPUs and what bench.py's README says. Writes a JSON file after every round.

  abort 0       the rank in this process aborts in the middle of a pass
  abort 1       another rank does
  late          another rank comes to a sum later than the deadline
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

WAYS = ("abort 0", "abort 1", "late")
DEADLINE_S, LATE_S = 1.0, 2.5
# A pass that failed may leave answers behind that the next one reads as its own.
TRIES = 4


def abort_soon(local: dict[str, Any], device: int, seconds: float) -> None:
    """Runs on every rank: that of `device` aborts after a while."""
    if local["device"] == device:
        threading.Timer(seconds, local["backend"].communicator.abort).start()


def come_late(local: dict[str, Any], device: int, after: int) -> None:
    """Runs on every rank: that of `device` sleeps before one of its sums."""
    if local["device"] != device:
        return
    backend, exact, left = local["backend"], local["backend"].all_reduce, [after]

    def all_reduce(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            backend.all_reduce = exact
            time.sleep(LATE_S)
        return exact(*arguments, **named)

    backend.all_reduce = all_reduce


def shorten_deadline(local: dict[str, Any]) -> None:
    """Runs on every rank."""
    local["backend"].communicator.set_deadline(DEADLINE_S)


def break_once(loaded: Any, way: str, turn: int) -> dict[str, Any]:
    """Lets passes fail once and repeats them until they do not."""
    # Ranks import this module by its name, which `__main__` is not.
    import recovery

    ranks = list(loaded.model.active_devices)
    if way == "late":
        task, arguments = recovery.come_late, (ranks[-1], 7 + 31 * turn)
    else:
        task, arguments = recovery.abort_soon, (ranks[int(way[-1])], 0.02 + 0.013 * turn)
    loaded.model.tp_worker_dispatch_wait_multi(ranks, task, arguments)
    errors, began = [], time.monotonic()
    while len(errors) < TRIES:
        try:
            found = loaded.greedy(None)
            break
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:300])
    else:
        found = {}
    return {"way": way, "errors": errors, "seconds": round(time.monotonic() - began, 3), "greedy": found}


def run(args: argparse.Namespace) -> bool:
    from passes import Loaded

    result: dict[str, Any] = {"command": " ".join(sys.argv), "rounds": []}

    def note(name: str, value: Any) -> None:
        result[name] = value
        print(name, flush=True)

    loaded = Loaded(args, note)
    loaded.warm_up()
    expected = loaded.greedy(None)
    note("repeatable", loaded.greedy(None) == expected)
    import recovery

    loaded.model.tp_worker_dispatch_wait_multi(list(loaded.model.active_devices), recovery.shorten_deadline, ())
    for turn in range(args.rounds):
        for way in WAYS:
            found = break_once(loaded, way, turn)
            found["same"] = found.pop("greedy") == expected
            result["rounds"].append(found)
            print(json.dumps(found), flush=True)
            args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    well = all(found["same"] and found["errors"] for found in result["rounds"])
    print("well" if well else "NOT well", flush=True)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="as make_model.py makes it")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of each way to fail")
    args = parser.parse_args()
    args.backend, args.decode, args.prefill = "p2p", [1], [512]
    try:
        well = run(args)
    except BaseException:
        traceback.print_exc()
        well = False
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of ExLlamaV3's exit handler, which waits for GPUs that may never be done.
    os._exit(0 if well else 1)


if __name__ == "__main__":
    main()
