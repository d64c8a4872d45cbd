"""torch tensors: with the real torch if it is installed, and always with a fake one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(script: str, extra: Path | None = None) -> str:
    places = [str(extra)] if extra else []
    places += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(HERE / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_with_a_fake_torch() -> None:
    assert run("torch_calls.py", HERE / "fake_torch") == "torch is faked\n"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_calls_with_torch() -> None:
    assert run("torch_calls.py").startswith("torch is 2.")
