"""The whole program over a made-up ExLlamaV3 (fakes/) without GPUs, and over one that misbehaves."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import bench

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "bench.py"


@pytest.fixture
def site(tmp_path):
    """A version laid out as `bench.py setup` does, from carried wheels."""
    carry, target = tmp_path / "carry", tmp_path / "site"
    carry.mkdir()
    for name, folders in (("exllamav3-1.6.5-py3-none-any.whl", ["exllamav3"]), ("other-1.whl", ["torch", "peerlane"])):
        with zipfile.ZipFile(carry / name, "w") as wheel:
            for folder in folders:
                for path in (HERE / "fakes" / folder).rglob("*.py"):
                    wheel.write(path, path.relative_to(HERE / "fakes"))
    import lzma

    (carry / "exllamav3_ext-1.6.5.so.xz").write_bytes(lzma.compress(b"not a library"))
    bench.unpack(carry, target, ["1.6.5"])
    return target


def words(site, tmp_path, *args):
    command = [sys.executable, PROGRAM, "run", "--site", site, "--models", "tiny", "--timeout", "60"]
    command += ["--models-dir", tmp_path / "models", "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    command += ["--decode", "1,2", "--prefill", "32", "--steps", "4", "--repeats", "2", "--stream-hash", *args]
    return list(map(str, command))


def run(site, tmp_path, *args, trouble=""):
    command = words(site, tmp_path, *args)
    env = {**os.environ, "FAKE_TROUBLE": trouble}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    data = json.loads((tmp_path / "out.json").read_text())
    return done, data, (tmp_path / "out.md").read_text()


def status(data, **wanted):
    return [entry["status"] for entry in data["runs"] if all(entry[key] == value for key, value in wanted.items())]


def test_unpack(site):
    assert bench.missing(site, "1.6.5") is None
    assert (site / "1.6.5/exllamav3_ext.so").read_bytes() == b"not a library"
    assert "no exllamav3 1.4.1" in bench.missing(site, "1.4.1")


def test_every_backend_by_itself(site, tmp_path):
    done, data, text = run(site, tmp_path, "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["backend"] for entry in data["runs"]] == ["native", "p2p", "nccl", "single", "ceiling"]
    native = data["runs"][0]["result"]
    assert native["backend_class"] == "TPBackendNative" and len(native["greedy"]["tokens"]) == 65
    assert len(native["decode_2"]["steps_per_s"]) == 2 and len(native["prefill_32"]["ttft_ms"]) == 2
    assert native["memory"]["pss_total"] > 0
    assert (
        data["runs"][1]["stream_hash"]["agree"]
        and data["runs"][1]["result"]["greedy"]["largest_difference_to_native"] == 0
    )
    assert "greedy" not in data["runs"][4]["result"] and data["runs"][4]["result"]["backend_class"] == "NullBackend"
    assert "decode, batch 1, steps/s" in text and "Not complete" not in text


def test_backends_in_turns(site, tmp_path):
    done, data, text = run(site, tmp_path, "--turns", "--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for backend, name in (("p2p", "TPBackendP2P"), ("native", "TPBackendNative"), ("ceiling", "NullBackend")):
        sets = [entry for entry in data["runs"] if entry["in_turns"] and entry["backend"] == backend]
        assert [entry["round"] for entry in sets] == [1, 2]
        assert all(entry["result"]["backend_class"] == name and "decode_1" in entry["result"] for entry in sets)
    alone = [entry for entry in data["runs"] if entry["backend"] == "p2p" and not entry["in_turns"]]
    assert len(alone) == 1 and "memory" in alone[0]["result"] and "decode_1" not in alone[0]["result"]
    assert alone[0]["result"]["greedy"]["largest_difference_to_native"] == 0
    assert [
        entry["stream_hash"]["agree"] for entry in data["runs"] if entry["backend"] == "nccl" and entry["stream_hash"]
    ]


def test_one_backend_that_fails_does_not_stop_the_others(site, tmp_path):
    done, data, text = run(site, tmp_path, "--turns", "--rounds", "1", trouble="TPBackendNCCL raises")
    assert done.returncode == 1
    assert set(status(data, backend="nccl")) == {"failed"} and set(status(data, backend="p2p")) == {"ok"}
    failed = next(entry for entry in data["runs"] if entry["backend"] == "nccl" and not entry["in_turns"])
    assert "no more" in failed["stderr_tail"]
    assert "tiny nccl, round 1, taking turns: failed" in text


@pytest.mark.parametrize("limits", [("--timeout", "4"), ("--patience", "3")])
def test_a_hang_keeps_what_was_measured_before_it(site, tmp_path, limits):
    args = ["--backends", "ceiling,nccl", "--rounds", "2", *limits]
    done, data, _ = run(site, tmp_path, *args, trouble="TPBackendNCCL hangs")
    assert status(data, backend="ceiling") == ["ok", "ok"] and status(data, backend="nccl") == ["timeout"]
    hung = next(entry for entry in data["runs"] if entry["backend"] == "nccl")
    assert hung["result"]["backend_class"] == "TPBackendNCCL" and "loaded" in hung["stdout_tail"]
    assert "in step" in hung["stderr_tail"] or limits[0] == "--timeout"
    assert [entry["reason"] for entry in data["skipped"]] == ["hung on tiny in round 1"]


def test_a_hang_among_turns_leaves_the_others_a_run_of_their_own(site, tmp_path):
    args = ["--turns", "--backends", "native,nccl", "--rounds", "1", "--patience", "3"]
    _, data, _ = run(site, tmp_path, *args, trouble="TPBackendNCCL hangs")
    alone = {entry["backend"]: entry for entry in data["runs"] if not entry["in_turns"]}
    assert alone["turns"]["status"] == "timeout" and alone["nccl"]["status"] == "timeout"
    assert alone["native"]["status"] == "ok" and "decode_1" in alone["native"]["result"]


def test_ending_the_program_ends_its_sub_run(site, tmp_path):
    env = {**os.environ, "FAKE_TROUBLE": "TPBackendNative hangs"}
    process = subprocess.Popen(words(site, tmp_path), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logs = []
    deadline = time.monotonic() + 60
    while not any(path.read_text().count("loaded") for path in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
        logs = list((tmp_path / "work").rglob("*.out"))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and logs
    ours = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in ours.splitlines() if "run_one.py" in line and str(tmp_path) in line]


def test_what_the_time_does_not_allow_is_skipped(site, tmp_path):
    done, data, text = run(site, tmp_path, "--budget", "5")
    assert data["runs"] == [] and len(data["skipped"]) == 10 and "skipped, needs about" in text


def test_table_from_a_file(site, tmp_path):
    _, _, text = run(site, tmp_path, "--backends", "native", "--rounds", "1")
    done = subprocess.run([sys.executable, PROGRAM, "table", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.stdout == text


def test_unknown_names_are_refused(site, tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, "run", "--site", site, "--models", "9b", "--backends", "mpi"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "9b, mpi" in done.stderr
