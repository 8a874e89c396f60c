"""How the tensors of one suffix become one: a function a kind of merge."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .candidates import Candidate
from .checkpoint.model import Tensor
from .checkpoint.pieces import Piece, Strand, Weave, piece_size, stacked


@dataclass(frozen=True, slots=True)
class Fused:
    """One output tensor made of source tensors.

    `merge` is how: "stack" along `axis`; "same", one of equals; "expand", single numbers repeated
    over the rows they stand for (`rows` of each part); "literal", `pieces` written anew.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    merge: str
    parts: tuple[Tensor, ...]
    rows: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(map(piece_size, self.pieces))


def fuse(c: Candidate) -> tuple[Fused, ...]:
    """The fused weight and its companions, of a candidate that passed every guard."""
    return tuple(
        MERGES[c.companion(suffix).merge](c, suffix, tuple(c.column(suffix).values()))
        for suffix in c.suffixes
    )


def _name(c: Candidate, suffix: str) -> str:
    return c.path(c.rule.fused_name(suffix))


def _rows(parts: tuple[Tensor, ...], axis: int) -> tuple[int, ...]:
    return tuple(part.shape[axis] if len(part.shape) > axis else 1 for part in parts)


def _stack(c: Candidate, suffix: str, parts: tuple[Tensor, ...]) -> Fused:
    axis, first = c.axis(suffix), parts[0]
    rows = _rows(parts, axis)
    if c.rule.per_expert:
        each = len(c.rule.parts)
        shape = (len(parts) // each, sum(rows[:each]), *first.shape[1:])
    else:
        shape = (*first.shape[:axis], sum(rows), *first.shape[axis + 1 :])
    piece = stacked([part.place for part in parts], first.shape, axis)
    return Fused(_name(c, suffix), shape, first.dtype, axis, "stack", parts, rows, (piece,))


def _same(c: Candidate, suffix: str, parts: tuple[Tensor, ...]) -> Fused:
    first, rows = parts[0], _rows(parts, 0)
    values = {c.checkpoint.read(part) for part in parts} if c.companion(suffix).expands else {b""}
    if len(values) == 1:
        return Fused(
            _name(c, suffix), first.shape, first.dtype, 0, "same", parts, rows, (first.bytes,)
        )
    weight = c.suffixes[0]
    rows = tuple(part[weight].shape[c.axis(weight)] for part in c.parts)
    pieces = tuple(
        Weave(count, (Strand(part.file, part.offset, part.size, 0),))
        for part, count in zip(parts, rows, strict=True)
    )
    shape = (sum(rows), 1)
    return Fused(_name(c, suffix), shape, first.dtype, 0, "expand", parts, rows, pieces)


def _shape(c: Candidate, suffix: str, parts: tuple[Tensor, ...]) -> Fused:
    """compressed-tensors' `weight_shape`: int64 [rows, columns] of the unpacked weight."""
    shapes = [struct.unpack("<qq", c.checkpoint.read(part)) for part in parts]
    literal = struct.pack("<qq", sum(rows for rows, _ in shapes), shapes[0][1])
    return _literal(c, suffix, parts, parts[0].shape, literal)


def _state(c: Candidate, suffix: str, parts: tuple[Tensor, ...]) -> Fused:
    """bitsandbytes' quant_state: JSON bytes that hold the unpacked shape."""
    states = [bnb_state(c.checkpoint.read(part)) for part in parts]
    assert states[0] is not None
    rows = sum(state["shape"][0] for state in states if state)
    literal = json.dumps({**states[0], "shape": [rows, *states[0]["shape"][1:]]}).encode()
    return _literal(c, suffix, parts, (len(literal),), literal)


def weight_shape(raw: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a `weight_shape`, None when it is not one."""
    if len(raw) != 16:
        return None
    rows, columns = struct.unpack("<qq", raw)
    return (rows, columns) if 0 <= rows < 1 << 40 and columns >= 0 else None


def bnb_state(blob: bytes) -> dict | None:
    """The JSON object of a bitsandbytes quant_state, None when it is not one with a shape."""
    try:
        state = json.loads(blob)
    except (ValueError, RecursionError):
        return None
    shape = state.get("shape") if isinstance(state, dict) else None
    sound = isinstance(shape, list) and shape and all(type(n) is int and n >= 0 for n in shape)
    return state if sound else None


def _literal(
    c: Candidate, suffix: str, parts: tuple[Tensor, ...], shape: tuple[int, ...], raw: bytes
) -> Fused:
    dtype, rows = parts[0].dtype, _rows(parts, 0)
    return Fused(_name(c, suffix), shape, dtype, 0, "literal", parts, rows, (raw,))


MERGES: dict[str, Callable[[Candidate, str, tuple[Tensor, ...]], Fused]] = {
    "stack": _stack,
    "same": _same,
    "shape": _shape,
    "state": _state,
}
