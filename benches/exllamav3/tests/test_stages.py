"""stages.py with a stand-in for the program that traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import stages

BENCH = Path(stages.__file__)
# Takes what `peerlane trace` takes, and says how often it was started; the second time it fails.
PROGRAM = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
assert words[0] == "trace" and words[words.index("--") + 2].endswith("run_one.py"), words
log = pathlib.Path("{log}")
kind = words[words.index("--backend") + 1]
log.write_text((log.read_text() if log.exists() else "") + kind + "\\n")
if len(log.read_text().splitlines()) == 2:
    sys.exit(3)
stage = {{"pass": "decode", "name": "dispatch", "place": "host", "count": 4, "per_pass": 1.0,
         "p50_us": 30.0, "p99_us": 90.0, "max_us": 95.0, "pass_us": 31.0}}
pathlib.Path(words[words.index("--json") + 1]).write_text(json.dumps({{"trace": {{"passes": {{}}, "stages": [stage]}}}}))
"""


def stage(name: str, p50: float, kind: str = "decode") -> dict[str, Any]:
    figures = {"per_pass": 2.0, "p50_us": p50, "p99_us": 2 * p50, "pass_us": 2 * p50}
    return {"pass": kind, "name": name, "place": "host", **figures}


def test_rounds_alternate() -> None:
    assert stages.order(["a", "b"], 2) == [(1, "a"), (1, "b"), (2, "b"), (2, "a")]


def test_the_table_has_medians_and_what_only_one_backend_does() -> None:
    runs = [
        {"backend": "p2p", "round": 1, "stages": [stage("dispatch", 40.0), stage("pass", 900.0)]},
        {"backend": "p2p-channel", "round": 1, "stages": [stage("dispatch", 4.0), stage("send", 3.0), stage("x", 1.0, "warm-up")]},
        {"backend": "p2p", "round": 2, "stages": [stage("dispatch", 60.0), stage("pass", 700.0)]},
        {"backend": "p2p-channel", "round": 2, "failed": "exit status 1"},
    ]
    lines = stages.table(runs).splitlines()
    assert lines[2] == "| pass | host | 2.0 | 800.0 | 1600.0 | 1600.0 | - | - | - | - |"
    assert lines[3] == "| dispatch | host | 2.0 | 50.0 | 100.0 | 100.0 | 2.0 | 4.0 | 8.0 | 8.0 |"
    assert lines[4].startswith("| send | host | - |")
    assert lines[-1] == "p2p-channel, round 2: exit status 1" and len(lines) == 7


def test_a_run_that_fails_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    program, log, out = tmp_path / "program", tmp_path / "log", tmp_path / "out.json"
    program.write_text(PROGRAM.format(python=sys.executable, log=log))
    program.chmod(0o755)
    words = ["--model", tmp_path / "8b", "--peerlane", program, "--out", out]
    done = subprocess.run([sys.executable, BENCH, *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert log.read_text().split() == ["p2p", "p2p-channel", "p2p-channel", "p2p"]
    runs = json.loads(out.read_text())["runs"]
    assert [run.get("failed") for run in runs] == [None, "exit status 3", None, None]
    assert out.with_suffix(".md").read_text() == stages.table(runs)
    assert "| dispatch | host | 1.0 | 30.0 | 90.0 | 31.0 | 1.0 | 30.0 | 90.0 | 31.0 |" in stages.table(runs)
