"""ExLlamaV3's contract, by call site, with every rank in a spawned process.

On simulated GPUs, and on real ones where torch sees two. PEERLANE_TEST_STRESS sets the number of mixed calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import p2p_cases as cases
import pytest
from p2p_ranks import Failed, Team, missing

STRESS = int(os.environ.get("PEERLANE_TEST_STRESS", "60"))

# Devices in ExLlamaV3's order (the output device last) with the output device being the first, the
# last and a middle one by index; the last team also leaves devices out.
TEAMS = {"output-first": ([1, 0], 0), "output-last": ([0, 1], 1), "four": ([0, 3, 6, 2], 2)}


# Never two processes that spin on one GPU, so real ones serve two ranks.
RUNS = [*(f"sim-{name}" for name in TEAMS), "cuda-output-first", "cuda-output-last"]


@pytest.fixture(scope="module", params=RUNS)
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    transport, _, name = request.param.partition("-")
    if reason := missing(transport):
        pytest.skip(reason)
    with Team(*TEAMS[name], transport) as team:
        yield team.ready()


@pytest.mark.parametrize(
    "shape", [(1, 1, 4096), (8, 1, 8192), (1, 5, 5120), (2, 3, 12288), (8,), (24,)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_reduce(team: Team, shape: tuple, dtype: str) -> None:
    team.run(cases.all_reduce, shape, dtype)


def test_all_reduce_of_a_prefill_chunk(team: Team) -> None:
    team.run(cases.all_reduce, (1, 128, 4096), "float32")


def test_ranks_without_a_contribution_receive(team: Team) -> None:
    for silent in team.devices:
        team.run(cases.all_reduce, (1, 4, 4096), "float32", (silent,))
    team.run(cases.all_reduce, (1, 1, 4096), "float32", tuple(team.devices[1:]))


def test_a_view_of_a_static_buffer(team: Team) -> None:
    team.run(cases.all_reduce_of_a_view, 4, 5120)


@pytest.mark.parametrize("dtype, bound", [("float32", 2**-7), ("float16", 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (1, 40, 8192), (1, 1, 5128)], ids=str)
def test_all_ranks_get_the_same_bits(team: Team, shape: tuple, dtype: str, bound: float) -> None:
    outcomes = team.run(cases.all_reduce_of_reals, shape, dtype)
    assert len({digest for digest, _ in outcomes.values()}) == 1
    assert all(error < bound for _, error in outcomes.values())


def test_routing_tables(team: Team) -> None:
    for source in team.devices:
        team.run(cases.broadcast, (3, 8), "int64", source)
        team.run(cases.broadcast, (3, 8), "float16", source)


def test_broadcast_of_an_activation(team: Team) -> None:
    team.run(cases.broadcast, (1, 64, 4096), "float32", team.devices[0])


@pytest.mark.parametrize("size", [1, 3, 7, 17, 2047, 2049, 16385])
def test_broadcast_of_any_size_and_alignment(team: Team, size: int) -> None:
    team.run(cases.broadcast, (size,), "uint8", team.devices[-1])
    team.run(cases.broadcast, (size,), "float16", team.devices[0], 1)


@pytest.mark.parametrize("rows", [(1, 1), (4, 1), (1, 5)], ids=str)
def test_logits(team: Team, rows: tuple) -> None:
    team.run(cases.gather, rows, "float16", {device: 1280 for device in team.devices})


def test_logits_in_uneven_slices(team: Team) -> None:
    widths = {device: 128 * (3 * place + 1) for place, device in enumerate(sorted(team.devices))}
    team.run(cases.gather, (2, 1), "float16", widths)


def test_the_output_device_owns_no_logits(team: Team) -> None:
    output = team.setup.output_device
    team.run(cases.gather, (1, 2), "float16", {d: 0 if d == output else 256 for d in team.devices})


def test_devices_that_take_no_part_in_a_gather(team: Team) -> None:
    output = team.setup.output_device
    for left_out in (d for d in team.devices if d != output):
        team.run(cases.gather, (1, 1), "float16", {d: 128 for d in team.devices if d != left_out})
    team.run(cases.gather, (1, 1), "float16", {output: 128})
    team.run(cases.all_reduce, (1, 1, 4096), "float32")


def test_best_logits_and_their_ids(team: Team) -> None:
    output = team.setup.output_device
    widths = {device: int(device != output) for device in team.devices}
    for dtype in ("float16", "int64"):
        team.run(cases.gather, (1, 1), dtype, widths, True)
    for dtype in ("float32", "int64"):
        team.run(cases.gather, (2, 3), dtype, {device: 5 for device in team.devices}, True)


def test_passes(team: Team) -> None:
    vocab = {device: 640 for device in team.devices}
    for _ in range(3):
        team.run(cases.forward, 4, 4096, vocab)
        team.run(cases.idle)


def test_mixed_sizes_back_to_back(team: Team) -> None:
    team.run(cases.stress, STRESS, 11)


def test_empty_tensors(team: Team) -> None:
    team.run(cases.empty_tensors)


def test_barrier(team: Team) -> None:
    team.run(cases.barrier)


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("host memory", "TypeError", ["tensor"]),
        ("strides", "ValueError", ["tensor", "contiguous"]),
        ("element type", "TypeError", ["tensor", "int64"]),
        ("source", "ValueError", ["src_device", "expected one of the active devices", "99"]),
        (
            "gather device",
            "ValueError",
            ["gather_devices", "expected one of the active devices", "99"],
        ),
        ("ldims count", "ValueError", ["ldims", "expected 2 widths", "[128]"]),
        ("own width", "ValueError", ["tensor", "expected a last dimension of 64", "(4, 128)"]),
        ("output width", "ValueError", ["out_tensor", "expected shape (4, 256)", "(4, 128)"]),
        ("output missing", "ValueError", ["out_tensor", "expected shape (4, 256)", "None"]),
    ],
)
def test_wrong_arguments(team: Team, what: str, kind: str, words: list[str]) -> None:
    """They raise on the rank that brings them, and the ranks still agree afterwards."""
    device = team.setup.output_device
    team.send(device, cases.wrong, what)
    with pytest.raises(Failed) as failed:
        team.reply(device)
    assert failed.value.kind == kind, failed.value
    assert all(word in failed.value.message for word in words), failed.value.message
    team.run(cases.all_reduce, (1, 1, 4096), "float32")


def test_the_cases_notice_a_wrong_result() -> None:
    """The negative control: a rank that brings something else makes the others' case fail."""
    with Team([1, 0], 0, "sim") as team:
        team.ready()
        team.send(0, cases.all_reduce, (1, 1, 4096), "float32")
        team.send(1, cases.all_reduce, (1, 1, 4096), "float32", (1,))
        with pytest.raises(Failed, match="AssertionError"):
            team.reply(0)
        team.reply(1)


def test_values_are_exact_on_a_bf16_wire() -> None:
    parts = [cases.values(device, (1000,), np.float32) for device in range(8)]
    total = np.sum(parts, axis=0)
    assert total.max() <= 256 and (total == total.astype(int)).all()
