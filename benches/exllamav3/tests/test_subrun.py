"""Nothing of a sub-run outlives it."""

import os
import sys
import time
from pathlib import Path

import probe
import subrun

# Starts a child that ignores SIGTERM and says who it is, then hangs.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print("child", process.pid, flush=True)
print("last words", file=sys.stderr, flush=True)
time.sleep(600 if sys.argv[1] == "hang" else 0)
"""


def run(tmp_path: Path, code: str, *args: str, limit_s: float = 20.0) -> subrun.Outcome:
    return subrun.run([sys.executable, "-c", code, *args], dict(os.environ), limit_s, tmp_path / "log")


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_a_hanging_group_is_killed_whole(tmp_path):
    started = time.monotonic()
    outcome = run(tmp_path, STUBBORN, "hang", limit_s=3.0)
    assert outcome.timed_out and time.monotonic() - started < 12
    assert gone(int(outcome.stdout.split()[1]))
    assert outcome.stderr_tail.endswith("last words\n")


def test_what_outlives_the_leader_is_killed_too(tmp_path):
    outcome = run(tmp_path, STUBBORN, "leave")
    assert outcome.returncode == 0 and not outcome.timed_out
    assert gone(int(outcome.stdout.split()[1]))


def test_exit_status_and_output_are_kept(tmp_path):
    outcome = run(tmp_path, "import sys; print('said'); sys.exit('went wrong')")
    assert (outcome.returncode, outcome.stdout) == (1, "said\n") and "went wrong" in outcome.stderr_tail


def test_shared_memory_left_behind_is_removed(tmp_path):
    name = f"peerlane-test-{os.getpid()}"
    outcome = run(tmp_path, f"open('/dev/shm/{name}', 'wb').write(b'x' * 5000)")
    assert outcome.shm_removed[name]["bytes"] == 5000
    assert not (probe.SHM / name).exists()


def test_shared_memory_that_someone_maps_stays(tmp_path):
    import mmap

    path = probe.SHM / f"peerlane-test-mapped-{os.getpid()}"
    before = probe.shared_segments()
    path.write_bytes(b"x" * 4096)
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            assert path.name not in probe.remove_orphans(before) and path.exists()
    finally:
        path.unlink()


def test_tail_starts_at_a_line():
    assert subrun.tail("first line\nsecond\nthird\n", 12) == "[cut] third\n"


def test_the_process_tree_holds_this_process_and_its_memory():
    assert probe.tree(os.getpid())[0] == os.getpid()
    assert probe.memory(os.getpid())["rss"] > 1_000_000
    assert probe.memory(2**22 + 1) == {}
