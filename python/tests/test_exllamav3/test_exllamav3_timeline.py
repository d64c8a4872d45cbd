"""What is recorded of passes, with pipes and with channels, and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import p2p_tree
import pytest

import peerlane

HERE = Path(__file__).parent
# Two ranks are workers; the third is in the main process.
WORKERS, RANKS = 2, 3


def run(folder: Path, backend: str, **environment: str) -> list[Any]:
    p2p_tree.write(folder)
    path = [HERE, folder, Path(peerlane.__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, HERE / "p2p_timeline.py", folder, backend],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def records(folder: Path) -> list[dict[str, Any]]:
    """The spans of each process, the main one's first."""
    found = []
    for file in folder.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        spans = [line["span"] for line in lines if "span" in line]
        found.append({"command": lines[0]["process"]["command"], "spans": spans})
    return sorted(found, key=lambda one: -sum(span["name"] == "pass" for span in one["spans"]))


def count(spans: list[dict[str, Any]]) -> Counter[str]:
    return Counter(span["name"] for span in spans)


@pytest.fixture(scope="module")
def untraced(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("untraced")
    return run(folder, "p2p")


@pytest.mark.parametrize("channel", ["0", "1"])
def test_passes_are_recorded_on_every_rank(
    channel: str, untraced: list[Any], tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    seen = run(tmp_path, "p2p", PEERLANE_TRACE=str(traces), PEERLANE_TP_CHANNEL=channel)
    assert seen == untraced
    # What a pass is called is not shown to ExLlamaV3's own code.
    of_rank = [[6.0] * 8, ["a"]]
    assert seen == [*3 * [[of_rank, ["a"]]], WORKERS * [of_rank]]

    main, *workers = records(traces)
    workers = [one for one in workers if count(one["spans"])["rank"]]
    assert len(workers) == WORKERS
    kinds = Counter(s["args"]["pass"] for s in main["spans"] if s["name"] == "pass")
    assert kinds == {"decode": 2, "prefill": 1}
    seen_there = count(main["spans"])
    for name, expected in {
        "prepare inputs": 3,
        "acks": 2,
        "dispatch": 3 * WORKERS,
        "rank": 3,
        "inputs": 3,
        "embedding": 3,
        "upload": 3,
        "woken": 0,
        "synchronize": 3,
    }.items():
        assert seen_there[name] == expected, (name, seen_there)
    for worker in workers:
        assert count(worker["spans"])["woken"] == 3
        assert Counter(s["args"]["pass"] for s in worker["spans"] if s["name"] == "rank") == kinds
    spans = [span for process in (main, *workers) for span in process["spans"]]
    on_both = [span for span in spans if span["name"] == "all_reduce"]
    # On the host and on the GPU.
    assert len(on_both) == 2 * 3 * RANKS
    assert len({span["args"]["group"] for span in on_both if "group" in span["args"]}) == 1
    sent = Counter(span["args"]["sends"] for span in spans if span["name"] == "dispatch")
    heard = Counter(span["args"]["hears"] for span in spans if span["name"] == "woken")
    assert sent == heard and set(sent.values()) == {1} and len(sent) == 3 * WORKERS
    for woken in (span for span in spans if span["name"] == "woken"):
        (its,) = (s for s in spans if s.get("args", {}).get("sends") == woken["args"]["hears"])
        assert its["begin"] < woken["end"]


def test_other_backends_are_left_alone(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    run(tmp_path, "native", PEERLANE_TRACE=str(traces))
    seen = [count(process["spans"]) for process in records(traces)]
    assert len(seen) == 1, "only the main process has Peerlane"
    assert not seen[0]


def test_a_trace_that_cannot_be_written_changes_nothing(
    untraced: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path, "p2p", PEERLANE_TRACE=str(tmp_path / "file")) == untraced


def test_workers_that_do_not_record_see_nothing_of_it(untraced: list[Any], tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    assert run(tmp_path, "p2p", TEST_TRACE_HERE=str(traces)) == untraced
    (main,) = records(traces)
    assert count(main["spans"])["rank"] == count(main["spans"])["pass"] == 3
