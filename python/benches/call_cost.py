"""What a call costs the caller's thread, in nanoseconds.

Empty tensors take every step of a call but planning and launching. On a real GPU the whole call is
measured too, in batches small enough that the GPU's queue never fills.

    python call_cost.py [DEVICE]        # cuda:0, or sim:0/1 (the default)
"""

import sys
import timeit
from collections.abc import Callable
from typing import Any

from peerlane import Communicator

BATCH = 100
BATCHES = 3000


def nothing() -> None:
    pass


def measure(statement: str, names: dict[str, Any], after: Callable[[], None] = nothing) -> None:
    """Prints the median and the least time of a batch, for one statement."""
    timer = timeit.Timer(statement, globals=names)
    times = []
    for _ in range(BATCHES):
        times.append(timer.timeit(BATCH) / BATCH * 1e9)
        after()
    times.sort()
    print(f"{statement:62} {times[BATCHES // 2]:8.0f} {times[0]:8.0f}")


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "sim:0/1"
    (rank,) = Communicator.connect([device])
    names: dict[str, Any] = {"rank": rank}
    try:
        import torch
    except ImportError:
        torch = None
        names["empty"] = rank.empty(0, "float32")
    else:
        where = device if device.startswith("cuda") else "cpu"
        names["empty"] = torch.empty(0, dtype=torch.bfloat16, device=where)
        names["tensor"] = torch.zeros(4096, dtype=torch.bfloat16, device=where)
    print(f"{type(names['empty']).__module__} on {device}, ns a call: {'median':>29} {'least':>8}")
    measure("rank.health()", names)
    measure("rank.all_reduce(empty)", names)
    measure("rank.all_reduce(empty, stream=0)", names)
    measure("rank.all_reduce(empty, op='sum', wire='native')", names)
    measure("rank.all_reduce(empty, empty)", names)
    measure("rank.broadcast(empty, 0)", names)
    if torch and device.startswith("cuda"):
        after = torch.cuda.synchronize
        measure("tensor.add_(1)", names, after)
        measure("rank.all_reduce(tensor)", names, after)


if __name__ == "__main__":
    main()
