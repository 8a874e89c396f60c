"""Hugging Face directories: fused and restored tensors → files, index and configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from .. import __version__
from ..checkpoint.directory import CONFIGS, INDEX, HFCheckpoint
from ..checkpoint.model import SourceFile, Tensor
from ..checkpoint.pieces import Piece, Strand, Weave, section, span
from ..checkpoint.safetensors import SafetensorsFile, compose
from ..clone import BLOCK, best_start
from ..errors import CorruptError
from ..manifest import KEY, Entry, Manifest, Origin, Part, fold_experts, parse
from ..merging import Fused
from ..planner import Group, Output
from . import config

# (name, dtype, shape, bytes, pieces)
Row = tuple[str, str, Sequence[int], int, Sequence[Piece]]


def read_manifest(checkpoint: HFCheckpoint) -> Manifest | None:
    """The manifest of a checkpoint that fuseweights fused; None for any other."""
    first = checkpoint.files[0]
    assert isinstance(first, SafetensorsFile)
    text = (first.metadata or {}).get(KEY)
    if text is None:
        return None
    manifest = parse(text, checkpoint)
    names = {origin.name for origin in manifest.files}
    wrong = [name for name in names if not checkpoint.bare and not _is_file_name(name)]
    wrong += manifest.texts.keys() - {*CONFIGS, INDEX}
    if wrong:
        raise CorruptError(f"{checkpoint.root}: manifest: {wrong[0][:80]!r} is no file of ours")
    present = {file.path.name for file in checkpoint.files}
    if len(names) != len(manifest.files) or not (checkpoint.bare or present <= names):
        raise CorruptError(f"{checkpoint.root}: manifest: speaks of other files")
    return manifest


def _is_file_name(name: str) -> bool:
    """A name in this directory, on any system."""
    odd = set(name) & set('/\\:*?"<>|') or not name.isprintable()
    return name.endswith(".safetensors") and not odd and len(name.encode()) < 256


def plain_row(tensor: Tensor) -> Row:
    """A tensor as it is."""
    return tensor.name, tensor.dtype, tensor.shape, tensor.size, (tensor.bytes,)


def fuse(
    checkpoint: HFCheckpoint, groups: Sequence[Group], consumer: str
) -> tuple[tuple[Output, ...], str | None]:
    """The files of the fused checkpoint; un-fusing always returns the same bytes."""
    fused = [(group.group, tensor) for group in groups for tensor in group.tensors]
    stands_at = {_place(tensor).name: tensor for _, tensor in fused}
    gone = {part.name for _, tensor in fused for part in tensor.parts}
    files: list[list[Row]] = []
    for file in checkpoint.files:
        rows: list[Row] = []
        for tensor in file.tensors:
            if (new := stands_at.get(tensor.name)) is not None:
                rows.append((new.name, new.dtype, new.shape, new.size, new.pieces))
            elif tensor.name not in gone:
                rows.append(plain_row(tensor))
        files.append(rows)
    texts = {} if checkpoint.bare else config.edited(checkpoint, groups)
    if INDEX in checkpoint.texts and not checkpoint.bare:
        texts[INDEX] = config.new_index(checkpoint, _sizes(checkpoint, files), _lost(fused))
    emptied = {
        file.path.name
        for file, rows in zip(checkpoint.files, files, strict=True)
        if not rows and _tensors(file)
    }
    origins, originals = _origins(checkpoint, texts, emptied)
    entries = _entries(checkpoint, fused)
    manifest = Manifest(consumer, __version__, entries, origins, originals)
    weights: list[Output] = []
    for file, rows in zip(checkpoint.files, files, strict=True):
        assert isinstance(file, SafetensorsFile)
        if file.path.name in emptied:
            continue
        metadata = file.metadata
        if not weights:  # the first file that is written
            metadata = {**(metadata or {}), KEY: manifest.dump()}
        start = best_start([piece for *_, parts in rows for piece in parts])
        phase = None if start is None else (start, BLOCK)
        pieces = compose(rows, metadata, phase=phase)
        weights.append(Output(file.path.name, tuple(pieces)))
    return (*weights, *beside(checkpoint, texts)), None


def _tensors(file: SourceFile) -> tuple[Tensor, ...]:
    return file.tensors if isinstance(file, SafetensorsFile) else ()


def _place(fused: Fused) -> Tensor:
    """The part whose place `fused` takes: the first. What is no whole number of blocks takes the
    earliest part's place in that file: most of what follows is then shifted as in the source."""
    first = fused.parts[0]
    if fused.size % BLOCK == 0:
        return first
    return min((p for p in fused.parts if p.file == first.file), key=lambda p: p.offset)


def _sizes(
    checkpoint: HFCheckpoint, files: Sequence[Sequence[Row]]
) -> list[tuple[str, list[tuple[str, int]]]]:
    return [
        (file.path.name, [(name, size) for name, _, _, size, _ in rows])
        for file, rows in zip(checkpoint.files, files, strict=True)
    ]


def _lost(fused: Sequence) -> int:
    """Elements that the parts had and the fused tensors have not."""
    return sum(
        sum(prod(part.shape) for part in tensor.parts) - prod(tensor.shape) for _, tensor in fused
    )


def _entries(checkpoint: HFCheckpoint, fused: Sequence) -> tuple[Entry, ...]:
    index = {t.name: i for file in checkpoint.files for i, t in enumerate(file.tensors)}
    return tuple(
        Entry(
            group,
            tensor.name,
            tensor.axis,
            tensor.merge,
            tuple(
                Part(
                    part.name,
                    part.shape,
                    part.file,
                    index[part.name],
                    rows,
                    checkpoint.read(part).hex() if tensor.merge == "literal" else None,
                )
                for part, rows in zip(tensor.parts, tensor.rows, strict=True)
            ),
        )
        for group, tensor in fused
    )


def _origins(
    checkpoint: HFCheckpoint, edits: Mapping[str, str], emptied: Collection[str]
) -> tuple[tuple[Origin, ...], dict[str, str]]:
    """What the manifest keeps of each file's header, and the texts that were edited.

    A file whose tensors all moved elsewhere is not written: its header is kept whole.

    An index that transformers' own writer would write again is not kept: it can be large.
    """
    origins = []
    for file in checkpoint.files:
        assert isinstance(file, SafetensorsFile)
        kept = file.usual and file.path.name not in emptied
        header = None if kept else _whole_header(file)
        origins.append(Origin(file.path.name, header=header))
    texts = {name: checkpoint.texts[name] for name in edits}
    if INDEX in texts:
        rows = [
            (file.path.name, [(t.name, t.size) for t in file.tensors]) for file in checkpoint.files
        ]
        if config.new_index(checkpoint, rows, 0) == texts[INDEX]:
            del texts[INDEX]
    return tuple(origins), texts


def _whole_header(file: SafetensorsFile) -> str:
    """The header with its padding."""
    return file.header + " " * (file.data_start - 8 - len(file.header.encode()))


def beside(checkpoint: HFCheckpoint, texts: Mapping[str, str]) -> list[Output]:
    """The other files: JSON with `texts` in place of their own, the rest as they are."""
    if checkpoint.bare:
        return []
    known = {**checkpoint.texts, **texts}
    outputs = [Output(name, (text.encode(),)) for name, text in known.items()]
    number = len(checkpoint.files)
    for name, file in checkpoint.extras:
        outputs.append(Output(name, (span(number, 0, file.size),)))
        number += 1
    return outputs


def unfuse(
    checkpoint: HFCheckpoint, entries: Sequence[Entry], manifest: Manifest | None
) -> tuple[Output, ...]:
    """The files of the original checkpoint, to the byte."""
    assert manifest is not None
    parts: list[dict[int, Row]] = [{} for _ in manifest.files]
    for entry in manifest.entries:
        for part, row in zip(entry.parts, restored(checkpoint, entry), strict=True):
            if parts[part.file].setdefault(part.index, row) is not row:
                raise CorruptError(f"{checkpoint.root}: manifest: places of the parts collide")
    fused = {entry.name for entry in manifest.entries}
    present = {file.path.name: file for file in checkpoint.files}
    outputs, files = [], []
    for number, origin in enumerate(manifest.files):
        file = checkpoint.files[0] if checkpoint.bare else present.get(origin.name)
        tensors: tuple[Tensor, ...] = ()
        metadata: Mapping[str, str] = {}
        if isinstance(file, SafetensorsFile):
            tensors, metadata = file.tensors, file.metadata or {}
        kept = [plain_row(tensor) for tensor in tensors if tensor.name not in fused]
        total, rest = len(kept) + len(parts[number]), iter(kept)
        if any(index >= total for index in parts[number]):
            raise CorruptError(f"{checkpoint.root}: manifest: a part's place is not in its file")
        rows = [parts[number].get(i) or next(rest) for i in range(total)]
        metadata = {key: value for key, value in metadata.items() if key != KEY}
        pieces = compose(rows, metadata or None, header=origin.header)
        outputs.append(Output(origin.name, tuple(pieces)))
        files.append((origin.name, [(name, size) for name, _, _, size, _ in rows]))
    texts = dict(manifest.texts)
    if INDEX in checkpoint.texts and INDEX not in texts and not checkpoint.bare:
        lost = sum(_entry_lost(checkpoint, entry) for entry in manifest.entries)
        texts[INDEX] = config.new_index(checkpoint, files, -lost)
    return (*outputs, *beside(checkpoint, texts))


def _entry_lost(checkpoint: HFCheckpoint, entry: Entry) -> int:
    whole = prod(checkpoint.tensors[entry.name].shape)
    return sum(prod(part.shape) for part in entry.parts) - whole


def restored(checkpoint: HFCheckpoint, entry: Entry) -> list[Row]:
    """The parts of one fused tensor, in order."""
    whole = checkpoint.tensors[entry.name]
    rows, begin = [], 0
    for part in entry.parts:
        pieces: Sequence[Piece]
        if entry.merge == "same":
            pieces, size = (whole.bytes,), whole.size
        elif entry.merge == "literal":
            raw = bytes.fromhex(part.data or "")
            pieces, size = (raw,), len(raw)
        elif entry.merge == "expand":
            size = whole.size // (whole.shape[0] or 1)
            at = whole.offset + begin * size
            pieces = (Weave(1, (Strand(whole.file, at, size, size),)),)
        else:
            shape = fold_experts(whole.shape, part.shape)
            pieces = (section(whole.place, shape, entry.axis, begin, begin + part.rows),)
            size = whole.size // (shape[entry.axis] or 1) * part.rows
        begin += part.rows
        rows.append((part.name, whole.dtype, part.shape, size, pieces))
    return rows
