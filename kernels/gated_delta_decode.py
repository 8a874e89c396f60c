"""Gated DeltaNet's decoding step after its input projections, in one launch.

`torch.ops.fuseweights.gated_delta_decode`, for each sequence and value head h with its key head j:

    q, k, v = silu(causal convolution)                            the state shifted in place
    q, k ← x · rsqrt(Σx² + 1e-6)
    g = −exp(A_log) · softplus(a + dt_bias),  beta = sigmoid(b)
    S ← S·exp(g);  Δ = beta·(v − Sᵀk);  S ← S + k Δᵀ              fp32, in place
    out = rmsnorm(Sᵀq / √dk) · w · silu(z)

(Yang et al., "Gated Delta Networks", 2024; Qwen3-Next and Qwen3.5.) Without a convolution state,
q, k and v are taken as already convolved.

A program is a value head of a sequence, its whole state in registers: one read, one write. With the
decayed state D, (D + kΔᵀ)ᵀq = Dᵀq + Δ·(k·q), so one pass over S gives both products with it. A warp
has whole columns of S, some rows in each lane, so that these sums are shuffles.

The r value heads of a key head all read its q and k channels of the convolution state; the one of
them that reads a channel last shifts it: each counts itself in `arrivals` once it has read, and the
last, which puts the count back to zero, overwrites what the others no longer need.

While the kernel before it still runs, it asks for its states to be brought to L2. A prefetch
returns nothing, and L2 is where all programs meet, so this is right whoever writes them when.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d_update import convolve, load_columns, silu, store_last
from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

#: Warps a program. With 8 each thread has half of S, but all that is not S is done twice: slower on
#: an H200 at B = 1, 16 and 64.
WARPS = 4


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float = 1e-6,
    tiled: bool = False,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """The operation in plain PyTorch, rounded where transformers rounds; float64 is kept."""
    ratio, kind = v.shape[2], torch.promote_types(v.dtype, torch.float32)
    # value heads in the order of A_log: h = i·nK + j where tiled, else j·r + i
    v, z, b, a = (x.transpose(1, 2) if tiled else x for x in (v, z, b, a))
    v, z, b, a = (x.flatten(1, 2) for x in (v, z, b, a))
    if conv_state is not None:
        sizes = [x.shape[1] * x.shape[2] for x in (q, k, v)]
        x = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
        inputs = torch.cat((conv_state, x[..., None]), 2)
        conv_state.copy_(inputs[..., 1:])
        window = inputs[..., -conv_weight.shape[1] :].to(kind)
        x = F.silu((window * conv_weight.to(kind)).sum(-1)).to(x.dtype)
        q, k, v = (
            y.unflatten(1, like.shape[1:])
            for y, like in zip(x.split(sizes, 1), (q, k, v), strict=True)
        )

    def unit(x: Tensor) -> Tensor:  # of length 1, once for each value head
        x = x.to(kind)
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return (x.repeat(1, ratio, 1) if tiled else x.repeat_interleave(ratio, 1))[..., None]

    q, k = unit(q), unit(k)
    g = -A_log.to(kind).exp() * F.softplus(a.to(kind) + dt_bias)
    new = state.to(kind) * g.exp()[..., None, None]
    change = b.sigmoid().to(kind)[..., None] * (v.to(kind) - (new * k).sum(-2))
    new = new + k * change[..., None, :]
    state.copy_(new)
    out = (new * q).sum(-2) * q.shape[-2] ** -0.5
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    return (out * norm_weight.to(kind) * F.silu(z.to(kind))).to(z.dtype)


@jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@jit
def _softplus(x):
    """log(1 + exp(x)). log1p(e) = 2·artanh(e / (2 + e)), a series in s² ≤ 1/9: tl.log would lose
    what a small e adds to 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    s2 = s * s
    series = 1.0 / 15
    for n in tl.static_range(13, 0, -2):
        series = series * s2 + 1.0 / n
    return tl.maximum(x, 0.0) + 2 * s * series


@jit
def _prefetch(pointers):
    """Bring the 128-byte lines at `pointers` to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _decode(
    q,
    k,
    v,
    z,
    b,
    a,
    A_log,
    dt_bias,
    norm_weight,
    state,
    conv_state,
    conv_weight,
    arrivals,
    out,
    q_b,
    q_j,
    k_b,
    k_j,
    v_b,
    v_j,
    v_i,
    z_b,
    z_j,
    z_i,
    b_b,
    b_j,
    b_i,
    a_b,
    a_j,
    a_i,
    conv_b,
    conv_c,
    conv_k,
    weight_c,
    key_heads,
    eps,
    R: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,  # 0: no convolution
    KEPT: tl.constexpr,
    TILED: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    j, i, batch = tl.program_id(0) // R, tl.program_id(0) % R, tl.program_id(1).to(tl.int64)
    h = i * key_heads + j if TILED else j * R + i
    heads = key_heads * R
    row, column = tl.arange(0, DK), tl.arange(0, DV)
    # S as [ROWS, WARPS, LANES, C]: each warp has C columns, each lane four of them in ROWS rows.
    # Read as [·, C], because that is how the compiler deals out a tile of rows: neighbouring lanes,
    # then warps, then the next row of the same lane
    C: tl.constexpr = DV // WARPS
    LANES: tl.constexpr = 128 // C if 128 // C < DK else DK
    ROWS: tl.constexpr = DK // LANES
    m = tl.arange(0, DK * WARPS)
    row_of = m % LANES * ROWS + m // (LANES * WARPS)
    tile = (row_of * DV + m // LANES % WARPS * C)[:, None] + tl.arange(0, C)[None, :]
    state += (batch * heads + h) * DK * DV
    # channels of q, k and v in the convolution
    q_c, k_c, v_c = j * DK, (key_heads + j) * DK, 2 * key_heads * DK + h * DV
    conv_state += batch * conv_b

    # before the wait: what no kernel writes, and hints
    if PDL:
        _prefetch(state + tl.arange(0, DK * DV // 32) * 32)
        if W > 0:
            _prefetch(conv_state + (q_c + row) * conv_c)
            _prefetch(conv_state + (k_c + row) * conv_c)
            _prefetch(conv_state + (v_c + column) * conv_c)
    if W > 0:
        q_taps = load_columns(conv_weight + q_c * weight_c, weight_c, 1, W, DK)
        k_taps = load_columns(conv_weight + k_c * weight_c, weight_c, 1, W, DK)
        v_taps = load_columns(conv_weight + v_c * weight_c, weight_c, 1, W, DV)
    rate = -tl.exp(tl.load(A_log + h).to(tl.float32))
    bias = tl.load(dt_bias + h).to(tl.float32)
    weight = tl.load(norm_weight + column).to(tl.float32)

    wait_for_previous(PDL)
    q += batch * q_b + j * q_j
    k += batch * k_b + j * k_j
    v += batch * v_b + j * v_j + i * v_i
    if W > 0:
        q_conv, k_conv = conv_state + q_c * conv_c, conv_state + k_c * conv_c
        v_conv, past = conv_state + v_c * conv_c, (KEPT - W + 1) * conv_k
        q_inputs = load_columns(q_conv + past, conv_c, conv_k, W - 1, DK)
        q_inputs += load_columns(q, 1, 0, 1, DK)
        k_inputs = load_columns(k_conv + past, conv_c, conv_k, W - 1, DK)
        k_inputs += load_columns(k, 1, 0, 1, DK)
        v_inputs = load_columns(v_conv + past, conv_c, conv_k, W - 1, DV)
        v_inputs += load_columns(v, 1, 0, 1, DV)
    else:
        q = tl.load(q + row).to(tl.float32)
        k = tl.load(k + row).to(tl.float32)
        v = tl.load(v + column).to(tl.float32)
    gate = tl.load(z + batch * z_b + j * z_j + i * z_i + column).to(tl.float32)
    beta = tl.sigmoid(tl.load(b + batch * b_b + j * b_j + i * b_i).to(tl.float32))
    step = tl.load(a + batch * a_b + j * a_j + i * a_i).to(tl.float32)
    S = tl.load(state + tile, eviction_policy="evict_first")
    start_next(PDL)

    if W > 0:
        q = convolve(q_inputs, q_taps, 0)
        k = convolve(k_inputs, k_taps, 0)
        v = convolve(v_inputs, v_taps, 0)

    qq, kk, qk = tl.reduce((q * q, k * k, q * k), 0, _add3)
    last = True
    if W > 0 and R > 1:
        # The sums above met at a barrier between warps: every thread has its inputs, and not just
        # asked for them; the stores at the end wait for what a count returns. That orders them
        # without a fence, which would wait for S. (Sums within one warp meet at no barrier.)
        SEM: tl.constexpr = "relaxed" if DK > 32 else "acq_rel"
        tl.debug_barrier()
        arrivals += (batch * key_heads + j) * DK + row
        last = tl.atomic_add(arrivals, 1, sem=SEM) == R - 1
        tl.store(arrivals, 0, mask=last)
    q_scale, k_scale = tl.rsqrt(qq + 1e-6), tl.rsqrt(kk + 1e-6)
    qk *= q_scale * k_scale
    q = tl.trans(tl.reshape(q * q_scale, (LANES, ROWS)))[:, None, :, None]
    k = tl.trans(tl.reshape(k * k_scale, (LANES, ROWS)))[:, None, :, None]
    v = tl.reshape(v, (WARPS, C))
    S = tl.reshape(S, (ROWS, WARPS, LANES, C))
    decay = tl.exp(rate * _softplus(step + bias))
    Sq, Sk = tl.sum(tl.sum(S * q, 0), 1), tl.sum(tl.sum(S * k, 0), 1)
    change = beta * (v - decay * Sk)
    S = decay * S + k * change[None, :, None, :]
    tl.store(state + tile, tl.reshape(S, (DK * WARPS, C)), eviction_policy="evict_first")
    y = tl.reshape(decay * Sq + change * qk, (DV,)) * (DK**-0.5)
    y *= tl.rsqrt(tl.sum(y * y) / DV + eps) * weight * silu(gate)
    tl.store(out + (batch * heads + h) * DV + column, y)
    if W > 0:
        tl.debug_barrier()  # threads overwrite what others have read
        store_last(v_inputs, v_conv, conv_c, conv_k, True, KEPT, DV)
        store_last(q_inputs, q_conv, conv_c, conv_k, last, KEPT, DK)
        store_last(k_inputs, k_conv, conv_c, conv_k, last, KEPT, DK)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    arrivals: Tensor | None,
) -> None:
    check(q.dim() == 3, f"q: expected [B, nK, dk], found {list(q.shape)}")
    check(v.dim() == 4, f"v: expected [B, nK, r, dv], found {list(v.shape)}")
    batch, key_heads, dk = q.shape
    ratio, dv = v.shape[2:]
    heads = key_heads * ratio
    for name, n in (("dk", dk), ("dv", dv)):
        check(n & (n - 1) == 0, f"{name}: expected a power of two, found {n}")
    check(batch < 65536, f"q: expected fewer than 65536 sequences, found {batch}")
    expected = {
        "k": (k, [batch, key_heads, dk]),
        "v": (v, [batch, key_heads, ratio, dv]),
        "z": (z, [batch, key_heads, ratio, dv]),
        "b": (b, [batch, key_heads, ratio]),
        "a": (a, [batch, key_heads, ratio]),
        "A_log": (A_log, [heads]),
        "dt_bias": (dt_bias, [heads]),
        "norm_weight": (norm_weight, [dv]),
        "state": (state, [batch, heads, dk, dv]),
    }
    if conv_state is not None:
        check(conv_weight is not None, "conv_weight: expected with conv_state, found None")
        check(arrivals is not None or ratio == 1, f"arrivals: expected, {ratio=}, found None")
        channels = 2 * key_heads * dk + heads * dv
        width = conv_weight.shape[-1]
        check(width > 1, f"conv_weight: expected at least 2 taps, found {width}")
        kept = width - (conv_state.shape[-1] == width - 1)
        expected["conv_weight"] = conv_weight, [channels, width]
        expected["conv_state"] = conv_state, [batch, channels, kept]
        if arrivals is not None:
            expected["arrivals"] = arrivals, [batch, key_heads, dk]
    for name, (tensor, shape) in expected.items():
        found = list(tensor.shape)
        check(found == shape, f"{name}: expected {shape}, found {found}")
        check(tensor.device == q.device, f"{name}: expected on {q.device}, found {tensor.device}")
        if name in ("k", "v", "z", "b", "a", "conv_state"):
            check(tensor.dtype == q.dtype, f"{name}: expected {q.dtype}, found {tensor.dtype}")
        strides = tensor.stride()
        if name in ("k", "v", "z"):
            check(strides[-1] == 1, f"{name}: expected adjacent columns, found {strides=}")
        elif name not in ("b", "a", "conv_state"):
            check(tensor.is_contiguous(), f"{name}: expected contiguous, found {strides=}")
    check(q.stride(2) == 1, f"q: expected adjacent columns, found strides {q.stride()}")
    kinds = (torch.float64,) if q.dtype == torch.float64 else (torch.float32,)
    check(state.dtype in kinds, f"state: expected {kinds[0]}, found {state.dtype}")
    if arrivals is not None:
        check(arrivals.dtype == torch.int32, f"arrivals: expected int32, found {arrivals.dtype}")


def gated_delta_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float = 1e-6,
    tiled: bool = False,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """One token of B sequences: the formulas at the top of this file → [B, nV, dv], q's dtype.

    q, k [B, nK, dk], v, z [B, nK, r, dv], b, a [B, nK, r]: bf16, fp16 or fp32, columns of q, k, v,
    z adjacent, other strides any: `gdn_projection.views` makes them of the projections' outputs.
    A_log, dt_bias [nK·r], norm_weight [dv], value heads in the checkpoint's order (`tiled`: head
    i·nK + j reads key head j, else j·r + i). `state` [B, nV, dk, dv], fp32, contiguous, written.
    `conv_state` [B, 2·nK·dk + nV·dv, W − 1 or W], q's dtype, any strides, shifted by one;
    `conv_weight` [.., W]. `arrivals` int32 [B, nK, dk], where r > 1: zeros, and zeros again
    afterwards; two launches at a time need two. dk and dv are powers of two, B below 65536.
    Raises KernelError for other shapes, dtypes, devices, strides.
    """
    weights = (A_log, dt_bias, norm_weight)
    _check(q, k, v, z, b, a, *weights, state, conv_state, conv_weight, arrivals)
    batch, key_heads, ratio, dv = v.shape
    warps = min(WARPS, dv // 4)
    width, kept, strides = 0, 0, (0, 0, 0, 0)
    if conv_state is None:
        conv_state = conv_weight = q  # not read
    else:
        width, kept = conv_weight.shape[1], conv_state.shape[2]
        strides = *conv_state.stride(), conv_weight.stride(0)
    out = q.new_empty(batch, key_heads * ratio, dv)
    launch(
        _decode, (key_heads * ratio, batch),
        q, k, v, z, b, a, *weights, state, conv_state, conv_weight,
        q if arrivals is None else arrivals, out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:3], *z.stride()[:3], *b.stride(),
        *a.stride(), *strides, key_heads, eps,
        R=ratio, DK=q.shape[2], DV=dv, W=width, KEPT=kept,
        TILED=tiled, WARPS=warps, pdl=pdl(q), num_warps=warps,
    )  # fmt: skip
    return out


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float = 1e-6,
    tiled: bool = False,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    weights = (A_log, dt_bias, norm_weight)
    _check(q, k, v, z, b, a, *weights, state, conv_state, conv_weight, arrivals)
    return reference(
        q, k, v, z, b, a, *weights, state, eps, tiled, conv_state, conv_weight, arrivals
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(v.shape[0], v.shape[1] * v.shape[2], v.shape[3])


register(
    "gated_delta_decode(Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor A_log, "
    "Tensor dt_bias, Tensor norm_weight, Tensor(a!) state, float eps=1e-6, bool tiled=False, "
    "Tensor(b!)? conv_state=None, Tensor? conv_weight=None, Tensor(c!)? arrivals=None) -> Tensor",
    cuda=gated_delta_decode,
    cpu=_cpu,
    fake=_fake,
)
