"""Ranks that die, that stay away, that come late, and that leave in any order.

On simulated GPUs: three ranks are needed, and real GPUs see ranks die in tests/tests/processes.rs.
"""

from __future__ import annotations

import itertools
import time

import p2p_cases as cases
import pytest
from p2p_ranks import Failed, Team

from peerlane.exllamav3 import Options

GONE = {"PeerLostError", "AbortedError"}


@pytest.fixture
def transport() -> str:
    return "sim"


def failures_of(team: Team, devices: list[int]) -> list[Failed]:
    """What the devices raised in the case that they were sent; each must have raised."""
    raised = []
    for device in devices:
        with pytest.raises(Failed) as failed:
            team.reply(device)
        raised.append(failed.value)
    return raised


def test_survivors_name_a_rank_that_died_in_a_pass(transport: str) -> None:
    with Team([0, 2, 1], 1, transport) as team:
        team.ready().run(cases.all_reduce, (1, 1, 4096), "float32")
        survivors = [0, 1]
        for device in survivors:
            team.send(device, cases.forward, 8, 4096, {0: 128, 1: 128, 2: 128})
        time.sleep(0.3)
        team.kill(2)
        begin = time.monotonic()
        raised = failures_of(team, survivors)
        assert time.monotonic() - begin < 2
        assert {failed.kind for failed in raised} <= GONE
        assert any("rank 2" in failed.message for failed in raised), raised

        # It stays: the next pass raises as well, on every survivor, and closing still works.
        for device in survivors:
            team.send(device, cases.all_reduce, (1, 1, 4096), "float32")
        assert {failed.kind for failed in failures_of(team, survivors)} <= GONE
        team.run(cases.leave)


def test_a_rank_that_makes_no_call(transport: str) -> None:
    options = Options(deadline=1.0, first_deadline=1.0)
    with Team([1, 0], 0, transport, options=options) as team:
        team.ready().run(cases.barrier)
        team.send(0, cases.all_reduce, (1, 1, 4096), "float32")
        begin = time.monotonic()
        (failed,) = failures_of(team, [0])
        assert failed.kind == "DeadlineError" and "rank 1" in failed.message
        assert time.monotonic() - begin < 10
        team.send(0, cases.idle)
        (again,) = failures_of(team, [0])
        assert again.kind == "DeadlineError"
        # The next pass that both make is right: they recover at its first call, again and again.
        for _ in range(2):
            team.run(cases.all_reduce, (1, 1, 4096), "float32")
            team.run(cases.forward, 2, 4096, {0: 128, 1: 128})
            team.send(0, cases.barrier)
            (failed,) = failures_of(team, [0])
            assert failed.kind == "DeadlineError"
        team.run(cases.leave)


def test_a_pass_that_was_aborted_is_made_again(transport: str) -> None:
    with Team([0, 2, 1], 1, transport) as team:
        team.ready().run(cases.forward, 2, 4096, {0: 128, 1: 128, 2: 128})
        for device in (0, 1):
            team.send(device, cases.forward, 2, 4096, {0: 128, 1: 128, 2: 128})
        time.sleep(0.3)
        team.send(2, cases.abort)
        team.reply(2)
        assert {failed.kind for failed in failures_of(team, [0, 1])} == {"AbortedError"}
        team.run(cases.forward, 4, 4096, {0: 128, 1: 128, 2: 128})
        team.run(cases.leave)


def test_a_pass_that_does_not_wait_for_the_gpu(transport: str) -> None:
    """The failure shows at the next call after it is known."""
    options = Options(deadline=1.0, first_deadline=1.0, check="late")
    with Team([1, 0], 0, transport, options=options) as team:
        team.ready().send(0, cases.barrier)
        try:
            team.reply(0)
        except Failed as failed:
            assert failed.kind == "DeadlineError"
        time.sleep(3)
        team.send(0, cases.idle)
        (failed,) = failures_of(team, [0])
        assert failed.kind == "DeadlineError" and "rank 1" in failed.message


def test_a_rank_that_never_starts(transport: str) -> None:
    with Team([0, 1, 2], 2, transport, options=Options(patience=5.0), absent=[1]) as team:
        for failed in failures_of(team, [0, 2]):
            assert failed.kind == "RendezvousError" and "1" in failed.message
        team.reply(-1)


@pytest.mark.parametrize("order", list(itertools.permutations([0, 1, 2])), ids=str)
def test_leaving_in_any_order(transport: str, order: tuple[int, ...]) -> None:
    with Team([0, 1, 2], 2, transport) as team:
        team.ready().run(cases.all_reduce, (1, 1, 4096), "float32")
        for device in order:
            team.send(device, cases.leave)
            time.sleep(0.05)
        for device in order:
            team.reply(device)
        team.send(0, cases.barrier)
        (failed,) = failures_of(team, [0])
        assert failed.kind == "ClosedError"


def test_two_models_in_the_same_devices(transport: str) -> None:
    with Team([1, 0], 0, transport) as one, Team([0, 1], 1, transport) as two:
        one.ready(), two.ready()
        for team in (one, two, one):
            team.run(cases.all_reduce, (1, 1, 4096), "float32")
        one.run(cases.leave)
        two.run(cases.all_reduce, (1, 1, 4096), "float32")


def test_devices_of_a_killed_model_serve_the_next_one(transport: str) -> None:
    with Team([1, 0], 0, transport) as team:
        team.ready()
        for device in (0, 1):
            team.kill(device)
    with Team([1, 0], 0, transport) as team:
        team.ready().run(cases.all_reduce, (1, 1, 4096), "float32")
