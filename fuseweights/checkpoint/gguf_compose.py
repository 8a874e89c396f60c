"""GGUF files as pieces: a header made anew around the source's own metadata, then the tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from .ggml import SCALARS, STRING, TENSOR_TYPE_IDS
from .gguf import MAGIC, TENSOR_EXTRA, GGUFFile, aligned, is_note, read_array, read_value
from .pieces import Piece, Zeros, piece_size, span


def compose(
    source: GGUFFile,
    number: int,
    tensors: Sequence[tuple[str, Sequence[int], str, Piece, int]],
    *,
    replace: Mapping[str, bytes] | None = None,
    remove: Iterable[str] = (),
    append: Sequence[bytes] = (),
    tail: int | None = None,
) -> list[Piece]:
    """A whole file: `source`'s metadata, edited, and `tensors`.

    `tensors` are (name, row-major shape, type, piece, bytes). `replace` gives new value bytes for
    keys, `remove` drops keys, `append` adds whole entries. `tail` is the number of bytes after the
    last tensor; None pads to the alignment.
    """
    order, alignment = source.order, source.alignment
    remove = frozenset(remove)
    count = len(source.fields) - len(remove) + len(append)
    pieces: list[Piece] = [MAGIC + struct.pack(order + "IQQ", source.version, len(tensors), count)]
    pieces += _edited_metadata(source, number, replace or {}, remove)
    pieces += append
    infos, offset = [], 0
    for name, shape, dtype, _, size in tensors:
        infos.append(packed_string(order, name.encode()))
        infos.append(
            struct.pack(
                f"{order}I{len(shape)}QIQ",
                len(shape),
                *reversed(shape),
                TENSOR_TYPE_IDS[dtype],
                offset,
            )
        )
        offset = aligned(offset + size, alignment)
    pieces.append(b"".join(infos))
    end = sum(map(piece_size, pieces))
    for _, _, _, piece, size in tensors:
        pieces += [Zeros(-end % alignment), piece]
        end = aligned(end, alignment) + size
    pieces.append(Zeros(-end % alignment if tail is None else tail))
    return [piece for piece in pieces if piece_size(piece)]


def _edited_metadata(
    source: GGUFFile, number: int, replace: Mapping[str, bytes], remove: frozenset[str]
) -> list[Piece]:
    pieces: list[Piece] = []
    start, end = source.metadata
    for key, field in source.fields.items():
        if key in remove:
            pieces.append(span(number, start, field.start - start))
            start = field.end
        elif key in replace:
            pieces += [span(number, start, field.value_start - start), replace[key]]
            start = field.end
    pieces.append(span(number, start, end - start))
    return pieces


def packed_string(order: str, text: bytes) -> bytes:
    return struct.pack(order + "Q", len(text)) + text


def packed_strings(order: str, texts: Sequence[str]) -> bytes:
    """An array-of-strings value."""
    return struct.pack(order + "IQ", STRING, len(texts)) + b"".join(
        packed_string(order, text.encode()) for text in texts
    )


def string_field(order: str, key: str, text: bytes) -> bytes:
    """A whole metadata entry holding one string."""
    return (
        packed_string(order, key.encode())
        + struct.pack(order + "I", STRING)
        + packed_string(order, text)
    )


def renamed_notes(file: GGUFFile, names: Mapping[str, str]) -> dict[str, bytes]:
    """New values of `general.tensor_extra.*` with tensors renamed; of several that become one,
    the first entry stays. Empty when no named tensor is concerned."""
    old = [str(name) for name in read_array(file, TENSOR_EXTRA + "name") or []]
    if not names.keys() & set(old):
        return {}
    new = [names.get(name, name) for name in old]
    kept = [i for i, name in enumerate(new) if name not in new[:i]]
    values = {TENSOR_EXTRA + "name": packed_strings(file.order, [new[i] for i in kept])}
    for key in filter(is_note, file.fields):
        column = read_array(file, key)
        if column is not None and len(column) == len(old):
            raw = read_value(file, key, limit=file.size) or b""
            (kind,) = struct.unpack_from(file.order + "I", raw)
            values[key] = _packed_array(file.order, kind, [column[i] for i in kept])
    return values


def _packed_array(order: str, kind: int, items: Sequence) -> bytes:
    if kind == STRING:
        return packed_strings(order, items)
    return struct.pack(f"{order}IQ{len(items)}{SCALARS[kind]}", kind, len(items), *items)
