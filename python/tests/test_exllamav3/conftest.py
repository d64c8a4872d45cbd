"""Makes `peerlane.exllamav3` importable, with stand-ins for the extension where it is not built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("peerlane") is None:
    sys.path.insert(0, str(Path(__file__).parents[2]))

import p2p_fakes  # noqa: E402

p2p_fakes.stand_in()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option from outside changes what a test sees."""
    from peerlane.exllamav3.options import ENVIRONMENT

    for key in ENVIRONMENT.values():
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[p2p_fakes.Recorder]:
    """Communicators that only keep what they were called with."""
    import peerlane

    fresh = type("Recorder", (p2p_fakes.Recorder,), {})
    monkeypatch.setattr(peerlane, "Communicator", fresh)
    return fresh
