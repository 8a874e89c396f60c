"""A softmax router in two launches: logits x·Wᵀ, then softmax, the k largest, and their scores.

The shared expert's gate (Qwen: sigmoid(x·g)) is one more row of the first product. On a decoding
step the second launch is not needed either: the experts' kernels (moe.py) pick from the logits
themselves, with `best` below.

Equal logits: the expert that comes first wins, here and in the reference. (torch.topk promises no
order.) Logits are rounded to x's dtype, as F.linear's are; the softmax is in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

#: Tokens up to which the logits come from `_logits_kernel`; more are a matrix product for cuBLAS.
FEW_TOKENS = 16
#: Rows of W, elements of a row and tokens that a program holds, and its warps.
ONE_TOKEN = {"ROWS": 2, "BLOCK": 2048, "TOKENS": 1, "num_warps": 4}
SOME_TOKENS = {"ROWS": 2, "BLOCK": 1024, "TOKENS": 4, "num_warps": 4}


def reference(
    x: Tensor, weight: Tensor, top_k: int, normalize: bool, shared_gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`router` in plain PyTorch."""
    logits = F.linear(x, weight)
    scores = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
    index = logits.sort(dim=-1, descending=True, stable=True)[1][:, :top_k].contiguous()
    scores = scores.gather(1, index)
    if normalize:
        scores = scores / scores.sum(-1, keepdim=True)
    if shared_gate is None:
        shared = x.new_empty(0)
    else:
        shared = torch.sigmoid(F.linear(x, shared_gate).flatten())
    return logits, scores.to(x.dtype), index, shared


@jit
def _logits_kernel(
    x, weight, gate, logits, shared, x_stride, T, H: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    w_at = weight + row[:, None] * H + column
    if GATED:  # the last row
        w_at = tl.where(row[:, None] == E, gate + column, w_at)
    real = row[:, None] < E + GATED
    w = tl.load(w_at, mask=real & (column < H), other=0.0)
    wait_for_previous(PDL)
    start_next(PDL)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        at = token[:, None].to(tl.int64) * x_stride + start + column
        part = tl.load(x + at, mask=(token[:, None] < T) & (column < H - start), other=0.0)
        product = w.to(tl.float32)[:, None, :] * part.to(tl.float32)[None, :, :]
        total += tl.sum(product, 2)
        if start + BLOCK < H:
            mask = real & (column < H - start - BLOCK)
            w = tl.load(w_at + start + BLOCK, mask=mask, other=0.0)
    written = token[None, :] < T
    tl.store(logits + token[None, :] * E + row[:, None], total, mask=written & (row[:, None] < E))
    if GATED:
        score = tl.sigmoid(total)
        tl.store(shared + token[None, :] + row[:, None] * 0, score, written & (row[:, None] == E))


@jit
def sort_keys(logits, E, EXPERTS: tl.constexpr):
    """Integers that sort as the logits [E] do, each with its expert's complement in its low bits.

    A float's bits sort like integers once those of a negative are flipped. 16-bit floats leave at
    least 13 of 32 bits to the expert; float32 needs 64-bit keys.
    """
    expert = tl.arange(0, EXPERTS)
    value = tl.load(logits + expert, mask=expert < E, other=float("-inf"))
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if value.dtype == tl.float32:
        return (bits.to(tl.int64) << 32) | (0xFFFF - expert)
    else:
        return (bits & -8192) | (8191 - expert)


@jit
def expert_of(key):
    if key.dtype == tl.int64:
        return (0xFFFF - (key & 0xFFFF)).to(tl.int32)
    else:
        return 8191 - (key & 8191)


@jit
def logit_of(key):
    if key.dtype == tl.int64:
        bits = (key >> 32).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) & -8192
    return bits.to(tl.float32, bitcast=True)


@jit
def without(keys, key):
    """`keys` with `key` taken out: below every other."""
    lowest: tl.constexpr = -(2**63) if keys.dtype == tl.int64 else -(2**31)
    return tl.where(keys == key, lowest, keys)


@jit
def nth_best(logits, n, E, EXPERTS: tl.constexpr):
    """The expert with the n-th largest logit, from 0."""
    keys = sort_keys(logits, E, EXPERTS)
    for _ in range(n):
        keys = without(keys, tl.max(keys, 0))
    return expert_of(tl.max(keys, 0))


@jit
def best(
    logits, E, TOP: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, NORM: tl.constexpr
):
    """(experts, float32 scores) [SLOTS] of the TOP largest logits; slots past TOP score 0."""
    keys = sort_keys(logits, E, EXPERTS)
    first = logit_of(tl.max(keys, 0))
    every = tl.where(tl.arange(0, EXPERTS) < E, tl.exp(logit_of(keys) - first), 0.0)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), keys.dtype)
    for n in tl.static_range(TOP):
        key = tl.max(keys, 0)
        keys = without(keys, key)
        chosen = tl.where(slot == n, key, chosen)
    score = tl.where(slot < TOP, tl.exp(logit_of(chosen) - first), 0.0)
    total = tl.sum(score, 0) if NORM else tl.sum(every, 0)
    return tl.where(slot < TOP, expert_of(chosen), 0), score / total


@jit
def _top_k_kernel(
    logits, scores, index, E,
    TOP: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    wait_for_previous(PDL)
    start_next(PDL)
    expert, score = best(logits + token.to(tl.int64) * E, E, TOP, SLOTS, EXPERTS, NORM)
    slot = tl.arange(0, SLOTS)
    tl.store(index + token * TOP + slot, expert.to(tl.int64), mask=slot < TOP)
    tl.store(scores + token * TOP + slot, score, mask=slot < TOP)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def check_router(x: Tensor, weight: Tensor, top_k: int, shared_gate: Tensor | None) -> None:
    """Refuse what `router` does not take."""
    check(x.dim() == 2 and x.stride(1) == 1, f"x must be [T, H], rows of stride 1: {x.shape}")
    check(x.dtype in (torch.bfloat16, torch.float16, torch.float32), f"x cannot be {x.dtype}")
    hidden = x.shape[1]
    given = [("router weight", weight, (weight.shape[0], hidden))]
    if shared_gate is not None:
        given.append(("shared_gate", shared_gate, (1, hidden)))
    for name, tensor, shape in given:
        check(tuple(tensor.shape) == shape, f"{name} must be {shape}, not {tuple(tensor.shape)}")
        check(tensor.dtype == x.dtype, f"{name} is {tensor.dtype}, x is {x.dtype}")
        check(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
        check(tensor.is_contiguous(), f"{name} must be contiguous")
    check(1 <= top_k <= weight.shape[0] <= 8192, f"top {top_k} of {weight.shape[0]} experts")


def router_logits(x: Tensor, weight: Tensor, shared_gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits [T, E], sigmoid(x·shared_gate) [T] or [0]), for few tokens in one launch."""
    tokens, hidden = x.shape
    gated = shared_gate is not None
    if tokens > FEW_TOKENS:
        shared = F.linear(x, shared_gate).flatten().sigmoid_() if gated else x.new_empty(0)
        return F.linear(x, weight), shared
    experts = weight.shape[0]
    logits, shared = x.new_empty(tokens, experts), x.new_empty(tokens if gated else 0)
    config = dict(ONE_TOKEN if tokens == 1 else SOME_TOKENS)
    config["BLOCK"] = min(config["BLOCK"], power_of_two(hidden))
    grid = (-(-(experts + gated) // config["ROWS"]), -(-tokens // config["TOKENS"]))
    gate = shared_gate if gated else weight
    launch(
        _logits_kernel, grid, x, weight, gate, logits, shared,
        x.stride(0), tokens, H=hidden, E=experts, GATED=gated, pdl=pdl(x), **config,
    )  # fmt: skip
    return logits, shared


def router(
    x: Tensor, weight: Tensor, top_k: int, normalize: bool, shared_gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(x Wᵀ), its `top_k` largest, rescaled to sum to 1 if `normalize`.

    x [T, H], weight [E, H] → logits [T, E], scores [T, k], index [T, k] (int64, best first), and
    sigmoid(x · shared_gate) [T] for a shared_gate [1, H], else [0]. bf16, fp16 or fp32, one dtype.
    Raises KernelError for any other shape, dtype, device or stride.
    """
    check_router(x, weight, top_k, shared_gate)
    logits, shared = router_logits(x, weight, shared_gate)
    tokens, experts = logits.shape
    scores = x.new_empty(tokens, top_k)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    launch(
        _top_k_kernel, (tokens,), logits, scores, index, experts,
        TOP=top_k, SLOTS=power_of_two(top_k), EXPERTS=power_of_two(experts), NORM=normalize,
        pdl=pdl(x), num_warps=4 if experts >= 128 else 1,
    )  # fmt: skip
    return logits, scores, index, shared


def _fake(x, weight, top_k, normalize, shared_gate=None):
    tokens = x.shape[0]
    index = x.new_empty(tokens, top_k, dtype=torch.int64)
    shared = x.new_empty(0 if shared_gate is None else tokens)
    return x.new_empty(tokens, weight.shape[0]), x.new_empty(tokens, top_k), index, shared


register(
    "router(Tensor x, Tensor weight, int top_k, bool normalize, Tensor? shared_gate=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=router,
    cpu=reference,
    fake=_fake,
)
