"""What kernels/gguf_linear.py and gguf_experts.py launch at shipped shapes, for tests/sass.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuseweights.kernels.gguf_experts import experts_cuda
from fuseweights.kernels.gguf_linear import dequantize_cuda, linear_cuda, q8_1_cuda
from fuseweights.kernels.gguf_types import TYPES

Q8_0, Q4_K, Q6_K = 8, 12, 14
#: Rows and columns of W: Qwen3-8B's.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}


def blocks(type: int, *shape: int) -> torch.Tensor:
    *rows, columns = shape
    kind = TYPES[type]
    size = kind.row_bytes(columns, kind.has_planar)
    return torch.empty(*rows, size, dtype=torch.uint8)


def product(type: int, name: str, m: int) -> Callable[[], object]:
    n, k = SHAPES[name]
    act = "silu" if name == "gate_up" else None

    def run() -> object:
        q, d = torch.empty(m, k, dtype=torch.int8), torch.empty(m, k // 32)
        given = (q, d, d.clone(), blocks(type, n, k), type, torch.bfloat16)
        return q8_1_cuda(*given, TYPES[type].has_planar, act=act)

    return run


def exact(type: int) -> Callable[[], object]:
    x = torch.empty(1, 4096, dtype=torch.bfloat16)
    planar = TYPES[type].has_planar
    return lambda: linear_cuda(x, blocks(type, 4096, 4096), type, planar, exact=True)


def dequantize(type: int) -> Callable[[], object]:
    planar = TYPES[type].has_planar
    return lambda: dequantize_cuda(blocks(type, 64, 4096), type, 4096, torch.bfloat16, planar)


def mixture() -> object:
    x = torch.empty(1, 2048, dtype=torch.bfloat16)
    index, scores = torch.empty(1, 8, dtype=torch.int64), torch.empty(1, 8)
    gate_up, down = blocks(Q4_K, 128, 1536, 2048), blocks(Q4_K, 128, 2048, 768)
    return experts_cuda(x, index, scores, gate_up, Q4_K, down, Q4_K, "silu")


SASS = {
    **{f"{TYPES[t].name} gate_up M=1": product(t, "gate_up", 1) for t in (Q4_K, Q6_K, Q8_0)},
    "Q4_K down M=1": product(Q4_K, "down", 1),
    "Q4_K gate_up M=8": product(Q4_K, "gate_up", 8),
    "Q4_K exact": exact(Q4_K),
    "Q4_K dequantize": dequantize(Q4_K),
    "Q4_K experts": mixture,
}
