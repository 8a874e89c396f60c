"""Output files made of the source's own blocks, where the file system shares them (XFS, btrfs, …).

A clone moves no data: Linux's FICLONERANGE has the target refer to the source's blocks until one
side is written to. It takes whole blocks only, so a run of bytes can be cloned where it lies at the
same offset modulo the block in source and target; what surrounds its whole blocks is copied.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from io import FileIO
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from .checkpoint.pieces import Piece, Sources, Weave, piece_size, span, stream

# What XFS and btrfs share by default, and what headers are padded to. Not st_blksize: that is the
# preferred size of a read, which XFS's `largeio` and NFS raise to megabytes. Where blocks are
# larger than this (64 KiB pages, ZFS), `clonable` finds it out and everything is copied.
BLOCK = 4096
# Shorter runs are copied: that takes no longer than the call, and each clone splits an extent.
LEAST = 16 * BLOCK
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)


class Clone(NamedTuple):
    """`size` bytes at `target` are those of source `file` at `offset`: whole blocks on both."""

    target: int
    size: int
    file: int
    offset: int


class Copy(NamedTuple):
    """The bytes of `piece` belong at `target`."""

    target: int
    size: int
    piece: Piece


class Run(NamedTuple):
    """Consecutive bytes of a source."""

    file: int
    offset: int
    size: int


def clone_ranges(
    pieces: Iterable[Piece],
    usable: Collection[int] | None = None,
    *,
    block: int = BLOCK,
    least: int = LEAST,
) -> Iterator[Clone | Copy]:
    """What of an output can be cloned and what must be copied: each byte once, in order.

    `usable` are the numbers of the sources that can be cloned from (None: all of them). Clones
    have `least` bytes or more, and whole blocks.
    """
    target = 0
    for item in _joined(_runs(pieces, least)):
        if not isinstance(item, Run):
            size = piece_size(item)
            yield Copy(target, size, item)
        else:
            size = item.size
            if usable is None or item.file in usable:
                yield from _cut(item, target, block, least)
            else:
                yield Copy(target, size, span(*item))
        target += size


def _runs(pieces: Iterable[Piece], least: int) -> Iterator[Run | Piece]:
    """`pieces` with the runs of weaves one by one; weaves of many short runs as they are."""
    for piece in pieces:
        if not isinstance(piece, Weave):
            yield piece
            continue
        rounds, strands = piece
        if len(strands) == 1 and strands[0].stride == strands[0].size:
            yield Run(strands[0].file, strands[0].offset, rounds * strands[0].size)
        elif rounds == 1 or any(strand.size >= least for strand in strands):
            for i in range(rounds):
                for file, offset, size, stride in strands:
                    yield Run(file, offset + i * stride, size)
        else:
            yield piece


def _joined(items: Iterable[Run | Piece]) -> Iterator[Run | Piece]:
    """Runs that follow each other in the source become one: most neighbours stay neighbours."""
    held: Run | None = None
    for item in items:
        if isinstance(item, Run):
            if held is not None and item[:2] == (held.file, held.offset + held.size):
                held = held._replace(size=held.size + item.size)
                continue
            item, held = held, item
        elif held is not None:
            yield held
            held = None
        if item is not None:
            yield item
    if held is not None:
        yield held


def _cut(run: Run, target: int, block: int, least: int) -> Iterator[Clone | Copy]:
    """The whole blocks of one run, and what surrounds them."""
    file, offset, size = run
    head = -target % block
    body = (size - head) // block * block
    if (offset - target) % block or body < max(least, block):
        yield Copy(target, size, span(*run))
        return
    if head:
        yield Copy(target, head, span(file, offset, head))
    yield Clone(target + head, body, file, offset + head)
    if tail := size - head - body:
        end = head + body
        yield Copy(target + end, tail, span(file, offset + end, tail))


def best_start(pieces: Iterable[Piece]) -> int | None:
    """Where, modulo `BLOCK`, an output's `pieces` should begin so that most bytes can be cloned:
    a multiple of 8, None when no run is long enough."""
    votes: Counter[int] = Counter()
    position = 0
    for piece in pieces:
        if not (isinstance(piece, Weave) and any(s.size >= LEAST for s in piece.strands)):
            position += piece_size(piece)
            continue
        for i in range(piece.rounds):
            for _, offset, size, stride in piece.strands:
                if size >= LEAST:
                    votes[(offset + i * stride - position) % BLOCK] += size
                position += size
    return next((start for start, _ in votes.most_common() if start % 8 == 0), None)


def copied_size(pieces: Iterable[Piece], usable: Collection[int]) -> int:
    """Bytes that take room of their own when sources `usable` are cloned from."""
    if not usable:
        return sum(map(piece_size, pieces))
    return sum(r.size for r in clone_ranges(pieces, usable) if isinstance(r, Copy))


def clonable(paths: Sequence[Path], directory: Path) -> frozenset[int]:
    """Numbers of the sources that files in `directory` can share blocks with, found by sharing one
    with a file that has no name. Subvolumes of one btrfs share blocks though their device numbers
    differ, so there is no cheaper way to tell."""
    if sys.platform != "linux":
        return frozenset()
    found = set()
    try:
        with TemporaryFile(dir=directory) as probe:
            for number, path in enumerate(paths):
                try:
                    with FileIO(path) as source:
                        _clone_range(probe.fileno(), source.fileno(), Clone(0, BLOCK, number, 0))
                    found.add(number)
                except OSError:
                    pass
    except OSError:
        pass
    return frozenset(found)


def write(
    out: FileIO,
    pieces: Sequence[Piece],
    paths: Sequence[Path],
    usable: Collection[int],
    tick: Callable[[int], None] = lambda count: None,
) -> bool:
    """Write the empty file `out`, cloning what can be and copying the rest; `tick` is told of each
    step's bytes. Returns False, with nothing written, when nothing could be cloned."""
    if not usable:
        return False
    clones: list[Clone] = []
    copies: list[Copy] = []
    for item in clone_ranges(pieces, usable):
        (clones if isinstance(item, Clone) else copies).append(item)  # type: ignore[arg-type]
    failed = _clone_all(out, clones, paths, tick)
    if len(failed) == len(clones):
        return False
    copies += [Copy(c.target, c.size, span(c.file, c.offset, c.size)) for c in failed]
    copies.sort(key=attrgetter("target"))
    _copy_all(out, copies, paths, tick)
    return True


def _clone_all(
    out: FileIO, clones: Iterable[Clone], paths: Sequence[Path], tick: Callable[[int], None]
) -> list[Clone]:
    """Clone source by source; returns what must be copied after all. A source that fails once is
    given up: if there is something to report, copying from it will."""
    failed: list[Clone] = []
    for file, group in groupby(sorted(clones, key=attrgetter("file")), attrgetter("file")):
        waiting = list(reversed(list(group)))
        try:
            source = FileIO(paths[file])
        except OSError:
            failed += waiting
            continue
        with source:
            while waiting:
                try:
                    _clone_range(out.fileno(), source.fileno(), waiting[-1])
                except OSError:
                    failed += waiting
                    break
                tick(waiting.pop().size)
    return failed


def _clone_range(out: int, source: int, clone: Clone) -> None:
    """FICLONERANGE. Raises OSError: EOPNOTSUPP, ENOTTY (no such thing here), EXDEV (two file
    systems), EINVAL (larger blocks, or the source ends before), …"""
    import fcntl

    request = struct.pack("=qQQQ", source, clone.offset, clone.size, clone.target)
    fcntl.ioctl(out, FICLONERANGE, request)


def _copy_all(
    out: FileIO, copies: Sequence[Copy], paths: Sequence[Path], tick: Callable[[int], None]
) -> None:
    with Sources(paths) as sources:
        views = stream([copy.piece for copy in copies], sources)
        for copy in copies:
            out.seek(copy.target)
            left = copy.size
            while left:
                view = next(views)
                left -= (size := len(view))
                while view:
                    view = view[out.write(view) :]
                tick(size)
