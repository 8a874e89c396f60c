"""The shipped shapes of kernels/fp8_linear.py, for sass.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuseweights.kernels import fp8_linear as linear
from fuseweights.kernels import fp8_weights

FP8 = torch.float8_e4m3fn


def _weight(rows: int, columns: int, per: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"block": (-(-rows // 128), -(-columns // 128)), "row": (rows, 1), "all": (1, 1)}[per]
    return torch.empty(rows, columns, dtype=FP8), torch.empty(shape)


def _case(tokens: int, rows: int, columns: int, per: str, act: str | None) -> Callable[[], None]:
    def case() -> None:
        x = torch.empty(tokens, columns, dtype=torch.bfloat16)
        linear.fp8_linear_cuda(x, *_weight(rows, columns, per), None, None, act)

    return case


def _w8a8(tokens: int, rows: int, columns: int) -> Callable[[], None]:
    def case() -> None:
        q, scale = torch.empty(tokens, columns, dtype=FP8), torch.empty(tokens, columns // 128)
        linear.w8a8_cuda(q, scale, *_weight(rows, columns, "block"), None, torch.bfloat16)

    return case


SASS = {
    "gate_up 1": _case(1, 24576, 4096, "block", "silu"),
    "down 1": _case(1, 4096, 12288, "block", None),
    "qkv 1": _case(1, 6144, 4096, "row", None),
    "all 1": _case(1, 6144, 4096, "all", None),
    "gate_up 16": _case(16, 24576, 4096, "block", "silu"),
    "down 16": _case(16, 4096, 12288, "block", None),
    "gate_up 64": _case(64, 24576, 4096, "block", "silu"),
    "gate_up 128": _case(128, 24576, 4096, "block", "silu"),
    "w8a8 16": _w8a8(16, 24576, 4096),
    "w8a8 2048": _w8a8(2048, 24576, 4096),
    "dequantize": lambda: fp8_weights.dequantize_cuda(
        *_weight(24576, 4096, "block"), torch.bfloat16
    ),
}
