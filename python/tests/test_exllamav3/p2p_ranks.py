"""Ranks in processes of their own, driven as ExLlamaV3 drives its workers: a command, then a reply.

Invariant: every process of a team is a spawned, fresh interpreter, the helper (device -1) included,
and none outlives the team.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from peerlane.exllamav3 import Options, TPBackendP2P

# Joining takes a spawned interpreter's start, on a machine that may be busy with others.
REPLY_TIMEOUT = 120.0


@dataclass
class Rank:
    """What a case has to work with."""

    device: int
    active_devices: list[int]
    output_device: int
    backend: TPBackendP2P

    @property
    def devices(self) -> list[int]:
        return sorted(self.active_devices)

    def tensor(self, values: Any, dtype: Any = None) -> Any:
        """A tensor on this rank's device with these values: torch's, or simulated memory."""
        values = np.asarray(values, dtype)
        if self.backend.options.device_format.startswith("cuda"):
            import torch

            return torch.from_numpy(values).to(f"cuda:{self.device}")
        tensor = self.backend.communicator.empty(values.shape, values.dtype)
        tensor[...] = values
        return tensor


def host(tensor: Any) -> np.ndarray:
    """A tensor's values, once what is queued on it is done."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.cpu().numpy()


def address(tensor: Any) -> int:
    """Where a tensor lies."""
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


def missing(transport: str) -> str | None:
    """What a transport lacks on this machine, if anything."""
    if transport != "cuda":
        return None
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    count = torch.cuda.device_count()
    return None if count >= 2 else f"2 GPUs are needed, torch sees {count}"


@dataclass(frozen=True)
class Setup:
    """A model's processes: which devices, in ExLlamaV3's order, and how they are joined."""

    active_devices: tuple[int, ...]
    output_device: int
    transport: str
    uuid: str
    options: Options


def backend_arguments(setup: Setup, device: int, version: str = "native") -> dict[str, Any]:
    """The keywords that `init_pg` of both ExLlamaV3 versions passes to a backend of that kind."""
    arguments = {
        "device": device,
        "active_devices": list(setup.active_devices),
        "output_device": setup.output_device,
        "init_method": "tcp://127.0.0.1:29500",
        "master": device == setup.output_device,
        "uuid": setup.uuid,
    }
    return arguments | {"cpu": device < 0} if version == "native" else arguments


def serve(conn: Connection, device: int, setup: Setup) -> None:
    """A worker's main loop."""
    # Half of the devices are constructed as by the arm that knows no `cpu`.
    version = "native" if device % 2 else "nccl"
    try:
        backend = TPBackendP2P(**backend_arguments(setup, device, version), options=setup.options)
    except Exception as error:
        conn.send((False, type(error).__name__, str(error), ""))
        return
    rank = Rank(device, list(setup.active_devices), setup.output_device, backend)
    conn.send((True, None, None, None))
    while (command := conn.recv()) is not None:
        case, arguments = command
        try:
            conn.send((True, case(rank, *arguments), None, None))
        except BaseException as error:
            conn.send((False, type(error).__name__, str(error), traceback.format_exc()))


class Failed(Exception):
    """What a rank raised."""

    def __init__(self, device: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"device {device}: {kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Team:
    """All processes of one model. `absent` devices are never started."""

    def __init__(
        self,
        active_devices: Sequence[int],
        output_device: int,
        transport: str,
        *,
        options: Options | None = None,
        absent: Sequence[int] = (),
    ) -> None:
        options = options or Options()
        if transport == "sim":
            options = replace(options, device_format="sim:{device}/8")
        self.setup = Setup(
            tuple(active_devices), output_device, transport, uuid.uuid4().hex, options
        )
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, Connection] = {}
        for device in [*active_devices, -1]:
            if device not in absent:
                self._start(device)

    def _start(self, device: int) -> None:
        self.pipes[device], end = self.context.Pipe()
        self.processes[device] = self.context.Process(target=serve, args=(end, device, self.setup))
        self.processes[device].start()
        end.close()

    @property
    def devices(self) -> list[int]:
        return [device for device in self.pipes if device >= 0]

    def reply(self, device: int) -> Any:
        if not self.pipes[device].poll(REPLY_TIMEOUT):
            raise TimeoutError(f"device {device} did not answer within {REPLY_TIMEOUT} s")
        good, value, message, trace = self.pipes[device].recv()
        if not good:
            raise Failed(device, value, message, trace)
        return value

    def ready(self) -> Team:
        """Waits until every process has its backend."""
        for device in self.pipes:
            self.reply(device)
        return self

    def send(self, device: int, case: Callable[..., Any], *arguments: Any) -> None:
        self.pipes[device].send((case, arguments))

    def run(self, case: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
        """Runs a case on every GPU rank and returns what each returned."""
        for device in self.devices:
            self.send(device, case, *arguments)
        outcomes: dict[int, Any] = {}
        for device in self.devices:
            try:
                outcomes[device] = self.reply(device)
            except Failed as failed:
                outcomes[device] = failed
        for outcome in outcomes.values():
            if isinstance(outcome, Failed):
                raise outcome
        return outcomes

    def kill(self, device: int) -> None:
        """Ends a process as the kernel's out-of-memory killer would."""
        self.processes[device].kill()
        self.processes[device].join()
        del self.pipes[device]

    def stop(self) -> None:
        for pipe in self.pipes.values():
            try:
                pipe.send(None)
            except OSError:
                pass
        end = time.monotonic() + 20
        for process in self.processes.values():
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
