"""The tables of docs/reliability.md that compare variants of the kernels, from the result files beside this program.

`variants.py ../docs/reliability.md` renews what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` for
every NAME below. Invariant: a figure is the median over the rounds of each round's median.
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


def main() -> None:
    page = Path(sys.argv[1])
    text = page.read_text()
    for name, file in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has no {begin.strip()} ... {end}")
        text = before + begin + table(RESULTS / file) + "\n" + end + after
    page.write_text(text)


if __name__ == "__main__":
    main()
