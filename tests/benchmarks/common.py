"""Timing commands side by side: paired, in shuffled rounds, each in its own process.

This process stays small (standard library only, rich once all is measured): Linux hands a parent's
peak memory on to the children that it starts.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

BLOCK = 1 << 20


@dataclass
class Case:
    """One command to time.

    `baseline` names the case whose seconds it is divided by, round by round. `inputs` are read
    into the page cache before, `output` is deleted before and after, both untimed. `rounds` limits
    a slow case to the first rounds. With `reports` the command prints its own seconds as JSON, an
    object with one entry per row; these rows take the place of the command's.
    """

    name: str
    command: Sequence[str]
    baseline: str | None = None
    inputs: Sequence[Path] = ()
    output: Path | None = None
    rounds: int | None = None
    reports: bool = False
    aim_ratio: float | None = None
    aim_seconds: float | None = None
    aim_mb: float | None = None
    runs: list[dict[str, float]] = field(default_factory=list)


def python(code: str, *args: object) -> list[str]:
    """A command that runs `code` with `args` as sys.argv[1:]."""
    return [sys.executable, "-c", code, *map(str, args)]


def measure(case: Case) -> dict[str, float]:
    """Seconds of wall, seconds of CPU, peak resident MB, and what it reports.

    A command that writes runs twice and the second counts: a virtual machine may be given memory
    when it first touches it, at a third of a second a GB and more, and this is no cost of copying.
    """
    for path in case.inputs:
        warm(path)
    if case.output:
        run(case)
    return run(case)


def run(case: Case) -> dict[str, float]:
    remove(case.output)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(case.command, stdout=subprocess.PIPE, env=environ())
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{case.name}: exit code {process.returncode}: {case.command}")
    remove(case.output)
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * unit / 1e6,
    }
    return measured | (json.loads(printed) if case.reports else {})


def environ() -> dict[str, str]:
    """With bytecode cached, as in an installed package; not in the source tree."""
    cache = {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "fuseweights-pycache")}
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | cache


def run_rounds(cases: Sequence[Case], rounds: int, say: Callable[[str], None]) -> None:
    """Every case once a round, in another order each; those of one baseline beside it, because
    on a machine with other work two minutes are not alike."""
    families: dict[str, list[Case]] = {}
    for case in cases:
        families.setdefault(case.baseline or case.name, []).append(case)
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        order = list(families.values())
        shuffle(order)
        for family in order:
            shuffle(family)
        todo = [case for family in order for case in family]
        for case in todo:
            if case.rounds is not None and number >= case.rounds:
                continue
            case.runs.append(measured := measure(case))
            say(f"round {number + 1}/{rounds}  {measured['seconds']:8.3f} s  {case.name}")


def results(cases: Iterable[Case]) -> list[dict]:
    """A row a case: medians, and the median of the paired ratios."""
    named = {case.name: case for case in cases}
    rows = []
    for case in named.values():
        usual = ("seconds", "cpu", "peak_mb")
        reported = [key for key in case.runs[0] if key not in usual]
        for key in reported or ["seconds"]:
            samples = [run[key] for run in case.runs]
            base = named[case.baseline].runs if case.baseline else []
            ratios = [s / b["seconds"] for s, b in zip(samples, base, strict=False)]
            cpu_ratios = [r["cpu"] / b["cpu"] for r, b in zip(case.runs, base, strict=False)]
            rows.append(
                {
                    "name": case.name if key == "seconds" else key,
                    "baseline": case.baseline,
                    "seconds": median(samples),
                    "moves_data": bool(case.inputs),
                    "samples": samples,
                    "ratio": median(ratios) if ratios else None,
                    "ratios": ratios,
                    "cpu_ratio": median(cpu_ratios) if cpu_ratios else None,
                    "cpu": None if reported else median(run["cpu"] for run in case.runs),
                    "peak_mb": max(run["peak_mb"] for run in case.runs),
                    "aim_ratio": case.aim_ratio,
                    "aim_seconds": case.aim_seconds
                    if key == (reported or ["seconds"])[0]
                    else None,
                    "aim_mb": case.aim_mb,
                }
            )
    return rows


def environment(scratch: Path, packages: Sequence[str]) -> dict:
    """What the numbers depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": file_system(scratch),
        "page_cache": "warm; outputs are deleted and the disk synced before each command",
    }


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`; "unknown" where /proc does not tell."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    holds = [m for m in mounts if path.resolve().is_relative_to(m[1])]
    return max(holds, key=lambda m: len(m[1]))[2]


def print_table(title: str, rows: Sequence[dict], size: int) -> None:
    """What was measured beside what is aimed for; GB/s is of `size`, the source's bytes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in (
        "seconds",
        "CPU s",
        "GB/s",
        "ratio",
        "CPU ratio",
        "of",
        "aim",
        "peak MB",
        "aim",
    ):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    for row in rows:
        seconds, ratio, aim_ratio = row["seconds"], row["ratio"], row["aim_ratio"]
        missed_time = (aim_ratio and ratio > aim_ratio) or (
            row["aim_seconds"] and seconds > row["aim_seconds"]
        )
        aim = f"{aim_ratio} ×" if aim_ratio else f"{row['aim_seconds'] or ''}"
        table.add_row(
            row["name"],
            f"{seconds:.3f}",
            "" if row["cpu"] is None else f"{row['cpu']:.2f}",
            f"{size / seconds / 1e9:.2f}" if row["moves_data"] else "",
            "" if ratio is None else f"{ratio:.2f}",
            "" if ratio is None else f"{row['cpu_ratio']:.2f}",
            row["baseline"] or "",
            f"[red]{aim} missed[/]" if missed_time else aim,
            f"{row['peak_mb']:.0f}",
            _memory_aim(row),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _memory_aim(row: dict) -> str:
    if row["aim_mb"] is None:
        return ""
    missed = row["peak_mb"] > row["aim_mb"]
    return f"[red]{row['aim_mb']:.0f} missed[/]" if missed else f"{row['aim_mb']:.0f}"


def warm(path: Path) -> None:
    """Into the page cache; a directory with all its files."""
    if path.is_dir():
        for inner in path.iterdir():
            warm(inner)
        return
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def remove(path: Path | None) -> None:
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)
