"""Writes a random EXL3 model with the layer shapes of a well-known Llama, for timing.

Any bit pattern is a valid EXL3 trellis, so a model of random bits loads and runs at the speed of
a real one; what it says is noise. Invariant: the directory holds exactly the tensors that the
loaders of ExLlamaV3 1.4.1 and 1.6.5 ask a Llama for, and the same seed gives the same bytes.

Who asks for what (the same in both versions; nothing else is read, and there is no tokenizer):
  modules/linear.py      Linear.is_exl3_storage, load_exl3   KEY.trellis .suh .svh .mul1
  loader/safetensors.py  get_codebook_marker (1.6.5)         .mul1: I32, shape [], one fixed value
  modules/embedding.py   Embedding.load                      model.embed_tokens.weight
  modules/rmsnorm.py     RMSNorm.load                        KEY.weight
  model/config.py, architecture/llama.py                     config.json
The name of every KEY is in architecture/llama.py (LlamaModel), modules/attn.py (q, k, v, o) and
modules/mlp.py (gate, up, down).

Where a shape is not the original's: Llama-3.2-1B has 32 query and 8 key heads of 64, which the
tensor-parallel split pairs up anyway, so the 1B here has 16 and 4 of 128; every projection keeps its
size. All models have a head of their own (the 1B's is tied) and plain rotary embeddings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MUL1_MARKER = 0x83DCD12D
POOL_BYTES = 64 << 20
SHARD_BYTES = 4 << 30
ITEM_BYTES = {"I16": 2, "F16": 2, "I32": 4}


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how much a Llama computes and how much it sends."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 128256
    head_dim: int = 128


SHAPES = {
    "1b": Shape(hidden=2048, layers=16, heads=16, kv_heads=4, intermediate=8192),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336),
    "70b": Shape(hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=28672),
    "tiny": Shape(hidden=256, layers=2, heads=2, kv_heads=2, intermediate=512, vocab=1024),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model: how it is stored, and which values fill it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def linear(key: str, inputs: int, outputs: int, bits: int) -> list[Tensor]:
    """A quantised layer. Its rows are scaled by 1/sqrt(inputs), so that activations keep their size."""
    return [
        Tensor(f"{key}.mul1", "I32", (), "marker"),
        Tensor(f"{key}.trellis", "I16", (inputs // 16, outputs // 16, 16 * bits), "bits"),
        Tensor(f"{key}.suh", "F16", (inputs,), "scaled_signs"),
        Tensor(f"{key}.svh", "F16", (outputs,), "signs"),
    ]


def tensors(shape: Shape, bits: int, head_bits: int) -> list[Tensor]:
    """Every tensor of the model, layer by layer, the order in which it is loaded."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = [Tensor("model.embed_tokens.weight", "F16", (shape.vocab, h), "normal")]
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append(Tensor(f"{layer}.{norm}.weight", "F16", (h,), "ones"))
        for name, inputs, outputs in (
            ("self_attn.q_proj", h, q),
            ("self_attn.k_proj", h, kv),
            ("self_attn.v_proj", h, kv),
            ("self_attn.o_proj", q, h),
            ("mlp.gate_proj", h, shape.intermediate),
            ("mlp.up_proj", h, shape.intermediate),
            ("mlp.down_proj", shape.intermediate, h),
        ):
            found += linear(f"{layer}.{name}", inputs, outputs, bits)
    found.append(Tensor("model.norm.weight", "F16", (h,), "ones"))
    return found + linear("lm_head", h, shape.vocab, head_bits)


def config(shape: Shape) -> dict[str, object]:
    """What architecture/llama.py reads; a float must be written as one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


class Filler:
    """Values for tensors. Large ones are cut out of one pool each, every tensor at its own place:
    drawing gigabytes of fresh random numbers would take longer than the measurement."""

    def __init__(self, seed: int, pool_bytes: int = POOL_BYTES):
        self.random = np.random.default_rng(seed)
        self.bits = np.frombuffer(self.random.bytes(pool_bytes), np.int16)
        self.normal = self.random.standard_normal(pool_bytes // 8, np.float32).astype(np.float16)

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, in order."""
        count = math.prod(tensor.shape)
        if tensor.fill in ("bits", "normal"):
            pool = self.bits if tensor.fill == "bits" else self.normal
            start = int(self.random.integers(len(pool)))
            while count:
                part = pool[start : start + count]
                yield memoryview(part).cast("B")
                count, start = count - len(part), 0
        else:
            yield memoryview(self.small(tensor, count)).cast("B")

    def small(self, tensor: Tensor, count: int) -> np.ndarray:
        if tensor.fill == "marker":
            return np.array([MUL1_MARKER], np.uint32)
        if tensor.fill == "ones":
            return np.ones(count, np.float16)
        signs = self.random.integers(0, 2, count) * 2.0 - 1.0
        if tensor.fill == "scaled_signs":
            signs /= math.sqrt(count)
        return signs.astype(np.float16)


def shards(found: list[Tensor], limit: int) -> list[list[Tensor]]:
    """The tensors cut into files of about `limit` bytes. Within a file the 4-byte markers come first,
    so that every tensor is aligned to its own element."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in found:
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(part, key=lambda t: -ITEM_BYTES[t.dtype]) for part in files]


def write_shard(path: Path, part: list[Tensor], filler: Filler) -> int:
    header: dict[str, object] = {}
    offset = 0
    for tensor in part:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in part:
            for piece in filler.pieces(tensor):
                file.write(piece)
    return offset


def make(
    directory: Path,
    shape: Shape,
    bits: int = 4,
    head_bits: int = 6,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    pool_bytes: int = POOL_BYTES,
) -> int:
    """Writes the model and returns its size in bytes. config.json comes last: a directory that has
    one is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.safetensors"):
        old.unlink()
    filler = Filler(seed, pool_bytes)
    files = shards(tensors(shape, bits, head_bits), shard_bytes)
    total = 0
    for index, part in enumerate(files, 1):
        total += write_shard(directory / f"model-{index:05}-of-{len(files):05}.safetensors", part, filler)
    (directory / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    return total


def with_layers(shape: Shape, layers: int | None) -> Shape:
    return shape if layers is None else Shape(**{**shape.__dict__, "layers": layers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    shape = with_layers(SHAPES[args.model], args.layers)
    total = make(args.directory, shape, args.bits, args.head_bits, args.seed)
    print(f"{args.directory}: {total / 1e9:.2f} GB, {shape.layers} layers, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
