"""Words from memory in the widest loads allowed, and the instructions that take four bytes a word.

What the interpreter cannot run, inline assembly, has an emulated form.
"""
# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from .launch import INTERPRETED, jit, tl

if tl is not None:
    EMULATED = tl.constexpr(INTERPRETED)


@jit
def split4(x):
    """[C, 4] → its columns."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@jit
def at_words(at, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """`COUNT` int32 words [C] from each of the addresses [C], in the widest loads allowed."""
    words = ()
    if ALIGN % 16 == 0 and COUNT % 4 == 0:
        wide = at.to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, 4)[None, :]
        for i in tl.static_range(COUNT // 4):
            words = words + split4(tl.load(wide + 4 * i))
    elif ALIGN % 8 == 0 and COUNT % 2 == 0:
        wide = at.to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, 2)[None, :]
        for i in tl.static_range(COUNT // 2):
            words = words + tl.split(tl.load(wide + 2 * i))
    elif ALIGN % 4 == 0:
        for i in tl.static_range(COUNT):
            words = words + (tl.load(at.to(tl.pointer_type(tl.int32)) + i),)
    elif ALIGN % 2 == 0:
        for i in tl.static_range(COUNT):
            low = tl.load(at.to(tl.pointer_type(tl.uint16)) + 2 * i).to(tl.int32)
            high = tl.load(at.to(tl.pointer_type(tl.uint16)) + 2 * i + 1).to(tl.int32)
            words = words + (low | high << 16,)
    else:
        for i in tl.static_range(COUNT):
            word = tl.load(at + 4 * i).to(tl.int32)
            for byte in tl.static_range(1, 4):
                word = word | tl.load(at + 4 * i + byte).to(tl.int32) << 8 * byte
            words = words + (word,)
    return words


@jit
def within(i, COUNT: tl.constexpr, STEP: tl.constexpr):
    """Whether i, which goes in steps of STEP, is below COUNT, and an i that is."""
    inside = i >= 0
    if COUNT % STEP != 0:
        inside, i = i < COUNT, tl.minimum(i, COUNT - 1)
    return inside, i


@jit
def at_floats(at, inside, COUNT: tl.constexpr):
    """`COUNT` (1, 2 or 4) float32 from each address, 0 where not `inside`."""
    if COUNT == 1:
        found = (tl.load(at, mask=inside, other=0.0),)
    else:
        wide = at[:, None] + tl.arange(0, COUNT)[None, :]
        wide = tl.load(wide, mask=inside[:, None], other=0.0)
        found = tl.split(wide) if COUNT == 2 else split4(wide)
    return found


@jit
def low_half(word):
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def high_half(word):
    return (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def permute(a, b, select):
    """CUDA's __byte_perm: byte i of the result is byte `select` nibble i (0 … 7) of b:a."""
    if EMULATED:
        out = select & 0
        for i in tl.static_range(4):
            one = select >> 4 * i & 7
            word = tl.where(one < 4, a, b)
            out = out | (word >> 8 * (one & 3) & 255) << 8 * i
        return out
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, select], tl.int32, is_pure=True, pack=1
    )


@jit
def dp4a(a, b, c):
    """c + Σ of the products of four signed bytes."""
    if EMULATED:
        for i in tl.static_range(4):
            c = c + (a << 24 - 8 * i >> 24) * (b << 24 - 8 * i >> 24)
        return c
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
    )


@jit
def byte_of(word, i: tl.constexpr):
    """Signed byte `i`."""
    return word << 24 - 8 * i >> 24
