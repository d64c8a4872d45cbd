"""Which sub-runs there are, in which order, and which of them the time still allows.

Pure. Invariant: order is priority, and what is compared is measured in turns: either the backends
share one process and take turns there ("turns"), or each has processes of its own and every other
round goes backwards, so that a host that grows slower or faster favours none.
"""

from __future__ import annotations

from dataclasses import dataclass

TURNS = "turns"
# Before the first sub-run of a model has ended, this is what one is thought to take, and how many
# times that one with several backends takes.
FIRST_GUESS_S = {"1b": 45.0, "8b": 70.0, "70b": 150.0}
TURNS_FACTOR = 2.5
MARGIN = 1.1
MIN_RUN_S = 15.0


@dataclass(frozen=True)
class Job:
    """One sub-run. Untimed, it tells what a backend computes and how much memory it takes."""

    version: str
    model: str
    backend: str
    round: int = 1
    timed: bool = True

    def head(self) -> dict[str, object]:
        return {"version": self.version, "model": self.model, "backend": self.backend, "round": self.round}


def parse_model(text: str) -> tuple[str, int | None]:
    """`8b`, or `70b:16` for the first 16 layers."""
    name, _, layers = text.partition(":")
    return name, int(layers) if layers else None


def turn_takers(backends: list[str]) -> list[str]:
    """The backends that can share a process, the one that loads the model first: native if it is
    among them, because the others can join it but a dead one cannot be loaded with. One GPU alone is
    another way to load, and auto is one of the others."""
    able = [backend for backend in backends if backend not in ("single", "auto")]
    return sorted(able, key=lambda backend: backend != "native")


def jobs(versions: list[str], models: list[str], backends: list[str], rounds: int, turns: bool) -> list[Job]:
    pairs = [(version, model) for version in versions for model in models]
    if not turns:
        return [
            Job(version, model, backend, turn)
            for turn in range(1, rounds + 1)
            for version, model in pairs
            for backend in (backends if turn % 2 else backends[::-1])
        ]
    alone = [backend for backend in backends if backend in ("single", "auto")]
    timed = [Job(version, model, backend) for version, model in pairs for backend in [TURNS, *alone]]
    rest = [backend for backend in backends if backend not in alone]
    return timed + [Job(version, model, backend, timed=False) for version, model in pairs for backend in rest]


class Budget:
    """Decides, from what sub-runs took so far, whether the next one still fits."""

    def __init__(self, total_s: float, limit_s: float):
        self.total_s, self.limit_s = total_s, limit_s
        self.taken: dict[tuple[str, bool], float] = {}
        self.failed: dict[tuple[str, ...], str] = {}

    def longest(self, job: Job) -> float:
        return self.limit_s * (TURNS_FACTOR if job.backend == TURNS else 1.0)

    def estimate(self, job: Job) -> float:
        guess = FIRST_GUESS_S.get(parse_model(job.model)[0], max(FIRST_GUESS_S.values()))
        guess *= TURNS_FACTOR if job.backend == TURNS else 1.0
        return min(self.taken.get((job.model, job.backend == TURNS), guess), self.longest(job))

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

    def limit(self, job: Job, spent_s: float) -> float:
        """The time limit of a sub-run that starts now."""
        return min(self.longest(job), self.total_s - spent_s)

    def ended(self, job: Job, status: str, seconds: float) -> None:
        """A backend that hung is not given a second chance to; one that failed is, on another model."""
        if status == "timeout":
            self.failed[(job.version, job.backend)] = f"hung on {job.model} in round {job.round}"
        elif status == "failed":
            self.failed[(job.version, job.backend, job.model)] = f"failed in round {job.round}"
        else:
            key = (job.model, job.backend == TURNS)
            self.taken[key] = max(seconds, self.taken.get(key, 0.0))
