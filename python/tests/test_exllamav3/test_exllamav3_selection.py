"""What "auto" stands for on which machine, and the program that says so."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from p2p_fakes import topology

import peerlane
from peerlane.exllamav3 import choose
from peerlane.exllamav3.__main__ import main


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch whose process groups can be set up."""
    state = SimpleNamespace(
        is_available=lambda: True, is_nccl_available=lambda: True, is_initialized=lambda: False
    )
    torch = ModuleType("torch")
    torch.distributed = state
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.distributed", state)
    return state


@pytest.mark.parametrize(
    "nvlinks, way", [(18, "over NVLink"), (0, "over PCIe"), (None, "over PCIe")]
)
def test_p2p_where_every_pair_is_reachable(nvlinks: int | None, way: str) -> None:
    choice = choose([2, 0], topology(3, nvlinks=nvlinks))
    assert choice.backend == "p2p"
    assert choice.reason.startswith("GPUs 0, 2: every GPU can map") and choice.reason.endswith(way)


def test_only_the_models_devices_count() -> None:
    refused = ((0, 2), (2, 0), (1, 2), (2, 1))
    assert choose([0, 1], topology(3, refused=refused)).backend == "p2p"
    choice = choose([0, 1, 2], topology(3, refused=refused))
    assert choice.backend == "native" and "GPU 0 cannot map the memory of GPU 2" in choice.reason


def test_one_refused_direction_is_enough() -> None:
    assert choose([0, 1], topology(2, refused=((1, 0),))).backend == "native"


def test_devices_are_ordinals_not_places() -> None:
    seen = topology(2, refused=((0, 1),), first=4)
    choice = choose([5, 4], seen)
    assert choice.backend == "native" and "GPU 4 cannot map the memory of GPU 5" in choice.reason


def test_one_device() -> None:
    assert choose([0], topology(1)).backend == "p2p"


def test_nccl_for_nvlink_that_peerlane_cannot_use(nccl: SimpleNamespace) -> None:
    old = topology(2, nvlinks=6, capability=(7, 0))
    choice = choose([0, 1], old)
    assert choice.backend == "nccl"
    assert (
        "GPU 0 has compute capability 7.0, below 7.5, but NVLink joins every pair" in choice.reason
    )
    assert choose([0, 1], topology(2, nvlinks=0, capability=(7, 0))).backend == "native"
    assert choose(range(17), topology(17, nvlinks=4)).backend == "nccl"

    nccl.is_initialized = lambda: True
    choice = choose([0, 1], old)
    assert choice.backend == "native" and "already has a torch process group" in choice.reason
    nccl.is_nccl_available = lambda: False
    assert "no NCCL" in choose([0, 1], old).reason


def test_native_without_a_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> dict:
        raise peerlane.NoDriverError("no NVIDIA driver: libcuda.so.1 not found")

    monkeypatch.setattr(peerlane, "topology", nothing)
    choice = choose([0, 1])
    assert choice.backend == "native" and "libcuda.so.1" in choice.reason
    choice = choose([0, 3], topology(2))
    assert (
        choice.backend == "native"
        and "GPU 3 not in the topology, which has GPUs 0, 1" in choice.reason
    )


def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peerlane, "topology", lambda: topology(3, refused=((0, 2),)))
    assert main([]) == 0
    assert "auto: native (GPUs 0, 1, 2: GPU 0 cannot map" in capsys.readouterr().out
    assert main(["--devices", "0,1"]) == 0
    said = capsys.readouterr().out
    assert "auto: p2p (GPUs 0, 1: " in said and "GPU 1: Test GPU, compute capability 9.0" in said
    with pytest.raises(SystemExit):
        main(["--devices", "zero"])


def test_the_program_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> dict:
        raise peerlane.NoDriverError("no NVIDIA driver: libcuda.so.1 not found")

    monkeypatch.setattr(peerlane, "topology", nothing)
    assert main([]) == 0
    assert "auto: native (no NVIDIA driver" in capsys.readouterr().out
