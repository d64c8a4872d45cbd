"""`install` on a stand-in for ExLlamaV3's module tree, down into the processes that it spawns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import p2p_fakes
import p2p_tree
import pytest
from p2p_tree import plain_environment  # noqa: F401

import peerlane
from peerlane.exllamav3 import Options, hooks, install, uninstall


@pytest.fixture(autouse=True)
def no_patches() -> Iterator[None]:
    """Leaves nothing of a test's ExLlamaV3 behind."""
    yield
    hooks._patches.clear()


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return p2p_tree.load(monkeypatch, tmp_path)


@pytest.fixture(params=["files", "sim"])
def options(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tree: ModuleType,
) -> Options:
    """Options under which real processes can join: on files, or on simulated GPUs."""
    if request.param == "sim":
        return Options(device_format="sim:{device}/8")
    monkeypatch.setenv("PEERLANE_TEST_FOLDER", str(tmp_path))
    monkeypatch.setattr(peerlane, "Communicator", p2p_fakes.FileCommunicator)
    return Options()


@pytest.fixture
def load(tree: ModuleType) -> Iterator[Any]:
    """Loads models and unloads them after the test."""
    models = []

    def load(active: list[int], output: int, backend: str) -> Any:
        models.append(tree.Model().load(active, output, backend))
        return models[-1]

    yield load
    for model in models:
        model.unload()
        assert not any(child.is_alive() for child in model.children.values())


def describe(model: Any) -> dict[int, dict[str, Any]]:
    return model.run(
        sys.modules["exllamav3.model.model_tp_fn"].mp_describe, [*model.active_devices, -1]
    )


def total(model: Any) -> dict[int, list[float]]:
    return model.run(sys.modules["exllamav3.model.model_tp_fn"].mp_sum)


def test_p2p_in_every_process(options: Options, load: Any) -> None:
    install(options=options)
    model = load([0, 3, 1], 1, "p2p")
    assert model.tp_backend == "p2p"
    seen = describe(model)
    assert {one["backend"] for one in seen.values()} == {"TPBackendP2P"}
    assert [seen[device]["joined"] for device in (0, 3, 1, -1)] == [True, True, True, False]
    assert len({one["pid"] for one in seen.values()}) == 4
    assert total(model) == {device: [7.0] * 8 for device in (0, 1, 3)}


def test_options_reach_every_process(options: Options, load: Any) -> None:
    install(exact=True, options=options)
    assert {one["wire"] for one in describe(load([1, 0], 0, "p2p")).values()} == {"native"}
    install(exact=False, options=options)
    assert {one["wire"] for one in describe(load([1, 0], 0, "p2p")).values()} == {"bf16"}


def test_two_models_at_once(options: Options, load: Any) -> None:
    install(options=options)
    one, two = load([1, 0], 0, "p2p"), load([0, 2], 2, "p2p")
    for _ in range(2):
        assert total(one) == {0: [3.0] * 8, 1: [3.0] * 8}
        assert total(two) == {0: [4.0] * 8, 2: [4.0] * 8}


@pytest.mark.parametrize("name, kind", [("native", "TPBackendNative"), ("nccl", "TPBackendNCCL")])
def test_other_backends_stay_as_they_are(load: Any, name: str, kind: str) -> None:
    install()
    model = load([1, 0], 0, name)
    seen = describe(model)
    assert {one["backend"] for one in seen.values()} == {kind}
    assert model.tp_backend == name and type(model.tp_backend) is str
    assert not seen[1]["peerlane"] and not seen[-1]["peerlane"]
    assert total(model) == {0: [1001.0] * 8, 1: [1002.0] * 8}


def test_native_beside_p2p(options: Options, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(options=options)
    p2p, native = load([1, 0], 0, "p2p"), load([1, 0], 0, "native")
    assert {one["backend"] for one in describe(native).values()} == {"TPBackendNative"}
    assert total(p2p) == {0: [3.0] * 8, 1: [3.0] * 8}


def test_all_processes_fall_back_together(
    tree: ModuleType,
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PEERLANE_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("PEERLANE_TEST_REFUSAL", "GPU 0 cannot reach GPU 1: data arrived changed")
    monkeypatch.setattr(peerlane, "Communicator", p2p_fakes.FileCommunicator)
    install()
    model = load([1, 2, 0], 0, "p2p")
    assert all(one["native"] for one in describe(model).values())
    assert total(model) == {0: [1001.0] * 8, 1: [1002.0] * 8, 2: [1003.0] * 8}
    said = capfd.readouterr().out
    assert (
        said.count("TP backend: native, because p2p cannot work here: GPU 0 cannot reach GPU 1")
        == 1
    )


def test_auto(
    options: Options, load: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(options=options)
    monkeypatch.setattr(peerlane, "topology", lambda: p2p_fakes.topology(3, refused=((0, 2),)))
    assert load([1, 0], 0, "auto").tp_backend == "p2p"
    assert " -- TP backend: auto chose p2p (GPUs 0, 1: every GPU can map" in capfd.readouterr().out
    model = load([2, 0], 0, "auto")
    assert model.tp_backend == "native"
    assert {one["backend"] for one in describe(model).values()} == {"TPBackendNative"}
    assert (
        " -- TP backend: auto chose native (GPUs 0, 2: GPU 0 cannot map" in capfd.readouterr().out
    )


def test_installing_twice_and_uninstalling(tree: ModuleType) -> None:
    model_tp_fn = sys.modules["exllamav3.model.model_tp_fn"]
    before = (
        tree.Model_TPMixin.create_tp_context,
        model_tp_fn.init_pg,
        model_tp_fn.TPBackendNative,
    )
    install()
    once = (tree.Model_TPMixin.create_tp_context, model_tp_fn.init_pg)
    install(exact=True)
    assert (tree.Model_TPMixin.create_tp_context, model_tp_fn.init_pg) == once != before[:2]
    assert model_tp_fn.TPBackendNative is before[2]
    uninstall()
    uninstall()
    assert (
        tree.Model_TPMixin.create_tp_context,
        model_tp_fn.init_pg,
        model_tp_fn.TPBackendNative,
    ) == before
    with pytest.raises(ValueError, match="p2p"):
        tree.Model().load([1, 0], 0, "p2p")
    install()
    assert model_tp_fn.init_pg is not before[1]


def test_uninstalling_under_another_patch(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    ours = tree.Model_TPMixin.create_tp_context
    tree.Model_TPMixin.create_tp_context = lambda self, tp_backend: ours(self, tp_backend)
    with pytest.raises(
        RuntimeError, match="Model_TPMixin.create_tp_context: expected Peerlane's function"
    ):
        uninstall()


def test_an_unknown_backend_is_still_an_error(tree: ModuleType) -> None:
    install()
    with pytest.raises(ValueError, match="gloo"):
        tree.Model().load([1, 0], 0, "gloo")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model_tp": ("create_tp_context", "start_workers")},
            "model_tp.Model_TPMixin.create_tp_context",
        ),
        (
            {"model_tp": ("tp_backend: str", "backend: str")},
            "create_tp_context with the parameter tp_backend",
        ),
        (
            {"model_tp": ("end = Pipe()", "end = getattr(multiprocessing, 'Pi' + 'pe')()")},
            "create_tp_context as a plain function that uses the name Pipe",
        ),
        ({"model_tp_fn": ("def init_pg(", "def start_pg(")}, "model_tp_fn.init_pg"),
        (
            {"model_tp_fn": ("backend_args, master=False):", "master=False, **_):")},
            "the parameter backend_args",
        ),
        (
            {"model_tp_fn": ("backend = TPBackendNative(", "backend = getattr(os, 'x')(")},
            "name TPBackendNative",
        ),
        (
            {"model_tp_fn": ("def mp_model_worker(", "def mp_worker(")},
            "model_tp_fn.mp_model_worker",
        ),
        (
            {"model_tp_backend": ("class TPBackendNative(", "class TPBackendHost(")},
            "TPBackendNative",
        ),
    ],
)
def test_a_tree_that_lacks_what_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, tuple[str, str]], words: str
) -> None:
    """The error names what is missing and the version, and nothing has been replaced."""
    if "model_tp_backend" in change:
        change |= {"model_tp_fn": ("TPBackendNCCL, TPBackendNative", "TPBackendNCCL")}
    tree = p2p_tree.load(monkeypatch, tmp_path, **change)
    before = dict(vars(tree.Model_TPMixin)), dict(vars(sys.modules["exllamav3.model.model_tp_fn"]))
    with pytest.raises(RuntimeError, match=f"ExLlamaV3 1.6.5: expected .*{words}"):
        install()
    assert (
        dict(vars(tree.Model_TPMixin)),
        dict(vars(sys.modules["exllamav3.model.model_tp_fn"])),
    ) == before


def test_a_tree_that_does_not_pass_the_type_on(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Native instead of p2p, unasked, would go unnoticed."""
    tree = p2p_tree.load(
        monkeypatch, tmp_path, model_tp=('"type": tp_backend', '"type": str("native")')
    )
    install(options=options)
    model = tree.Model()
    with pytest.raises(RuntimeError, match=r"backend_args\['type'\]"):
        model.load([1, 0], 0, "p2p")
    model.unload()


def test_a_tree_that_makes_its_connections_elsewhere(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = p2p_tree.load(
        monkeypatch, tmp_path, model_tp=("end = Pipe()", "end = multiprocessing.Pipe()")
    )
    install(channel=True, options=options)
    model = tree.Model()
    with pytest.raises(RuntimeError, match="expected it to make its connections by the name Pipe"):
        model.load([1, 0], 0, "p2p")


def test_without_exllamav3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "exllamav3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if not (Path(entry) / "exllamav3").exists()]
    )
    with pytest.raises(ImportError, match=r"expected ExLlamaV3 \(1.4.1 to 1.6.5\) to be installed"):
        install()
