"""GGUF files: reading the header without its vocabulary, and laying out a new one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, either byte
order. The key-value section stays the bytes it is: keys are indexed, values are skipped, and a
copy of the section is a span of the source file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

from ..errors import CorruptError, printable
from .ggml import ARRAY, SCALARS, STRING, TENSOR_TYPES
from .model import Checkpoint, SourceFile, Tensor
from .pieces import BUFFER, Sources

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
TENSOR_EXTRA = "general.tensor_extra."
MAX_DIMS = 4
MAX_NAME = 65535
MAX_KEPT_STRING = 4096
MAX_ARRAY_DEPTH = 8
SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)

# The C matcher walks runs of short strings four times faster than a Python loop: one branch per
# length below 64, each a little-endian length and then exactly that many bytes.
_RUN = 4096
_SHORT_STRINGS = re.compile(
    b"(?:"
    + b"|".join(re.escape(bytes([n])) + rb"\x00{7}" + b".{%d}" % n for n in range(64))
    + b"){%d}+" % _RUN,
    re.DOTALL,
)


class Field(NamedTuple):
    """A metadata entry: where it lies, and its value when that is a scalar or a short string."""

    type: int
    start: int
    value_start: int
    end: int
    value: object


@dataclass(frozen=True)
class GGUFFile(SourceFile):
    """One GGUF file. Offsets are absolute; `tail` counts the bytes after the last tensor."""

    version: int
    order: str
    alignment: int
    fields: dict[str, Field]
    metadata: tuple[int, int]
    header_end: int
    tensors: tuple[Tensor, ...]

    @property
    def data_start(self) -> int:
        return aligned(self.header_end, self.alignment)

    @property
    def tail(self) -> int:
        ends = (tensor.offset + tensor.size for tensor in self.tensors)
        return self.size - max(ends, default=self.header_end)

    @cached_property
    def tensor_notes(self) -> dict[str, tuple]:
        """What `general.tensor_extra.*`, parallel arrays, say of each tensor they name."""
        names = read_array(self, TENSOR_EXTRA + "name") or []
        columns = [read_array(self, key) or [] for key in self.fields if is_note(key)]
        return {
            str(name): tuple(c[i] if i < len(c) else None for c in columns)
            for i, name in enumerate(names)
        }

    def get(self, key: str, default: object = None) -> object:
        """The scalar or short string under `key`."""
        field = self.fields.get(key)
        return default if field is None else field.value


def open_gguf(path: Path) -> Checkpoint:
    """Read the header of `path`, and of its siblings when it belongs to a split set.

    Raises CorruptError for whatever is not a well-formed GGUF, OSError when unreadable.
    """
    files: list[GGUFFile] = []
    tensors: dict[str, Tensor] = {}
    given = read_file(path, 0)
    for number, sibling in enumerate(_siblings(given)):
        file = given if sibling == path and number == 0 else read_file(sibling, number)
        files.append(file)
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise CorruptError(f"{sibling}: tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
    if len(files) > 1:
        _check_split(files, len(tensors))
    architecture = files[0].get("general.architecture", "")
    if not isinstance(architecture, str):
        raise CorruptError(f"{files[0].path}: general.architecture is not a string")
    return Checkpoint("gguf", files[0].path, tuple(files), tensors, architecture)


def _siblings(file: GGUFFile) -> list[Path]:
    path, count = file.path, file.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [path]
    name = SPLIT_NAME.match(path.name)
    if not name or int(name["count"]) != count:
        raise CorruptError(
            f"{path}: says it is one of {count} split files, but is not named like one",
            hint=f"Expected a name like {path.stem}-00001-of-{count:05d}.gguf.",
        )
    paths = [path.with_name(split_name(name["stem"], i, count)) for i in range(count)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise CorruptError(f"{path}: missing from the split set: {', '.join(missing[:20])}")
    return paths


def split_name(stem: str, number: int, count: int) -> str:
    """llama.cpp's name of split `number` (from 0)."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def _check_split(files: list[GGUFFile], tensors: int) -> None:
    for number, file in enumerate(files):
        expected = {"split.no": number, "split.count": len(files), "split.tensors.count": tensors}
        for key, value in expected.items():
            if file.get(key) != value:
                raise CorruptError(f"{file.path}: {key} is {file.get(key)}, expected {value}")


def read_file(path: Path, number: int) -> GGUFFile:
    """Parse one file's header; `number` is its index in the checkpoint."""
    identity = SourceFile.identity(path)
    with FileIO(path) as handle:
        return _Reader(handle, path, identity["size"]).file(number, identity)


class _Reader:
    """Parses through a window on the file, so that memory does not depend on what it claims."""

    WINDOW = 1 << 20

    def __init__(self, handle: FileIO, path: Path, size: int):
        self.handle, self.path, self.size = handle, path, size
        self.start, self.window = 0, b""
        self.position = 0
        self.order = "<"

    def fail(self, message: str, hint: str | None = None) -> CorruptError:
        return CorruptError(f"{self.path}: {message}", hint=hint)

    def load(self, position: int, size: int, what: str) -> None:
        if position + size > self.size:
            raise self.fail(
                f"{what} at byte {position} needs {size} bytes, the file has "
                f"{max(0, self.size - position)} left",
                hint="The file is truncated or its header is damaged: download it again.",
            )
        if position < self.start or position + size > self.start + len(self.window):
            self.handle.seek(position)
            parts, wanted = [], min(max(size, self.WINDOW), self.size - position)
            while wanted and (part := self.handle.read(wanted)):
                parts.append(part)
                wanted -= len(part)
            self.start, self.window = position, b"".join(parts)
            if len(self.window) < size:
                raise self.fail(f"{what} at byte {position} could not be read whole")

    def take(self, size: int, what: str) -> bytes:
        self.load(self.position, size, what)
        at = self.position - self.start
        self.position += size
        return self.window[at : at + size]

    def unpack(self, codes: str, what: str) -> tuple:
        layout = struct.Struct(self.order + codes)
        return layout.unpack(self.take(layout.size, what))

    def text(self, what: str, limit: int = MAX_NAME) -> str:
        (length,) = self.unpack("Q", f"length of {what}")
        if length > limit:
            raise self.fail(f"{what} is {length} bytes long, at most {limit} are allowed")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from None

    def skip(self, size: int, what: str) -> None:
        if size > self.size - self.position:
            raise self.fail(
                f"{what} at byte {self.position} needs {size} bytes, the file has "
                f"{self.size - self.position} left",
                hint="The file is truncated or its header is damaged: download it again.",
            )
        self.position += size

    def file(self, number: int, identity: dict) -> GGUFFile:
        version, tensor_count, field_count = self.preamble()
        metadata_start = self.position
        fields = self.fields(field_count)
        metadata = (metadata_start, self.position)
        alignment = self.alignment(fields)
        infos = self.infos(tensor_count)
        tensors = self.place(infos, alignment, number)
        return GGUFFile(
            **identity,
            version=version,
            order=self.order,
            alignment=alignment,
            fields=fields,
            metadata=metadata,
            header_end=self.position,
            tensors=tensors,
        )

    def preamble(self) -> tuple[int, int, int]:
        magic = self.take(4, "the magic") if self.size >= 4 else b""
        if magic != MAGIC:
            raise self.fail(f"is not a GGUF file: starts with {magic!r}, expected {MAGIC!r}")
        (version,) = self.unpack("I", "the version")
        if version & 0xFFFF == 0:  # written on a big-endian machine
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise self.fail(
                f"GGUF version {version} is not supported, expected 2 or 3",
                hint="Version 1 files of 2023 can be rewritten by llama.cpp's llama-quantize.",
            )
        counts = self.unpack("QQ", "the counts")
        for count, least, what in ((counts[0], 24, "tensors"), (counts[1], 13, "metadata keys")):
            if count * least > self.size - self.position:
                raise self.fail(f"claims {count} {what}, too many for a file of {self.size} bytes")
        return version, *counts

    def fields(self, count: int) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for _ in range(count):
            start = self.position
            key = self.text("a metadata key")
            if key in fields:
                raise self.fail(f"metadata key {key!r} occurs twice")
            (kind,) = self.unpack("I", f"type of {key}")
            value_start = self.position
            value = self.value(kind, key)
            fields[key] = Field(kind, start, value_start, self.position, value)
        return fields

    def value(self, kind: int, key: str) -> object:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind], key)[0]
        if kind == STRING:
            (length,) = self.unpack("Q", f"length of {key}")
            if length > MAX_KEPT_STRING:
                return self.skip(length, key)
            return self.take(length, key).decode(errors="replace")
        if kind == ARRAY:
            return self.skip_array(key)
        raise self.fail(f"metadata key {key!r} has the unknown type {kind}")

    def skip_array(self, key: str, depth: int = 1) -> None:
        kind, count = self.unpack("IQ", f"array {key}")
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]), key)
        elif kind == STRING:
            self.skip_strings(count, key)
        elif kind == ARRAY and depth < MAX_ARRAY_DEPTH:
            if count * 12 > self.size - self.position:
                raise self.fail(f"array {key!r} claims {count} arrays, too many for the file")
            for _ in range(count):
                self.skip_array(key, depth + 1)
        else:
            raise self.fail(f"array {key!r} has the unknown element type {kind}")

    def skip_strings(self, count: int, key: str) -> None:
        if count * 8 > self.size - self.position:
            raise self.fail(f"array {key!r} claims {count} strings, too many for the file")
        while count:
            run = min(count, _RUN)
            if run == _RUN and self.order == "<":
                self.load(self.position, min(_RUN * 72, self.size - self.position), key)
                found = _SHORT_STRINGS.match(self.window, self.position - self.start)
                if found:
                    self.position = self.start + found.end()
                    count -= run
                    continue
            for _ in range(run):
                self.skip(self.unpack("Q", key)[0], key)
            count -= run

    def alignment(self, fields: Mapping[str, Field]) -> int:
        field = fields.get("general.alignment")
        value = DEFAULT_ALIGNMENT if field is None else field.value
        if type(value) is not int or value <= 0 or value & (value - 1):
            raise self.fail(f"general.alignment is {value}, expected a power of two")
        return value

    def infos(self, count: int) -> list[tuple[str, tuple[int, ...], str, int, int]]:
        """(name, row-major shape, type, offset in the data, bytes) of every tensor."""
        infos = []
        for _ in range(count):
            name = self.text("a tensor name")
            (dims,) = self.unpack("I", f"dimensions of {name}")
            if dims > MAX_DIMS:
                raise self.fail(f"tensor {name!r} has {dims} dimensions, at most {MAX_DIMS}")
            *shape, kind, offset = self.unpack(f"{dims}QIQ", f"tensor {name}")
            if kind not in TENSOR_TYPES:
                raise self.fail(
                    f"tensor {name!r} has type {kind}, whose size is unknown",
                    hint="A newer fuseweights may know it; nothing is guessed about sizes.",
                )
            type_name, block, block_bytes = TENSOR_TYPES[kind]
            if shape and shape[0] % block:
                raise self.fail(
                    f"tensor {name!r} of type {type_name} has rows of {shape[0]} weights, "
                    f"expected a multiple of {block}"
                )
            size = prod(shape) // block * block_bytes if shape else block_bytes
            infos.append((name, tuple(reversed(shape)), type_name, offset, size))
        return infos

    def place(self, infos: Sequence[tuple], alignment: int, number: int) -> tuple[Tensor, ...]:
        """Absolute offsets, checked: inside the file, aligned, no two sharing a byte."""
        base = aligned(self.position, alignment)
        tensors = []
        for name, shape, dtype, offset, size in infos:
            if offset % alignment:
                raise self.fail(f"tensor {name!r} starts at {offset}, not aligned to {alignment}")
            if base + offset + size > self.size:
                raise self.fail(
                    f"tensor {name!r} ends at byte {base + offset + size}, "
                    f"the file has {self.size}",
                    hint="The file is truncated: download it again.",
                )
            tensors.append(Tensor(name, shape, dtype, number, base + offset, size))
        end, before = base, ""
        for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
            if tensor.size and tensor.offset < end:
                raise self.fail(f"tensors {before!r} and {tensor.name!r} overlap")
            if tensor.size:
                end, before = tensor.offset + tensor.size, tensor.name
        return tuple(tensors)


def read_array(file: GGUFFile, key: str) -> list | None:
    """The array under `key`, decoded; None when it is absent or no flat array."""
    field = file.fields.get(key)
    if field is None or field.type != ARRAY:
        return None
    with FileIO(file.path) as handle:
        reader = _Reader(handle, file.path, file.size)
        reader.order, reader.position = file.order, field.value_start
        kind, count = reader.unpack("IQ", key)
        if kind == STRING:
            return [reader.text(key, limit=file.size) for _ in range(count)]
        if kind in SCALARS:
            return list(reader.unpack(f"{count}{SCALARS[kind]}", key))
    return None


def read_value(file: GGUFFile, key: str, limit: int) -> bytes | None:
    """The raw value bytes under `key` (for a string without its length), at most `limit`."""
    field = file.fields.get(key)
    if field is None:
        return None
    start = field.value_start + (8 if field.type == STRING else 0)
    if field.end - start > limit:
        raise CorruptError(f"{file.path}: {key} is {field.end - start} bytes, at most {limit}")
    with Sources([file.path]) as sources:
        return bytes(sources.read(0, start, field.end - start))


def irregularity(file: GGUFFile) -> str | None:
    """Why a file rebuilt from its header and tensors would not be this file; None if it would.

    The usual layout is the only one ggml loads: tensors in header order, each padded with zeros
    to the alignment, nothing but zeros after the last.
    """
    end = file.header_end
    with Sources([file.path]) as sources:
        for tensor in file.tensors:
            if tensor.offset != aligned(end, file.alignment):
                return f"tensor {printable(tensor.name)} does not follow the one before it"
            if any(sources.read(0, end, tensor.offset - end)):
                return f"the padding before {printable(tensor.name)} is not zero"
            end = tensor.offset + tensor.size
        for begin in range(end, file.size, BUFFER):
            if any(sources.read(0, begin, min(BUFFER, file.size - begin))):
                return "there are other bytes than zeros after the last tensor"
    return None


def is_note(key: str) -> bool:
    return key.startswith(TENSOR_EXTRA) and key != TENSOR_EXTRA + "name"


def aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
