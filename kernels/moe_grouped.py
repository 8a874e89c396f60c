"""Experts for many tokens: four launches, every expert's weights read once for its tokens.

1. `_sort_kernel` orders the pairs (token · k + slot) by expert, stably, and cuts each expert's into
   blocks.
2. `_gate_up_kernel`: a block of at most BLOCK_M pairs of one expert times rows n and n + I of its
   gate_up, act(gate) · up stored in sorted order.
3. `_down_kernel`: times the expert's down rows and the pairs' scores, stored in the pairs' order.
4. `_sum_kernel` adds a token's pairs, always in the same order: results do not vary.

How many blocks an expert has is known on the GPU only, so every expert has places for as many as
its pairs could need, and a program whose place is empty ends: nothing waits for the host, and the
launches can be captured in a CUDA graph.

A shared expert as wide as the routed ones is one more expert, of all tokens, in the same launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import jit, launch, pdl, start_next, tl, wait_for_previous
from .router import power_of_two

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}

#: Mean pairs of an expert up to which a configuration serves: blocks of the two products, the
#: first's BLOCK_N counting row pairs. Both have one BLOCK_M. Measured on an H200 with 256 experts,
#: top 8, 2048 → 512.
CONFIGS = {
    8: (
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    ),
    32: (
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
    1 << 62: (
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
}
#: Pairs and columns that a program of the first and of the last kernel takes at a time.
SORT_BLOCK, SUM_BLOCK = 4096, 1024


@jit
def activate(gate, ACT: tl.constexpr):
    """silu, gelu by tanh (1 + tanh(z) = 2 sigmoid(2z)), or gelu by erf, of float32."""
    if ACT == 0:
        return gate * tl.sigmoid(gate)
    if ACT == 1:
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))


@jit
def _place(expert, start, BLOCK_M: tl.constexpr, FEW: tl.constexpr):
    """The first place for blocks of an expert whose first pair is sorted to `start`: with few
    pairs, one for each; else one for each BLOCK_M, and one more for each expert."""
    if FEW:
        return start
    else:
        return start // BLOCK_M + expert


@jit
def _sort_kernel(
    index, order, blocks, PAIRS,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program an expert: it counts the pairs of those before, then sorts in its own. Blocks
    are (expert, first pair, last pair + 1); expert −1 where there is none."""
    expert = tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    start_next(PDL)
    before = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, PAIRS, BLOCK):
        chosen = tl.load(index + at + pair, mask=at + pair < PAIRS, other=1 << 30)
        before += (chosen < expert).to(tl.int32)
    first = tl.sum(before, 0)
    last = first
    for at in range(0, PAIRS, BLOCK):
        chosen = tl.load(index + at + pair, mask=at + pair < PAIRS, other=1 << 30)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order + last + tl.cumsum(mine, 0) - 1, at + pair, mask=mine > 0)
        last += tl.sum(mine, 0)
    place = _place(expert, first, BLOCK_M, FEW)
    places = _place(expert + 1, last, BLOCK_M, FEW) - place
    for at in range(0, places, BLOCK):
        start = first + (at + pair) * BLOCK_M
        to = blocks + (place + at + pair) * 3
        tl.store(to, tl.where(start < last, expert, -1), mask=at + pair < places)
        tl.store(to + 1, start, mask=at + pair < places)
        tl.store(to + 2, last, mask=at + pair < places)


@jit
def _gate_up_kernel(
    x, order, blocks, gate_up, shared, hidden, x_stride, T, PAIRS, H, INTER,
    TOP: tl.constexpr, SHARED: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(INTER, BLOCK_N)
    block = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    shared_blocks = tl.cdiv(T, BLOCK_M) if SHARED else 0
    wait_for_previous(PDL)
    start_next(PDL)
    if block < shared_blocks:
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < T
        token = row
        row += PAIRS
        weight = shared
    else:
        at = blocks + (block - shared_blocks) * 3
        expert = tl.load(at)
        if expert < 0:
            return
        row = tl.load(at + 1) + tl.arange(0, BLOCK_M)
        real = row < tl.load(at + 2)
        token = tl.load(order + row, mask=real, other=0) // TOP
        weight = gate_up + expert.to(tl.int64) * INTER * H * 2
    x_at = x + token[:, None].to(tl.int64) * x_stride + k
    gate_at = weight + n[None, :].to(tl.int64) * H + k[:, None]
    up_at = gate_at + INTER.to(tl.int64) * H
    wide = n[None, :] < INTER
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        rest = H - start
        part = tl.load(x_at + start, mask=real[:, None] & (k < rest), other=0.0)
        gate = tl.load(gate_at + start, mask=wide & (k[:, None] < rest), other=0.0)
        up = tl.load(up_at + start, mask=wide & (k[:, None] < rest), other=0.0)
        gates = tl.dot(part, gate, gates, input_precision="ieee")
        ups = tl.dot(part, up, ups, input_precision="ieee")
    out = (activate(gates, ACT) * ups).to(hidden.dtype.element_ty)
    at = hidden + row[:, None].to(tl.int64) * INTER + n[None, :]
    tl.store(at, out, mask=real[:, None] & wide)


@jit
def _down_kernel(
    hidden, order, blocks, scores, shared_score, down, shared, parts, T, PAIRS, H, INTER,
    TOP: tl.constexpr, SHARED: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(H, BLOCK_N)
    block = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    shared_blocks = tl.cdiv(T, BLOCK_M) if SHARED else 0
    # the blocks may be read at once: the kernel before this one has waited for them
    if block < shared_blocks:
        expert = block * 0
        token = block * BLOCK_M + tl.arange(0, BLOCK_M)
        real = token < T
        row = PAIRS + token
        part_row = token * (TOP + 1) + TOP
        score = real.to(tl.float32)
        if SCORED:
            score = tl.load(shared_score + token, mask=real, other=0.0).to(tl.float32)
        weight = shared
    else:
        at = blocks + (block - shared_blocks) * 3
        expert = tl.load(at)
        row = tl.load(at + 1) + tl.arange(0, BLOCK_M)
        real = row < tl.load(at + 2)
        pair = tl.load(order + row, mask=real, other=0)
        score = tl.load(scores + pair, mask=real, other=0.0).to(tl.float32)
        part_row = pair // TOP * (TOP + SHARED) + pair % TOP
        weight = down + expert.to(tl.int64) * H * INTER
    wait_for_previous(PDL)
    start_next(PDL)
    if expert < 0:
        return
    in_at = hidden + row[:, None].to(tl.int64) * INTER + k
    w_at = weight + n[None, :].to(tl.int64) * INTER + k[:, None]
    wide = n[None, :] < H
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INTER, BLOCK_K):
        rest = INTER - start
        part = tl.load(in_at + start, mask=real[:, None] & (k < rest), other=0.0)
        w = tl.load(w_at + start, mask=wide & (k[:, None] < rest), other=0.0)
        total = tl.dot(part, w, total, input_precision="ieee")
    out = (total * score[:, None]).to(parts.dtype.element_ty)
    at = parts + part_row[:, None].to(tl.int64) * H + n[None, :]
    tl.store(at, out, mask=real[:, None] & wide)


@jit
def _sum_kernel(parts, out, H, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    start_next(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        at = parts + (token * SLOTS + slot) * H + column
        total += tl.load(at, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total, mask=column < H)


def sorted_pairs(index: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """index [T, k], contiguous → pairs sorted by expert [T · k], and their blocks [n, 3], int32."""
    pairs = index.numel()
    places = min(pairs, experts + pairs // block_m)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    blocks = torch.empty(places, 3, dtype=torch.int32, device=index.device)
    block = min(SORT_BLOCK, power_of_two(pairs))
    launch(
        _sort_kernel, (experts,), index, order, blocks, pairs,
        BLOCK=block, BLOCK_M=block_m, FEW=places == pairs,
        pdl=pdl(index), num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return order, blocks


def _fitted(config: dict[str, int], weight: Tensor, rows: int) -> dict[str, int]:
    """Blocks no larger than a small matrix has use for, and no smaller than tl.dot takes; of
    float32 half as many columns, which are as many bytes."""
    n = min(config["BLOCK_N"], max(16, power_of_two(rows)))
    k = min(config["BLOCK_K"] * 2 // weight.itemsize, max(16, power_of_two(weight.shape[-1])))
    return config | {"BLOCK_N": n, "BLOCK_K": k}


def grouped_experts(
    x: Tensor, index: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, act: str,
    shared_gate_up: Tensor | None, shared_down: Tensor | None, shared_score: Tensor | None,
) -> Tensor:  # fmt: skip
    """moe.experts for many tokens, its arguments checked there."""
    (tokens, hidden), (experts, _, intermediate) = x.shape, down.shape
    top_k, pairs = index.shape[1], index.numel()
    if shared_down is not None and shared_down.shape[1] != intermediate:
        # of another width: a mixture of one expert, in launches of its own
        out = grouped_experts(x, index, scores, gate_up, down, act, None, None, None)
        one = torch.zeros(tokens, 1, dtype=torch.int32, device=x.device)
        score = x.new_ones(tokens, 1) if shared_score is None else shared_score.reshape(-1, 1)
        weights = (shared_gate_up[None], shared_down[None], act, None, None, None)
        return out.add_(grouped_experts(x, one, score.contiguous(), *weights))
    shared, scored = shared_down is not None, shared_score is not None
    first, second = next(c for mean, c in CONFIGS.items() if pairs <= mean * experts)
    first = _fitted(first, gate_up, intermediate)
    second = _fitted(second, down, hidden)
    order, blocks = sorted_pairs(index, experts, first["BLOCK_M"])
    middle = x.new_empty(pairs + tokens * shared, intermediate)
    parts = x.new_empty(tokens, top_k + shared, hidden)
    out = x.new_empty(tokens, hidden)

    count = len(blocks) + (-(-tokens // first["BLOCK_M"]) if shared else 0)
    same = {"TOP": top_k, "SHARED": shared, "pdl": pdl(x)}
    launch(
        _gate_up_kernel, (count * -(-intermediate // first["BLOCK_N"]),),
        x, order, blocks, gate_up, shared_gate_up if shared else gate_up, middle,
        x.stride(0), tokens, pairs, hidden, intermediate,
        ACT=ACTIVATIONS[act], **same, **first,
    )  # fmt: skip
    launch(
        _down_kernel, (count * -(-hidden // second["BLOCK_N"]),),
        middle, order, blocks, scores, shared_score if scored else scores, down,
        shared_down if shared else down, parts, tokens, pairs, hidden, intermediate,
        SCORED=scored, **same, **second,
    )  # fmt: skip
    launch(
        _sum_kernel, (tokens, -(-hidden // SUM_BLOCK)), parts, out, hidden,
        SLOTS=top_k + shared, BLOCK=SUM_BLOCK, pdl=pdl(x), num_warps=4,
    )  # fmt: skip
    return out
