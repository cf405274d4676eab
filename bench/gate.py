"""Hold a benchmark run against bench/gate.json: `python bench/gate.py bench/results/MACHINE/RUN.json`.

A ratio is ours / theirs, the median over interleaved rounds of one process. It fails when it exceeds its ceiling by more
than 10 % twice in a row: a group that fails is measured a second time first. Counted bytes fail at once.
Exit status: 0 all held, 1 something failed or was not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = Path(__file__).with_name("gate.json")
NOISE = 1.10  # what a ratio may exceed its ceiling by before it counts as a failure

Record = dict[str, Any]
Rerun = Callable[[list[Record]], list[Record]]


@dataclass
class Row:
    """One number and its ceiling. value None: not measured, which is a failure too."""

    group: str
    what: str  # "ratio", "warm" or "count"
    name: str
    value: float | None
    ceiling: float
    second: float | None = None  # the ratio when measured again

    @property
    def over(self) -> bool:
        return self.value is None or self.value > self.ceiling * (1.0 if self.what == "count" else NOISE)

    @property
    def failed(self) -> bool:
        if not self.over or self.second is None:
            return self.over
        return self.second > self.ceiling * NOISE


def counts(info: Record) -> dict[str, float]:
    """The deterministic numbers of a record, as parts of the logits, of the gradients, or of the peak of torch eager."""
    found: dict[str, float] = {k: info[k] for k in ("extra_over_logits", "growth_over_logits") if k in info}
    if info.get("logits_bytes"):
        found["saved_over_logits"] = info["saved_bytes"] / info["logits_bytes"]
    if info.get("gradient_bytes"):
        found["saved_over_gradients"] = info["saved_bytes"] / info["gradient_bytes"]
    if "torch" in info.get("peaks", {}):
        found["peak_over_torch"] = info["peaks"][info["impl"]] / info["peaks"]["torch"]
    return found


def measured(record: Record | None, what: str, name: str) -> float | None:
    """The median ratio, or the count, of that name; None when the record does not hold it."""
    info = {} if record is None else record["extra_info"]
    if what == "count":
        return counts(info).get(name)
    ratios = info.get("ratios", {}) if what == "ratio" else info.get("warm", {}).get("ratios", {})
    return ratios.get(name, {}).get("median")


def rows_of(records: dict[str, Record], ceilings: dict[str, Any]) -> list[Row]:
    keys = {"ratios": "ratio", "warm": "warm", "counts": "count"}
    return [
        Row(group, what, name, measured(records.get(group), what, name), ceiling)
        for group, limits in ceilings.items()
        for key, what in keys.items()
        for name, ceiling in limits.get(key, {}).items()
    ]


def by_group(records: list[Record]) -> dict[str, Record]:
    return {record["group"]: record for record in records}


def check(run: Record, ceilings: dict[str, Any], rerun: Rerun | None) -> list[Row]:
    """Every ceiling of this run's kind of machine; ratios that are over are measured again by `rerun`."""
    info = run["machine_info"]
    kind = info["name"] if info.get("gpu") else "cpu"
    if kind not in ceilings:
        raise SystemExit(f"gate.json has no ceilings for {kind!r}: it has {', '.join(ceilings)}")
    records = by_group(run["benchmarks"])
    rows = rows_of(records, ceilings[kind])
    again = {row.group for row in rows if row.over and row.value is not None and row.what != "count"}
    if rerun is not None and again:
        fresh = by_group(rerun([records[group] for group in sorted(again)]))
        for row in rows:
            if row.group in again and row.over and row.what != "count":
                row.second = measured(fresh.get(row.group), row.what, row.name)
    return rows


def run_again(records: list[Record]) -> list[Record]:
    """Measure the groups of these records once more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.json"
        tests = [record["fullname"] for record in records]
        print(f"measuring {len(tests)} group(s) a second time ...", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests, f"--benchmark-json={path}"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or not path.exists():
            raise SystemExit(f"the second measurement failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        return json.loads(path.read_text())["benchmarks"]


def table(rows: list[Row]) -> str:
    lines, group = [], None
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(group)
        value = "not measured" if row.value is None else f"{row.value:8.4f}"
        if row.second is not None:
            value += f" then {row.second:.4f}"
        faster = f"  {1 / row.value:6.2f}x faster" if row.value and row.what != "count" else ""
        verdict = "FAIL" if row.failed else "PASS"
        lines.append(f"  {verdict}  {row.what:5s} {row.name:20s} {value:24s} ceiling {row.ceiling:<7.4g}{faster}")
    failed = sum(row.failed for row in rows)
    lines.append(f"{len(rows) - failed} passed, {failed} failed")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", help="a run of `pytest bench`; default: the newest one")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS)
    parser.add_argument("--no-rerun", action="store_true", help="do not measure failing groups a second time")
    options = parser.parse_args(arguments)
    path = options.json or newest()
    rows = check(
        json.loads(path.read_text()), json.loads(options.ceilings.read_text()), None if options.no_rerun else run_again
    )
    print(table(rows))
    return int(any(row.failed for row in rows))


def newest() -> Path:
    runs = sorted(Path(__file__).parent.glob("results/*/*.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise SystemExit("no results yet: run `make bench`, or name a JSON file")
    return runs[-1]


if __name__ == "__main__":
    sys.exit(main())
