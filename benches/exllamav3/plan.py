"""Which sub-runs there are, in which order, and which of them the time still allows.

Pure. Invariant: order is priority. All of round 1 comes before round 2, and every other round runs
its backends backwards, so that a host that grows slower or faster favours none of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BACKENDS = ["native", "p2p", "nccl", "single", "ceiling", "auto"]
# Before the first sub-run of a model has ended, this is what one is thought to take.
FIRST_GUESS_S = {"1b": 45.0, "8b": 70.0, "70b": 150.0}
MARGIN = 1.1
MIN_RUN_S = 15.0


@dataclass(frozen=True)
class Job:
    """One sub-run."""

    version: str
    model: str
    backend: str
    round: int

    def head(self) -> dict[str, Any]:
        return asdict(self)


def parse_model(text: str) -> tuple[str, int | None]:
    """`8b`, or `70b:16` for the first 16 layers."""
    name, _, layers = text.partition(":")
    return name, int(layers) if layers else None


def jobs(versions: list[str], models: list[str], backends: list[str], rounds: int) -> list[Job]:
    found = []
    for turn in range(1, rounds + 1):
        order = backends if turn % 2 else backends[::-1]
        for version in versions:
            for model in models:
                found += [Job(version, model, backend, turn) for backend in order]
    return found


class Budget:
    """Decides, from what sub-runs took so far, whether the next one still fits."""

    def __init__(self, total_s: float, limit_s: float):
        self.total_s, self.limit_s = total_s, limit_s
        self.taken: dict[str, float] = {}
        self.failed: dict[tuple[str, ...], str] = {}

    def estimate(self, job: Job) -> float:
        guess = FIRST_GUESS_S.get(parse_model(job.model)[0], max(FIRST_GUESS_S.values()))
        return min(self.taken.get(job.model, guess), self.limit_s)

    def refusal(self, job: Job, spent_s: float) -> str | None:
        """Why this sub-run is not worth starting, or None."""
        for key in ((job.version, job.backend), (job.version, job.backend, job.model)):
            if key in self.failed:
                return self.failed[key]
        left = self.total_s - spent_s
        needed = max(self.estimate(job) * MARGIN, MIN_RUN_S)
        if needed > left:
            return f"needs about {needed:.0f} s, {max(left, 0):.0f} s left"
        return None

    def limit(self, spent_s: float) -> float:
        """The time limit of a sub-run that starts now."""
        return min(self.limit_s, self.total_s - spent_s)

    def ended(self, job: Job, status: str, seconds: float) -> None:
        """A backend that hung is not given a second chance to; one that failed is, on another model."""
        if status == "timeout":
            self.failed[(job.version, job.backend)] = f"hung on {job.model} in round {job.round}"
        elif status == "failed":
            self.failed[(job.version, job.backend, job.model)] = f"failed in round {job.round}"
        else:
            self.taken[job.model] = max(seconds, self.taken.get(job.model, 0.0))
