"""Every byte of every section against its source, on all cores."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock, local

from ..checkpoint.model import Checkpoint
from ..checkpoint.pieces import Sources
from ..manifest import fold_experts
from .results import Difference, Section

BLOCK = 1 << 18
JOB = 1 << 25
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Runs:
    """`count` runs of `size` bytes to compare: contiguous in the source, strided when fused."""

    section: Section
    a: int
    b: int
    size: int
    stride: int
    count: int


def _runs(sections: Iterable[Section]) -> Iterator[Runs]:
    """Jobs of about `JOB` bytes."""
    for s in sections:
        if not s.part.size or s.merge not in ("stack", "same"):
            continue
        shape = fold_experts(s.fused.shape, s.part.shape)
        rounds = prod(shape[: s.axis])
        stride = s.fused.size // rounds
        rows = shape[s.axis] if shape else 1
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


def compare(
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
    for difference in [*found, *_derived(source, fused, sections)]:
        first.setdefault((difference.tensor, difference.detail), difference)
    return list(first.values())


def _derived(
    source: Checkpoint, fused: Checkpoint, sections: Iterable[Section]
) -> Iterator[Difference]:
    """Small tensors that are not the source's bytes but follow from them."""
    whole: dict[str, list[Section]] = {}
    for s in sections:
        whole.setdefault(s.fused.name, []).append(s)
    for name, parts in whole.items():
        first = parts[0]
        if first.merge in ("stack", "same"):
            continue
        values = [source.read(s.part) for s in parts]
        found = fused.read(first.fused, limit=1 << 30)
        if first.merge == "expand":
            equal = found == b"".join(
                value * (s.end - s.begin) for value, s in zip(values, parts, strict=True)
            )
        elif first.merge == "shape":
            shapes = [struct.unpack("<qq", value) for value in values]
            equal = struct.unpack("<qq", found) == (sum(n for n, _ in shapes), shapes[0][1])
        else:
            equal = _state_of_all(values, found)
        if not equal:
            yield Difference(name, None, f"does not follow from its parts ({first.merge})")


def _state_of_all(values: list[bytes], found: bytes) -> bool:
    """A bitsandbytes quant_state says of the whole what the parts' say of them."""
    try:
        states, whole = [json.loads(value) for value in values], json.loads(found)
        rows = sum(state["shape"][0] for state in states)
        return all({**state, "shape": [rows, *state["shape"][1:]]} == whole for state in states)
    except (ValueError, KeyError, TypeError, IndexError):
        return False


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
