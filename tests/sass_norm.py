"""The shipped shapes of kernels/norm.py and quantize.py, for sass.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuseweights.kernels import norm as norms
from fuseweights.kernels import quantize


def _case(run: Callable, rows: tuple[int, ...], width: int) -> Callable[[], None]:
    def case() -> None:
        x, other = (torch.empty(*rows, width, dtype=torch.bfloat16) for _ in range(2))
        run(x, other, torch.empty(width, dtype=torch.bfloat16))

    return case


def _add(form: str, *group: int) -> Callable:
    return lambda x, r, w: norms._run(x, w, 1e-6, "llama", form, *group, residual=r)


def _gated(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor) -> None:
    norms._run(x, w, 1e-6, "late", "plain", gate=gate)


SASS = {
    **{f"add {m} {k}": _case(_add("plain"), (m,), k)
       for m, k in ((1, 2048), (1, 4096), (1, 16384), (2048, 4096), (2048, 5120), (2048, 16384))},
    "add fp8 1": _case(_add("fp8", 128), (1,), 4096),
    "add fp8 2048": _case(_add("fp8", 128), (2048,), 4096),
    "add fp8 row 2048": _case(_add("fp8", 0), (2048,), 4096),
    "add q8_1 1": _case(_add("q8_1"), (1,), 4096),
    "add q8_1 2048": _case(_add("q8_1"), (2048,), 4096),
    "gated 1": _case(_gated, (1, 32), 128),
    "gated 2048": _case(_gated, (2048, 32), 128),
    "quantize fp8": _case(lambda x, *_: quantize.launch_quantize(x, 128), (2048,), 4096),
    "quantize q8_1": _case(lambda x, *_: quantize.launch_quantize(x, None), (1,), 12288),
}  # fmt: skip
