"""`install(channel=True)`: one table of token embeddings for all ranks of a model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import p2p_tree
import pytest

import peerlane.exllamav3
from peerlane.exllamav3.embeddings import PROMPT, Table, adopt

plain_environment = p2p_tree.plain_environment


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The stand-in's `Embedding` and producers, with Peerlane installed."""
    model_tp = p2p_tree.load(monkeypatch, tmp_path)
    embedding = importlib.import_module("exllamav3.modules.embedding")
    before = dict(vars(embedding.Embedding))
    peerlane.exllamav3.install(channel=True)
    yield SimpleNamespace(embedding=embedding, model_tp=model_tp)
    peerlane.exllamav3.uninstall()
    assert dict(vars(embedding.Embedding)) == before


@pytest.mark.skipif(
    not p2p_tree.WITHOUT_TORCH, reason="arrays stand for tensors where there is no torch"
)
def test_ranks_look_at_one_table(modules: Any) -> None:
    from peerlane.exllamav3.tensors import Consumer, Producer

    torch = importlib.import_module("torch")
    weight = torch.from_numpy(np.arange(96, dtype=np.float32).reshape(16, 6))
    module = modules.embedding.Embedding(SimpleNamespace(weight=weight))
    producer = Producer()
    exported = module.tp_export(None, producer)
    simulated = SimpleNamespace(options=SimpleNamespace(device_format="sim:{device}/2"))
    ranks = [
        {"consumer": Consumer(producer, rank), "backend": simulated, "device": rank}
        for rank in range(2)
    ]
    tables = [exported["cls"].tp_import(rank, exported, None).embedding for rank in ranks]
    # Each importer has a mapping of its own, and all are of the same file.
    addresses = [table.ctypes.data for table in tables]
    assert addresses[0] != addresses[1]
    assert file_at(addresses[0]) == file_at(addresses[1]) != file_at(weight.ctypes.data)
    producer.clear()
    producer.close()
    assert tables[0].tolist() == tables[1].tolist() == weight.tolist()


def file_at(address: int) -> str:
    """The number of the file that is mapped there."""
    with open("/proc/self/maps") as maps:
        for span, _, _, _, inode, *_ in map(str.split, maps):
            first, end = (int(part, 16) for part in span.split("-"))
            if first <= address < end:
                return inode
    raise AssertionError("nothing is mapped there")


def test_other_producers_are_left_alone(modules: Any) -> None:
    class Theirs:
        def send(self, tensor: Any) -> Any:
            return {"method": "buffer", "tensor": tensor}

    weight = np.zeros((2, 2), np.float32)
    module = modules.embedding.Embedding(SimpleNamespace(weight=weight))
    exported = module.tp_export(None, Theirs())
    consumer = SimpleNamespace(recv=lambda imp: imp["tensor"])
    context = {"consumer": consumer, "backend": None, "device": 0}
    assert exported["cls"].tp_import(context, exported, None).embedding is weight


@pytest.mark.skipif(p2p_tree.WITHOUT_TORCH, reason="torch is not installed")
def test_who_looks_tokens_up() -> None:
    import torch

    weight = torch.randn(100, 16).half()
    # What stands for the GPU's view differs by a sign, to tell which one was asked.
    table = Table(weight, -weight)
    for count, sign in ((1, 1), (PROMPT - 1, 1), (PROMPT, -1), (500, -1)):
        ids = torch.randint(100, (1, count))
        wanted = torch.nn.functional.embedding(ids, weight)
        assert torch.equal(table.forward(ids), sign * wanted)
        assert torch.equal(table(ids), wanted)
    for wrong in (-1, 100):
        ids = torch.zeros(1, PROMPT, dtype=torch.long)
        ids[0, 5] = wrong
        with pytest.raises(IndexError, match="expected 0 to 99, got"):
            table.forward(ids)


@pytest.mark.parametrize(
    "refusal", [peerlane.DriverError("no pages"), BufferError(), RuntimeError(), ValueError()]
)
def test_without_pinned_memory_the_cpu_looks_up(
    refusal: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise refusal

    view = SimpleNamespace(map=lambda device: SimpleNamespace(__dlpack__=lambda: None))
    theirs = object()
    module = SimpleNamespace(embedding=theirs)
    for importing, reading in ((refuse, None), (lambda _: view, refuse)):
        importer = SimpleNamespace(import_=importing)
        adopt(module, SimpleNamespace(importer=importer, from_dlpack=reading), b"s", "cuda:1")
        assert module.embedding is theirs
        assert "cuda:1: prompts are looked up by the CPU" in capsys.readouterr().out
