"""Runs a command in a process group of its own, under a time limit, and keeps what it printed.

Invariant: when `run` returns or raises, no process of the group is left, whatever the command did: a
rank that waits for a dead peer would otherwise hold its GPU against every later measurement. The
group stays in the caller's session, so that whoever ends a session ends it too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import probe

TERM_GRACE_S = 3.0
TAIL_BYTES = 3000


@dataclass
class Outcome:
    """How a command ended."""

    returncode: int | None
    timed_out: bool
    seconds: float
    stdout: str
    stderr_tail: str
    shm_removed: dict[str, dict[str, int]]


def tail(text: str, limit: int = TAIL_BYTES) -> str:
    """The end of a log, from the beginning of a line."""
    if len(text) <= limit:
        return text
    return "[cut] " + text[-limit:].partition("\n")[2]


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the whole group to end, then makes it. The leader's id names the group for as long as any
    member lives, so this reaches ranks that outlived the leader."""
    for number, patience in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (process.poll() is None or group_alive(process.pid)):
            time.sleep(0.02)
        if not group_alive(process.pid):
            break


def run(command: list[str], env: dict[str, str], limit_s: float, logs: Path) -> Outcome:
    """Runs `command`, its output in `logs`.out and `logs`.err."""
    out, err = logs.with_suffix(".out"), logs.with_suffix(".err")
    shm = probe.shared_segments()
    started = time.monotonic()
    timed_out = False
    # Opened for appending: the ranks write to one file, and only so does no line overwrite another.
    out.write_bytes(b"")
    err.write_bytes(b"")
    with out.open("ab") as stdout, err.open("ab") as stderr:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end_group(process)
    seconds = time.monotonic() - started
    return Outcome(
        returncode=process.poll(),
        timed_out=timed_out,
        seconds=seconds,
        stdout=out.read_text(errors="replace"),
        stderr_tail=tail(err.read_text(errors="replace")),
        shm_removed=probe.remove_orphans(shm),
    )
