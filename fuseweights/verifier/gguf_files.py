"""GGUF: everything of a file that is not a tensor's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoint.gguf import GGUFFile, irregularity
from ..checkpoint.model import Checkpoint
from ..checkpoint.pieces import Sources
from ..manifest import KEY, Manifest, Origin
from .results import Difference, Section

BLOCK = 1 << 18


def metadata(
    source: Checkpoint,
    fused: Checkpoint,
    manifest: Manifest | None,
    made: Mapping[str, list[Section]],
) -> Iterator[Difference]:
    if len(source.files) != len(fused.files):
        yield Difference("", None, f"{len(fused.files)} files, the source has {len(source.files)}")
        return
    removed = len(source.tensors) - len(fused.tensors)
    for number, (a, b) in enumerate(zip(source.files, fused.files, strict=True)):
        assert isinstance(a, GGUFFile) and isinstance(b, GGUFFile)
        for what in ("version", "order", "alignment"):
            if getattr(a, what) != getattr(b, what):
                yield Difference(what, None, f"is {getattr(b, what)}, was {getattr(a, what)}")
        if reason := irregularity(b):
            yield Difference("", None, f"{b.path.name}: {reason}")
        if manifest is not None and b.tail != -(b.size - b.tail) % b.alignment:
            yield Difference("", None, f"{b.path.name}: ends {b.tail} bytes after its tensors")
        ours = {KEY} if manifest is not None and number == 0 else set()
        if [*a.fields] != [key for key in b.fields if key not in ours]:
            keys = sorted(set(a.fields) ^ (set(b.fields) - ours))
            yield Difference(", ".join(keys) or "metadata", None, "keys differ or changed order")
        for key in a.fields.keys() & b.fields.keys():
            if key == "split.tensors.count":
                if b.get(key) != a.get(key) - removed:  # type: ignore[operator]
                    yield Difference(key, None, f"is {b.get(key)}, {removed} fewer were expected")
            elif key.startswith("general.tensor_extra."):
                continue  # compared by meaning below
            elif not _same_value(a, b, key):
                yield Difference(key, None, "metadata value differs")
        yield from _notes(a, b, made)


def _same_value(a: GGUFFile, b: GGUFFile, key: str) -> bool:
    left, right = a.fields[key], b.fields[key]
    size = left.end - left.value_start
    if left.type != right.type or right.end - right.value_start != size:
        return False
    with Sources([a.path, b.path]) as sources:
        for at in range(0, size, BLOCK):
            count = min(BLOCK, size - at)
            if sources.read(0, left.value_start + at, count) != sources.read(
                1, right.value_start + at, count
            ):
                return False
    return True


def _notes(a: GGUFFile, b: GGUFFile, made: Mapping[str, list[Section]]) -> Iterator[Difference]:
    """`general.tensor_extra` must say of each tensor what it said of each of its parts."""
    expected = dict(a.tensor_notes)
    for name, sections in made.items():
        said = {expected.pop(section.part.name, None) for section in sections}
        if len(said) > 1:
            yield Difference(name, None, "general.tensor_extra disagreed on its parts")
        elif said != {None}:
            expected[name] = said.pop()
    if expected != b.tensor_notes:
        changed = sorted(set(expected.items()) ^ set(b.tensor_notes.items()), key=repr)
        yield Difference(str(changed[0][0]), None, "general.tensor_extra says something else")


def origin(file: GGUFFile, recorded: Origin) -> Iterator[Difference]:
    """What the manifest says of a source file's layout and of metadata it replaced."""
    if recorded.inexact is None and (recorded.tail != file.tail or irregularity(file)):
        yield Difference("", None, f"the manifest does not describe {file.path.name}'s layout")
    for key, value in recorded.replaced.items():
        field = file.fields.get(key)
        with Sources([file.path]) as sources:
            if field is None or bytes.fromhex(value) != sources.read(
                0, field.value_start, field.end - field.value_start
            ):
                yield Difference(key, None, "the manifest records another original value")
