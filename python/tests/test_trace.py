"""Spans of a Python program: what is recorded, and that being recorded changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peerlane
from peerlane.trace import Span

PROGRAM = """
import sys
import peerlane
from peerlane import trace

if len(sys.argv) > 1:
    trace.start(sys.argv[1])
with trace.Span("outer", **{"pass": "decode"}) as outer:
    with trace.Span("inner", tokens=4, name="x", odd=-1, none=None, flag=True):
        pass
try:
    with trace.Span("raises"):
        raise KeyError("of the program")
except KeyError:
    pass
ranks = peerlane.Communicator.connect(["sim:0/2", "sim:1/2"])
tensors = [rank.empty(8, "float32") for rank in ranks]
for rank, tensor in zip(ranks, tensors):
    rank.all_reduce(tensor)
for rank in ranks:
    rank.synchronize()
print(trace.is_recording())
"""


def run(*arguments: Any, **environment: str) -> tuple[str, str]:
    path = os.pathsep.join(
        [str(Path(peerlane.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip(), done.stderr


def spans(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.jsonl")
    assert file.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["span"] for line in lines if "span" in line]


def verify(folder: Path) -> None:
    found = spans(folder)
    of = {span["name"]: span for span in found}
    assert of["inner"]["args"] == {"tokens": 4, "name": "x", "odd": "-1", "none": "None", "flag": 1}
    assert of["outer"]["args"] == {"pass": "decode"} and "raises" in of
    assert of["outer"]["begin"] <= of["inner"]["begin"] <= of["inner"]["end"] <= of["outer"]["end"]
    # Communicators that nobody closed: what is done when the process ends is recorded.
    on_gpu = [s for s in found if s["name"] == "all_reduce" and "group" in s["args"]]
    assert sorted(span["args"]["rank"] for span in on_gpu) == [0, 1]
    assert sum(span["name"] == "synchronize" for span in found) == 2


def test_a_program_is_recorded_by_the_variable(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert run(PEERLANE_TRACE=str(folder)) == ("True", "")
    verify(folder)


def test_a_program_starts_by_itself(tmp_path: Path) -> None:
    assert run(tmp_path) == ("True", "")
    verify(tmp_path)


def test_a_trace_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said, errors = run(PEERLANE_TRACE=str(tmp_path / "file"))
    assert said == "False" and errors.count("PEERLANE_TRACE: nothing is recorded") == 1, errors


def test_a_span_that_nobody_records_is_nothing() -> None:
    assert not peerlane.trace.is_recording()
    with Span("x", anything=object()) as span:
        pass
    with span:
        pass
    peerlane.trace.flush()
