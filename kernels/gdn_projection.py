"""Gated DeltaNet's input projections, taken apart.

`views` sees q, k, v, z, b and a of one token per key head inside the projections' outputs, whatever
the layout, without moving a byte: what the decoding kernel reads. `split` gives the parts that the
prefill wants, q|k|v in one piece: views where the layout is contiguous, one kernel
(`torch.ops.fuseweights.gdn_split`) where it is interleaved.

Layouts (r = value heads / key heads): "contiguous", Qwen3.5: [Q | K | V | Z] and [b | a], or all in
one; "tiled", GGUF's qwen35: the same, but value head h reads key head h mod nK, not h div r;
"interleaved", Qwen3-Next: per key head [q | k | v·r | z·r] and [b·r | a·r].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

LAYOUTS = ("contiguous", "interleaved", "tiled")

#: Tokens up to which a configuration of the split is used → tokens a program, warps.
CONFIGURATIONS = {64: (1, 1), 1 << 62: (8, 4)}


class Heads(NamedTuple):
    """key and value heads, and their widths"""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def ratio(self) -> int:
        return self.values // self.keys

    @property
    def group(self) -> int:
        """Columns of a key head's q, k, v·r and z·r."""
        return 2 * (self.key_dim + self.ratio * self.value_dim)


class Parts(NamedTuple):
    """Views of the projections: q, k [..., nK, dk]; v, z [..., nK, r, dv]; b, a [..., nK, r]."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


def _check(qkvz: Tensor, ba: Tensor, heads: Heads) -> None:
    check(
        heads.values % heads.keys == 0,
        f"value heads: expected a multiple of {heads.keys} key heads, found {heads.values}",
    )
    for name, x, columns in (
        ("qkvz", qkvz, heads.keys * heads.group),
        ("ba", ba, 2 * heads.values),
    ):
        found = x.shape[-1]
        check(found == columns, f"{name}: expected {columns} columns for {heads}, found {found}")
    check(qkvz.shape[:-1] == ba.shape[:-1], f"ba: expected {qkvz.shape[:-1]}, found {ba.shape}")
    check(ba.dtype == qkvz.dtype, f"ba: expected {qkvz.dtype}, found {ba.dtype}")
    check(ba.device == qkvz.device, f"ba: expected on {qkvz.device}, found on {ba.device}")


def views(qkvz: Tensor, ba: Tensor, heads: Heads, layout: str = "contiguous") -> Parts:
    """qkvz [..., nK·(2·dk + 2·r·dv)] and ba [..., 2·nV], any strides → Parts that share their
    memory. One fused output [Q | K | V | Z | b | a] is given as its two slices.
    Raises KernelError for other widths, dtypes, devices, layouts."""
    check(layout in LAYOUTS, f"layout: expected one of {LAYOUTS}, found {layout!r}")
    _check(qkvz, ba, heads)
    nk, r, dk, dv = heads.keys, heads.ratio, heads.key_dim, heads.value_dim
    if layout == "interleaved":
        q, k, v, z = qkvz.unflatten(-1, (nk, -1)).split((dk, dk, r * dv, r * dv), -1)
        b, a = ba.unflatten(-1, (nk, 2, r)).unbind(-2)
        return Parts(q, k, v.unflatten(-1, (r, dv)), z.unflatten(-1, (r, dv)), b, a)
    q, k, v, z = qkvz.split((nk * dk, nk * dk, nk * r * dv, nk * r * dv), -1)
    q, k = (x.unflatten(-1, (nk, dk)) for x in (q, k))
    order = (r, nk) if layout == "tiled" else (nk, r)
    v, z = (x.unflatten(-1, (*order, dv)) for x in (v, z))
    b, a = ba.unflatten(-1, (2, *order)).unbind(-3)
    if layout == "tiled":
        v, z, b, a = v.transpose(-3, -2), z.transpose(-3, -2), b.mT, a.mT
    return Parts(q, k, v, z, b, a)


def split(
    qkvz: Tensor, ba: Tensor, heads: Heads, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ q|k|v [..., C], z [..., nV, dv], b and a [..., nV], value heads in the layout's order:
    views, but of an interleaved layout copies. Raises KernelError as `views` does."""
    check(layout in LAYOUTS, f"layout: expected one of {LAYOUTS}, found {layout!r}")
    _check(qkvz, ba, heads)
    if layout == "interleaved":
        lead = qkvz.shape[:-1]
        flat = (x.reshape(-1, x.shape[-1]) for x in (qkvz, ba))
        parts = torch.ops.fuseweights.gdn_split(*flat, *heads)
        return tuple(x.unflatten(0, lead) for x in parts)
    values = heads.values * heads.value_dim
    qkv, z = qkvz.split((qkvz.shape[-1] - values, values), -1)
    b, a = ba.split(heads.values, -1)
    return qkv, z.unflatten(-1, (heads.values, heads.value_dim)), b, a


def reference(qkvz: Tensor, ba: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The interleaved split in plain PyTorch."""
    q, k, v, z, b, a = views(qkvz, ba, heads, "interleaved")
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    z, b, a = (x.flatten(1, 2).clone(memory_format=torch.contiguous_format) for x in (z, b, a))
    return qkv, z, b, a


@jit
def _split(
    qkvz,
    ba,
    qkv,
    z,
    b,
    a,
    qkvz_t,
    ba_t,
    ba_c,
    tokens,
    key_heads,
    R: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    j, heads = tl.program_id(1), key_heads * R
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k, v = tl.arange(0, DK)[None, :], tl.arange(0, DV)[None, :]
    here, tile = token < tokens, (token < tokens)[:, None]
    qkvz += j * 2 * (DK + R * DV) + token[:, None] * qkvz_t
    ba += j * 2 * R * ba_c + token * ba_t
    wait_for_previous(PDL)
    # every load before the first store, which could be to where a load reads, for all it knows
    parts = (tl.load(qkvz + k, mask=tile), tl.load(qkvz + DK + k, mask=tile))
    for i in tl.static_range(2 * R):
        parts += (tl.load(qkvz + 2 * DK + i * DV + v, mask=tile),)
    gates = (tl.load(ba, mask=here),)
    for i in tl.static_range(1, 2 * R):
        gates += (tl.load(ba + i * ba_c, mask=here),)
    start_next(PDL)
    qkv += token[:, None] * (2 * key_heads * DK + heads * DV) + j * DK
    tl.store(qkv + k, parts[0], mask=tile)
    tl.store(qkv + key_heads * DK + k, parts[1], mask=tile)
    qkv += 2 * key_heads * DK - j * DK
    for i in tl.static_range(R):
        h = j * R + i
        tl.store(qkv + h * DV + v, parts[2 + i], mask=tile)
        tl.store(z + (token[:, None] * heads + h) * DV + v, parts[2 + R + i], mask=tile)
        tl.store(b + token * heads + h, gates[i], mask=here)
        tl.store(a + token * heads + h, gates[R + i], mask=here)


def gdn_split(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Interleaved projections of T tokens → q|k|v [T, 2·nK·dk + nV·dv], z [T, nV, dv], b, a
    [T, nV], contiguous. qkvz [T, nK·(2·dk + 2·r·dv)], columns adjacent, any row stride; ba
    [T, 2·nV], any strides; any dtype; dk and dv powers of two. Raises KernelError for others."""
    heads = Heads(key_heads, value_heads, key_dim, value_dim)
    _check_split(qkvz, ba, heads)
    tokens = qkvz.shape[0]
    values = value_heads * value_dim
    qkv = qkvz.new_empty(tokens, 2 * key_heads * key_dim + values)
    z = qkvz.new_empty(tokens, value_heads, value_dim)
    b, a = (ba.new_empty(tokens, value_heads) for _ in range(2))
    rows, warps = next(c for most, c in CONFIGURATIONS.items() if tokens <= most)
    launch(
        _split, (-(-tokens // rows), key_heads),
        qkvz, ba, qkv, z, b, a, qkvz.stride(0), *ba.stride(), tokens, key_heads,
        R=heads.ratio, DK=key_dim, DV=value_dim, ROWS=rows, pdl=pdl(qkvz), num_warps=warps,
    )  # fmt: skip
    return qkv, z, b, a


def _check_split(qkvz: Tensor, ba: Tensor, heads: Heads) -> None:
    check(qkvz.dim() == 2 == ba.dim(), f"expected [T, columns], found {qkvz.shape} and {ba.shape}")
    _check(qkvz, ba, heads)
    for name, n in (("dk", heads.key_dim), ("dv", heads.value_dim)):
        check(n & (n - 1) == 0, f"{name}: expected a power of two, found {n}")
    check(qkvz.stride(1) == 1, f"qkvz: expected adjacent columns, found strides {qkvz.stride()}")


def _cpu(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = Heads(key_heads, value_heads, key_dim, value_dim)
    _check_split(qkvz, ba, heads)
    return reference(qkvz, ba, heads)


def _fake(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, values = qkvz.shape[0], value_heads * value_dim
    return (
        qkvz.new_empty(tokens, 2 * key_heads * key_dim + values),
        qkvz.new_empty(tokens, value_heads, value_dim),
        ba.new_empty(tokens, value_heads),
        ba.new_empty(tokens, value_heads),
    )


register(
    "gdn_split(Tensor qkvz, Tensor ba, int key_heads, int value_heads, int key_dim, int value_dim)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=gdn_split,
    cpu=_cpu,
    fake=_fake,
)
