"""From a results file to tables: medians, ratios, agreement between backends and between ranks.

Pure: JSON in, Markdown out. Invariant: a ratio compares runs of the same round only, because hosts
drift between rounds, and above 1 it always means that p2p is the better of the two.
"""

from __future__ import annotations

import re
from statistics import median
from typing import Any

BACKENDS = ["single", "native", "nccl", "p2p", "p2p-late", "p2p-exact", "p2p-rounded", "p2p-channel", "auto", "ceiling"]
TITLES = {"single": "one GPU", "ceiling": "ceiling"}
RATIOS = ["native", "nccl", "ceiling"]
STREAM_HASH = re.compile(r"stream-hash dev=(\d+) pass=(\d+)\s+(\d+) (\S+)\s+([0-9a-f]{12}) ")
IN_USE = re.compile(r"^backend-in-use (\S+)$", re.MULTILINE)
# Each rank holds its own part of the vocabulary there, so these must differ.
SHARDED = ("lm_head", "output_gather")

Json = dict[str, Any]


def stream_hash(stdout: str) -> dict[str | None, Json]:
    """Whether the ranks' residual streams were the same bits after every module of every pass that
    EXL3_TP_STREAM_HASH printed, by the backend in use (None before the first is named). Empty when
    nothing was printed: 1.4.1 has no such switch."""
    parts = IN_USE.split(stdout)
    found = {None: agree(parts[0])}
    for backend, text in zip(parts[1::2], parts[2::2]):
        found[backend] = found.get(backend) or agree(text)
    return {backend: verdict for backend, verdict in found.items() if verdict}


def without_hashes(stdout: str) -> str:
    """What else was printed."""
    return "".join(line for line in stdout.splitlines(keepends=True) if not line.startswith("stream-hash "))


def agree(stdout: str) -> Json | None:
    seen: dict[tuple[int, int, str], dict[int, str]] = {}
    for device, turn, index, key, digest in STREAM_HASH.findall(stdout):
        if not key.endswith(SHARDED):
            seen.setdefault((int(turn), int(index), key), {})[int(device)] = digest
    if not seen:
        return None
    devices = {device for digests in seen.values() for device in digests}
    shared = {place: digests for place, digests in seen.items() if len(digests) == len(devices) > 1}
    differing = [place for place in sorted(shared) if len(set(shared[place].values())) > 1]
    first = differing[0] if differing else None
    return {
        "ranks": len(devices),
        "compared": len(shared),
        "agree": bool(shared) and not differing,
        "first_difference": f"pass {first[0]}, module {first[1]} {first[2]}" if first else None,
    }


def measures(result: Json) -> dict[str, tuple[float, bool]]:
    """Each measure of one sub-run: its median, and whether more is better."""
    found: dict[str, tuple[float, bool]] = {}
    for name, value in result.items():
        kind, _, size = name.partition("_")
        if kind == "decode":
            found[f"decode, batch {size}, steps/s"] = (median(value["steps_per_s"]), True)
        elif kind == "prefill":
            found[f"prefill {size}, tokens/s"] = (median(value["tokens_per_s"]), True)
            found[f"first token of {size}, ms"] = (median(value["ttft_ms"]), False)
    if "decode_1" in result:
        found["busy CPU cores in decode, batch 1"] = (result["decode_1"]["busy_cores"], False)
    memory = result.get("memory")
    if memory:
        found["host memory of all processes (PSS), GB"] = (memory["pss_total"] / 1e9, False)
        shared = sum(segment["bytes"] for segment in memory["shm"].values())
        found["/dev/shm, MB"] = (shared / 1e6, False)
        used = memory["gpu_used"]
        for name, mark in (("contexts and backend", "backend"), ("in all", "running")):
            if used.get("before") and used.get(mark):
                grown = sum(after - before for after, before in zip(used[mark], used["before"]))
                found[f"GPU memory, {name}, all GPUs, GB"] = (grown / 1e9, False)
    return found


def collect(runs: list[Json]) -> dict[tuple[str, str], dict[str, dict[str, dict[int, tuple[float, bool]]]]]:
    """(version, model) -> measure -> backend -> round -> (median, more is better)."""
    found: dict[tuple[str, str], dict[str, dict[str, dict[int, tuple[float, bool]]]]] = {}
    for run in runs:
        rows = found.setdefault((run["version"], run["model"]), {})
        for name, figure in measures(run.get("result") or {}).items():
            rows.setdefault(name, {}).setdefault(run["backend"], {})[run["round"]] = figure
    return found


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(rounds: dict[int, tuple[float, bool]] | None) -> str:
    """The median over rounds, and with several rounds their range."""
    if not rounds:
        return ""
    values = [value for value, _ in rounds.values()]
    text = number(median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))}..{number(max(values))})"


def ratio(ours: dict[int, tuple[float, bool]] | None, theirs: dict[int, tuple[float, bool]] | None) -> str:
    """How many times better ours is: the median over the rounds that have both."""
    if not ours or not theirs:
        return ""
    found = []
    for turn in ours.keys() & theirs.keys():
        (mine, more), (other, _) = ours[turn], theirs[turn]
        if mine > 0 and other > 0:
            found.append(mine / other if more else other / mine)
    return f"{median(found):.2f}" if found else ""


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def speed_table(runs: list[Json]) -> list[str]:
    used = [name for name in BACKENDS if any(run["backend"] == name for run in runs)]
    head = ["ExLlamaV3", "model", "measure"] + [TITLES.get(name, name) for name in used]
    lines = [row(head + [f"p2p/{name}" for name in RATIOS]), row(["---"] * (len(head) + len(RATIOS)))]
    for (version, model), rows in collect(runs).items():
        for name, figures in rows.items():
            cells = [cell(figures.get(backend)) for backend in used]
            ratios = [ratio(figures.get("p2p"), figures.get(other)) for other in RATIOS]
            lines.append(row([version, model, name] + cells + ratios))
    return lines


def agreement(runs: list[Json]) -> list[Json]:
    """What each sub-run computed, held against native's of the same version and model."""
    found = []
    for run in runs:
        greedy = (run.get("result") or {}).get("greedy")
        if not greedy:
            continue
        reference = next(
            (
                other["result"]["greedy"]
                for other in runs
                if other["backend"] == "native"
                and (other["version"], other["model"]) == (run["version"], run["model"])
                and (other.get("result") or {}).get("greedy")
            ),
            None,
        )
        same = 0
        if reference:
            pairs = list(zip(greedy["tokens"], reference["tokens"]))
            same = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
        hashes = run.get("stream_hash")
        found.append(
            {
                "version": run["version"],
                "model": run["model"],
                "backend": run["backend"],
                "round": run["round"],
                "repeatable": greedy["repeatable"],
                "finite": greedy["finite"],
                "tokens_as_native": f"{same} of {len(greedy['tokens'])}" if reference else None,
                "largest_difference": greedy.get("largest_difference_to_native"),
                "logits_as_native": greedy["logits_sha1"] == reference["logits_sha1"] if reference else None,
                "ranks_agree": hashes["agree"] if hashes else None,
            }
        )
    return found


def mark(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def agreement_table(runs: list[Json]) -> list[str]:
    titles = [
        "ExLlamaV3",
        "model",
        "backend",
        "round",
        "same when repeated",
        "finite",
        "tokens as native",
        "largest difference of a logit",
        "logits as native, bit for bit",
        "residual stream same on all ranks",
    ]
    lines = [row(titles), row(["---"] * len(titles))]
    return lines + [row([mark(value) for value in line.values()]) for line in agreement(runs)]


def problems(data: Json) -> list[str]:
    lines = []
    for run in data["runs"]:
        if run["status"] != "ok":
            how = "taking turns" if run.get("in_turns") else "a process of its own"
            place = f"{run['version']} {run['model']} {run['backend']}, round {run['round']}"
            lines.append(f"- {place}, {how}: {run['status']}")
    for run in data["skipped"]:
        lines.append(
            f"- {run['version']} {run['model']} {run['backend']}, round {run['round']}: skipped, {run['reason']}"
        )
    return lines


def markdown(data: Json) -> str:
    """The whole report."""
    machine = data["machine"]
    gpus = ", ".join(machine.get("gpus") or []) or "unknown GPUs"
    lines = [
        f"# ExLlamaV3 on {gpus}",
        "",
        f"{data['date']}, driver {machine.get('driver')}, `{data['command']}`.",
        "Medians; in brackets the range over rounds. Ratios are taken within a round; above 1 p2p is better.",
        "",
        *speed_table(data["runs"]),
        "",
        *agreement_table(data["runs"]),
    ]
    trouble = problems(data)
    if trouble:
        lines += ["", "Not complete:", *trouble]
    return "\n".join(lines) + "\n"
