"""ggml blocks as numbers: in registers, and as a kernel that stores them.

float32 weights equal gguf-py's bit for bit.
"""
# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from .gguf_words import byte_of
from .launch import jit, start_next, tl, wait_for_previous


@jit
def dequantized(weights, i: tl.constexpr, TRAITS: tl.constexpr):
    """A unit's weights 4i … 4i + 3 as float32. The product of d, s and q is exact, so it does not
    matter whether the difference fuses with it."""
    q, s, m, d, dmin = weights
    scale = d
    if TRAITS[1] > 0:
        scale = d * s[i * TRAITS[1] // 8].to(tl.float32)
    values = ()
    for b in tl.static_range(4):
        value = scale * byte_of(q[i], b).to(tl.float32)
        if TRAITS[2] > 0:
            value -= dmin * m[i * TRAITS[2] // 8].to(tl.float32)
        elif TRAITS[3]:
            value -= dmin
        values = values + (value,)
    return values


@jit
def joined(parts, COUNT: tl.constexpr):
    """COUNT (2, 4, … 64) tensors [C] → [C, COUNT]."""
    for level in tl.static_range(6):
        new = ()
        for i in tl.static_range(COUNT >> level + 1):
            new = new + (tl.join(parts[i], parts[i + (COUNT >> level + 1)]),)
        if COUNT >> level > 1:
            parts = new
    return tl.reshape(parts[0], (parts[0].shape[0], COUNT))


@jit
def dequantize_kernel(
    w, out, LOAD: tl.constexpr, UNPACK: tl.constexpr, PLACES: tl.constexpr, TRAITS: tl.constexpr,
    ROW_BYTES: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's LANES units in out's dtype; out [rows, K] is contiguous."""
    WORDS: tl.constexpr = 8 * TRAITS[0]
    UNITS: tl.constexpr = K // (4 * WORDS)
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clamped = tl.minimum(unit, UNITS - 1)
    block, sub = clamped // TRAITS[5], clamped % TRAITS[5]
    weights = UNPACK(LOAD(w + row * ROW_BYTES, block, sub, 0, PLACES, 8), sub, 0, 8)
    a, b, c, d = (), (), (), ()
    for i in tl.static_range(WORDS):
        four = dequantized(weights, i, TRAITS)
        a, b = a + (four[0].to(out.dtype.element_ty),), b + (four[1].to(out.dtype.element_ty),)
        c, d = c + (four[2].to(out.dtype.element_ty),), d + (four[3].to(out.dtype.element_ty),)
    even = tl.join(joined(a, WORDS), joined(c, WORDS))
    odd = tl.join(joined(b, WORDS), joined(d, WORDS))
    values = tl.reshape(tl.join(even, odd), (LANES, 4 * WORDS))
    wait_for_previous(PDL)
    start_next(PDL)
    at = row * K + unit[:, None] * (4 * WORDS) + tl.arange(0, 4 * WORDS)[None, :]
    tl.store(out + at, values, mask=(unit < UNITS)[:, None])
