"""Depthwise causal convolution over a prompt, then SiLU (Gated DeltaNet's q, k and v).

    y[b, t, c] = silu(Σ_i weight[c, i] · x[b, t − (W − 1) + i, c])

Two forms: `causal_conv1d` finds the W − 1 tokens before the first in x itself, which starts with
them; `causal_conv1d_prefill` finds them in a state [B, C, S ≥ W − 1], the last S inputs (without
one they are zeros), and returns the state after the prompt. x may be any view, such as the first
columns of a fused projection's output. Products and sums are float32 (float64 for float64, on a
CPU); the result is rounded once, to x's dtype.

A program slides over BT tokens of BC channels with its rows in registers: x and y are moved once,
but for W − 1 rows between neighbours, which L2 holds.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Compiled once for all numbers of tokens.
COUNTS = {} if tl is None else {"do_not_specialize": ("T", "PAST", "S")}
#: At least this many tokens in all → tokens and channels a program, warps.
CONFIGURATIONS = {1024: (12, 512, 4), 0: (4, 256, 1)}


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T + W - 1, C], weight [C, W] → [B, T, C]."""
    tokens = x.shape[1] - weight.shape[1] + 1
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, taps = x.to(kind), weight.to(kind).unbind(1)
    return F.silu(sum(wide[:, i : i + tokens] * tap for i, tap in enumerate(taps))).to(x.dtype)


def reference_prefill(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, T, C], state [B, C, S] or None → [B, T, C], the state after x."""
    past = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], past)
    seen = torch.cat((state.mT.to(x.dtype), x), 1)
    last = seen[:, seen.shape[1] - state.shape[2] :].mT.clone(memory_format=torch.contiguous_format)
    return reference(seen[:, state.shape[2] - past :], weight), last


@jit
def _row(x, state, t, x_t, s_i, PAST, mask, HAS_STATE: tl.constexpr):
    """The inputs of token t, from x if t ≥ −PAST; before that the state's, or zeros. Both pointers
    are at token 0."""
    row = tl.load(x + t * x_t, mask=mask & (t >= -PAST), other=0)
    if HAS_STATE:
        before = tl.load(state + t * s_i, mask=mask & (t < -PAST), other=0)
        row = tl.where(t < -PAST, before.to(tl.float32), row.to(tl.float32)).to(row.dtype)
    return row


@functools.partial(jit, **COUNTS)
def _conv(
    x, weight, state, y, new_state, T, C, PAST, S,
    x_b, x_t, x_c, w_c, w_i, s_b, s_c, s_i,
    W: tl.constexpr, HAS_STATE: tl.constexpr, KEPT: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last tokens' programs also write the new state, KEPT inputs a channel."""
    tile, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    x += b * x_b + c * x_c
    state += b * s_b + c * s_c + S * s_i
    taps = (tl.load(weight + c * w_c, mask=inside, other=0).to(tl.float32),)
    for i in tl.static_range(1, W):
        taps += (tl.load(weight + c * w_c + i * w_i, mask=inside, other=0).to(tl.float32),)
    wait_for_previous(PDL)
    rows = (_row(x, state, tile * BT - (W - 1), x_t, s_i, PAST, inside, HAS_STATE),)
    for i in tl.static_range(1, BT + W - 1):
        t = tile * BT + (i - (W - 1))
        if i < W - 1:
            rows += (_row(x, state, t, x_t, s_i, PAST, inside, HAS_STATE),)
        else:
            rows += (tl.load(x + t * x_t, mask=inside & (t < T), other=0),)
    start_next(PDL)
    y += (b * T + tile * BT) * C + c
    for t in tl.static_range(BT):
        total = rows[t].to(tl.float32) * taps[0]
        for i in tl.static_range(1, W):
            total += rows[t + i].to(tl.float32) * taps[i]
        silu = total / (1 + tl.exp(-total))
        tl.store(y + t * C, silu.to(y.dtype.element_ty), mask=inside & (tile * BT + t < T))
    if KEPT > 0 and tile == tl.num_programs(1) - 1:
        for kept in tl.static_range(KEPT):
            at = T.to(tl.int64) + (kept - KEPT)
            row = _row(x, state, at, x_t, s_i, PAST, inside, HAS_STATE)
            tl.store(new_state + (b * C + c) * KEPT + kept, row, mask=inside)


def _check(x: Tensor, weight: Tensor, state: Tensor | None) -> None:
    name = "causal_conv1d"
    check(x.dim() == 3, f"{name}: x must be [B, T, C], found shape {tuple(x.shape)}")
    check(
        weight.dim() == 2 and weight.shape[0] == x.shape[2] and weight.shape[1] >= 2,
        f"{name}: weight must be [{x.shape[2]}, W ≥ 2], found {tuple(weight.shape)}",
    )
    for what, tensor in {"x": x, "weight": weight, "state": state}.items():
        if tensor is not None:
            check(tensor.dtype in FLOATS, f"{name}: {what} must be bf16, fp16 or fp32, "
                  f"found {tensor.dtype}")  # fmt: skip
            check(tensor.device == x.device, f"{name}: {what} must be on {x.device}, "
                  f"found {tensor.device}")  # fmt: skip
    if state is not None:
        batch, past, channels = x.shape[0], weight.shape[1] - 1, x.shape[2]
        check(
            state.dim() == 3 and state.shape[:2] == (batch, channels) and state.shape[2] >= past,
            f"{name}: state must be [{batch}, {channels}, {past} or more], "
            f"found {tuple(state.shape)}",
        )


def _run(x: Tensor, weight: Tensor, state: Tensor | None, past: int, new_state: Tensor | None):
    """x [B, past + T, C] → y [B, T, C]; the state after it into `new_state`, if there is one."""
    batch, tokens, channels = x.shape[0], x.shape[1] - past, x.shape[2]
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    least = next(least for least in CONFIGURATIONS if batch * tokens >= least)
    block_t, block_c, warps = CONFIGURATIONS[least]
    old = x if state is None else state
    launch(
        _conv, (-(-channels // block_c), -(-tokens // block_t), batch),
        x[:, past:], weight, old, y, y if new_state is None else new_state,
        tokens, channels, past, old.shape[2], *x.stride(), *weight.stride(), *old.stride(),
        W=weight.shape[1], HAS_STATE=state is not None,
        KEPT=0 if new_state is None else new_state.shape[2],
        BT=block_t, BC=block_c, num_warps=warps, pdl=pdl(x),
    )  # fmt: skip
    return y


def causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T + W - 1, C], the past first, any strides; weight [C, W], W ≥ 2; bf16, fp16 or fp32 →
    [B, T, C] in x's dtype. Raises KernelError."""
    _check(x, weight, None)
    past = weight.shape[1] - 1
    check(
        x.shape[1] >= past,
        f"causal_conv1d: x must hold {past} tokens before the first, found {x.shape[1]}",
    )
    return _run(x, weight, None, past, None)


def causal_conv1d_prefill(
    x: Tensor, weight: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B, T, C], any strides; weight [C, W], W ≥ 2; state [B, C, S ≥ W - 1], the last S inputs
    before x, or None for zeros → ([B, T, C] in x's dtype, the state after x [B, C, S or W - 1] in
    x's dtype, a new tensor: other programs still read the old one). Raises KernelError."""
    _check(x, weight, state)
    new_state = _new_state(x, weight, state)
    if x.shape[1] == 0:
        return torch.empty_like(x), new_state.copy_(0 if state is None else state)
    return _run(x, weight, state, 0, new_state), new_state


def _new_state(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    kept = weight.shape[1] - 1 if state is None else state.shape[2]
    return torch.empty(x.shape[0], x.shape[2], kept, dtype=x.dtype, device=x.device)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


def _fake_prefill(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _new_state(x, weight, state)


op = register(
    "causal_conv1d(Tensor x, Tensor weight) -> Tensor",
    cuda=causal_conv1d, cpu=reference, fake=_fake,
)  # fmt: skip
op_prefill = register(
    "causal_conv1d_prefill(Tensor x, Tensor weight, Tensor? state) -> (Tensor, Tensor)",
    cuda=causal_conv1d_prefill, cpu=reference_prefill, fake=_fake_prefill,
)  # fmt: skip
