"""What compressing a model's tensors would take, beside a copy: why `peerlane.transfer` does not. Needs torch, lz4, zstandard; no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import lz4.frame
import numpy as np
import torch
import zstandard

BYTES = 16 << 20


def payloads() -> dict[str, bytes]:
    draw = np.random.default_rng(1)

    def bf16(count: int) -> torch.Tensor:
        return torch.randn(count).bfloat16()

    return {
        "fp16 weights, normal": draw.standard_normal(BYTES // 2).astype(np.float16).tobytes(),
        "bf16 weights, normal": bf16(BYTES // 2).view(torch.int16).numpy().tobytes(),
        "EXL3 weights": draw.bytes(BYTES),
        "fp32 activations with bf16's values": bf16(BYTES // 4).float().numpy().tobytes(),
        "token ids, int64": draw.integers(0, 128256, BYTES // 8).astype(np.int64).tobytes(),
        "block tables, int32": np.tile(np.arange(4096, dtype=np.int32), BYTES // 16384).tobytes(),
    }


def timed(action: Callable[[], bytes | None]) -> tuple[bytes | None, float]:
    """What it gives, and its GB/s of `BYTES`."""
    began = time.perf_counter()
    given = action()
    return given, BYTES / (time.perf_counter() - began) / 1e9


def main() -> None:
    target = bytearray(BYTES)
    ways = {
        "lz4": lambda data: lz4.frame.compress(data, compression_level=0),
        "zstd": zstandard.ZstdCompressor(level=1).compress,
    }
    for name, data in payloads().items():
        found = [f"copy {timed(lambda: memoryview(target).__setitem__(slice(None), data))[1]:.1f} GB/s"]
        for way, compress in ways.items():
            small, rate = timed(lambda: compress(data))
            found.append(f"{way} {len(small) / BYTES:.2f} at {rate:.1f} GB/s")
        print(f"{name:36s}", "; ".join(found))


if __name__ == "__main__":
    main()
