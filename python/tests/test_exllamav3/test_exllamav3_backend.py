"""`TPBackendP2P` by itself: what it asks of a communicator, and when it uses native instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import p2p_tree
import pytest
from p2p_fakes import Recorder
from p2p_tree import plain_environment  # noqa: F401

import peerlane
from peerlane.exllamav3 import Options, TPBackendP2P


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """Communicators that only keep what they were called with."""
    fresh = type("Recorder", (Recorder,), {})
    monkeypatch.setattr(peerlane, "Communicator", fresh)
    return fresh


def make(device: int = 0, active: tuple[int, ...] = (1, 0), **more: Any) -> TPBackendP2P:
    """A backend, constructed as ExLlamaV3's arm for native does."""
    arguments = {
        "device": device,
        "active_devices": list(active),
        "output_device": active[-1],
        "init_method": "tcp://127.0.0.1:1",
        "master": device == active[-1],
        "uuid": "abc",
        "cpu": device < 0,
    }
    return TPBackendP2P(**(arguments | more))


def calls(backend: TPBackendP2P) -> list[tuple]:
    return backend.communicator.calls


def test_ranks_are_places_in_the_sorted_devices(recorder: type[Recorder]) -> None:
    made = [make(device, (5, 0, 3)).communicator for device in (0, 3, 5)]
    assert [one.rank for one in made] == [0, 1, 2]
    assert {one.world_size for one in made} == {3}
    assert {one.name for one in made} == {"exllamav3-abc"}
    assert [one.device for one in made] == ["cuda:0", "cuda:3", "cuda:5"]


def test_both_arms_of_exllamav3_can_construct_it(recorder: type[Recorder]) -> None:
    native = TPBackendP2P(
        device=0,
        active_devices=[1, 0],
        output_device=0,
        init_method="x",
        master=True,
        uuid="u",
        cpu=False,
    )
    nccl = TPBackendP2P(
        device=0, active_devices=[1, 0], output_device=0, init_method="x", master=True, uuid="u"
    )
    positional = TPBackendP2P(0, [1, 0], 0, "x", True, "u", 1 << 24)
    assert {one.communicator.rank for one in (native, nccl, positional)} == {0}


def test_an_unknown_device_is_refused(recorder: type[Recorder]) -> None:
    with pytest.raises(
        ValueError, match=r"device: expected one of the active devices \[0, 1\], got 2"
    ):
        make(2)


def test_all_reduce_passes_wire_and_contribution(recorder: type[Recorder]) -> None:
    tensor = np.zeros(8, np.float32)
    for options, wire in ((Options(), "bf16"), (Options(wire="native"), "native")):
        backend = make(options=options)
        backend.all_reduce(tensor)
        backend.all_reduce(tensor, False)
        (first, second) = calls(backend)
        assert first == ("all_reduce", (tensor,), {"wire": wire, "contribution": True})
        assert second[2] == {"wire": wire, "contribution": False}
        assert first[1][0] is tensor


def test_gather_names_widths_by_rank(recorder: type[Recorder]) -> None:
    output, other, idle = (make(device, (6, 1, 4)) for device in (4, 6, 1))
    part, joined = np.zeros((2, 256)), np.zeros((2, 384))
    output.gather(part, joined, [6, 4], 4, [128, 256])
    other.gather(part[:, :128], None, [6, 4], 4, [128, 256])
    idle.gather(np.zeros((2, 0)), None, [6, 4], 4, [128, 256])
    assert calls(output)[0][1][1:] == (joined, 1, [0, 256, 128])
    assert calls(other)[0][1][1:] == (None, 1, [0, 256, 128])
    assert calls(idle) == []


def test_an_output_rank_without_a_part_brings_nothing(recorder: type[Recorder]) -> None:
    output, other = make(0), make(1)
    joined = np.zeros((1, 128))
    output.gather_small(np.zeros((1, 0)), joined, [0, 1], 0, [0, 128])
    assert calls(output)[0] == ("gather", (None, joined, 0, [0, 128]), {})
    other.gather_small(np.zeros((1, 0)), None, [0, 1], 0, [128, 0])
    assert calls(other) == []


@pytest.mark.parametrize(
    "devices, ldims, out, words",
    [
        ([0, 1, 0], [64, 64, 64], 0, "gather_devices: expected each device once"),
        ([0, 1], [128, -1], 0, "ldims: expected widths of 0 or more"),
        ([1], [128], 0, "out_device: expected one of gather_devices"),
        ([0, 1], [128, 128], 7, "out_device: expected one of the active devices"),
    ],
)
def test_gathers_that_make_no_sense(
    recorder: type[Recorder], devices: list[int], ldims: list[int], out: int, words: str
) -> None:
    backend = make()
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        backend.gather(np.zeros((1, 128)), np.zeros((1, 256)), devices, out, ldims)
    assert calls(backend) == []


def test_the_first_pass_may_take_longer(recorder: type[Recorder]) -> None:
    backend = make(options=Options(deadline=30.0))
    assert backend.communicator.options["deadline"] == 600.0
    backend.communicator.failure = peerlane.DeadlineError("rank 0 waited for rank 1")
    with pytest.raises(peerlane.DeadlineError):
        backend.end_cpu_reduce_jobs()
    backend.communicator.failure = None
    for _ in range(3):
        backend.end_cpu_reduce_jobs()
    deadlines = [call for call in calls(backend) if call[0] == "set_deadline"]
    assert deadlines == [("set_deadline", (30.0,), {})]
    assert make(options=Options(deadline=900.0)).communicator.options["deadline"] == 900.0


def test_the_end_of_a_pass_waits_or_only_looks(recorder: type[Recorder]) -> None:
    for check, method in (("sync", "synchronize"), ("late", "health")):
        backend = make(options=Options(check=check))
        backend.end_cpu_reduce_jobs()
        assert calls(backend)[0] == (method, (), {})


def test_closing_after_a_failure_does_not_raise(
    recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    backend = make()
    backend.communicator.failure = peerlane.PeerLostError("the process of rank 1 is gone")
    backend.close()
    assert "the process of rank 1 is gone" in caplog.text


def test_the_helper_joins_nobody(recorder: type[Recorder]) -> None:
    recorder.refusal = AssertionError("the helper made a communicator")
    helper = make(-1)
    helper.run_cpu_reduce_jobs()
    helper.end_cpu_reduce_jobs()
    helper.close()
    assert helper.communicator is None and helper.native is None


@pytest.mark.parametrize("reason", ["UnreachableError", "UnsupportedError", "NoDriverError"])
def test_native_where_the_machine_cannot(
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    p2p_tree.load(monkeypatch, tmp_path)
    recorder.refusal = getattr(peerlane, reason)("GPU 0 cannot reach GPU 1: peer access refused")
    child, master = make(1, shbuf_size=77), make(0)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        " -- TP backend: native, because p2p cannot work here: GPU 0 cannot reach GPU 1: peer access refused"
    ]
    helper, stranger = make(-1), make(-1, uuid="another model")
    for one, master_flag, cpu in (
        (child, False, False),
        (master, True, False),
        (helper, False, True),
    ):
        native = one.native
        assert type(native).__name__ == "TPBackendNative"
        assert (native.master, native.cpu, native.uuid) == (master_flag, cpu, "abc")
        assert one.all_reduce == native.all_reduce and one.gather_small == native.gather_small
        assert one.run_cpu_reduce_jobs == native.run_cpu_reduce_jobs
    assert stranger.native is None

    for one in (child, helper, master):
        one.close()
    assert not [key for key in os.environ if key.startswith("PEERLANE_TP_NATIVE")]


def test_a_rank_that_did_not_come_is_no_reason_for_native(recorder: type[Recorder]) -> None:
    recorder.refusal = peerlane.RendezvousError("rendezvous of 2 ranks: rank 1 did not come")
    with pytest.raises(peerlane.RendezvousError, match="rank 1"):
        make()


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Options.from_env() == Options()
    for key, value in {
        "WIRE": "native",
        "CHECK": "late",
        "DEADLINE": "12.5",
        "PATIENCE": "30",
    }.items():
        monkeypatch.setenv(f"PEERLANE_TP_{key}", value)
    monkeypatch.setenv("PEERLANE_TRANSPORT", "host")
    expected = Options("native", "late", deadline=12.5, patience=30.0, transport="host")
    assert Options.from_env() == expected


def test_the_transport_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, recorder: type[Recorder]
) -> None:
    assert make().communicator.options["transport"] == "p2p"
    monkeypatch.setenv("PEERLANE_TRANSPORT", "auto")
    assert make().communicator.options["transport"] == "auto"
    monkeypatch.setenv("PEERLANE_TRANSPORT", "nvlink")
    message = r"transport \(PEERLANE_TRANSPORT\): expected p2p, auto or host, got 'nvlink'"
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("WIRE", "fp8", r"wire \(PEERLANE_TP_WIRE\): expected bf16 or native, got 'fp8'"),
        ("CHECK", "never", r"check \(PEERLANE_TP_CHECK\): expected sync or late, got 'never'"),
        (
            "DEADLINE",
            "soon",
            r"deadline \(PEERLANE_TP_DEADLINE\): expected seconds above 0, got 'soon'",
        ),
        (
            "DEADLINE",
            "-1",
            r"deadline \(PEERLANE_TP_DEADLINE\): expected seconds above 0, got -1.0",
        ),
        (
            "PATIENCE",
            "inf",
            r"patience \(PEERLANE_TP_PATIENCE\): expected seconds above 0, got inf",
        ),
    ],
)
def test_options_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"PEERLANE_TP_{key}", value)
    with pytest.raises(ValueError, match=words):
        Options.from_env()
