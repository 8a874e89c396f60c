"""Draw what bench_kernels.py measured: how many times the floor each contender takes.

    pip install '.[plot]'
    python tests/benchmarks/plot_kernels.py tests/benchmarks/results/kernels.json kernels.svg

One row a kernel and shape, one dot a contender, on a logarithmic axis: 1 is the time that memory
(or the tensor cores) cannot beat. Rows whose floor is under a microsecond are left out: there the
launch is what is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from bench_kernels import COLUMNS
from matplotlib.figure import Figure

matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
COLOURS = {"ours_us": "C3", "pytorch_us": "0.6", "compiled_us": "C0", "peer_us": "C2"}
LABELS = {**COLUMNS, "ours_us": "fuseweights", "pytorch_us": "PyTorch, unfused"}


def draw(measured: dict) -> Figure:
    rows = [row for row in measured["rows"] if row["floor_us"] >= 1][::-1]
    figure = Figure(figsize=(9, 0.24 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for key, colour in COLOURS.items():
        points = [(row[key] / row["floor_us"], y) for y, row in enumerate(rows) if row.get(key)]
        front = key == "ours_us"
        axes.scatter(
            *zip(*points, strict=True), s=26 if front else 16, color=colour, label=LABELS[key],
            zorder=3 if front else 2,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{r['kernel']}  {r['shape']}" for r in rows], fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set_xscale("log")
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.grid(axis="x", which="both", color="0.92")
    axes.set_xlabel(f"× floor, {measured['device']}, {measured['date'][:10]}")
    axes.legend(loc="lower right", fontsize=8)
    return figure


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())).savefig(sys.argv[2], metadata={"Date": None})
