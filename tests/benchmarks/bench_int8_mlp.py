"""A Qwen3-1.7B-shaped MLP on a CPU, one token: bf16 unfused and fused, and packed INT8.

    python tests/benchmarks/bench_int8_mlp.py [--threads 1] [--rounds 15]

The variants take turns, and the best time of each counts. INT8 changes numbers: the error tells.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fuseweights.nn.cpu_int8 import pack_model

HIDDEN, INNER = 2048, 6144


def variants() -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    gate, up = (nn.Linear(HIDDEN, INNER, bias=False).bfloat16() for _ in range(2))
    down = nn.Linear(INNER, HIDDEN, bias=False).bfloat16()
    gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=False).bfloat16()
    with torch.no_grad():
        gate_up.weight.copy_(torch.cat([gate.weight, up.weight]))
    packed = nn.ModuleList([copy.deepcopy(gate_up), copy.deepcopy(down)])
    print(pack_model(packed))

    def whole(product: nn.Module, last: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            a, b = product(x).chunk(2, -1)
            return last(silu(a) * b)

        return run

    return {
        "bf16, unfused": lambda x: down(silu(gate(x)) * up(x)),
        "bf16, fused": whole(gate_up, down),
        "INT8, fused": whole(*packed),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = variants()
    x = torch.randn(1, HIDDEN).bfloat16()
    exact = runs["bf16, unfused"](x).float()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():
            for _ in range(3):
                begun = time.perf_counter()
                run(x)
                best[name] = min(best[name], time.perf_counter() - begun)
    for name, run in runs.items():
        error = (run(x).float() - exact).norm() / exact.norm()
        ratio = best["bf16, unfused"] / best[name]
        print(f"{name:14} {best[name] * 1e6:7.0f} us  {ratio:5.2f} x  error {error:.1e}")


if __name__ == "__main__":
    main()
