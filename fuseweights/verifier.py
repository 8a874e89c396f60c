"""Proof that a fused checkpoint holds exactly what its source holds.

Both sides are read afresh. What each fused tensor must consist of, and in which order, is derived
from the rules and from the source's own tensors; the manifest is one more claim to check. Nothing
here is shared with planning, layout or writing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from threading import Lock, local

from .checkpoint.gguf import GGUFFile, irregularity
from .checkpoint.model import Checkpoint, Tensor
from .checkpoint.pieces import Sources, stream
from .manifest import KEY, Manifest
from .planner import Output
from .rules import gguf

BLOCK = 1 << 18
JOB = 1 << 25
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two checkpoints differ: a tensor (or metadata key), a byte offset in it, and how."""

    tensor: str
    offset: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """`checked` tensors of the fused side in `bytes` were compared; `notes` say what was not."""

    checked: int
    bytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences


@dataclass(frozen=True, slots=True)
class Section:
    """Source tensor `part` must be rows `begin` to `end` of `fused` along `axis`."""

    part: Tensor
    fused: Tensor
    axis: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Runs:
    """`count` runs of `size` bytes to compare: contiguous in the source, strided when fused."""

    section: Section
    a: int
    b: int
    size: int
    stride: int
    count: int


def verify(
    source: Checkpoint,
    fused: Checkpoint,
    manifest: Manifest | None,
    *,
    values: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare every byte of every tensor, and all metadata that is not ours."""
    differences: list[Difference] = []
    sections = list(_match(source, fused, differences))
    differences += _metadata(source, fused, manifest)
    if manifest is not None:
        differences += _manifest(source, fused, manifest, sections)
    differences += _compare(source, fused, sections, threads, progress)
    notes: list[str] = []
    if values:
        from .values import compare_values

        for section in sections:
            differences += compare_values(source, fused, section, notes)
    size = sum(tensor.size for tensor in fused.tensors.values())
    return Verification(len(fused.tensors), size, tuple(differences), tuple(dict.fromkeys(notes)))


def verify_hash(
    outputs: Iterable[Output], checkpoint: Checkpoint, expected: Mapping[str, str]
) -> Verification:
    """Hash the files that un-fusing would write, without writing them, against sha256 values."""
    differences, size = [], 0
    with Sources(checkpoint.paths) as sources:
        for output in outputs:
            if output.name not in expected:
                continue
            digest = sha256()
            for view in stream(output.pieces, sources):
                digest.update(view)
            size += output.size
            if digest.hexdigest() != expected[output.name].lower():
                detail = f"sha256 is {digest.hexdigest()}, expected {expected[output.name]}"
                differences.append(Difference(output.name, None, detail))
    for file in checkpoint.files:
        file.check_unchanged()
    return Verification(len(checkpoint.tensors), size, tuple(differences))


def _match(
    source: Checkpoint, fused: Checkpoint, differences: list[Difference]
) -> Iterator[Section]:
    """What each tensor of `fused` must be, each tensor of `source` used exactly once."""
    unused = dict(source.tensors)
    for tensor in fused.tensors.values():
        own = source.tensors.get(tensor.name)
        parts = [own] if own else _parts_by_rule(source, fused, tensor)
        if not parts:
            differences.append(Difference(tensor.name, None, "is not in the source"))
            continue
        merge, axis = ("stack", 0) if own else _rule_of(tensor)[:2]
        if used := [part.name for part in parts if unused.pop(part.name, None) is None]:
            differences.append(Difference(tensor.name, None, f"repeats {', '.join(used)}"))
        if wrong := _misfit(parts, tensor, merge, axis):
            differences.append(Difference(tensor.name, None, wrong))
            continue
        begin = 0
        for part in parts:
            rows = part.shape[axis] if len(part.shape) > axis else 1
            whole = tensor.shape[axis] if len(tensor.shape) > axis else 1
            if merge == "same":
                yield Section(part, tensor, axis, 0, whole)
            else:
                yield Section(part, tensor, axis, begin, begin + rows)
            begin += rows
    differences += [Difference(name, None, "is missing from the fused side") for name in unused]


def _rule_of(tensor: Tensor) -> tuple[str, int, str, tuple[str, ...]]:
    """(merge, axis, parent, part names) if `tensor` has a fused module's name; else no parts."""
    for rule in gguf.RULES:
        parent, _, suffix = tensor.name.rpartition(f".{rule.fused}.")
        if parent and suffix in gguf.COMPANIONS:
            names = tuple(f"{parent}.{part}.{suffix}" for part in rule.parts)
            return gguf.COMPANIONS[suffix].merge, rule.axis, parent, names
    return "stack", 0, "", ()


def _parts_by_rule(source: Checkpoint, fused: Checkpoint, tensor: Tensor) -> list[Tensor]:
    names = _rule_of(tensor)[3]
    if not names or any(n not in source.tensors or n in fused.tensors for n in names):
        return []
    return [source.tensors[name] for name in names]


def _misfit(parts: list[Tensor], tensor: Tensor, merge: str, axis: int) -> str | None:
    """Why `parts` cannot make up `tensor` by type and shape; None when they can."""
    if any(part.dtype != tensor.dtype for part in parts):
        return f"type is {tensor.dtype}, the source has {', '.join(p.dtype for p in parts)}"
    shapes = [part.shape for part in parts]
    expected = shapes[0]
    if merge == "stack" and len(parts) > 1:
        expected = (*expected[:axis], sum(s[axis] for s in shapes), *expected[axis + 1 :])
    fits = all(
        s == expected if merge == "same" else s[:axis] + s[axis + 1 :] == _rest(expected, axis)
        for s in shapes
    )
    if tensor.shape != expected or not fits:
        return f"shape is {list(tensor.shape)}, the source has {list(map(list, shapes))}"
    return None


def _rest(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _runs(sections: Iterable[Section]) -> Iterator[Runs]:
    """Jobs of about `JOB` bytes."""
    for s in sections:
        if not s.part.size:
            continue
        rounds = prod(s.fused.shape[: s.axis])
        stride = s.fused.size // rounds
        rows = s.fused.shape[s.axis] if s.fused.shape else 1
        size = stride // rows * (s.end - s.begin)
        b = s.fused.offset + stride // rows * s.begin
        if rounds == 1:
            for at in range(0, size, JOB):
                yield Runs(s, s.part.offset + at, b + at, min(JOB, size - at), 0, 1)
            continue
        step = max(1, JOB // stride)
        for i in range(0, rounds, step):
            count = min(step, rounds - i)
            yield Runs(s, s.part.offset + i * size, b + i * stride, size, stride, count)


def _compare(
    source: Checkpoint,
    fused: Checkpoint,
    sections: list[Section],
    threads: int | None,
    progress: Progress | None,
) -> list[Difference]:
    total, done, lock, mine = sum(s.part.size for s in sections), 0, Lock(), local()
    handles: list[Sources] = []

    def one(runs: Runs) -> Difference | None:
        nonlocal done
        if not hasattr(mine, "a"):
            mine.a, mine.b = Sources(source.paths), Sources(fused.paths)
            handles.extend((mine.a, mine.b))
        offset = _first_difference(runs, mine.a, mine.b)
        with lock:
            done += runs.size * runs.count
            if progress is not None:
                progress(done, total)
        if offset is None:
            return None
        where = offset - runs.section.fused.offset
        return Difference(
            runs.section.fused.name, where, f"differs from the source's {runs.section.part.name}"
        )

    try:
        with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
            found = [d for d in pool.map(one, _runs(sections)) if d is not None]
    finally:
        for handle in handles:
            handle.__exit__()
    first: dict[tuple[str, str], Difference] = {}
    for difference in found:
        first.setdefault((difference.tensor, difference.detail), difference)
    return list(first.values())


def _first_difference(runs: Runs, a: Sources, b: Sources) -> int | None:
    """The offset in the fused file of the first byte that differs."""
    together = max(1, BLOCK // max(runs.size, runs.stride))
    for i in range(0, runs.count, together):
        count = min(together, runs.count - i)
        if count > 1:
            offset = _strided_difference(runs, i, count, a, b)
        else:
            offset = _run_difference(runs, i, a, b)
        if offset is not None:
            return offset
    return None


def _run_difference(runs: Runs, i: int, a: Sources, b: Sources) -> int | None:
    left, right = bytearray(BLOCK), bytearray(BLOCK)
    for at in range(0, runs.size, BLOCK):
        size = min(BLOCK, runs.size - at)
        if size < BLOCK:
            left, right = bytearray(size), bytearray(size)
        a.read_into(runs.section.part.file, runs.a + i * runs.size + at, memoryview(left))
        b.read_into(runs.section.fused.file, runs.b + i * runs.stride + at, memoryview(right))
        if left != right:  # memcmp
            first = next(k for k in range(size) if left[k] != right[k])
            return runs.b + i * runs.stride + at + first
    return None


def _strided_difference(runs: Runs, i: int, count: int, a: Sources, b: Sources) -> int | None:
    import numpy as np

    size, stride = runs.size, runs.stride
    left = a.read(runs.section.part.file, runs.a + i * size, count * size)
    right = b.read(runs.section.fused.file, runs.b + i * stride, (count - 1) * stride + size)
    want = np.frombuffer(left, np.uint8).reshape(count, size)
    got = np.lib.stride_tricks.as_strided(
        np.frombuffer(right, np.uint8), (count, size), (stride, 1)
    )
    if np.array_equal(want, got):
        return None
    row, column = np.argwhere(want != got)[0]
    return runs.b + (i + int(row)) * stride + int(column)


def _metadata(
    source: Checkpoint, fused: Checkpoint, manifest: Manifest | None
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
        yield from _notes(a, b, fused)


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


def _notes(a: GGUFFile, b: GGUFFile, fused: Checkpoint) -> Iterator[Difference]:
    """`general.tensor_extra` must say of each tensor what it said of each of its parts."""
    expected = dict(a.tensor_notes)
    for name, tensor in fused.tensors.items():
        parts = _rule_of(tensor)[3]
        said = {expected.pop(part, None) for part in parts if part not in fused.tensors}
        if len(said) > 1:
            yield Difference(name, None, "general.tensor_extra disagreed on its parts")
        elif said != {None} and said:
            expected[name] = said.pop()
    if expected != b.tensor_notes:
        changed = sorted(set(expected.items()) ^ set(b.tensor_notes.items()), key=repr)
        yield Difference(str(changed[0][0]), None, "general.tensor_extra says something else")


def _manifest(
    source: Checkpoint, fused: Checkpoint, manifest: Manifest, sections: list[Section]
) -> Iterator[Difference]:
    """The manifest must describe this source, or un-fusing would not return it."""
    files = [file for file in source.files if isinstance(file, GGUFFile)]
    index = {t.name: i for file in files for i, t in enumerate(file.tensors)}
    expected: dict[str, list] = {}
    for s in sections:
        if s.part.name != s.fused.name:
            row = (s.part.name, s.part.shape, s.part.file, index[s.part.name])
            expected.setdefault(s.fused.name, []).append(row)
    claimed = {
        e.name: [(p.name, p.shape, p.file, p.index) for p in e.parts] for e in manifest.entries
    }
    for name in expected.keys() | claimed.keys():
        if expected.get(name) != claimed.get(name):
            yield Difference(name, None, "the manifest does not describe the source's parts")
    for e in manifest.entries:
        merge, axis = _rule_of(fused.tensors[e.name])[:2]
        if (e.merge, e.axis) != (merge, axis):
            yield Difference(e.name, None, "the manifest says it was merged in another way")
    for file, origin in zip(files, manifest.files, strict=False):
        if origin.inexact is None and (origin.tail != file.tail or irregularity(file)):
            yield Difference("", None, f"the manifest does not describe {file.path.name}'s layout")
        for key, value in origin.replaced.items():
            field = file.fields.get(key)
            with Sources([file.path]) as sources:
                if field is None or bytes.fromhex(value) != sources.read(
                    0, field.value_start, field.end - field.value_start
                ):
                    yield Difference(key, None, "the manifest records another original value")
    kept = {t.name for t in source.tensors.values()} - {p for r in claimed.values() for p, *_ in r}
    for a, b in zip(files, fused.files, strict=False):
        assert isinstance(b, GGUFFile)
        order = [t.name for t in b.tensors if t.name in kept]
        if [t.name for t in a.tensors if t.name in kept] != order:
            yield Difference("", None, f"{b.path.name}: the kept tensors changed order")
