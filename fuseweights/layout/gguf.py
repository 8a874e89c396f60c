"""GGUF: fused and restored tensors → whole files, split sets file by file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from .. import __version__
from ..checkpoint.ggml import SCALARS
from ..checkpoint.gguf import (
    GGUFFile,
    irregularity,
    read_value,
)
from ..checkpoint.gguf_compose import compose, renamed_notes, string_field
from ..checkpoint.model import Checkpoint
from ..checkpoint.pieces import Sources, section
from ..clone import best_start
from ..errors import CorruptError
from ..manifest import KEY, LIMIT, Entry, Manifest, Origin, Part, parse
from ..planner import Group, Output

SPLIT_TENSORS = "split.tensors.count"


def read_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest of a file that fuseweights fused; None for any other."""
    text = read_value(checkpoint.files[0], KEY, LIMIT)
    if text is None:
        return None
    manifest = parse(text, checkpoint)
    if len(manifest.files) != len(checkpoint.files):
        raise CorruptError(f"{checkpoint.root}: manifest: speaks of {len(manifest.files)} files")
    return manifest


def fuse(
    checkpoint: Checkpoint, groups: Sequence[Group], consumer: str
) -> tuple[tuple[Output, ...], str | None]:
    """The files of the fused checkpoint, and why un-fusing could not return the same bytes."""
    fused = [(group.group, tensor) for group in groups for tensor in group.tensors]
    stands_at = {tensor.parts[0].name: tensor for _, tensor in fused}
    gone = {part.name for _, tensor in fused for part in tensor.parts}
    replace = [_replacements(file, fused, len(gone)) for file in checkpoint.files]
    origins = tuple(
        Origin(file.path.name, file.tail, irregularity(file), _originals(file, replaced))
        for file, replaced in zip(checkpoint.files, replace, strict=True)
    )
    index = {t.name: i for file in checkpoint.files for i, t in enumerate(file.tensors)}
    entries = tuple(
        Entry(
            group,
            tensor.name,
            tensor.axis,
            tensor.merge,
            tuple(
                Part(part.name, part.shape, part.file, index[part.name], rows)
                for part, rows in zip(tensor.parts, tensor.rows, strict=True)
            ),
        )
        for group, tensor in fused
    )
    manifest = Manifest(consumer, __version__, entries, origins)
    outputs = []
    for number, file in enumerate(checkpoint.files):
        tensors = []
        for tensor in file.tensors:
            if (new := stands_at.get(tensor.name)) is not None:
                tensors.append((new.name, new.shape, new.dtype, new.pieces[0], new.size))
            elif tensor.name not in gone:
                tensors.append((tensor.name, tensor.shape, tensor.dtype, tensor.bytes, tensor.size))
        text = manifest.dump().encode()
        append = [string_field(file.order, KEY, text)] if number == 0 else []
        pieces = compose(file, number, tensors, replace=replace[number], append=append)
        if number == 0 and (shift := best_start(pieces)):
            # spaces after the manifest until the tensors lie so that blocks can be cloned
            append = [string_field(file.order, KEY, text + b" " * shift)]
            pieces = compose(file, number, tensors, replace=replace[number], append=append)
        outputs.append(Output(file.path.name, tuple(pieces)))
    return tuple(outputs), next((o.inexact for o in origins if o.inexact), None)


def _replacements(file: GGUFFile, fused: Sequence, gone: int) -> dict[str, bytes]:
    names = {part.name: tensor.name for _, tensor in fused for part in tensor.parts}
    replaced = renamed_notes(file, names)
    total = file.get(SPLIT_TENSORS)
    if total is not None and isinstance(total, int):
        replaced[SPLIT_TENSORS] = _packed_count(file, total - gone + len(fused))
    return replaced


def _packed_count(file: GGUFFile, count: int) -> bytes:
    return struct.pack(file.order + SCALARS[file.fields[SPLIT_TENSORS].type], count)


def _originals(file: GGUFFile, replaced: Mapping[str, bytes]) -> dict[str, str]:
    return {key: _raw(file, key).hex() for key in replaced}


def _raw(file: GGUFFile, key: str) -> bytes:
    """The value bytes of `key`, a string's length included."""
    field = file.fields[key]
    with Sources([file.path]) as sources:
        return bytes(sources.read(0, field.value_start, field.end - field.value_start))


def unfuse(
    checkpoint: Checkpoint, entries: Sequence[Entry], manifest: Manifest | None
) -> tuple[Output, ...]:
    """The files of the original checkpoint. Without a manifest (another tool fused it) the parts
    stand where the fused tensor stood, and files end as usual."""
    origins = None if manifest is None else manifest.files
    restored: list[list] = [[] for _ in checkpoint.files]
    fused = {}
    for entry in entries:
        whole = checkpoint.tensors[entry.name]
        fused[entry.name] = entry
        begin = 0
        for part in entry.parts:
            rows = part.rows
            if entry.merge == "same":
                piece = whole.bytes
                size = whole.size
            else:
                piece = section(whole.place, whole.shape, entry.axis, begin, begin + rows)
                size = whole.size // (whole.shape[entry.axis] or 1) * rows
            begin += rows
            row = (part.name, part.shape, whole.dtype, piece, size)
            restored[part.file].append((part.index, row))
    outputs = []
    for number, file in enumerate(checkpoint.files):
        if origins is None:
            tensors = _in_place(file, fused, dict(restored[number]))
        else:
            tensors = _in_order(checkpoint, file, fused.keys(), restored[number])
        origin = None if origins is None else origins[number]
        replace = {k: bytes.fromhex(v) for k, v in origin.replaced.items()} if origin else {}
        if origin is None and SPLIT_TENSORS in file.fields:
            parts = sum(len(entry.parts) for entry in entries)
            total = len(checkpoint.tensors) - len(entries) + parts
            replace[SPLIT_TENSORS] = _packed_count(file, total)
        pieces = compose(
            file,
            number,
            tensors,
            replace=replace,
            remove={KEY} & file.fields.keys(),
            tail=origin.tail if origin else None,
        )
        outputs.append(Output(file.path.name, tuple(pieces)))
    return tuple(outputs)


def _in_order(
    checkpoint: Checkpoint, file: GGUFFile, fused: frozenset[str], parts: Sequence[tuple]
) -> list:
    """Kept tensors in their order, with every part at the place it came from."""
    kept = iter(
        [(t.name, t.shape, t.dtype, t.bytes, t.size) for t in file.tensors if t.name not in fused]
    )
    total = sum(t.name not in fused for t in file.tensors) + len(parts)
    at = dict(parts)
    if len(at) != len(parts) or any(index >= total for index in at):
        raise CorruptError(f"{checkpoint.root}: manifest: places of the parts collide")
    return [at[i] if i in at else next(kept) for i in range(total)]


def _in_place(file: GGUFFile, fused: Mapping[str, Entry], rows: Mapping) -> list:
    tensors = []
    for t in file.tensors:
        if t.name in fused:
            tensors += [rows[part.index] for part in fused[t.name].parts]
        else:
            tensors.append((t.name, t.shape, t.dtype, t.bytes, t.size))
    return tensors
