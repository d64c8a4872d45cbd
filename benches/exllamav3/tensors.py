"""How long a tensor takes from ExLlamaV3's main process to a worker's memory: `SMProducer` beside `install(channel=True)`.

  tensors.py [--rounds 2000] [--json FILE]

Needs torch and ExLlamaV3 (its sources: the compiled extension is not used), no GPU. For every shape, in microseconds, medians:
  send   into the arena, and what the command carries
  recv   from that to a tensor of the worker's own, on the CPU
  view   the same of a tensor with a cache_id, which was received before
Both in one process, one after the other within a round. Invariant: what is received is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
from typing import Any
from unittest import mock

import torch

SHAPES = [((1, 1), "int32"), ((1, 256), "int32"), ((1, 2048), "int64"), ((128, 4096), "float16"), ((2048, 4096), "float16")]


def theirs() -> tuple[Any, Any]:
    stub: Any = types.ModuleType("exllamav3.ext")
    stub.exllamav3_ext = mock.MagicMock(name="exllamav3_ext")
    sys.modules["exllamav3.ext"] = stub
    from exllamav3.model import model_tp_shared

    torch.cuda.set_device = lambda device: None
    producer = model_tp_shared.SMProducer(buffer_size=64 << 20)
    return producer, model_tp_shared.SMConsumer(producer.export(), device=0, pin_memory=False)


def ours() -> tuple[Any, Any]:
    from peerlane.exllamav3.tensors import Consumer, Producer

    producer = Producer()
    return producer, Consumer(producer.export(), device=0)


def measure(producer: Any, consumer: Any, tensor: torch.Tensor, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"send_us": [], "recv_us": [], "view_us": []}
    kept = producer.send(tensor, cache_id=id(tensor))
    consumer.recv(kept)
    kept = producer.send(tensor, cache_id=id(tensor))
    found = None
    for _ in range(rounds):
        producer.clear()
        begin = time.perf_counter()
        sent = producer.send(tensor)
        between = time.perf_counter()
        found = consumer.recv(sent)
        end = time.perf_counter()
        consumer.recv(kept)
        last = time.perf_counter()
        for name, seconds in zip(times, (between - begin, end - between, last - end)):
            times[name].append(seconds * 1e6)
    assert found is not None and torch.equal(found, tensor)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json")
    options = parser.parse_args()
    ways = {"exllamav3": theirs(), "channel": ours()}
    rows = []
    for shape, kind in SHAPES:
        tensor = torch.randint(0, 100, shape).to(getattr(torch, kind))
        rounds = options.rounds if tensor.nbytes < 1 << 20 else max(5, options.rounds // 50)
        for name, (producer, consumer) in ways.items():
            row = {"shape": list(shape), "dtype": kind, "way": name, "rounds": rounds}
            rows.append(row | measure(producer, consumer, tensor, rounds))
            print("{shape!s:14} {dtype:8} {way:10} send {send_us:9} recv {recv_us:9} view {view_us:9}".format(**rows[-1]))
    for producer, consumer in ways.values():
        consumer.close()
        producer.close()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
