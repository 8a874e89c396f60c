"""A mixture of experts whose weights are ggml blocks, as GGUF's ffn_gate_up_exps and ffn_down_exps.

Few tokens: each pair of a token and one of its experts is a program's row of the first product,
act(gate) · up in its epilogue, and the second sums a token's pairs, times their scores
(gguf_vector.py); x and the pairs are quantized before each. Many: all experts
are dequantized and moe.py multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated_mlp import ACTIVATIONS
from .gguf_linear import FLOATS, dequantize_cuda, multiply, refuse_blocks
from .gguf_types import dequantize as dequantize_reference
from .launch import check, register
from .linear import rows_of
from .moe import experts
from .quantize import quantize_q8_1

#: Tokens a slot up to which every pair reads its expert's weights for itself.
FEW = 16


def _refuse(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    gate_up_type: int,
    down: Tensor,
    down_type: int,
    act: str,
    planar: bool,
) -> int:
    """Whatever gguf_experts does not take; else I."""
    check(x.ndim == 2, f"x: expected [T, H], found {list(x.shape)}")
    check(act in ACTIVATIONS, f"act: expected one of {list(ACTIVATIONS)}, found {act}")
    refuse_blocks(gate_up, gate_up_type, x.shape[1], planar, 3)
    experts, rows = gate_up.shape[:2]
    check(rows % 2 == 0, f"gate_up: expected 2I rows an expert, found {rows}")
    refuse_blocks(down, down_type, rows // 2, planar, 3)
    expected = [experts, x.shape[1]]
    check(list(down.shape[:2]) == expected, f"down: expected {expected}, found {list(down.shape)}")
    pairs = index.ndim == 2 and index.shape == scores.shape and len(index) == len(x)
    check(
        pairs and index.dtype in (torch.int32, torch.int64) and scores.is_floating_point(),
        f"index, scores: expected integers and floats [{len(x)}, k], found {index.dtype} "
        f"{list(index.shape)}, {scores.dtype} {list(scores.shape)}",
    )
    given = {"index": index, "scores": scores, "gate_up": gate_up, "down": down}
    for name, tensor in given.items():
        check(tensor.device == x.device, f"{name}: expected on {x.device}, not {tensor.device}")
    return rows // 2


def experts_reference(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    gate_up_type: int,
    down: Tensor,
    down_type: int,
    act: str,
    planar: bool = False,
    exact: bool = False,
) -> Tensor:
    """An expert at a time, computed in float32 (float64 where x is), rounded once."""
    width = _refuse(x, index, scores, gate_up, gate_up_type, down, down_type, act, planar)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape, dtype=wide)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        first = dequantize_reference(gate_up[expert], gate_up_type, x.shape[1], planar).to(wide)
        second = dequantize_reference(down[expert], down_type, width, planar).to(wide)
        gate, up = F.linear(x[token].to(wide), first).chunk(2, -1)
        y = F.linear(ACTIVATIONS[act](gate) * up, second)
        out.index_add_(0, token, y * scores[token, slot, None].to(wide))
    return out.to(x.dtype)


def experts_cuda(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    gate_up_type: int,
    down: Tensor,
    down_type: int,
    act: str,
    planar: bool = False,
    exact: bool = False,
) -> Tensor:
    width = _refuse(x, index, scores, gate_up, gate_up_type, down, down_type, act, planar)
    given = (x, index, scores, gate_up, gate_up_type, down, down_type, act, planar)
    if x.dtype not in FLOATS:
        return experts_reference(*given)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    tokens, top = index.shape
    if tokens > FEW:
        first = dequantize_cuda(gate_up, gate_up_type, x.shape[1], x.dtype, planar)
        second = dequantize_cuda(down, down_type, width, x.dtype, planar)
        return experts(x, index, scores, first, second, act)
    quantize = (lambda rows: rows) if exact else quantize_q8_1
    index, scores = index.contiguous(), scores.contiguous()
    hidden = x.new_empty(tokens * top, width, dtype=torch.float32)
    multiply(quantize(rows_of(x)), gate_up, hidden, gate_up_type, planar, act=act, index=index)
    return multiply(quantize(hidden), down, out, down_type, planar, index=index, scores=scores)


#: gguf_experts(x [T, H], index [T, k], scores [T, k], gate_up [E, 2I, bytes a row] with its gate
#: rows first, its ggml type, down [E, H, bytes a row], its type, act) → Σ over a token's experts of
#: score · down(act(gate) · up), [T, H] in x's dtype. act: silu, gelu, gelu_tanh. Raises KernelError
#: for shapes, dtypes or devices that do not fit.
gguf_experts = register(
    "gguf_experts(Tensor x, Tensor index, Tensor scores, Tensor gate_up, int gate_up_type, "
    "Tensor down, int down_type, str act, bool planar=False, bool exact=False) -> Tensor",
    cuda=experts_cuda,
    cpu=experts_reference,
    fake=lambda x, *_, **__: torch.empty_like(x, memory_format=torch.contiguous_format),
)
