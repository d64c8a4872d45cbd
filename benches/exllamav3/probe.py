"""What a run uses of the machine: memory and CPU time of its processes, GPU memory, /dev/shm.

Reads /proc, /dev/shm and NVML only, so looking changes nothing: no CUDA context is made and no
process is asked anything. Invariant: a figure that cannot be read is None or left out, never a
guess and never an exception.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

PROC = Path("/proc")
SHM = Path("/dev/shm")
ROLLUP_FIELDS = {"Rss": "rss", "Pss": "pss", "Pss_Anon": "pss_anon", "Pss_Shmem": "pss_shmem"}


def parents() -> dict[int, int]:
    """The parent of every process there is."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                # The command's name stands in parentheses and may hold anything, so cut after it.
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    return found


def tree(root: int) -> list[int]:
    """`root` and everything below it."""
    parent = parents()
    family = [root]
    for pid in family:
        family += [child for child, above in parent.items() if above == pid]
    return family


def memory(pid: int) -> dict[str, int]:
    """Resident and proportional size in bytes. Memory shared by n processes counts 1/n in each pss."""
    sizes = {}
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ROLLUP_FIELDS and rest.strip().endswith("kB"):
                sizes[ROLLUP_FIELDS[name]] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    return sizes


def cpu_seconds(pids: list[int]) -> float:
    """User and system time that these processes have used so far."""
    ticks = 0
    for pid in pids:
        try:
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def shared_segments(directory: Path = SHM) -> dict[str, dict[str, int]]:
    """Files under /dev/shm: their size, and the bytes of it that are backed by memory."""
    found = {}
    try:
        for entry in directory.iterdir():
            try:
                stat = entry.stat()
            except OSError:
                continue
            found[entry.name] = {"bytes": stat.st_size, "resident": stat.st_blocks * 512}
    except OSError:
        pass
    return found


def new_segments(before: dict[str, dict[str, int]], directory: Path = SHM) -> dict[str, dict[str, int]]:
    return {name: size for name, size in shared_segments(directory).items() if name not in before}


def mapped_names() -> set[str]:
    """Names under /dev/shm that some living process maps."""
    names = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                for line in (entry / "maps").read_text().splitlines():
                    _, found, path = line.partition(f"{SHM}/")
                    if found:
                        names.add(path.removesuffix(" (deleted)"))
            except OSError:
                continue
    return names


def remove_orphans(before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Removes what a killed run left under /dev/shm and nobody maps: the loader's arena alone is
    2 GB, and a few of those fill the file system. Returns what was removed."""
    orphans = new_segments(before)
    if orphans:
        living = mapped_names()
        orphans = {name: size for name, size in orphans.items() if name not in living}
    removed = {}
    for name, size in orphans.items():
        try:
            (SHM / name).unlink()
            removed[name] = size
        except OSError:
            continue
    return removed


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml:
    """GPU memory as the driver counts it, all processes together, by PCI order."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.handles: list[ctypes.c_void_p] = []
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        count = ctypes.c_uint()
        if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                return
            self.handles.append(handle)
        self.library = library

    def used(self) -> list[int] | None:
        """Bytes in use on every GPU."""
        if self.library is None:
            return None
        answer = []
        for handle in self.handles:
            sizes = _Memory()
            if self.library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(sizes)):
                return None
            answer.append(sizes.used)
        return answer
