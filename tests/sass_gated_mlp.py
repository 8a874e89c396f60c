"""The products of a dense and of a GDN + MoE model, as they are compiled for a Hopper GPU."""

from __future__ import annotations

from functools import partial

import torch
from fuseweights.kernels import gated_mlp, linear


def _linear(n: int, k: int, m: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    tensors = [torch.empty(size, dtype=dtype) for size in ((m, k), (n, k), (n,), (m, n))]
    linear.linear_cuda(*tensors)


def _gated_linear(
    m: int, dtype: torch.dtype = torch.bfloat16, n: int = 24576, k: int = 4096
) -> None:
    x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
    gated_mlp.gated_linear_cuda(x, weight, "silu")


SASS = {
    "qkv": partial(_linear, 6144, 4096),
    "GDN in_proj": partial(_linear, 12352, 2048),
    "down_proj": partial(_linear, 4096, 12288),
    "router": partial(_linear, 256, 2048),
    "lm_head": partial(_linear, 151936, 4096),
    "qkv, 4 rows": partial(_linear, 6144, 4096, 4),
    "GDN in_proj, 4 rows": partial(_linear, 12352, 2048, 4),
    "router, 4 rows": partial(_linear, 256, 2048, 4),
    "qkv, 16 rows": partial(_linear, 6144, 4096, 16),
    "GDN in_proj, 16 rows": partial(_linear, 12352, 2048, 16),
    "down_proj, 16 rows": partial(_linear, 4096, 12288, 16),
    "lm_head, 16 rows": partial(_linear, 151936, 4096, 16),
    "qkv, float32": partial(_linear, 6144, 4096, 1, torch.float32),
    "qkv, float32, 4 rows": partial(_linear, 6144, 4096, 4, torch.float32),
    "gate_up": partial(_gated_linear, 1),
    "gate_up, 2 rows": partial(_gated_linear, 2),
    "gate_up, 4 rows": partial(_gated_linear, 4),
    "gate_up, 16 rows": partial(_gated_linear, 16),
    "gate_up, float32": partial(_gated_linear, 1, torch.float32),
    "shared expert gate_up, 16 rows": partial(_gated_linear, 16, n=1024, k=2048),
    "gated": lambda: gated_mlp.gated_cuda(torch.empty(2048, 24576, dtype=torch.bfloat16), "silu"),
}
