"""The tables of docs/reliability.md that compare variants of the kernels, and the result files that they are made from.

  variants.py table ../docs/reliability.md     renews what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`
                                               for every NAME below, from the result files beside this program
  variants.py collect RESULT "with deadlines=out/cost_?.json" "without=out/cost_unbounded_?.json"
                                               makes a result file of what `peerlane bench --json` has written

Invariant: a figure is the median over the rounds of each round's median, and its results were compared.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = {"bounded": "2026-11-23-2xH200-bounded.json", "checked": "2026-11-23-2xH200-checked.json"}


def size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def medians(runs: list[dict[str, Any]], variant: str) -> dict[int, float]:
    """By bytes, in microseconds."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run["rows"] if run["variant"] == variant else []:
            if not row["checked"]:
                raise ValueError(f"{variant}, {row['bytes']} bytes: a result that was not compared")
            found.setdefault(row["bytes"], []).append(row["median_us"])
    return {count: statistics.median(times) for count, times in found.items()}


def table(path: Path) -> str:
    runs = json.loads(path.read_text())["runs"]
    first, second = dict.fromkeys(run["variant"] for run in runs)
    left, right = medians(runs, first), medians(runs, second)
    lines = [f"| size | {first} | {second} | ratio |", "|---|---:|---:|---:|"]
    for count in left:
        ratio = left[count] / right[count]
        lines.append(f"| {size(count)} | {left[count]:.2f} us | {right[count]:.2f} us | {ratio:.3f} |")
    return "\n".join(lines)


def collect(result: Path, sources: list[str]) -> None:
    runs, head = [], {}
    for variant, _, pattern in (source.partition("=") for source in sources):
        found = sorted(Path().glob(pattern)) if not pattern.startswith("/") else sorted(Path("/").glob(pattern[1:]))
        if not found:
            raise SystemExit(f"{pattern}: no such file")
        for turn, path in enumerate(found, 1):
            report = json.loads(path.read_text())
            head = head or {
                "date": report["date"],
                "driver": report["driver"],
                "devices": [device["name"] for device in report["devices"]],
                "command": report["command"].partition(" --json")[0],
            }
            rows = [
                {"bytes": row["bytes"], "checked": row["checked"], **{k: v for k, v in row["ours"].items() if k[-3:] == "_us"}}
                for row in report["series"][0]["rows"]
            ]
            runs.append({"variant": variant, "round": turn, "rows": rows})
    result.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n")


def renew(page: Path) -> None:
    text = page.read_text()
    for name, file in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has no {begin.strip()} ... {end}")
        text = before + begin + table(RESULTS / file) + "\n" + end + after
    page.write_text(text)


def main() -> None:
    match sys.argv[1:]:
        case ["table", page]:
            renew(Path(page))
        case ["collect", result, *sources] if sources:
            collect(Path(result), sources)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
