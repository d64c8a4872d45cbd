"""What a user may set, and how it is said.

Invariant: all ranks of a model work with equal options. The parent reads the environment once, when
`install` runs, and its children receive the result; without `install` every process reads the same
inherited environment.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields
from typing import Any

log = logging.getLogger("peerlane")

ENVIRONMENT = {
    "wire": "PEERLANE_TP_WIRE",
    "check": "PEERLANE_TP_CHECK",
    "deadline": "PEERLANE_TP_DEADLINE",
    "patience": "PEERLANE_TP_PATIENCE",
    "transport": "PEERLANE_TRANSPORT",
    "channel": "PEERLANE_TP_CHANNEL",
    "spin": "PEERLANE_TP_SPIN",
}
CHOICES = {
    "wire": ("bf16", "native"),
    "check": ("sync", "late"),
    "transport": ("p2p", "auto", "host"),
}
SWITCH = {"0": False, "1": True}


@dataclass(frozen=True)
class Options:
    """Options of one model's communicator."""

    wire: str = "bf16"
    """How fp32 sums travel: rounded to bf16, as ExLlamaV3's other backends do, or as they are."""
    check: str = "sync"
    """When a failed wait becomes an exception: `sync` before the pass returns, which waits for the
    GPU; `late` at the first call after it is known, which does not."""
    deadline: float = 90.0
    """Seconds that one wait for a peer may last."""
    first_deadline: float = 600.0
    """The same until the first pass is done: ExLlamaV3 1.4.1 compiles kernels in the middle of it."""
    patience: float = 120.0
    """Seconds to wait for the other processes at the start."""
    transport: str = "p2p"
    """What carries the data: `p2p`, with native taking over where the machine cannot do that; `auto`,
    with Peerlane's own way through host memory where a pair cannot; `host`, that way for all."""
    channel: bool = False
    """Whether commands travel through channels in shared memory rather than pipes, and the helper process stays away."""
    spin: float | None = None
    """Seconds that a process looks for its next command before it sleeps; unless given, 4 ms where there are two cores
    for each GPU, else 20 us."""
    device_format: str = "cuda:{device}"
    """The device's name for Peerlane; `sim:{device}/8` runs ranks on simulated GPUs."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{_said(name)}: expected {_either(choices)}, got {value!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{_said(field.name)}: expected True or False, got {value!r}")
            if value is None and field.default is None:
                continue
            if "float" in field.type and not 0 < value < float("inf"):
                raise ValueError(f"{_said(field.name)}: expected seconds above 0, got {value!r}")

    @classmethod
    def from_env(cls) -> Options:
        """The options that the environment asks for, defaults for the rest."""
        given: dict[str, Any] = {}
        for name, key in ENVIRONMENT.items():
            if text := os.environ.get(key):
                given[name] = text if name in CHOICES else _parsed(name, text)
        return cls(**given)


def _parsed(name: str, text: str) -> float | bool:
    if name == "channel":
        if text not in SWITCH:
            raise ValueError(f"{_said(name)}: expected 0 or 1, got {text!r}")
        return SWITCH[text]
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{_said(name)}: expected seconds above 0, got {text!r}") from None


def _either(choices: tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"


def _said(name: str) -> str:
    key = ENVIRONMENT.get(name)
    return f"{name} ({key})" if key else name


def announce(line: str) -> None:
    """Says a line where ExLlamaV3 says its own, and in the log."""
    log.info(line)
    print(f" -- {line}", flush=True)
