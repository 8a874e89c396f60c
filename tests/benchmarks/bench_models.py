"""Batch 1 decoding of whole models with random weights on this GPU: stock transformers eager, stock
transformers compiled (static cache, reduce-overhead), and fuseweights' Decoder, one process.

    python tests/benchmarks/bench_models.py [--json FILE] [--only NAME …] [--with-fla] [--check]

transformers uses its own PyTorch for Gated DeltaNet, as it does where flash-linear-attention and
causal-conv1d are not installed; with --with-fla, whatever is installed. Takes four minutes and
80 GB.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def print_table(results: list[dict[str, Any]], found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"batch 1 decoding on {found['device']}", title_justify="left")
    table.add_column("model")
    table.add_column("")
    for heading in ("tokens/s", "of the floor", "kernels a layer", "error of the logits"):
        table.add_column(heading, justify="right")
    for result in results:
        floor = result["floor_tokens_per_second"]
        for road, row in result["roads"].items():
            speed = row["tokens_per_second"]
            cells = f"{speed:.1f}", f"{speed / floor:.0%}", f"{row['kernels_per_layer']:.1f}"
            table.add_row(result["model"], road, *cells, f"{row['step_error']:.1e}")
        table.add_row(result["model"], "floor (weights at 4.3 TB/s)", f"{floor:.1f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write environment and results here")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--with-fla", action="store_true")
    parser.add_argument("--check", action="store_true", help="first compare small models' logits")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    if not given.with_fla:
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None  # as if not installed

    import gpu_models
    import torch
    from bench_kernels import environment

    problems = gpu_models.check() if given.check else []
    for problem in problems:
        print(problem, file=sys.stderr)
    found, results, failed = environment(), {}, bool(problems)
    found["with_fla"] = given.with_fla
    for name, road in itertools.product(given.only or gpu_models.SHAPES, gpu_models.ROADS):
        try:
            measured = gpu_models.measure(name, (road,))  # a new model: fusing changes it
            results.setdefault(name, measured)["roads"] |= measured["roads"]
            gc.collect()
            torch.cuda.empty_cache()
        except Exception:
            traceback.print_exc()
            failed = True
        if given.json:
            text = json.dumps({**found, "models": list(results.values())}, indent=1)
            given.json.write_text(text + "\n")
    print_table(list(results.values()), found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
