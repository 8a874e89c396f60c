"""Which kernel of fuseweights.kernels takes the place of an operation of ops.py on a GPU.

The kernels have no backward: where a gradient is asked for, the references run. So they do on
float64, and on tensors that are more than plain ones (DTensor).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.gguf_types import TYPES
from . import ops
from .weights import GGUFBlocks, Plain, Scaled

for _name in (
    *("causal_conv1d", "delta_chunks", "fp8_linear", "gated_mlp", "gguf_experts", "gguf_linear"),
    *("linear", "moe", "norm"),
):
    import_module(f"..kernels.{_name}", __package__)
OPS = torch.ops.fuseweights
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
#: Rows and columns that a scale of fp8_linear covers.
FP8_BLOCKS = ((128, 128), (1, 128), (1, None), (None, None))


def takes(*given: Tensor | None) -> bool:
    """Whether kernels can have these tensors, of which the first decides the dtype."""
    tensors = [tensor for tensor in given if tensor is not None]
    if not tensors[0].is_cuda or tensors[0].dtype not in FLOATS:
        return False
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _plain(x: Tensor, tensors: dict[str, Tensor], format: Any, bias: Tensor | None, *_: Any):
    weight = tensors["weight"]
    return type(format) is Plain and weight.dtype == x.dtype and takes(x, weight, bias)


def _fp8(x: Tensor, tensors: dict[str, Tensor], format: Any, bias: Tensor | None, *_: Any) -> bool:
    if type(format) is not Scaled or (format.rows, format.columns) not in FP8_BLOCKS:
        return False
    weight, scale = tensors["weight"], tensors[format.scale]
    kinds = weight.dtype == torch.float8_e4m3fn and scale.dtype in (torch.float32, torch.bfloat16)
    half = x.dtype in (torch.bfloat16, torch.float16)
    return kinds and half and format.zero_point is None and takes(x, weight, scale, bias)


def _fp8_product(x: Tensor, t: dict[str, Tensor], format: Scaled, bias: Tensor | None, act=None):
    return OPS.fp8_linear(x, t["weight"], t[format.scale], bias, None, act)


def _blocks(x: Tensor, tensors: dict[str, Tensor], format: Any, bias: Tensor | None, *_: Any):
    return type(format) is GGUFBlocks and takes(x, tensors["weight"], bias)


def _block_product(x: Tensor, t: dict[str, Tensor], format: Any, bias: Tensor | None, act=None):
    """float32 activations are multiplied as they are, others quantized to Q8_1 where they are few,
    as llama.cpp does."""
    exact = x.dtype == torch.float32
    given = t["weight"], format.type, format.is_planar, bias, act, None, exact
    return OPS.gguf_linear(x, *given)


def _block_experts(x: Tensor, index: Tensor, scores: Tensor, stacks: Any, formats: Any, act: str):
    known = all(type(f) is GGUFBlocks and f.type in TYPES for f in formats.values())
    alike = len({getattr(f, "is_planar", None) for f in formats.values()}) == 1
    return known and alike and takes(x, scores, *stacks.values())


def _block_experts_product(x: Tensor, index: Tensor, scores: Tensor, stacks, formats, act):
    up, down = formats["gate_up"], formats["down"]
    pairs = stacks["gate_up"], up.type, stacks["down"], down.type
    exact = x.dtype == torch.float32
    return OPS.gguf_experts(x, index, scores, *pairs, act, up.is_planar, exact)


def _experts(x: Tensor, index: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, act: str):
    return gate_up.dtype == down.dtype == x.dtype and takes(x, scores, gate_up, down)


def _delta(*given: Any) -> bool:
    return len(given) <= 7 and takes(*given[:6]) and given[0].shape[-1] <= 256


#: operation, whether its kernel takes these arguments, and the kernel.
KERNELS = (
    (ops.linear, _plain, lambda x, t, _, bias: OPS.skinny_linear(x, t["weight"], bias)),
    (ops.linear, _fp8, _fp8_product),
    (ops.linear, _blocks, _block_product),
    (
        ops.gated_linear,
        _plain,
        lambda x, t, _, bias, act: OPS.gated_linear(x, t["weight"], act, bias),
    ),
    (ops.gated_linear, _fp8, _fp8_product),
    (ops.gated_linear, _blocks, _block_product),
    (ops.block_experts, _block_experts, _block_experts_product),
    (ops.gated, lambda x, act: takes(x), lambda x, act: OPS.gated(x, act)),
    (ops.experts, _experts, lambda *given: OPS.experts(*given)),
    (
        ops.rms_norm,
        lambda x, weight, *_: takes(x, weight),
        lambda x, weight, eps, norm="llama": OPS.rms_norm(x, weight, eps, norm),
    ),
    (
        ops.add_rms_norm,
        lambda x, residual, weight, *_: takes(x, residual, weight),
        lambda x, residual, weight, eps, norm="llama": OPS.add_rms_norm(
            x, residual, weight, eps, norm
        ),
    ),
    (
        ops.gated_rms_norm,
        lambda x, gate, weight, eps: takes(x, gate, weight),
        lambda *given: OPS.gated_rms_norm(*given),
    ),
    (
        ops.causal_conv,
        lambda x, weight: takes(x, weight),
        lambda x, weight: OPS.causal_conv1d(x, weight),
    ),
    (ops.delta_chunks, _delta, lambda *given: OPS.delta_chunks(*given)),
)
for _op, *_pair in KERNELS:
    _op.kernels.append(tuple(_pair))
