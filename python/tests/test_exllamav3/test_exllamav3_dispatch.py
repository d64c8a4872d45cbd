"""`install(channel=True)`: commands and answers over channels, and no helper process."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import p2p_fakes
import p2p_tree
import pytest
from p2p_tree import plain_environment  # noqa: F401

import peerlane
from peerlane.exllamav3 import Options, dispatch, hooks, install

OPTIONS = Options(device_format="sim:{device}/8", channel=True)


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    yield p2p_tree.load(monkeypatch, tmp_path)
    hooks._patches.clear()


@pytest.fixture
def load(tree: ModuleType) -> Iterator[Any]:
    """Loads models and unloads them after the test."""
    models = []

    def load(active: list[int], output: int, backend: str = "p2p") -> Any:
        models.append(tree.Model().load(active, output, backend))
        return models[-1]

    yield load
    for model in models:
        model.unload()
        assert not any(child.is_alive() for child in model.children.values())


def function(name: str) -> Any:
    return getattr(sys.modules["exllamav3.model.model_tp_fn"], name)


def test_a_model_without_pipes_and_helper(load: Any) -> None:
    install(channel=True, options=Options(device_format="sim:{device}/8"))
    model = load([0, 3, 1], 1)
    assert isinstance(model.mp_parent_conn[0], dispatch.ParentEnd)
    seen = model.run(function("mp_describe"))
    assert {one["backend"] for one in seen.values()} == {"TPBackendP2P"}
    assert len({one["pid"] for one in seen.values()}) == 3
    helper = model.children[-1]
    assert isinstance(helper, dispatch.Helper) and model.mp_parent_conn[-1] is helper
    for _ in range(3):
        assert model.run(function("mp_sum")) == {device: [7.0] * 8 for device in (0, 1, 3)}
        assert model.run(function("mp_cpu_reduce"), [-1]) == {-1: None}
    with pytest.raises(RuntimeError, match="expected mp_cpu_reduce, .* got 'mp_describe'"):
        model.run(function("mp_describe"), [-1])


def test_tensors_over_arenas(load: Any) -> None:
    install(options=OPTIONS)
    model = load([1, 0], 0)
    torch = importlib.import_module("torch")
    for producer, which in ((model.tp_producer, "inf_consumer"), (model.loader, "consumer")):
        if which == "consumer":
            for device, exported in ((1, producer.export()), (0, producer)):
                model.ask(device, function("mp_set_consumer"), exported)
        values = np.arange(24, dtype=np.int32).reshape(2, 12)
        sent = producer.send(torch.from_numpy(values))
        kept = producer.send(torch.from_numpy(values * 2), cache_id=77)
        huge = producer.send(torch.from_numpy(np.zeros(3 << 20, np.uint8)))
        for device in (1, 0):
            ask = functools.partial(model.ask, device, function("mp_recv"), which)
            assert ask(sent) == ("peerlane.exllamav3.tensors", values.tolist())
            assert ask(sent, 1, 3, 5)[1] == values[:, 3:5].tolist()
            assert ask(sent, -1, 3, 5)[1] == values[:, 3:5].tolist()
            assert ask(kept)[1] == (values * 2).tolist()
            assert ask(producer.send(None))[1] is None
            assert ask(huge, 0, 5, 7)[1] == [0, 0]
        before = getattr(model, "drained", 0)
        producer.clear()
        # Only the arena of passes is cleared without ExLlamaV3 asking the workers first.
        assert getattr(model, "drained", 0) - before == (which == "inf_consumer")
        assert model.ask(1, function("mp_recv"), which, kept)[1] == (values * 2).tolist()
        late = model.ask(1, function("mp_recv"), which, sent)
        assert isinstance(late, peerlane.ClosedError)
        producer.close()


def test_tensors_of_other_models(load: Any) -> None:
    install()
    for channel in (False, True):
        install(channel=channel)
        model = load([1, 0], 0, "native")
        imp = model.tp_producer.send(np.ones(3))
        for device in (1, 0):
            kind, _ = model.ask(device, function("mp_recv"), "inf_consumer", imp)
            assert kind == "exllamav3.model.model_tp_shared"
        assert type(model.loader).__module__ == "exllamav3.model.model_tp_shared"


def test_messages_of_all_sizes(load: Any) -> None:
    install(options=OPTIONS)
    connection = load([1, 0], 0).mp_parent_conn[1]
    sizes = [0, 1, 1000, dispatch.LARGEST - 1, dispatch.LARGEST, dispatch.CAPACITY, 3 << 20]
    for size in sizes:
        connection.send((function("mp_echo"), (bytes(size),)))
        assert connection.poll(60) and connection.recv() == bytes(size)
    # As ExLlamaV3 does for several workers: pickled once.
    connection.send_bytes(ForkingPickler.dumps((function("mp_echo"), (None,))))
    assert connection.recv() is None
    # Many commands before the first answer is looked at.
    for number in range(300):
        connection.send((function("mp_echo"), (number,)))
    assert [connection.recv() for _ in range(300)] == list(range(300))


def test_what_a_worker_raises_arrives(load: Any) -> None:
    install(options=OPTIONS)
    connection = load([1, 0], 0).mp_parent_conn[1]
    connection.send((function("mp_echo"), ("no such layer",)))
    error = connection.recv()
    assert isinstance(error, ValueError) and error.args == ("no such layer",)


def test_polling_in_vain_takes_its_time(load: Any) -> None:
    install(options=OPTIONS)
    connection = load([1, 0], 0).mp_parent_conn[1]
    begin = time.monotonic()
    assert connection.poll() is False and connection.poll(0) is False
    assert connection.poll(0.25) is False
    assert 0.25 <= time.monotonic() - begin < 20


@pytest.mark.parametrize("how", ["killed", "exit"])
def test_a_worker_that_dies_is_named_at_once(load: Any, how: str) -> None:
    install(options=OPTIONS)
    model = load([1, 0], 0)
    model.run(function("mp_describe"))
    if how == "killed":
        model.children[1].kill()
    else:
        model.mp_parent_conn[1].send((function("mp_end"), ()))
    begin = time.monotonic()
    with pytest.raises(peerlane.PeerLostError, match="has ended"):
        model.mp_parent_conn[1].poll(60)
    assert time.monotonic() - begin < 10
    model.children[1].join(20)
    assert model.children[1].exitcode == (-signal.SIGKILL if how == "killed" else 3)


class Deadly:
    """Ends the process that it is unpickled in."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)

    def __call__(self) -> None:
        """What a worker would run."""


def test_a_worker_that_ends_before_it_is_ready() -> None:
    multiprocessing.set_start_method("spawn", force=True)
    made = dispatch.Dispatch(1e-3)
    parent, child = made.pipe()
    worker = made.process(Deadly(), (child, 1, [1, 0], 0, {"uuid": ""}))
    worker.start()
    with pytest.raises(peerlane.PeerLostError, match="before it was ready"):
        parent.poll(60)
    parent.close()
    worker.join(20)


def test_native_keeps_its_helper(
    tree: ModuleType, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEERLANE_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("PEERLANE_TEST_REFUSAL", "GPU 0 cannot reach GPU 1")
    monkeypatch.setattr(peerlane, "Communicator", p2p_fakes.FileCommunicator)
    install(channel=True)
    model = load([1, 0], 0)
    seen = model.run(function("mp_describe"), [1, 0, -1])
    assert all(one["native"] for one in seen.values())
    assert len({one["pid"] for one in seen.values()}) == 3
    native = load([1, 0], 0, "native")
    assert not any(isinstance(one, dispatch.End) for one in native.mp_parent_conn.values())


def test_ends_stay_where_they_belong() -> None:
    parent, child = dispatch.Dispatch(1e-3).pipe()
    for call in (child.recv, child.poll, lambda: child.send(None)):
        with pytest.raises(OSError, match="expected a connection of this process"):
            call()
    parent.close()
    child.close()
    with pytest.raises(peerlane.ClosedError):
        parent.send(None)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERLANE_TP_CHANNEL", "1")
    monkeypatch.setenv("PEERLANE_TP_SPIN", "0.001")
    options = Options.from_env()
    assert (options.channel, options.spin) == (True, 0.001)
    assert dispatch.spin_of(options, 8) == 0.001
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert dispatch.spin_of(Options(), 4) == dispatch.SPIN
    assert dispatch.spin_of(Options(), 5) == dispatch.SPIN_CROWDED
    for key, text in (("CHANNEL", "yes"), ("SPIN", "long"), ("SPIN", "-1"), ("SPIN", "inf")):
        monkeypatch.setenv("PEERLANE_TP_CHANNEL", "1")
        monkeypatch.setenv("PEERLANE_TP_SPIN", "0.001")
        monkeypatch.setenv(f"PEERLANE_TP_{key}", text)
        with pytest.raises(ValueError, match=f"{key.lower()} .PEERLANE_TP_{key}.: expected"):
            Options.from_env()
    with pytest.raises(ValueError, match="channel .*: expected True or False, got 1"):
        Options(channel=1)  # type: ignore[arg-type]
