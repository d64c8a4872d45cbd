"""ExLlamaV3's tensor-parallel backends beside each other: `bench.py run`, `table`, `setup`.

Each sub-run (version, model, backend, round) is a process group of its own, so one that hangs or
dies costs only itself. Invariant: after every sub-run the results file on disk is valid and holds
everything up to it, and whatever was not run is in it with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import backends
import make_model
import report
import subrun
from plan import TURNS, Budget, Job, jobs, parse_model, turn_takers

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
STREAM_HASH_PASSES = "3"
# What a process prints that ends itself because a measurement takes too long.
GAVE_UP = "Timeout (0:"


def unpack(carry: Path, site: Path, versions: list[str]) -> None:
    """Lays out SITE/VERSION from wheels and a compiled extension. Wheels are plain zip files here: no
    pip, so nothing is looked up or compiled."""
    wheels = sorted(carry.glob("*.whl"))
    shared = [wheel for wheel in wheels if not wheel.name.startswith("exllamav3-")]
    for version in versions:
        target = site / version
        if (target / "exllamav3").is_dir():
            continue
        target.mkdir(parents=True, exist_ok=True)
        for wheel in shared + [w for w in wheels if w.name.startswith(f"exllamav3-{version}-")]:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        packed = carry / f"exllamav3_ext-{version}.so.xz"
        if packed.exists():
            with lzma.open(packed) as source, (target / "exllamav3_ext.so").open("wb") as copy:
                shutil.copyfileobj(source, copy)


def missing(site: Path, version: str) -> str | None:
    """Why this version cannot run, or None."""
    if not (site / version / "exllamav3").is_dir():
        return f"no exllamav3 {version} under {site}"
    if not (site / version / "exllamav3_ext.so").exists():
        return f"no exllamav3_ext.so for {version}, and compiling it takes minutes"
    return None


def machine() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    rows = [line.split(", ") for line in text.splitlines() if ", " in line]
    return {
        "gpus": [name for name, _ in rows],
        "driver": rows[0][1] if rows else None,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def hardware_name(found: dict[str, Any], gpus: int) -> str:
    name = found["gpus"][0].replace("NVIDIA", "").strip().replace(" ", "-") if found["gpus"] else "unknown"
    return f"{gpus}x{name}"


def model_directory(root: Path, model: str) -> Path:
    """The model's directory, made at first use."""
    name, layers = parse_model(model)
    directory = root / model.replace(":", "-")
    if not (directory / "config.json").exists():
        started = time.monotonic()
        size = make_model.make(directory, make_model.with_layers(make_model.SHAPES[name], layers))
        print(f"made {directory}: {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s", flush=True)
    return directory


def environment(args: argparse.Namespace, version: str) -> dict[str, str]:
    paths = [str(args.site / version), str(HERE), *map(str, args.pythonpath)]
    env = {**os.environ, "PYTHONPATH": ":".join(paths + [os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    env.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", PYTHONUNBUFFERED="1")
    if args.stream_hash:
        env["EXL3_TP_STREAM_HASH"] = STREAM_HASH_PASSES
    return env


def logits_difference(mine: Path, reference: Path) -> float | None:
    """The largest difference between two sub-runs' logits after the prompt."""
    import numpy as np

    if not (mine.exists() and reference.exists()):
        return None
    first, other = np.load(mine)[0], np.load(reference)[0]
    return float(np.abs(first.astype(np.float32) - other.astype(np.float32)).max())


def entries(
    job: Job, status: str, process: dict[str, Any], result: dict[str, Any], hashes: dict[str, Any]
) -> list[dict[str, Any]]:
    """A sub-run's part of the results: one entry, or one for every backend and round that took turns
    in it after one for the process that they shared."""
    sets = result.pop("sets", [])
    whole = {**job.head(), "in_turns": False, "status": status, **process, "result": result}
    whole["stream_hash"] = hashes.get(job.backend) or hashes.get(None)
    found = [whole]
    for part in sets:
        measured = part["result"]
        own = "failed" if "error" in measured else "ok" if report.measures(measured) else status
        found.append(
            {
                **job.head(),
                **part,
                "in_turns": True,
                "status": own,
                "stream_hash": hashes.get(part["backend"]) if "greedy" in measured else None,
            }
        )
    return found


class Bench:
    """The results so far, and how another sub-run is added to them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.started = time.monotonic()
        self.budget = Budget(args.budget, args.timeout)
        found = machine()
        date = datetime.datetime.now(datetime.timezone.utc)
        self.work = args.work / date.strftime("%H%M%S")
        self.work.mkdir(parents=True, exist_ok=True)
        self.out = args.out or RESULTS / f"{date:%Y-%m-%d}-{hardware_name(found, args.gpus)}-exllamav3.json"
        self.data: dict[str, Any] = {
            "program": "benches/exllamav3/bench.py",
            "command": shlex.join(["bench.py", *sys.argv[1:]]),
            "date": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": found,
            "runs": [],
            "skipped": [],
        }

    def spent(self) -> float:
        return time.monotonic() - self.started

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        part.replace(self.out)
        self.out.with_suffix(".md").write_text(report.markdown(self.data))

    def skip(self, job: Job, reason: str) -> None:
        self.data["skipped"].append({**job.head(), "reason": reason})
        print(f"{self.spent():6.0f} s  {job.version} {job.model} {job.backend}: skipped, {reason}", flush=True)
        self.save()

    def logs(self, job: Job) -> Path:
        return self.work / f"{job.version}-{job.model}-{job.backend}-{job.round}".replace(":", "_").replace(".", "_")

    def timed_in_turns(self, job: Job) -> bool:
        """Whether this backend's speed on this model is known already."""
        return any(
            run["in_turns"] and run["status"] == "ok" and all(run[key] == value for key, value in job.head().items())
            for run in self.data["runs"]
        )

    def command(self, job: Job, model: Path) -> list[str]:
        args = self.args
        if args.command:
            return [*shlex.split(args.command), job.version, job.model, job.backend]
        first, *others = turn_takers(args.backends) if job.backend == TURNS else [job.backend]
        timed = job.timed or not self.timed_in_turns(job)
        return [
            sys.executable, str(HERE / "run_one.py"),
            "--model", str(model), "--backend", first, "--also", ",".join(others), "--gpus", str(args.gpus),
            "--out", str(self.logs(job).with_suffix(".json")),
            "--decode", args.decode if timed else "", "--prefill", args.prefill if timed else "",
            "--steps", str(args.steps), "--repeats", str(args.repeats), "--rounds", str(args.rounds),
            "--patience", str(args.patience),
        ]  # fmt: skip

    def one(self, job: Job) -> None:
        try:
            model = model_directory(self.args.models_dir, job.model)
        except OSError as error:
            return self.skip(job, f"the model could not be written: {error}")
        limit = self.budget.limit(job, self.spent())
        logs = self.logs(job)
        outcome = subrun.run(self.command(job, model), environment(self.args, job.version), limit, logs)
        try:
            result = json.loads(logs.with_suffix(".json").read_text())
        except (OSError, ValueError):
            result = {}
        hung = outcome.timed_out or GAVE_UP in outcome.stderr_tail
        status = "timeout" if hung else "ok" if outcome.returncode == 0 else "failed"
        if status != "ok" and result.get("complete"):
            status = f"measured, then {status} while closing"
        self.budget.ended(job, status, outcome.seconds)
        process = {
            "returncode": outcome.returncode,
            "seconds": round(outcome.seconds, 1),
            "shm_removed": outcome.shm_removed,
            "stdout_tail": subrun.tail(report.without_hashes(outcome.stdout)),
            "stderr_tail": outcome.stderr_tail,
        }
        print(
            f"{self.spent():6.0f} s  {job.version} {job.model} {job.backend}: {status}, {outcome.seconds:.0f} s",
            flush=True,
        )
        self.data["runs"] += entries(job, status, process, result, report.stream_hash(outcome.stdout))
        self.compare_logits(job)
        self.save()

    def compare_logits(self, job: Job) -> None:
        """How far this sub-run's logits are from native's, wherever both are on disk by now."""
        for run in self.data["runs"]:
            greedy = run["result"].get("greedy")
            if greedy and (run["version"], run["model"]) == (job.version, job.model):
                mine, native = self.logits(run, run["backend"]), self.logits(run, "native")
                greedy["largest_difference_to_native"] = logits_difference(mine, native)

    def logits(self, run: dict[str, Any], backend: str) -> Path:
        in_turns = self.logs(Job(run["version"], run["model"], TURNS))
        shared = in_turns.with_name(f"{in_turns.name}-{backend}.npy")
        alone = self.logs(Job(run["version"], run["model"], backend, run["round"])).with_suffix(".npy")
        return shared if run["in_turns"] or not alone.exists() else alone

    def run(self) -> bool:
        args = self.args
        self.save()
        for job in jobs(args.versions, args.models, args.backends, args.rounds, args.turns):
            reason = None if args.command else missing(args.site, job.version)
            reason = reason or self.budget.refusal(job, self.spent())
            if reason:
                self.skip(job, reason)
            else:
                self.one(job)
        return all(run["status"] == "ok" for run in self.data["runs"]) and bool(self.data["runs"])


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "setup"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--versions", type=names, default=["1.6.5"])
        sub.add_argument(
            "--carry", type=Path, help="folder with wheels and exllamav3_ext-VERSION.so.xz, unpacked first"
        )
        sub.add_argument("--site", type=Path, default=Path("/tmp/peerlane-exl"), help="one folder per version in it")
    run = verbs.choices["run"]
    run.add_argument("--models", type=names, default=["8b"], help="1b, 8b, 70b; 70b:16 keeps 16 layers")
    run.add_argument("--backends", type=names, default=backends.NAMES[:5])
    run.add_argument("--rounds", type=int, default=2)
    run.add_argument(
        "--turns", action="store_true", help="load once, let the backends take turns, then each alone for memory"
    )
    run.add_argument("--gpus", type=int, default=2)
    run.add_argument("--decode", default="1,4,16", help="batch sizes")
    run.add_argument("--prefill", default="512,2048", help="prompt lengths")
    run.add_argument("--steps", type=int, default=32)
    run.add_argument("--repeats", type=int, default=6)
    run.add_argument("--budget", type=float, default=1200.0, help="seconds for everything")
    run.add_argument("--timeout", type=float, default=200.0, help="seconds for one sub-run")
    run.add_argument(
        "--patience", type=float, default=100.0, help="seconds for one measurement; a load has three times that"
    )
    run.add_argument("--stream-hash", action="store_true", help="also compare the ranks' residual streams bit for bit")
    run.add_argument("--models-dir", type=Path, default=Path("/tmp/peerlane-models"))
    run.add_argument("--work", type=Path, default=Path("/tmp/peerlane-bench"), help="logs of the sub-runs")
    run.add_argument("--pythonpath", type=Path, action="append", default=[], help="where the peerlane package is")
    run.add_argument("--out", type=Path)
    run.add_argument("--command", help="run this in place of run_one.py (for tests)")
    verbs.add_parser("table").add_argument("file", type=Path)
    return parser


def main() -> int:
    args = arguments().parse_args()
    if args.verb == "table":
        print(report.markdown(json.loads(args.file.read_text())), end="")
        return 0
    if args.carry:
        unpack(args.carry, args.site, args.versions)
    if args.verb == "setup":
        for version in args.versions:
            print(f"{version}: {missing(args.site, version) or 'ready'}")
        return 0
    unknown = [m for m in args.models if parse_model(m)[0] not in make_model.SHAPES]
    unknown += [b for b in args.backends if b not in backends.NAMES]
    if unknown:
        raise SystemExit(f"bench.py: unknown model or backend: {', '.join(unknown)}")
    if args.turns and "p2p-channel" in args.backends:
        raise SystemExit("bench.py: p2p-channel is how a model is loaded, so it takes no turns: run it without --turns")
    # As an exception, so that the sub-run in progress is ended and the results are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(args)
    try:
        return 0 if bench.run() else 1
    finally:
        bench.save()
        print(f"{bench.out}\n\n{report.markdown(bench.data)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
