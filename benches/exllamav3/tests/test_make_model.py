"""The random model's files, read the way the format's specification says."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

import make_model

TINY = make_model.SHAPES["tiny"]
BYTES = {"I16": 2, "F16": 2, "I32": 4}


def read(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    found = {}
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        body = data[8 + size :]
        end = 0
        for name, entry in json.loads(data[8 : 8 + size]).items():
            begin, stop = entry["data_offsets"]
            assert begin == end, "tensors follow each other without a hole"
            assert stop - begin == math.prod(entry["shape"]) * BYTES[entry["dtype"]]
            assert begin % BYTES[entry["dtype"]] == 0
            found[name] = (entry["dtype"], entry["shape"], body[begin:stop])
            end = stop
        assert end == len(body) and size % 8 == 0
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_model.make(directory, TINY, shard_bytes=200_000, pool_bytes=1 << 16)
    return directory


def test_every_tensor_that_the_loader_asks_for(tiny):
    found = read(tiny)
    assert len(list(tiny.glob("*.safetensors"))) > 1
    linears = ["lm_head"]
    for layer in range(TINY.layers):
        linears += [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkvo"]
        linears += [f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"{key}.{part}" for key in linears for part in ("trellis", "suh", "svh", "mul1")}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        expected |= {f"model.layers.{layer}.{norm}.weight" for layer in range(TINY.layers)}
    assert set(found) == expected


def test_shapes_and_types(tiny):
    found = read(tiny)
    kind, shape, _ = found["model.layers.1.mlp.down_proj.trellis"]
    assert (kind, shape) == ("I16", [512 // 16, 256 // 16, 16 * 4])
    kind, shape, _ = found["lm_head.trellis"]
    assert (kind, shape) == ("I16", [256 // 16, 1024 // 16, 16 * 6])
    assert found["model.embed_tokens.weight"][:2] == ("F16", [1024, 256])
    kind, shape, data = found["lm_head.mul1"]
    assert (kind, shape, int.from_bytes(data, "little")) == ("I32", [], 0x83DCD12D)


def test_values(tiny):
    found = read(tiny)
    suh = np.frombuffer(found["model.layers.0.mlp.down_proj.suh"][2], np.float16)
    assert set(np.abs(suh)) == {np.float16(1 / math.sqrt(512))} and len(set(suh)) == 2
    assert set(np.frombuffer(found["model.norm.weight"][2], np.float16)) == {1.0}
    embedding = np.frombuffer(found["model.embed_tokens.weight"][2], np.float16)
    assert np.isfinite(embedding).all() and 0.9 < embedding.astype(np.float32).std() < 1.1
    first, second = (found[f"model.layers.{i}.mlp.up_proj.trellis"][2] for i in (0, 1))
    assert first != second


def test_same_seed_same_bytes(tiny, tmp_path):
    make_model.make(tmp_path, TINY, shard_bytes=200_000, pool_bytes=1 << 16)
    assert read(tmp_path) == read(tiny)


def test_config_floats_are_written_as_floats(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert isinstance(config["rope_theta"], float) and isinstance(config["rms_norm_eps"], float)
    assert config["num_hidden_layers"] == TINY.layers


def test_the_eight_billion_model_has_eight_billion_weights():
    shape = make_model.SHAPES["8b"]
    weights = sum(t.shape[0] * t.shape[1] * 256 for t in make_model.tensors(shape, 4, 6) if t.name.endswith(".trellis"))
    assert 7.4e9 < weights < 7.6e9, "all but the embedding table's 0.5e9"


def test_layers_can_be_cut():
    assert make_model.with_layers(make_model.SHAPES["70b"], 3).layers == 3
