"""What a fused checkpoint records of its origin, inside itself: all that un-fusing needs.

A manifest is data from a file, so `parse` believes nothing: every field is checked for type and
range, and every claim about tensors against the tensors that are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

from .checkpoint.model import Checkpoint
from .errors import CorruptError

SCHEMA = 1
KEY = "fuseweights.manifest"
LIMIT = 100_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """A source tensor: its row-major shape, its file, and its place in that file's header."""

    name: str
    shape: tuple[int, ...]
    file: int
    index: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A fused tensor and its parts in order. `merge` is "stack" (along `axis`) or "same"."""

    group: str
    name: str
    axis: int
    merge: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """A source file: bytes after its last tensor, why it cannot be rebuilt to the byte (or None),
    and the original value bytes (hex) of the metadata that had to change."""

    tail: int
    inexact: str | None
    replaced: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    consumer: str
    version: str
    entries: tuple[Entry, ...]
    files: tuple[Origin, ...]

    def dump(self) -> str:
        """JSON, with a checksum of itself so that damage to any of it shows."""
        data = {"schema": SCHEMA, **asdict(self)}
        return _compact({**data, "sha256": _checksum(data)})


def _compact(data: dict) -> str:
    return json.dumps(data, separators=(",", ":"))


def _checksum(data: dict) -> str:
    return sha256(_compact(data).encode()).hexdigest()


class _Checked:
    """JSON values taken with their type checked."""

    def __init__(self, value: object, where: str):
        self.value, self.where = value, where

    def fail(self, expected: str) -> CorruptError:
        found = str(self.value)[:80]
        return CorruptError(f"manifest: {self.where} is {found!r}, expected {expected}")

    def __getitem__(self, key: str) -> _Checked:
        if not isinstance(self.value, dict) or key not in self.value:
            raise self.fail(f"an object with {key!r}")
        return _Checked(self.value[key], f"{self.where}.{key}")

    def items(self) -> list[_Checked]:
        if not isinstance(self.value, list):
            raise self.fail("a list")
        return [_Checked(v, f"{self.where}[{i}]") for i, v in enumerate(self.value)]

    def text(self, allowed: tuple[str, ...] = ()) -> str:
        if not isinstance(self.value, str) or (allowed and self.value not in allowed):
            raise self.fail(" or ".join(allowed) or "a string")
        return self.value

    def count(self, below: int = 1 << 62) -> int:
        if type(self.value) is not int or not 0 <= self.value < below:
            raise self.fail(f"an integer from 0 to {below - 1}")
        return self.value

    def hexes(self) -> dict[str, str]:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        for text in self.value.values():
            try:
                bytes.fromhex(text)
            except (TypeError, ValueError):
                raise self.fail("hexadecimal strings") from None
        return self.value


def parse(text: str | bytes, checkpoint: Checkpoint) -> Manifest:
    """The manifest in `text`, consistent with the tensors of `checkpoint`.

    Raises CorruptError for anything malformed, or a claim that the tensors do not bear out.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{checkpoint.root}: manifest is not JSON: {error}") from None
    root = _Checked(data, "it")
    schema = root["schema"].count()
    if schema != SCHEMA:
        raise CorruptError(
            f"{checkpoint.root}: manifest has schema {schema}, expected {SCHEMA}",
            hint="It was written by another version of fuseweights; use that one.",
        )
    claimed = root["sha256"].text()
    if claimed != _checksum({k: v for k, v in data.items() if k != "sha256"}):
        raise CorruptError(f"{checkpoint.root}: manifest does not match its own checksum")
    files = tuple(
        Origin(
            f["tail"].count(),
            None if f["inexact"].value is None else f["inexact"].text(),
            f["replaced"].hexes(),
        )
        for f in root["files"].items()
    )
    entries = tuple(_entry(e, len(files)) for e in root["entries"].items())
    manifest = Manifest(root["consumer"].text(), root["version"].text(), entries, files)
    _check(manifest, checkpoint)
    return manifest


def _entry(e: _Checked, files: int) -> Entry:
    parts = tuple(
        Part(
            p["name"].text(),
            tuple(d.count() for d in p["shape"].items()),
            p["file"].count(below=files),
            p["index"].count(),
        )
        for p in e["parts"].items()
    )
    if len(parts) < 2:
        raise e["parts"].fail("two parts or more")
    return Entry(
        e["group"].text(),
        e["name"].text(),
        e["axis"].count(below=8),
        e["merge"].text(("stack", "same")),
        parts,
    )


def _check(manifest: Manifest, checkpoint: Checkpoint) -> None:
    def fail(message: str) -> CorruptError:
        return CorruptError(f"{checkpoint.root}: manifest: {message}")

    if len(manifest.files) != len(checkpoint.files):
        raise fail(f"speaks of {len(manifest.files)} files, there are {len(checkpoint.files)}")
    fused = {entry.name for entry in manifest.entries}
    if len(fused) != len(manifest.entries):
        raise fail("a fused tensor occurs twice")
    names = checkpoint.tensors.keys() - fused
    for entry in manifest.entries:
        tensor = checkpoint.tensors.get(entry.name)
        if tensor is None:
            raise fail(f"fused tensor {entry.name!r} is not in the file")
        if not sections_fit(entry, tensor.shape):
            shapes = [list(p.shape) for p in entry.parts]
            raise fail(f"{entry.name!r} {list(tensor.shape)} cannot consist of {shapes}")
        for part in entry.parts:
            if part.name in names:
                raise fail(f"part {part.name!r} occurs twice")
            names.add(part.name)


def sections_fit(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether the parts' shapes make up `shape`."""
    if entry.merge == "same":
        return all(part.shape == shape for part in entry.parts)
    axis = entry.axis
    if axis >= len(shape) or any(len(part.shape) != len(shape) for part in entry.parts):
        return False
    rest = shape[:axis] + shape[axis + 1 :]
    return (
        all(p.shape[:axis] + p.shape[axis + 1 :] == rest for p in entry.parts)
        and sum(p.shape[axis] for p in entry.parts) == shape[axis]
    )
