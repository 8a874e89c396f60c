"""What a fused checkpoint records of its origin, inside itself: all that un-fusing needs.

A manifest is data from a file, so `parse` believes nothing: every field is checked for type and
range, and every claim about tensors against the tensors that are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import prod

from .checkpoint.model import Checkpoint
from .errors import CorruptError

SCHEMA = 1
KEY = "fuseweights.manifest"
LIMIT = 100_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """A source tensor: its row-major shape, its file, its place in that file's header, the rows it
    stands for in the fused tensor, and its bytes (hex) where the fused tensor lacks them."""

    name: str
    shape: tuple[int, ...]
    file: int
    index: int
    rows: int
    data: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A fused tensor and its parts in order. `merge` is one of `MERGES`."""

    group: str
    name: str
    axis: int
    merge: str
    parts: tuple[Part, ...]


MERGES = ("stack", "same", "expand", "literal")


@dataclass(frozen=True, slots=True)
class Origin:
    """A source file: its name, bytes after its last tensor, why it cannot be rebuilt to the byte
    (or None), the original value bytes (hex) of metadata that had to change, and the original
    header where it was not written the usual way."""

    name: str
    tail: int = 0
    inexact: str | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)
    header: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """`texts` are the original contents of the JSON files beside the tensors that were edited."""

    consumer: str
    version: str
    entries: tuple[Entry, ...]
    files: tuple[Origin, ...]
    texts: Mapping[str, str] = field(default_factory=dict)

    def dump(self) -> str:
        """JSON, with a checksum of itself so that damage to any of it shows."""
        data = {
            "schema": SCHEMA,
            "consumer": self.consumer,
            "version": self.version,
            "entries": [
                {
                    "group": e.group,
                    "name": e.name,
                    "axis": e.axis,
                    "merge": e.merge,
                    "parts": [[p.name, p.shape, p.file, p.index, p.rows, p.data] for p in e.parts],
                }
                for e in self.entries
            ],
            "files": [asdict(file) for file in self.files],
            "texts": dict(self.texts),
        }
        text = _compact(data)
        return f'{text[:-1]},"sha256":"{sha256(text.encode()).hexdigest()}"}}'


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

    def optional(self) -> str | None:
        return None if self.value is None else self.text()

    def texts(self) -> dict[str, str]:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return {
            key: _Checked(text, f"{self.where}.{key}").text() for key, text in self.value.items()
        }

    def hexes(self) -> dict[str, str]:
        for text in self.texts().values():
            self.hex(text)
        return self.texts()

    def hex(self, text: str | None) -> str | None:
        try:
            bytes.fromhex(text or "")
        except ValueError:
            raise self.fail("hexadecimal digits") from None
        return text


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
            f["name"].text(),
            f["tail"].count(),
            f["inexact"].optional(),
            f["replaced"].hexes(),
            f["header"].optional(),
        )
        for f in root["files"].items()
    )
    entries = tuple(_entry(e, len(files)) for e in root["entries"].items())
    consumer, version = root["consumer"].text(), root["version"].text()
    manifest = Manifest(consumer, version, entries, files, root["texts"].texts())
    _check(manifest, checkpoint)
    return manifest


def _entry(e: _Checked, files: int) -> Entry:
    parts = []
    for row in e["parts"].items():
        columns = row.items()
        if len(columns) != 6:
            raise row.fail("[name, shape, file, index, rows, data]")
        name, shape, file, index, rows, data = columns
        parts.append(
            Part(
                name.text(),
                tuple(d.count() for d in shape.items()),
                file.count(below=files),
                index.count(),
                rows.count(),
                data.hex(data.optional()),
            )
        )
    if len(parts) < 2:
        raise e["parts"].fail("two parts or more")
    return Entry(
        e["group"].text(), e["name"].text(), e["axis"].count(below=8), e["merge"].text(MERGES),
        tuple(parts),
    )  # fmt: skip


def _check(manifest: Manifest, checkpoint: Checkpoint) -> None:
    def fail(message: str) -> CorruptError:
        return CorruptError(f"{checkpoint.root}: manifest: {message}")

    if len(manifest.files) < len(checkpoint.files):
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
    shapes = [part.shape for part in entry.parts]
    if entry.merge == "same":
        return all(part == shape for part in shapes)
    if entry.merge == "literal":
        return all(part.data is not None for part in entry.parts)
    if entry.merge == "expand":
        one = all(prod(part) == 1 for part in shapes)
        return one and shape == (sum(part.rows for part in entry.parts), 1)
    shape, axis = fold_experts(shape, shapes[0]), entry.axis
    if axis >= len(shape) or any(len(part) != len(shape) for part in shapes):
        return False
    rest = shape[:axis] + shape[axis + 1 :]
    return (
        all(part[:axis] + part[axis + 1 :] == rest for part in shapes)
        and all(part.shape[axis] == part.rows for part in entry.parts)
        and sum(part[axis] for part in shapes) == shape[axis]
    )


def fold_experts(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with a leading dimension of experts folded into the rows, where `like` has none."""
    if len(shape) == len(like) + 1:
        return (shape[0] * shape[1], *shape[2:])
    return shape
