"""How a Triton program reads ggml blocks: per type, one function that loads a lane's share and one
that turns it into signed bytes.

A lane's share is a unit: 32·groups weights that follow each other, `groups` being what one field's
words hold (Q4_K: a word's low nibbles are one group of 32, its high nibbles the next); a block has
`units` of them. Loading and unpacking are apart so that words can be on their way before the
activations are there.

`load` (row, block, sub, part, places, WORDS) → int32 words as stored, of unit `sub` of a block.
WORDS, how many of a group's eight words a lane takes, is 8, or 2, the quarter `part`, which a
tensor core's operand needs. `unpack` (words, sub, part, WORDS) → (q, s, m, d, dmin): q:
WORDS·groups words, four weights a word as signed bytes, times 16, 8, 4 … where an offset binary
number became two's complement by a flipped top bit; s, m: integer scales and minima, as many a
group as `scales` and `minima` say; d, dmin: float32. Then weight = d·s·q − dmin·m.
"""
# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .gguf_types import FP4, IQ4
from .gguf_words import at_words, byte_of, high_half, low_half, permute
from .launch import jit, tl

if tl is not None:
    # as signed words: 0x80 in every byte, 0xC0, 0xF0
    TOP, TOP2, TOP4 = (tl.constexpr(n - (1 << 32)) for n in (0x80808080, 0xC0C0C0C0, 0xF0F0F0F0))


@jit
def field(row, block, F: tl.constexpr, i: tl.constexpr, inside, COUNT: tl.constexpr):
    """`COUNT` words of a block's field `i`, from byte `inside` of it."""
    return at_words(row + F[i][0] + (block * F[i][1] + inside), COUNT, F[i][2])


@jit
def half_at(row, block, F: tl.constexpr, i: tl.constexpr):
    """A field of one float16, as an int32."""
    at = row + F[i][0] + block * F[i][1]
    return tl.load(at.to(tl.pointer_type(tl.uint16))).to(tl.int32)


# Legacy types: blocks of 32; a byte's low nibble is weight i, its high one weight i + 16, so that
# half as many words as the group has are loaded, and two come of each.


@jit
def load_half_qs(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 1, part * (2 * WORDS), WORDS // 2)
    return (half_at(row, block, F, 0),) + qs


@jit
def load_q8_0(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    return (half_at(row, block, F, 0),) + field(row, block, F, 1, part * (4 * WORDS), WORDS)


@jit
def load_word_qs(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 1, part * (2 * WORDS), WORDS // 2)
    return field(row, block, F, 0, 0, 1) + qs


@jit
def load_q5_0(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 2, part * (2 * WORDS), WORDS // 2)
    return (half_at(row, block, F, 0),) + field(row, block, F, 1, 0, 1) + qs


@jit
def load_q5_1(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 2, part * (2 * WORDS), WORDS // 2)
    return field(row, block, F, 0, 0, 1) + field(row, block, F, 1, 0, 1) + qs


@jit
def unpack_q8_0(raw, sub, part, WORDS: tl.constexpr):
    return raw[1:], (), (), low_half(raw[0]), 0.0


@jit
def unpack_q4_0(raw, sub, part, WORDS: tl.constexpr):
    q = ()
    for i in tl.static_range(1, 1 + WORDS // 2):
        q = q + (raw[i] << 4 & TOP4 ^ TOP,)
    for i in tl.static_range(1, 1 + WORDS // 2):
        q = q + (raw[i] & TOP4 ^ TOP,)
    return q, (), (), low_half(raw[0]) * 0.0625, 0.0


@jit
def nibbles(raw, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Low nibbles of `COUNT` words, then high ones."""
    q = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        q = q + (raw[i] & 0x0F0F0F0F,)
    for i in tl.static_range(FIRST, FIRST + COUNT):
        q = q + (raw[i] >> 4 & 0x0F0F0F0F,)
    return q


@jit
def unpack_q4_1(raw, sub, part, WORDS: tl.constexpr):
    return nibbles(raw, 1, WORDS // 2), (), (), low_half(raw[0]), -high_half(raw[0])


@jit
def fifth(high, i, BIT: tl.constexpr, MASK: tl.constexpr):
    """Bits 4i … 4i + 3 of `high` to bit `BIT` of four bytes: no two of the products' bits meet."""
    return (high >> 4 * i & 15) * (0x00204081 << BIT) & MASK


@jit
def unpack_q5_0(raw, sub, part, WORDS: tl.constexpr):
    q, at = (), part * (WORDS // 2)
    for i in tl.static_range(WORDS // 2):
        q = q + (raw[2 + i] << 3 & 0x78787878 | fifth(raw[1], at + i, 7, TOP) ^ TOP,)
    for i in tl.static_range(WORDS // 2):
        q = q + (raw[2 + i] >> 1 & 0x78787878 | fifth(raw[1], at + 4 + i, 7, TOP) ^ TOP,)
    return q, (), (), low_half(raw[0]) * 0.125, 0.0


@jit
def unpack_q5_1(raw, sub, part, WORDS: tl.constexpr):
    q, at = (), part * (WORDS // 2)
    for i in tl.static_range(WORDS // 2):
        q = q + (raw[2 + i] & 0x0F0F0F0F | fifth(raw[1], at + i, 4, 0x10101010),)
    for i in tl.static_range(WORDS // 2):
        q = q + (raw[2 + i] >> 4 & 0x0F0F0F0F | fifth(raw[1], at + 4 + i, 4, 0x10101010),)
    return q, (), (), low_half(raw[0]), -high_half(raw[0])


# Sixteen values in four words: a nibble's low three bits pick among eight bytes, its top bit
# between the two halves of the table.


@jit
def pick8(word, T: tl.constexpr):
    """The values of a word's eight nibbles: of its bytes' low ones, of their high ones."""
    zero = word & 0
    low3, upper = word & 0x77777777, (word >> 1 & 0x44444444) | 0x32103210
    below = permute(T[0] + zero, T[1] + zero, low3)
    above = permute(T[2] + zero, T[3] + zero, low3)
    first = permute(below, above, upper)
    below = permute(T[0] + zero, T[1] + zero, low3 >> 16)
    above = permute(T[2] + zero, T[3] + zero, low3 >> 16)
    second = permute(below, above, upper >> 16)
    return permute(first, second, zero + 0x6420), permute(first, second, zero + 0x7531)


@jit
def picked(raw, FIRST: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr):
    low, high = (), ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        a, b = pick8(raw[i], T)
        low, high = low + (a,), high + (b,)
    return low + high


def _table(values):
    """Four signed bytes a word."""
    return tuple(
        int.from_bytes(bytes(v & 255 for v in values[i : i + 4]), "little", signed=True)
        for i in range(0, 16, 4)
    )


if tl is not None:
    IQ4_WORDS, FP4_WORDS = tl.constexpr(_table(IQ4)), tl.constexpr(_table(FP4))


@jit
def unpack_iq4_nl(raw, sub, part, WORDS: tl.constexpr):
    return picked(raw, 1, WORDS // 2, IQ4_WORDS), (), (), low_half(raw[0]), 0.0


@jit
def load_mxfp4(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    e = tl.load(row + F[0][0] + block * F[0][1]).to(tl.int32)
    return (e,) + field(row, block, F, 1, part * (2 * WORDS), WORDS // 2)


@jit
def unpack_mxfp4(raw, sub, part, WORDS: tl.constexpr):
    e = raw[0]  # half of 2 to the power of e − 127, as the values are doubled
    half = tl.where(e < 2, 0x00200000 << (e & 1), e - 1 << 23).to(tl.float32, bitcast=True)
    return picked(raw, 1, WORDS // 2, FP4_WORDS), (), (), half, 0.0


@jit
def load_iq4_xs(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 1, sub * 16 + part * (2 * WORDS), WORDS // 2)
    return field(row, block, F, 0, 0, 2) + qs


@jit
def unpack_iq4_xs(raw, sub, part, WORDS: tl.constexpr):
    s = (raw[1] >> 4 * sub & 15 | (raw[0] >> 16 + 2 * sub & 3) << 4) - 32
    return picked(raw, 2, WORDS // 2, IQ4_WORDS), (s,), (), low_half(raw[0]), 0.0


# K-quants: super-blocks of 256.


@jit
def load_q4_k(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    qs = field(row, block, F, 1, sub * 32 + part * (4 * WORDS), WORDS)
    return field(row, block, F, 0, 0, 4) + qs


@jit
def six_bit(raw, sub):
    """Scales and minima of groups 2·sub and 2·sub + 1 (gguf_types._six has the layout)."""
    s = tl.where(sub < 2, raw[1] & 0x3F3F3F3F, raw[3] & 0x0F0F0F0F | raw[1] >> 2 & 0x30303030)
    m = tl.where(sub < 2, raw[2] & 0x3F3F3F3F, raw[3] >> 4 & 0x0F0F0F0F | raw[2] >> 2 & 0x30303030)
    s, m = s >> 16 * (sub & 1), m >> 16 * (sub & 1)
    return (s & 255, s >> 8 & 255), (m & 255, m >> 8 & 255)


@jit
def unpack_q4_k(raw, sub, part, WORDS: tl.constexpr):
    s, m = six_bit(raw, sub)
    return nibbles(raw, 4, WORDS), s, m, low_half(raw[0]), high_half(raw[0])


@jit
def load_q5_k(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    inside = part * (4 * WORDS)
    high = field(row, block, F, 1, inside, WORDS)
    low = field(row, block, F, 2, sub * 32 + inside, WORDS)
    return field(row, block, F, 0, 0, 4) + high + low


@jit
def unpack_q5_k(raw, sub, part, WORDS: tl.constexpr):
    s, m = six_bit(raw, sub)
    q = ()
    for i in tl.static_range(4, 4 + WORDS):
        q = q + (raw[WORDS + i] & 0x0F0F0F0F | (raw[i] >> 2 * sub) << 4 & 0x10101010,)
    for i in tl.static_range(4, 4 + WORDS):
        q = q + (raw[WORDS + i] >> 4 & 0x0F0F0F0F | (raw[i] >> 2 * sub) << 3 & 0x10101010,)
    return q, s, m, low_half(raw[0]), high_half(raw[0])


@jit
def load_q6_k(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    inside = part * (4 * WORDS)
    low = field(row, block, F, 0, sub * 64 + inside, WORDS)
    low = low + field(row, block, F, 0, sub * 64 + 32 + inside, WORDS)
    high = field(row, block, F, 1, sub * 32 + inside, WORDS)
    return (half_at(row, block, F, 3),) + field(row, block, F, 2, sub * 8, 2) + low + high


@jit
def unpack_q6_k(raw, sub, part, WORDS: tl.constexpr):
    q, s = (), ()
    for j in tl.static_range(4):
        for i in tl.static_range(3, 3 + WORDS):
            low, high = raw[WORDS * (j % 2) + i], raw[2 * WORDS + i] << 6 - 2 * j
            low = low << 2 if j < 2 else low >> 2
            q = q + (low & 0x3C3C3C3C | high & TOP2 ^ TOP,)
    for i in tl.static_range(8):
        s = s + (byte_of(raw[1 + i // 4], i % 4),)
    return q, s, (), low_half(raw[0]) * 0.25, 0.0


@jit
def load_q2_k(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    scales = field(row, block, F, 2, 0, 1) + field(row, block, F, 0, sub * 8, 2)
    return scales + field(row, block, F, 1, sub * 32 + part * (4 * WORDS), WORDS)


@jit
def unpack_q2_k(raw, sub, part, WORDS: tl.constexpr):
    q, s, m = (), (), ()
    for j in tl.static_range(4):
        for i in tl.static_range(3, 3 + WORDS):
            q = q + (raw[i] >> 2 * j & 0x03030303,)
    for i in tl.static_range(8):
        s = s + (raw[1 + i // 4] >> 8 * (i % 4) & 15,)
        m = m + (raw[1 + i // 4] >> 8 * (i % 4) + 4 & 15,)
    return q, s, m, low_half(raw[0]), high_half(raw[0])


@jit
def load_q3_k(row, block, sub, part, F: tl.constexpr, WORDS: tl.constexpr):
    inside = part * (4 * WORDS)
    scales = field(row, block, F, 2, 0, 3) + (half_at(row, block, F, 3),)
    high = field(row, block, F, 0, inside, WORDS)
    return scales + high + field(row, block, F, 1, sub * 32 + inside, WORDS)


@jit
def unpack_q3_k(raw, sub, part, WORDS: tl.constexpr):
    """Scale i of 16: low nibble i of eight bytes' sixteen, and two bits of byte 8 + i % 4."""
    q, s = (), ()
    for j in tl.static_range(4):
        for i in tl.static_range(4, 4 + WORDS):
            low, high = raw[WORDS + i], raw[i] >> 4 * sub << 7 - j
            low = low << 5 - 2 * j if j < 3 else low >> 1
            q = q + (low & 0x60606060 | high & TOP ^ TOP,)
    for i in tl.static_range(8):
        low = raw[i // 4] >> 8 * (i % 4) + 4 * sub & 15
        high = raw[2] >> 8 * (i % 4) + 2 * (i // 4) + 4 * sub & 3
        s = s + ((low | high << 4) - 32,)
    return q, s, (), low_half(raw[3]) * 0.03125, 0.0


@dataclass(frozen=True)
class Decoder:
    """`groups` of 32 weights a unit; integer `scales` and `minima` a group; `offset`: whether there
    is a dmin (without `minima` its factor is 1); `halved`: quarter t of a group is words t and
    t + 4 instead of 2t and 2t + 1."""

    load: Callable
    unpack: Callable
    groups: int = 1
    scales: int = 0
    minima: int = 0
    offset: bool = False
    halved: bool = False

    units: int = 1

    @property
    def traits(self) -> tuple[int, int, int, bool, bool, int]:
        return self.groups, self.scales, self.minima, self.offset, self.halved, self.units


#: By ggml type.
DECODERS: dict[int, Decoder] = {
    2: Decoder(load_half_qs, unpack_q4_0, halved=True),
    3: Decoder(load_word_qs, unpack_q4_1, offset=True, halved=True),
    6: Decoder(load_q5_0, unpack_q5_0, halved=True),
    7: Decoder(load_q5_1, unpack_q5_1, offset=True, halved=True),
    8: Decoder(load_q8_0, unpack_q8_0),
    10: Decoder(load_q2_k, unpack_q2_k, 4, 2, 2, True, units=2),
    11: Decoder(load_q3_k, unpack_q3_k, 4, 2, units=2),
    12: Decoder(load_q4_k, unpack_q4_k, 2, 1, 1, True, units=4),
    13: Decoder(load_q5_k, unpack_q5_k, 2, 1, 1, True, units=4),
    14: Decoder(load_q6_k, unpack_q6_k, 4, 2, units=2),
    20: Decoder(load_half_qs, unpack_iq4_nl, halved=True),
    23: Decoder(load_iq4_xs, unpack_iq4_xs, 1, 1, halved=True, units=8),
    39: Decoder(load_mxfp4, unpack_mxfp4, halved=True),
}
