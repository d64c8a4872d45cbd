"""The self-test that a Python program starts: a process of the same interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONNECT = """
import sys
sys.executable = sys.argv[1]
import peerlane
ranks = peerlane.Communicator.connect(["sim:0/2", "sim:1/2"])
print(ranks[0].transport(0, 1))
for rank in ranks:
    rank.close()
"""


def wrapper(folder: Path, name: str) -> Path:
    """An interpreter that notes what it is told and what it says."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/told\n{sys.executable} "$@" | tee {folder}/said\n'
    )
    path.chmod(0o755)
    return path


def connect(program: Path, mode: str) -> str:
    environment = {**os.environ, "PEERLANE_SELF_TEST": mode, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", CONNECT, str(program)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def test_the_interpreter_runs_it(tmp_path: Path) -> None:
    assert connect(wrapper(tmp_path, "python-of-mine"), "always") == "p2p\n"
    assert (tmp_path / "told").read_text() == "-m peerlane.selftest\n"
    said = (tmp_path / "said").read_text().splitlines()
    assert said[-1].startswith('peerlane-self-test {"Report":')
    assert '"failed"' not in said[-1] and said[-1].count('"passed"') == 2 * 8


@pytest.mark.parametrize(("name", "mode"), [("python", "auto"), ("python", "off"), ("app", "always")])
def test_nothing_runs_where_nobody_asks_or_can(tmp_path: Path, name: str, mode: str) -> None:
    # The program that embeds an interpreter would not know what to do.
    assert connect(wrapper(tmp_path, name), mode) == "p2p\n"
    assert not (tmp_path / "told").exists()


def test_a_request_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "peerlane.selftest"]
    done = subprocess.run(command, input="{}\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "expected a request for a self-test, got " in done.stdout
