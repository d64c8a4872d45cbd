"""`install` on real ExLlamaV3 sources, with their own code starting and driving the processes.

PEERLANE_TEST_EXLLAMAV3 names folders that hold a package `exllamav3` (unpacked wheels of 1.4.1 and
1.6.5), separated as in PATH. Needs torch and ExLlamaV3's dependencies, no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import p2p_real
import pytest

import peerlane

HERE = Path(__file__).parent
PATCH = HERE.parents[2] / "docs" / "exllamav3-upstream.patch"
TREES = [
    Path(one) for one in os.environ.get("PEERLANE_TEST_EXLLAMAV3", "").split(os.pathsep) if one
]

pytestmark = pytest.mark.skipif(
    not TREES or importlib.util.find_spec("torch") is None,
    reason="PEERLANE_TEST_EXLLAMAV3 names no ExLlamaV3, or torch is not installed",
)


@pytest.fixture(params=TREES or [None], ids=lambda tree: tree.name if tree else "none")
def tree(request: pytest.FixtureRequest) -> Path:
    return request.param


def outcome(tree: Path, folder: Path, backend: str, **environment: str) -> dict[str, Any]:
    """What `p2p_real` saw with this tree and backend."""
    (folder / "sitecustomize.py").write_text(p2p_real.SITECUSTOMIZE)
    path = [folder, HERE, tree, Path(peerlane.__file__).parents[1]]
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PEERLANE_TEST_FOLDER": str(folder),
    }
    done = subprocess.run(
        [sys.executable, HERE / "p2p_real.py", backend],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_p2p_in_every_process(tree: Path, tmp_path: Path) -> None:
    seen = outcome(tree, tmp_path, "p2p")
    p2p = {"backend": "TPBackendP2P", "native": "NoneType"}
    assert seen["seen"] == {"1": p2p, "-1": p2p, "0": p2p}
    assert seen["tp_backend"] == "p2p"
    assert seen["pass"] == [[3.0], [3.0, 0.0, 1.0]]
    assert (seen["processes"], seen["connection"]) == (3, "Connection")
    assert seen["left over"] == 0 and seen["restored"]


def test_p2p_over_channels(tree: Path, tmp_path: Path) -> None:
    seen = outcome(tree, tmp_path, "p2p", PEERLANE_TP_CHANNEL="1")
    p2p = {"backend": "TPBackendP2P", "native": "NoneType"}
    assert seen["seen"] == {"1": p2p, "0": p2p} and seen["processes"] == 2
    assert seen["connection"] == "ParentEnd"
    assert seen["pass"] == [[3.0], [3.0, 0.0, 1.0]]
    rows = [[[12.0, 13.0, 14.0, 15.0], [0.0, 1.0, 2.0, 3.0], [8.0, 9.0, 10.0, 11.0]]]
    assert seen["embedding"] == 2 * [{"rows": rows, "dtype": "torch.float32", "shared": True}]
    assert seen["left over"] == 0 and seen["restored"]


@pytest.mark.parametrize("channel", ["0", "1"])
def test_a_traced_pass(tree: Path, tmp_path: Path, channel: str) -> None:
    traces = tmp_path / "traces"
    environment = {"PEERLANE_TRACE": str(traces), "PEERLANE_TP_CHANNEL": channel}
    seen = outcome(tree, tmp_path, "p2p", **environment)
    assert seen["traced"] and seen["restored"] and seen["left over"] == 0
    names = [
        Counter(json.loads(line).get("span", {}).get("name") for line in file.open())
        for file in traces.glob("*.jsonl")
    ]
    (main,) = (one for one in names if one["pass"])
    (worker,) = (one for one in names if one["woken"])
    for name in ("pass", "prepare inputs", "acks", "dispatch", "rank", "inputs", "embedding"):
        assert main[name] >= 1, (name, main)
    for name in ("woken", "rank", "inputs", "embedding"):
        assert worker[name] >= 1, (name, worker)


def test_native_is_untouched(tree: Path, tmp_path: Path) -> None:
    seen = outcome(tree, tmp_path, "native", PEERLANE_TP_CHANNEL="1")
    assert (seen["processes"], seen["connection"]) == (3, "Connection")
    assert {one["backend"] for one in seen["seen"].values()} == {"TPBackendNative"}
    assert seen["tp_backend"] == "native" and seen["left over"] == 0


@pytest.mark.parametrize("channel", ["0", "1"])
def test_all_processes_fall_back_together(tree: Path, tmp_path: Path, channel: str) -> None:
    refusal = {"PEERLANE_TEST_REFUSAL": "peer access refused", "PEERLANE_TP_CHANNEL": channel}
    seen = outcome(tree, tmp_path, "p2p", **refusal)
    fallen = {"backend": "TPBackendP2P", "native": "TPBackendNative"}
    assert seen["seen"] == {"1": fallen, "-1": fallen, "0": fallen}
    assert seen["left over"] == 0


def test_the_upstream_patch_applies(tree: Path) -> None:
    with PATCH.open() as patch:
        done = subprocess.run(
            ["patch", "-p1", "--dry-run"], cwd=tree, stdin=patch, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout
