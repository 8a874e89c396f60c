"""The first half of a gated MLP: act(x·Wgᵀ) · (x·Wuᵀ), W = [Wg; Wu] being one weight [2I, K].

Up to 16 rows of x the activation is the epilogue of the product (linear.py): a program reads the
rows i and I + i of W. Above that cuBLAS multiplies and `gated` does the rest in one pass: against
the product that pass is short, and cuBLAS's is the faster product.

silu(g) = g / (1 + exp(-g)); gelu and gelu_tanh as in Hendrycks and Gimpel (2016).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous
from .linear import DTYPES, activation, by_kernel, matvec, refuse, rows_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


@jit
def _gated(gate_up, out, stride, n, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    gate = tl.load(gate_up + row * stride + i, mask=i < n).to(tl.float32)
    up = tl.load(gate_up + row * stride + n + i, mask=i < n).to(tl.float32)
    start_next(PDL)
    tl.store(out + row * n + i, activation(gate, ACT) * up, mask=i < n)


def _refuse_gated(gate_up: Tensor, act: str) -> None:
    shape = list(gate_up.shape)
    check(act in ACTIVATIONS, f"act: expected one of {', '.join(ACTIVATIONS)}, found {act}")
    even = gate_up.dim() > 0 and shape[-1] % 2 == 0
    check(even, f"gate_up: expected [..., 2n], found shape {shape}")
    check(gate_up.is_floating_point(), f"gate_up: expected floating point, found {gate_up.dtype}")


def gated_reference(gate_up: Tensor, act: str) -> Tensor:
    _refuse_gated(gate_up, act)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


def gated_cuda(gate_up: Tensor, act: str) -> Tensor:
    _refuse_gated(gate_up, act)
    if gate_up.dtype not in DTYPES:
        return gated_reference(gate_up, act)
    n = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], n)
    if out.numel():
        rows = rows_of(gate_up)
        grid = (rows.shape[0], -(-n // GATED_BLOCK))
        meta = {"ACT": act, "BLOCK": GATED_BLOCK, "num_warps": 4, "pdl": pdl(rows)}
        launch(_gated, grid, rows, out, rows.stride(0), n, **meta)
    return out


#: Columns a program of `_gated` makes: 16 bytes a load and thread.
GATED_BLOCK = 1024


def _gated_fake(gate_up, act):
    _refuse_gated(gate_up, act)
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


#: gated(gate_up [..., 2n], act) → [..., n]: act(gate) · up, gate first, computed in float32 and
#: rounded once. Any strides; rows in one piece are read where they are.
gated = register(
    "gated(Tensor gate_up, str act) -> Tensor",
    cuda=gated_cuda,
    cpu=gated_reference,
    fake=_gated_fake,
)


def _refuse_gated_linear(x: Tensor, weight: Tensor, act: str, bias: Tensor | None) -> None:
    refuse(x, weight, bias)
    check(act in ACTIVATIONS, f"act: expected one of {', '.join(ACTIVATIONS)}, found {act}")
    check(weight.shape[0] % 2 == 0, f"weight: expected [2I, K], found {list(weight.shape)}")


def gated_linear_reference(x: Tensor, weight: Tensor, act: str, bias: Tensor | None = None):
    _refuse_gated_linear(x, weight, act, bias)
    return gated_reference(F.linear(x, weight, bias), act)


def gated_linear_cuda(x: Tensor, weight: Tensor, act: str, bias: Tensor | None = None) -> Tensor:
    _refuse_gated_linear(x, weight, act, bias)
    if not by_kernel(x, weight):
        return gated_cuda(F.linear(x, weight, bias), act)
    return matvec(rows_of(x), weight, bias, None, act).view(*x.shape[:-1], -1)


def _gated_linear_fake(x, weight, act, bias=None):
    _refuse_gated_linear(x, weight, act, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


#: gated_linear(x [..., K], weight [2I, K], act, bias [2I] or None) → [..., I]:
#: act(x·Wgᵀ + bg) · (x·Wuᵀ + bu), for any number of rows. Up to SKINNY of them the product is
#: never stored: it stays in float32 until the result is rounded.
gated_linear = register(
    "gated_linear(Tensor x, Tensor weight, str act, Tensor? bias=None) -> Tensor",
    cuda=gated_linear_cuda,
    cpu=gated_linear_reference,
    fake=_gated_linear_fake,
)
