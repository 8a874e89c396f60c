"""safetensors files: reading the header strictly, and laying out a new one.

Format: https://huggingface.co/docs/safetensors. The library's own reader accepts duplicate keys;
this one does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from .model import SourceFile, Tensor
from .pieces import Piece

MAX_HEADER = 100_000_000
METADATA = "__metadata__"
# bits of one element
DTYPES = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class SafetensorsFile(SourceFile):
    """One file. `header` is its JSON as written, without the spaces that pad it; `tensors` are in
    the order of their bytes, `listed` in the order of the header."""

    header: str
    data_start: int
    metadata: Mapping[str, str] | None
    tensors: tuple[Tensor, ...]
    listed: tuple[str, ...]

    @cached_property
    def usual(self) -> bool:
        """Whether `compose` would write this very header. Empty metadata would become none."""
        if self.metadata == {}:
            return False
        rows = [(t.name, t.dtype, t.shape, t.size) for t in self.tensors]
        text = header_text(rows, self.metadata).encode()
        return text == self.header.encode() and self.data_start == 8 + _padded(len(text))


def read_file(path: Path, number: int) -> SafetensorsFile:
    """Parse one file's header; `number` is its index in the checkpoint.

    Raises CorruptError for anything that is not well-formed: an absurd length, JSON that is none,
    duplicate keys, unknown dtypes, shapes that contradict offsets, holes, overlaps, other bytes
    after the last tensor.
    """
    identity = SourceFile.identity(path)
    size = identity["size"]

    def fail(message: str) -> CorruptError:
        return CorruptError(f"{path}: {message}", hint="Download or save the file again.")

    with FileIO(path) as handle:
        prefix = handle.read(9)
        length = int.from_bytes(prefix[:8], "little")
        if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
            raise fail(
                f"is not a safetensors file: a header of {length} bytes in a file of {size}, "
                f"at most {MAX_HEADER}"
            )
        raw = prefix[8:][:length]
        if raw != b"{":  # before 100 MB of a lie are read
            raise fail(f"the header is not a JSON object: starts with {raw!r}")
        while len(raw) < length and (part := handle.read(length - len(raw))):
            raw += part
    try:
        text = raw.decode()
        pairs = parse_object(text)
    except (ValueError, RecursionError) as error:
        raise fail(f"the header is not a JSON object: {error}") from None
    metadata = pairs.pop(METADATA, None)
    if metadata is not None and (
        not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values())
    ):
        raise fail("__metadata__ is not an object of strings")
    base = 8 + length
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
        tensors = [_tensor(name, row, number, base) for name, row in pairs.items()]
    except (TypeError, ValueError, KeyError) as error:
        raise fail(f"the header is malformed: {error}") from None
    in_order = sorted(tensors, key=lambda t: (t.offset, t.size))
    end, before = base, "the header"
    for tensor in in_order:
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise fail(f"tensor {tensor.name!r} {what} {before!r}")
        end, before = end + tensor.size, tensor.name
    if end != size:
        raise fail(f"the tensors end at byte {end}, the file at {size}")
    return SafetensorsFile(
        **identity,
        header=text.rstrip(" "),
        data_start=base,
        metadata=metadata,
        tensors=tuple(in_order),
        listed=tuple(tensor.name for tensor in tensors),
    )


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object; raises ValueError when it is none or a key occurs twice anywhere in it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"key {twice!r} occurs twice")
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _tensor(name: str, row: Any, number: int, base: int) -> Tensor:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has a shape or offsets that are no lists")
    name.encode()  # half a surrogate cannot be written again
    begin, end = offsets
    for size in (begin, end, *shape):
        if type(size) is not int or size < 0:
            raise ValueError(f"tensor {name!r} has a shape or offsets that are no sizes")
    bits = prod(shape) * DTYPES[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(
            f"tensor {name!r} {dtype} {shape} needs {bits / 8:g} bytes, its offsets give "
            f"{end - begin}"
        )
    return Tensor(name, tuple(shape), dtype, number, base + begin, end - begin)


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def header_text(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None
) -> str:
    """The header's JSON for (name, dtype, shape, bytes) in order, as the library writes it."""
    rows: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    offset = 0
    for name, dtype, shape, size in tensors:
        rows[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)


def compose(
    tensors: Sequence[tuple[str, str, Sequence[int], int, Sequence[Piece]]],
    metadata: Mapping[str, str] | None,
    *,
    header: str | None = None,
    phase: tuple[int, int] | None = None,
) -> list[Piece]:
    """A whole file of (name, dtype, shape, bytes, pieces).

    `header` is a text to use as it is instead of the usual one. `phase` (offset, block) pads the
    header until the data starts at `offset` modulo `block`, so that blocks can be cloned.
    """
    if header is None:
        rows = [(name, dtype, shape, size) for name, dtype, shape, size, _ in tensors]
        text = header_text(rows, metadata).encode()
        length = _padded(len(text))
        if phase is not None and phase[0] % 8 == 0:
            length += (phase[0] - 8 - length) % phase[1]
    else:
        text = header.encode()
        length = len(text)
    if length > MAX_HEADER:
        raise CorruptError(f"the header would take {length} bytes, at most {MAX_HEADER} may be")
    front = length.to_bytes(8, "little") + text + b" " * (length - len(text))
    return [front, *(piece for *_, pieces in tensors for piece in pieces)]
