"""From the fused product's rows to attention's inputs in one launch: split, norm of q and k heads,
rotary position embedding, and the step into the key-value cache.

A row of `qkv` [B, T, W] holds H query heads, Hkv key heads and Hkv value heads of d; with a gate
each query head is [query | gate] (Qwen3-Next, Qwen3.5); without value heads v is k as it was before
norm and rotation (Gemma 4). The gate needs no copy: `gate_view` is a strided view of `qkv`.

Norm: RMSNorm (Zhang & Sennrich, 2019) over each head. Rotary embedding: RoFormer (Su et al., 2021),
in the four layouts of transformers' models (`ROPES`). The kernel computes in float32 and rounds
once, at the end; plain PyTorch rounds after each step.

A call of one token is one wait for the previous kernel and one trip to memory; of many tokens, a
copy. So programs are small: some heads of one token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous
from .norm import CONVENTIONS, rms_norm_reference

#: Layout → is a pair x[2i] with x[2i + 1], or x[i] with x[i + n/2]; does it have one angle, entry i
#: of cos and sin, or one for each of its elements.
ROPES = {
    "halves": (False, False),
    "compact": (False, True),
    "pairs": (True, False),
    "glm": (True, True),
}
#: Elements of q, k or v and warps a program, for at most FEW_TOKENS, and for more.
FEW, MANY, FEW_TOKENS = (512, 1), (2048, 2), 64


class Options(NamedTuple):
    """What the operations take after their tensors.

    heads, kv_heads, head_dim: H, Hkv, d. cos, sin [B or 1, T, n ≤ d] turn the first n of each q and
    k head ("compact": 2n) as `rope` says; None turns nothing. q_weight, k_weight [d]: RMSNorm of
    each head with `eps`; `norm`: llama (w · y), gemma ((1 + w) · y), late (w · y: it differs from
    llama in where plain PyTorch rounds). `gate`: query heads are [query | gate]. `v_norm`: v is
    normed, without a weight.
    """

    heads: int
    kv_heads: int
    head_dim: int
    cos: Tensor | None = None
    sin: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 1e-6
    norm: str = "llama"
    rope: str = "halves"
    gate: bool = False
    v_norm: bool = False

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim * (2 if self.gate else 1)

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def gate_view(qkv: Tensor, heads: int, head_dim: int) -> Tensor:
    """The gate's part of `qkv` [B, T, W] with [query | gate] heads: a view [B, T, H, d]."""
    q = qkv[..., : 2 * heads * head_dim].unflatten(-1, (heads, 2, head_dim))
    return q[..., 1, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    half, kind = cos.shape[-1] // 2, x.dtype
    if rope == "compact":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    elif rope == "glm":
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    elif rope == "pairs":
        x = x.to(torch.promote_types(kind, torch.float32))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if rope in ("pairs", "glm"):
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return torch.cat((turned * cos + other * sin, rest), -1).to(kind)


def reference(qkv: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_rope` in plain PyTorch, rounded where transformers rounds."""
    o = Options(*args, **kwargs)
    q, k, v = qkv.tensor_split((o.q_width, o.q_width + o.kv_width), -1)
    v = v if v.shape[-1] else k
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in zip((q, k, v), _heads(o), strict=True))
    q = q[..., : o.head_dim]
    if o.v_norm:
        v = rms_norm_reference(v, None, o.eps, o.norm)
    if o.q_weight is not None:
        q = rms_norm_reference(q, o.q_weight, o.eps, o.norm)
    if o.k_weight is not None:
        k = rms_norm_reference(k, o.k_weight, o.eps, o.norm)
    if o.cos is not None:
        q, k = (_rotate(t, o.cos[:, :, None], o.sin[:, :, None], o.rope) for t in (q, k))
    # a custom operation may not return a view of what it was given
    return tuple(t.clone(memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k, v))


def reference_cache(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor, *args, **kwargs
) -> Tensor:
    """`qkv_rope_cache` in plain PyTorch; it raises where a position is outside of the cache."""
    q, k, v = reference(qkv, *args, **kwargs)
    positions = positions.expand(qkv.shape[:2])[:, None, :, None]
    key_cache.scatter_(2, positions.expand_as(k), k)
    value_cache.scatter_(2, positions.expand_as(v), v)
    return q


@jit
def prefetch(pointers, PDL: tl.constexpr):
    """Ask for the cache lines at `pointers`, even before what may still write them has ended: they
    go to L2, where writers and readers meet, so nothing stale is ever read."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def _write_heads(
    x, head, out, out_strides, place, sizes, weight, eps, angles,
    HEAD: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, turn and write heads `head` [BLOCK, 1] of a token, HEAD elements apart at x. A pair's
    two elements are loaded apart, so that they meet in one thread.

    out_strides (batch, head, row); place (batch, row, where to read the row or None); sizes (heads,
    rows); angles (cos, sin) of the token; ROPE (elements that are turned, *ROPES[rope]); BLOCKS:
    half of what is turned and the rest, in powers of two.
    """
    N: tl.constexpr = ROPE[0]
    PAIRS: tl.constexpr = ROPE[1]
    cos, sin = angles
    # every head's row of pointers to weights, cos and sin: loaded in the layout of the heads
    i, rest = tl.arange(0, BLOCKS[0]) + 0 * head, N + tl.arange(0, BLOCKS[1]) + 0 * head
    half, in_rest = i < N // 2, rest < D
    i1 = 2 * i if PAIRS else i
    i2 = i1 + (1 if PAIRS else N // 2)
    if weight is not None:  # written by no kernel, so before the wait
        w1 = tl.load(weight + i1, half, 0.0).to(tl.float32) + OFFSET
        w2 = tl.load(weight + i2, half, 0.0).to(tl.float32) + OFFSET
        w3 = tl.load(weight + rest, in_rest, 0.0).to(tl.float32) + OFFSET
    if N > 0:
        prefetch(cos, PDL)
        prefetch(sin, PDL)
    batch, row, position = place
    if position is not None:
        prefetch(position, PDL)
    wait_for_previous(PDL)
    start_next(PDL)  # earlier, the next programs are spread unevenly beside those still running

    here = head < sizes[0]
    x += head * HEAD
    if N > 0:
        a = tl.load(x + i1, here & half, 0.0).to(tl.float32)
        b = tl.load(x + i2, here & half, 0.0).to(tl.float32)
        at1 = i if ROPE[2] else i1
        at2 = i if ROPE[2] else i2
        cos1 = tl.load(cos + at1, half, 0.0).to(tl.float32)
        sin1 = tl.load(sin + at1, half, 0.0).to(tl.float32)
        cos2 = tl.load(cos + at2, half, 0.0).to(tl.float32)
        sin2 = tl.load(sin + at2, half, 0.0).to(tl.float32)
    if N < D:
        c = tl.load(x + rest, here & in_rest, 0.0).to(tl.float32)
    if position is not None:
        row = tl.load(position)
        here = here & (row >= 0) & (row < sizes[1])

    if NORM:
        square = tl.zeros([head.shape[0]], tl.float32)
        if N > 0:
            square += tl.sum(a * a + b * b, 1)
        if N < D:
            square += tl.sum(c * c, 1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        if N > 0:
            a, b = a * scale, b * scale
        if N < D:
            c = c * scale
    if weight is not None:
        if N > 0:
            a, b = a * w1, b * w2
        if N < D:
            c = c * w3
    out += batch * out_strides[0] + head * out_strides[1] + row * out_strides[2]
    kind = out.dtype.element_ty
    if N > 0:
        tl.store(out + i1, (a * cos1 - b * sin1).to(kind), here & half)
        tl.store(out + i2, (b * cos2 + a * sin2).to(kind), here & half)
    if N < D:
        tl.store(out + rest, c.to(kind), here & in_rest)


@jit
def _qkv_rope_kernel(
    qkv, q, k, v, q_weight, k_weight, cos, sin, positions, tokens, rows, eps,
    qkv_strides, q_strides, k_strides, v_strides, cos_strides, sin_strides, position_strides,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr,
    GATE: tl.constexpr, V_IS_K: tl.constexpr, V_NORM: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's BLOCK heads of q, of k or of v."""
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK - 1) // BLOCK
    Q_HEAD: tl.constexpr = 2 * D if GATE else D
    token = tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)
    block = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    batch, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    x = qkv + batch * qkv_strides[0] + t * qkv_strides[1]
    x_k = x + HEADS * Q_HEAD
    x_v = x_k if V_IS_K else x_k + KV_HEADS * D
    if cos is not None:
        cos += batch * cos_strides[0] + t * cos_strides[1]
        sin += batch * sin_strides[0] + t * sin_strides[1]
    angles = (cos, sin)
    if positions is not None:
        positions += batch * position_strides[0] + t * position_strides[1]
    place, sizes = (batch, t, positions), (KV_HEADS, rows)
    head = tl.arange(0, BLOCK).to(tl.int64)[:, None]
    if block < Q_BLOCKS:
        _write_heads(
            x, block * BLOCK + head, q, q_strides, (batch, t, None), (HEADS, tokens), q_weight, eps,
            angles, Q_HEAD, D, ROPE, q_weight is not None, OFFSET, BLOCKS, PDL,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        _write_heads(
            x_k, (block - Q_BLOCKS) * BLOCK + head, k, k_strides, place, sizes, k_weight, eps,
            angles, D, D, ROPE, k_weight is not None, OFFSET, BLOCKS, PDL,
        )  # fmt: skip
    else:
        _write_heads(
            x_v, (block - Q_BLOCKS - KV_BLOCKS) * BLOCK + head, v, v_strides, place, sizes, None,
            eps, (None, None), D, D, (0, False, False), V_NORM, 0.0, (1, WHOLE), PDL,
        )  # fmt: skip


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _heads(o: Options) -> tuple[int, int, int]:
    return o.heads, o.kv_heads, o.kv_heads


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            message = f"{name}: expected on {like.device}, found on {tensor.device}"
            check(tensor.device == like.device, message)


def _check_input(qkv: Tensor, o: Options) -> None:
    check(qkv.dim() == 3, f"qkv: expected [B, T, W], found {list(qkv.shape)}")
    check(
        qkv.dtype in (torch.bfloat16, torch.float16, torch.float32),
        f"qkv: expected bfloat16, float16 or float32, found {qkv.dtype}",
    )
    check(qkv.stride(-1) == 1, f"qkv: expected rows without gaps, found strides {qkv.stride()}")
    widths = o.q_width + o.kv_width, o.q_width + 2 * o.kv_width
    check(
        qkv.shape[-1] in widths,
        f"qkv: expected {widths[1]} columns, or {widths[0]} without v, found {qkv.shape[-1]}",
    )
    check(o.norm in CONVENTIONS, f"norm: expected one of {CONVENTIONS}, found {o.norm!r}")
    check(o.rope in ROPES, f"rope: expected one of {tuple(ROPES)}, found {o.rope!r}")
    for name, weight in (("q_weight", o.q_weight), ("k_weight", o.k_weight)):
        if weight is not None:
            check(
                list(weight.shape) == [o.head_dim] and weight.is_contiguous(),
                f"{name}: expected [{o.head_dim}], found {list(weight.shape)}",
            )
    check_device(qkv, q_weight=o.q_weight, k_weight=o.k_weight)
    check((o.cos is None) == (o.sin is None), "cos and sin: expected both or neither")
    if o.cos is None:
        return
    limit, even = (o.head_dim // 2, 1) if o.rope == "compact" else (o.head_dim, 2)
    for name, angles in (("cos", o.cos), ("sin", o.sin)):
        check(
            angles.dim() == 3
            and angles.shape[0] in (1, qkv.shape[0])
            and angles.shape[1] == qkv.shape[1]
            and angles.shape == o.cos.shape
            and 0 < angles.shape[2] <= limit
            and angles.shape[2] % even == 0
            and angles.stride(-1) == 1,
            f"{name}: expected [B, T, even n ≤ {limit}] with B, T of qkv {list(qkv.shape[:2])}, "
            f"found {list(angles.shape)}",
        )
    check_device(qkv, cos=o.cos, sin=o.sin)


def _run(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, o: Options):
    batch, tokens, width = qkv.shape
    cos, sin, turned = o.cos, o.sin, 0
    if cos is not None:
        turned = cos.shape[-1] * (2 if o.rope == "compact" else 1)
        cos, sin = (t.expand(batch, -1, -1) for t in (cos, sin))
    elements, warps = FEW if batch * tokens <= FEW_TOKENS else MANY
    half, rest = power_of_2(turned // 2), power_of_2(o.head_dim - turned)
    held = 2 * half * (turned > 0) + rest * (turned < o.head_dim)  # elements of a head, padded
    block = min(1 << max(1, elements // held).bit_length() - 1, power_of_2(o.heads))
    launch(
        _qkv_rope_kernel,
        (batch * tokens * sum(-(-n // block) for n in _heads(o)),),
        *(qkv, q, k, v, o.q_weight, o.k_weight, cos, sin, positions, tokens, k.shape[2], o.eps),
        *(None if t is None else t.stride()[:-1] for t in (qkv, q, k, v, cos, sin)),
        None if positions is None else positions.stride(),
        pdl=pdl(qkv),
        HEADS=o.heads,
        KV_HEADS=o.kv_heads,
        D=o.head_dim,
        ROPE=(turned, *ROPES[o.rope]),
        GATE=o.gate,
        V_IS_K=width == o.q_width + o.kv_width,
        V_NORM=o.v_norm,
        OFFSET=1.0 if o.norm == "gemma" else 0.0,
        BLOCK=block,
        BLOCKS=(half, rest),
        WHOLE=power_of_2(o.head_dim),
        num_warps=warps,
    )


def _new(qkv: Tensor, heads: int, head_dim: int) -> Tensor:
    """[B, H, T, d], stored as [B, T, H, d]: what a transposed view of a product's rows would be."""
    return qkv.new_empty(*qkv.shape[:2], heads, head_dim).transpose(1, 2)


def qkv_rope(qkv: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, d], k and v [B, Hkv, T, d], stored as [B, T, heads, d].

    qkv [B, T, W] bfloat16, float16 or float32, any strides between rows, then `Options`. W is
    (H + 2 Hkv) d, with `gate` (2 H + 2 Hkv) d, and Hkv d less where v is k.

    Raises KernelError for a shape, dtype, device or name other than these.
    """
    o = Options(*args, **kwargs)
    _check_input(qkv, o)
    q, k, v = (_new(qkv, n, o.head_dim) for n in _heads(o))
    _run(qkv, q, k, v, None, o)
    return q, k, v


def qkv_rope_cache(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor, *args, **kwargs
) -> Tensor:
    """As `qkv_rope`, with k and v written to rows `positions` (int64, [T] or [B, T], read on the
    device) of key_cache and value_cache [B, Hkv, S, d], any strides but the last. Returns q alone.
    What would be written outside of the cache's S rows is left out."""
    o = Options(*args, **kwargs)
    _check_input(qkv, o)
    batch, tokens = qkv.shape[:2]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        rows = key_cache.shape[2] if key_cache.dim() == 4 else "S"
        expected = [batch, o.kv_heads, rows, o.head_dim]
        check(
            list(cache.shape) == expected and cache.stride(-1) == 1,
            f"{name}: expected {expected}, rows without gaps, found {list(cache.shape)}",
        )
        check(cache.dtype == qkv.dtype, f"{name}: expected {qkv.dtype}, found {cache.dtype}")
    check(
        positions.dtype == torch.int64 and list(positions.shape) in ([tokens], [batch, tokens]),
        f"positions: expected int64 [{tokens}] or [{batch}, {tokens}], "
        f"found {positions.dtype} {list(positions.shape)}",
    )
    check_device(qkv, key_cache=key_cache, value_cache=value_cache, positions=positions)
    q = _new(qkv, o.heads, o.head_dim)
    _run(qkv, q, key_cache, value_cache, positions.expand(batch, tokens), o)
    return q


def _fake(qkv: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    o = Options(*args, **kwargs)
    return tuple(_new(qkv, n, o.head_dim) for n in _heads(o))


def _fake_cache(qkv, key_cache, value_cache, positions, *args, **kwargs) -> Tensor:
    return _fake(qkv, *args, **kwargs)[0]


_OPTIONS = (
    "int heads, int kv_heads, int head_dim, Tensor? cos=None, Tensor? sin=None, "
    "Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, str norm='llama', "
    "str rope='halves', bool gate=False, bool v_norm=False"
)
register(
    f"qkv_rope(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    cuda=qkv_rope,
    cpu=reference,
    fake=_fake,
)
register(
    "qkv_rope_cache(Tensor qkv, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor positions, "
    f"{_OPTIONS}) -> Tensor",
    cuda=qkv_rope_cache,
    cpu=reference_cache,
    fake=_fake_cache,
)
