"""A decoding step of the depthwise causal convolution: silu, and its state shifted in place.

`torch.ops.fuseweights.causal_conv1d_update`: y[t] = silu(Σⱼ weight[:, j] · x[t − W + 1 + j]), the
inputs before the first token taken from `conv_state`. The state keeps a channel's last W − 1 inputs
(causal-conv1d's format) or its last W (transformers'), oldest first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

#: Channels a program owns, and its warps.
CHANNELS, WARPS = 128, 4

#: More tokens than this are a prefill, which another kernel does better.
MOST_TOKENS = 16


def reference(x: Tensor, conv_state: Tensor, weight: Tensor) -> Tensor:
    """The operation in plain PyTorch, computed in float32, or in float64 where x is float64."""
    kept, width = conv_state.shape[2], weight.shape[1]
    inputs = torch.cat((conv_state, x.mT), 2)
    conv_state.copy_(inputs[..., inputs.shape[2] - kept :])
    kind = torch.promote_types(x.dtype, torch.float32)
    windows = inputs[..., kept - width + 1 :].to(kind).unfold(2, width, 1)
    return F.silu((windows * weight.to(kind)[:, None]).sum(-1)).to(x.dtype).mT.contiguous()


# Of D channels, a thread each: what belongs to one tap or token is a [D], several are a tuple.


@jit
def load_columns(first, stride_c, stride_k, COUNT: tl.constexpr, D: tl.constexpr):
    """COUNT columns, `stride_k` apart, of rows `stride_c` apart."""
    rows = first + tl.arange(0, D) * stride_c
    columns = (tl.load(rows),)
    for j in tl.static_range(1, COUNT):
        columns += (tl.load(rows + j * stride_k),)
    return columns


@jit
def store_last(inputs, state, state_c, state_k, mine, KEPT: tl.constexpr, D: tl.constexpr):
    """The state after `inputs`, the last KEPT of them, if it is `mine` to write. Put a barrier
    before it where threads overwrite what others read."""
    rows = state + tl.arange(0, D) * state_c
    for j in tl.static_range(KEPT):
        tl.store(rows + j * state_k, inputs[len(inputs) - KEPT + j], mask=mine)


@jit
def convolve(inputs, taps, t: tl.constexpr):
    """silu(Σⱼ taps[j] · inputs[t + j]), fp32."""
    total = inputs[t].to(tl.float32) * taps[0].to(tl.float32)
    for j in tl.static_range(1, len(taps)):
        total += inputs[t + j].to(tl.float32) * taps[j].to(tl.float32)
    return silu(total)


@jit
def silu(x):
    return x / (1 + tl.exp(-x))


@jit
def _update(
    x,
    conv_state,
    weight,
    out,
    x_b,
    x_t,
    x_c,
    state_b,
    state_c,
    state_k,
    weight_c,
    channels,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    first, batch = tl.program_id(0) * D, tl.program_id(1).to(tl.int64)
    taps = load_columns(weight + first * weight_c, weight_c, 1, W, D)
    wait_for_previous(PDL)
    conv_state += batch * state_b + first * state_c
    past = conv_state + (KEPT - W + 1) * state_k
    inputs = load_columns(past, state_c, state_k, W - 1, D)
    inputs = inputs + load_columns(x + batch * x_b + first * x_c, x_c, x_t, TOKENS, D)
    start_next(PDL)
    out += batch * TOKENS * channels + first + tl.arange(0, D)
    for t in tl.static_range(TOKENS):
        tl.store(out + t * channels, convolve(inputs, taps, t))
    tl.debug_barrier()
    store_last(inputs, conv_state, state_c, state_k, True, KEPT, D)


def _check(x: Tensor, conv_state: Tensor, weight: Tensor) -> None:
    check(x.dim() == 3, f"x: expected [B, T, C], found {list(x.shape)}")
    batch, tokens, channels = x.shape
    check(1 <= tokens <= MOST_TOKENS, f"x: expected 1 to {MOST_TOKENS} tokens, found {tokens}")
    found = list(weight.shape)
    check(len(found) == 2 and found[0] == channels, f"weight: expected [{channels}, W], {found=}")
    width, found = found[1], list(conv_state.shape)
    check(width > 1, f"weight: expected at least 2 taps, found {width}")
    expected = [[batch, channels, kept] for kept in (width - 1, width)]
    check(found in expected, f"conv_state: expected {expected[0]} or {expected[1]}, {found=}")
    check(weight.stride(1) == 1, f"weight: expected adjacent taps, found strides {weight.stride()}")
    check(conv_state.dtype == x.dtype, f"conv_state: expected {x.dtype}, found {conv_state.dtype}")
    for name, tensor in (("conv_state", conv_state), ("weight", weight)):
        check(tensor.device == x.device, f"{name}: expected on {x.device}, found {tensor.device}")


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor) -> Tensor:
    """silu of the causal convolution of a few new tokens, products and sums in fp32.

    x [B, T, C], 1 ≤ T ≤ 16, any strides; conv_state [B, C, W − 1 or W], any strides, x's dtype,
    shifted in place; weight [C, W], taps adjacent, any float → [B, T, C], x's dtype.
    Raises KernelError for other shapes, dtypes, devices.
    """
    _check(x, conv_state, weight)
    batch, tokens, channels = x.shape
    width, kept = weight.shape[1], conv_state.shape[2]
    out = x.new_empty(batch, tokens, channels)
    block = min(CHANNELS, channels & -channels)
    launch(
        _update, (channels // block, batch),
        x, conv_state, weight, out, *x.stride(), *conv_state.stride(), weight.stride(0), channels,
        TOKENS=tokens, D=block, W=width, KEPT=kept, pdl=pdl(x), num_warps=WARPS,
    )  # fmt: skip
    return out


def _cpu(x: Tensor, conv_state: Tensor, weight: Tensor) -> Tensor:
    _check(x, conv_state, weight)
    return reference(x, conv_state, weight)


def _fake(x: Tensor, conv_state: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


register(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight) -> Tensor",
    cuda=causal_conv1d_update,
    cpu=_cpu,
    fake=_fake,
)
