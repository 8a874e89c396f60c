"""How ggml's quantized types store weights: one row of a table each, a lossless rearrangement of
their bytes, and what they stand for in plain PyTorch.

A row of a weight is blocks of 32 or 256 weights. A block is a few fields one after the other:
scales, low bits, high bits (ggml-common.h in llama.cpp, gguf-py's quants.py). Raw, the blocks
follow each other; most sizes are odd multiples of 2 bytes, which only allows 2-byte loads. Planar,
each field of all blocks of a row lies together, on 16-byte boundaries: the same bytes in another
order, so that a thread reads 16 at a time and any rows can still be taken. Types are numbered as
in gguf.GGMLQuantizationType; nothing here needs gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from .launch import check

#: (offset of the first block's field, bytes from one block's to the next's, alignment of all)
Place = tuple[int, int, int]


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


@dataclass(frozen=True)
class BlockType:
    """`fields`: bytes of each, in a block's order. `weights`: how many a block has."""

    name: str
    weights: int
    fields: tuple[int, ...]
    values: Callable[..., Tensor]

    @property
    def bytes(self) -> int:
        return sum(self.fields)

    @property
    def has_planar(self) -> bool:
        """Whether raw blocks cannot be read 16 bytes at a time."""
        return self.bytes % 16 != 0

    def blocks(self, columns: int) -> int:
        check(
            columns % self.weights == 0,
            f"{self.name} has blocks of {self.weights} weights, found {columns} columns",
        )
        return columns // self.weights

    def row_bytes(self, columns: int, planar: bool) -> int:
        blocks = self.blocks(columns)
        return sum(_aligned(f * blocks) for f in self.fields) if planar else blocks * self.bytes

    def places(self, columns: int, planar: bool) -> tuple[Place, ...]:
        """Where each field is in a row."""
        at, found, blocks = 0, [], self.blocks(columns)
        for size in self.fields:
            stride = size if planar else self.bytes
            found.append((at, stride, gcd(at, stride, 16, self.row_bytes(columns, planar))))
            at += _aligned(size * blocks) if planar else size
        return tuple(found)


def block_type(number: int) -> BlockType:
    check(number in TYPES, f"ggml type {number} has no kernels, only {sorted(TYPES)}")
    return TYPES[number]


def planar(raw: Tensor, type: int, columns: int) -> Tensor:
    """Raw blocks [..., bytes a row] → the same bytes by fields [..., planar bytes a row]."""
    kind = block_type(type)
    fields = raw.unflatten(-1, (kind.blocks(columns), kind.bytes)).split(kind.fields, -1)
    out = raw.new_zeros(*raw.shape[:-1], kind.row_bytes(columns, True))
    for field, (at, _, _) in zip(fields, kind.places(columns, True), strict=True):
        plane = field.flatten(-2)
        out[..., at : at + plane.shape[-1]] = plane
    return out


def raw(planar: Tensor, type: int, columns: int) -> Tensor:
    """What `planar` was given, bit for bit."""
    kind = block_type(type)
    count = kind.blocks(columns)
    fields = [
        planar[..., at : at + size * count].unflatten(-1, (count, size))
        for (at, _, _), size in zip(kind.places(columns, True), kind.fields, strict=True)
    ]
    return torch.cat(fields, -1).flatten(-2)


def dequantize(blocks: Tensor, type: int, columns: int, is_planar: bool = False) -> Tensor:
    """Blocks uint8 [..., bytes a row] → float32 [..., columns], bit for bit as gguf.quants."""
    kind = block_type(type)
    stored = raw(blocks, type, columns) if is_planar else blocks
    stored = stored.unflatten(-1, (kind.blocks(columns), kind.bytes))
    fields = [field.contiguous() for field in stored.split(kind.fields, -1)]
    return kind.values(*fields).flatten(-2)


# What each type's fields stand for: [..., blocks, bytes of the field] → [..., blocks, weights].


def _half(field: Tensor) -> Tensor:
    return field.view(torch.float16).float()


def _bits(field: Tensor, width: int, count: int) -> Tensor:
    """`count` values of `width` bits from each byte, low bits first: all bytes' first value, then
    all bytes' second."""
    shifts = torch.arange(count, device=field.device, dtype=torch.uint8)[:, None] * width
    return (field[..., None, :] >> shifts & (1 << width) - 1).flatten(-2)


def _spread(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(count, -1)


def _fifth(high: Tensor) -> Tensor:
    """Bit i of a little-endian word belongs to weight i."""
    return _bits(high, 1, 8).unflatten(-1, (8, 4)).mT.flatten(-2) << 4


def _q4_0(d: Tensor, qs: Tensor) -> Tensor:
    return _half(d) * (_bits(qs, 4, 2).float() - 8)


def _q4_1(dm: Tensor, qs: Tensor) -> Tensor:
    d, m = _half(dm).split(1, -1)
    return d * _bits(qs, 4, 2).float() + m


def _q5_0(d: Tensor, high: Tensor, qs: Tensor) -> Tensor:
    return _half(d) * ((_bits(qs, 4, 2) | _fifth(high)).float() - 16)


def _q5_1(dm: Tensor, high: Tensor, qs: Tensor) -> Tensor:
    d, m = _half(dm).split(1, -1)
    return d * (_bits(qs, 4, 2) | _fifth(high)).float() + m


def _q8_0(d: Tensor, qs: Tensor) -> Tensor:
    return _half(d) * qs.view(torch.int8).float()


def _halves(field: Tensor, width: int, count: int, size: int) -> Tensor:
    """`_bits` within each `size` bytes."""
    return _bits(field.unflatten(-1, (-1, size)), width, count).flatten(-2)


def _q2_k(scales: Tensor, qs: Tensor, dm: Tensor) -> Tensor:
    d, m = _half(dm).split(1, -1)
    low, high = (scales & 15).float(), (scales >> 4).float()
    return _spread(d * low, 16) * _halves(qs, 2, 4, 32).float() - _spread(m * high, 16)


def _q3_k(hmask: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    low, high = scales.split((8, 4), -1)
    scale = (_bits(low, 4, 2) | _bits(high, 2, 4) << 4).float() - 32
    q = (_halves(qs, 2, 4, 32) | _bits(hmask, 1, 8) << 2).float() - 4
    return _spread(_half(d) * scale, 16) * q


def _six(head: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and the eight minima of Q4_K and Q5_K: four bytes of scales, four of
    minima, four of both one's low nibbles, whose upper bits are the first bytes' upper bits."""
    s, m, both = head.split(4, -1)
    scale = torch.cat((s & 63, both & 15 | s >> 2 & 48), -1)
    least = torch.cat((m & 63, both >> 4 | m >> 2 & 48), -1)
    return scale.float(), least.float()


def _q4_k(head: Tensor, qs: Tensor) -> Tensor:
    d, m = _half(head[..., :4].contiguous()).split(1, -1)
    scale, least = _six(head[..., 4:])
    return _spread(d * scale, 32) * _halves(qs, 4, 2, 32).float() - _spread(m * least, 32)


def _q5_k(head: Tensor, high: Tensor, qs: Tensor) -> Tensor:
    d, m = _half(head[..., :4].contiguous()).split(1, -1)
    scale, least = _six(head[..., 4:])
    q = _halves(qs, 4, 2, 32) | _bits(high, 1, 8) << 4
    return _spread(d * scale, 32) * q.float() - _spread(m * least, 32)


def _q6_k(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    q = (_halves(low, 4, 2, 64) | _halves(high, 2, 4, 32) << 4).float() - 32
    return _spread(_half(d) * scales.view(torch.int8).float(), 16) * q


#: The 16 values of IQ4_NL and IQ4_XS; E2M1's, doubled.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _pick(table: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(d: Tensor, qs: Tensor) -> Tensor:
    return _half(d) * _pick(IQ4, _bits(qs, 4, 2))


def _iq4_xs(head: Tensor, qs: Tensor) -> Tensor:
    d, high, low = head.split((2, 2, 4), -1)
    low = _bits(low[..., None], 4, 2).flatten(-2)
    high = _bits(high[..., None], 2, 4).flatten(-2)
    scale = (low | high << 4).float() - 32
    return _spread(_half(d.contiguous()) * scale, 32) * _pick(IQ4, _halves(qs, 4, 2, 16))


def _mxfp4(e: Tensor, qs: Tensor) -> Tensor:
    bits = e.int()
    half = torch.where(bits < 2, 0x00200000 << bits.clamp(max=1), bits - 1 << 23)
    return half.view(torch.float32) * _pick(FP4, _bits(qs, 4, 2))


#: gguf.GGMLQuantizationType → its fields.
TYPES: dict[int, BlockType] = {
    2: BlockType("Q4_0", 32, (2, 16), _q4_0),
    3: BlockType("Q4_1", 32, (4, 16), _q4_1),
    6: BlockType("Q5_0", 32, (2, 4, 16), _q5_0),
    7: BlockType("Q5_1", 32, (4, 4, 16), _q5_1),
    8: BlockType("Q8_0", 32, (2, 32), _q8_0),
    10: BlockType("Q2_K", 256, (16, 64, 4), _q2_k),
    11: BlockType("Q3_K", 256, (32, 64, 12, 2), _q3_k),
    12: BlockType("Q4_K", 256, (16, 128), _q4_k),
    13: BlockType("Q5_K", 256, (16, 32, 128), _q5_k),
    14: BlockType("Q6_K", 256, (128, 64, 16, 2), _q6_k),
    20: BlockType("IQ4_NL", 32, (2, 16), _iq4_nl),
    23: BlockType("IQ4_XS", 256, (8, 128), _iq4_xs),
    39: BlockType("MXFP4", 32, (1, 16), _mxfp4),
}
