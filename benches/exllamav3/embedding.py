"""Token embeddings of a prompt on the GPU: ExLlamaV3's way, and Peerlane's with channels.

ExLlamaV3's: the CPU copies the rows, widens them to fp32, and uploads them from pageable memory.
Peerlane's: the GPU reads the rows in pinned memory, and widens them itself. Both are timed until the GPU has the rows.
Invariant: both have the same bits, or this fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from peerlane.exllamav3.embeddings import adopt
from peerlane.exllamav3.tensors import Consumer, Producer


def median_us(action: Callable[[], torch.Tensor], repeats: int) -> float:
    action()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", default="1,8,31,32,128,512,2048,8192")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    weight = torch.empty(args.vocabulary, args.width, dtype=torch.half).normal_()
    producer = Producer()
    consumer = Consumer(producer, 0)
    sent = producer.share(weight)
    theirs = torch.nn.Embedding(*weight.shape, _weight=weight, _freeze=True)
    module = SimpleNamespace(embedding=SimpleNamespace(weight=consumer.recv(sent)))
    began = time.perf_counter()
    adopt(module, consumer, sent, "cuda:0")
    rows = [{"pin_ms": (time.perf_counter() - began) * 1e3, "kind": type(module.embedding).__name__}]
    print(rows[0])
    for tokens in map(int, args.tokens.split(",")):
        ids = torch.randint(args.vocabulary, (1, tokens))

        def old() -> torch.Tensor:
            return theirs.forward(ids).float().to("cuda:0")

        def new() -> torch.Tensor:
            return module.embedding.forward(ids).float().to("cuda:0")

        assert torch.equal(old(), new()), tokens
        row = {
            "tokens": tokens,
            "exllamav3_us": median_us(old, args.repeats),
            "peerlane_us": median_us(new, args.repeats),
        }
        rows.append(row)
        print({name: round(value, 1) for name, value in row.items()}, flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
