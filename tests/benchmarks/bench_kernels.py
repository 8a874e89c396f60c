"""Every kernel on this GPU, beside plain PyTorch, torch.compile or cuBLAS, and a named peer.

    python tests/benchmarks/bench_kernels.py [--json FILE] [--only NAME …] [--skip-checks]

Each `tests/gpu_<name>.py` gives `check()`, problems found with the real compiler, and `rows()`,
what it timed; nothing is timed before it is right. Graph replays, weights out of L2 (gpu.py).
Exits with 1 when a check fails. Peers that are not installed leave their column empty.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = (
    *("torch", "triton", "transformers", "liger-kernel", "fla-core", "flag-gems"),
    "vllm-gguf-plugin",
)
COLUMNS = {
    "ours_us": "ours",
    "floor_us": "floor",
    "pytorch_us": "PyTorch",
    "compiled_us": "compiled, cuBLAS",
    "peer_us": "peer",
}


def names() -> list[str]:
    found = {path.stem.removeprefix("gpu_") for path in HERE.parent.glob("gpu_*.py")}
    return sorted(found - {"models"})  # bench_models.py measures those


def environment() -> dict[str, Any]:
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "copy_tb_s": copy_bandwidth(),
        "versions": versions,
    }


def copy_bandwidth() -> float:
    """TB/s of a large copy on the device, bytes read and bytes written."""
    import gpu
    import torch

    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)  # by a kernel: a graph copies with the slower copy engine
    took = gpu.microseconds(
        lambda _: torch.bitwise_not(source, out=target), [None, None], launches=8
    )
    return 2 * source.nbytes / took / 1e6


def measure(only: list[str], checks: bool) -> tuple[list[dict], list[str]]:
    """Rows, and problems; an operation that fails is a problem and does not end the run."""
    rows, problems = [], []
    for name in names():
        if only and name not in only:
            continue
        try:
            module = importlib.import_module(f"gpu_{name}")
            if checks:
                problems += [f"{name}: {problem}" for problem in module.check()]
            rows += [{"operation": name, **row} for row in module.rows()]
        except Exception:
            problems.append(f"{name}: {traceback.format_exc()}")
    return rows, problems


def print_table(rows: list[dict], found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"µs a call on {found['device']}, copy {found['copy_tb_s']:.2f} TB/s"
    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "shape", "MB"):
        table.add_column(heading, justify="right" if heading == "MB" else "left")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for heading in ("by", "note"):
        table.add_column(heading)
    for row in rows:
        times = (f"{row[key]:.2f}" if row.get(key) else "" for key in COLUMNS)
        words = (row.get("peer") or "", row.get("note") or "")
        table.add_row(row["kernel"], row["shape"], f"{row['bytes'] / 1e6:.1f}", *times, *words)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write environment, rows and problems here")
    parser.add_argument("--only", nargs="*", default=[], choices=names())
    parser.add_argument("--skip-checks", action="store_true")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    found = environment()
    rows, problems = measure(given.only, not given.skip_checks)
    if given.json:
        text = json.dumps({**found, "rows": rows, "problems": problems}, indent=1)
        given.json.write_text(text + "\n")
    print_table(rows, found)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
