"""Output bytes as a list of pieces: what converting, un-fusing and hashing all walk.

A `Weave` is numpy's `concatenate(parts, axis)` on raw bytes: with `rounds = prod(shape[:axis])`,
each round takes the next run of every strand. Stacking rows is one round, stacking per-expert or
column-wise is many, and un-fusing is a weave of one strand whose runs lie `stride` apart.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from math import prod
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from ..errors import SourceChangedError, WriteError

BUFFER = 1 << 20
OPEN_FILES = 16


class Strand(NamedTuple):
    """Runs of `size` bytes in source `file`, the first at `offset`, then every `stride` bytes."""

    file: int
    offset: int
    size: int
    stride: int


class Weave(NamedTuple):
    """`rounds` times: the next run of each strand in turn."""

    rounds: int
    strands: tuple[Strand, ...]


class Zeros(NamedTuple):
    """Padding."""

    size: int


Piece = Weave | Zeros | bytes


def span(file: int, offset: int, size: int) -> Weave:
    """`size` consecutive bytes of source `file`."""
    return Weave(1, (Strand(file, offset, size, size),))


def stacked(parts: Sequence[tuple[int, int, int]], shape: Sequence[int], axis: int) -> Weave:
    """Concatenate whole tensors, each (file, offset, bytes), along `axis` of row-major `shape`."""
    rounds = prod(shape[:axis])
    if not rounds:
        return Weave(0, ())
    return Weave(
        rounds, tuple(Strand(f, at, size // rounds, size // rounds) for f, at, size in parts)
    )


def section(
    whole: tuple[int, int, int], shape: Sequence[int], axis: int, begin: int, end: int
) -> Weave:
    """Rows `begin` to `end` of `axis` out of the tensor (file, offset, bytes) of `shape`."""
    file, offset, size = whole
    rounds = prod(shape[:axis])
    if not size:
        return Weave(0, ())
    stride = size // rounds
    row = stride // shape[axis]
    return Weave(rounds, (Strand(file, offset + begin * row, (end - begin) * row, stride),))


def piece_size(piece: Piece) -> int:
    """Bytes that `piece` produces."""
    if isinstance(piece, Weave):
        return piece.rounds * sum(strand.size for strand in piece.strands)
    return piece.size if isinstance(piece, Zeros) else len(piece)


class Sources:
    """Open handles on the source files, at most `OPEN_FILES` at a time. One per thread.

    Reading uses seek and readinto rather than pread because Windows has no pread.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read_into(self, file: int, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises SourceChangedError when the file ends before,
        WriteError when it cannot be read."""
        try:
            self._read_into(file, offset, view)
        except OSError as error:
            raise WriteError(f"{self._paths[file]}: {error.strerror}") from error

    def _read_into(self, file: int, offset: int, view: memoryview) -> None:
        handle = self._open.get(file)
        if handle is None:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            handle = self._open[file] = FileIO(self._paths[file])
        handle.seek(offset)
        done = 0
        while done < len(view):
            got = handle.readinto(view[done:])
            if not got:
                raise SourceChangedError(
                    f"{self._paths[file]}: ends at byte {offset + done}, "
                    f"{len(view) - done} more were expected",
                    hint="The file shrank after it was opened; do not write to it meanwhile.",
                )
            done += got

    def read(self, file: int, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self.read_into(file, offset, memoryview(data))
        return data


def stream(pieces: Iterable[Piece], sources: Sources) -> Iterator[memoryview]:
    """The bytes of `pieces` in order, in views of at most `BUFFER` bytes, each valid until the
    next is asked for."""
    buffer = memoryview(_page_aligned(BUFFER))
    for piece in pieces:
        if isinstance(piece, bytes):
            yield memoryview(piece)
        elif isinstance(piece, Zeros):
            for begin in range(0, piece.size, BUFFER):
                yield memoryview(bytes(min(BUFFER, piece.size - begin)))
        else:
            yield from _woven(piece, sources, buffer)


def _page_aligned(size: int) -> mmap:
    """Memory of its own pages: what malloc gives starts 16 bytes into one and is written slower."""
    if sys.platform == "win32":
        return mmap(-1, size)
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE

    return mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)


def _woven(weave: Weave, sources: Sources, buffer: memoryview) -> Iterator[memoryview]:
    rounds, strands = weave
    if len(strands) == 1 and strands[0].stride == strands[0].size:
        file, offset, size, _ = strands[0]
        yield from _contiguous(file, offset, rounds * size, sources, buffer)
        return
    width = sum(strand.size for strand in strands)
    together = BUFFER // max(1, width, *(strand.stride for strand in strands))
    if rounds == 1 or together < 2:  # long runs: each is read on its own
        for i in range(rounds):
            for file, offset, size, stride in strands:
                yield from _contiguous(file, offset + i * stride, size, sources, buffer)
        return
    yield from _short_runs(weave, width, together, sources, buffer)


def _contiguous(
    file: int, offset: int, size: int, sources: Sources, buffer: memoryview
) -> Iterator[memoryview]:
    for begin in range(0, size, BUFFER):
        view = buffer[: min(BUFFER, size - begin)]
        sources.read_into(file, offset + begin, view)
        yield view


def _short_runs(
    weave: Weave, width: int, together: int, sources: Sources, buffer: memoryview
) -> Iterator[memoryview]:
    """Many rounds at a time: one read a strand, then columns copied into place."""
    import numpy as np

    for begin in range(0, weave.rounds, together):
        count = min(together, weave.rounds - begin)
        block = np.frombuffer(buffer, np.uint8, count * width).reshape(count, width)
        column = 0
        for file, offset, size, stride in weave.strands:
            raw = sources.read(file, offset + begin * stride, (count - 1) * stride + size)
            runs = np.lib.stride_tricks.as_strided(
                np.frombuffer(raw, np.uint8), (count, size), (stride, 1)
            )
            block[:, column : column + size] = runs
            column += size
        yield buffer[: count * width]
