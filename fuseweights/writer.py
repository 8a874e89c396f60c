"""Outputs → files: the only code that writes.

Everything is written in a hidden directory beside the target, synced, and moved into place, so
the target appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from uuid import uuid4

from . import clone
from .checkpoint.model import Checkpoint
from .checkpoint.pieces import Piece, Sources, piece_size, stream
from .errors import WriteError
from .planner import Output
from .target import (
    FILES,
    check_space,
    check_target,
    hidden,
    is_directory,
    publish,
    target_paths,
    workspace,
)

WRITEBACK = 1 << 25
Progress = Callable[[int, int], None]


def write(
    outputs: Sequence[Output],
    checkpoint: Checkpoint,
    dst: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    share: bool = True,
    sync: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `outputs` at `dst`; returns the paths of the files, the first one first. `share` has
    them made of the source's own blocks where the file system can.

    Raises RefusedError (the target exists, is the source, or is being written by another run),
    WriteError (no space, I/O), SourceChangedError. After any of them `dst` is as it was.
    """
    if dst.name in ("", ".."):
        dst = dst.resolve()
    targets = target_paths(outputs, dst)
    places = {o.name: target for o, target in zip(outputs, targets, strict=True)}
    ours = hidden(dst, "partial") / FILES if resume else None
    check_target(checkpoint, dst, places, overwrite, ours)
    with workspace(dst, outputs, checkpoint, resume) as partial:
        check_target(checkpoint, dst, places, overwrite, ours)  # again: others are locked out now
        files = partial / FILES
        todo = [o for o in outputs if not (files / o.name).exists()]
        usable = clone.clonable(checkpoint.paths, files) if share else frozenset()
        check_space(dst, sum(clone.copied_size(output.pieces, usable) for output in todo))
        _write_all(todo, checkpoint.paths, files, places, usable, sync, executor, threads, progress)
        for file in checkpoint.files:
            file.check_unchanged()
        publish(files, dst, places, is_directory(outputs, dst), overwrite, sync)
    return targets


def _write_all(
    outputs: Sequence[Output],
    paths: Sequence[Path],
    files: Path,
    places: Mapping[str, Path],
    usable: Collection[int],
    sync: bool,
    executor: Executor | None,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Write each output, in threads of ours or wherever `executor` runs things.

    Our threads report every block; another executor's tasks, which may run in other processes,
    report when a file is whole.
    """
    total, done, lock, stop = sum(o.size for o in outputs), 0, Lock(), Event()

    def tick(count: int) -> None:
        nonlocal done
        if stop.is_set():
            raise KeyboardInterrupt
        if progress is not None:
            with lock:
                done += count
                progress(done, total)

    workers = min(len(outputs), threads or os.cpu_count() or 1)
    if executor is None and workers <= 1:
        for output in outputs:
            write_output(output, paths, files, places[output.name], usable, sync, tick)
        return
    own = ThreadPoolExecutor(workers) if executor is None else None
    submit = (own or executor).submit  # type: ignore[union-attr]
    extra = (tick,) if own else ()
    sizes = {
        submit(
            write_output, output, paths, files, places[output.name], usable, sync, *extra
        ): output.size
        for output in outputs
    }
    try:
        for future in as_completed(sizes):
            future.result()
            if own is None:
                tick(sizes[future])
    finally:
        stop.set()
        for future in sizes:
            future.cancel()
        if own is not None:
            own.shutdown(wait=True)


def write_output(
    output: Output,
    paths: Sequence[Path],
    files: Path,
    place: Path,
    usable: Collection[int],
    sync: bool,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one output whole in `files`, to be put at `place`. A task of its own: picklable, and
    safe to run again or twice at a time, since each attempt writes under a name of its own and
    then renames.

    Raises WriteError with the path, SourceChangedError.
    """
    unfinished = files.with_name(f"{uuid4().hex}.part")
    finished = files / output.name
    try:
        write_file(output.pieces, paths, unfinished, usable=usable, sync=sync, tick=tick)
        finished.parent.mkdir(parents=finished.parent != files, exist_ok=True)
        unfinished.replace(finished)
    except OSError as error:
        raise WriteError(f"{place}: {error.strerror or error}") from error


def write_file(
    pieces: Sequence[Piece],
    paths: Sequence[Path],
    target: Path,
    *,
    usable: Collection[int] = (),
    sync: bool = True,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one file of `pieces`; `tick` is told of each block's bytes. `usable` are the numbers
    of the sources that can be cloned from."""
    with FileIO(target, "w") as out:
        if not clone.write(out, pieces, paths, usable, tick):
            _copy(out, pieces, paths, sync, tick)
        if sync:
            os.fsync(out.fileno())


def _copy(
    out: FileIO,
    pieces: Sequence[Piece],
    paths: Sequence[Path],
    sync: bool,
    tick: Callable[[int], None],
) -> None:
    _preallocate(out.fileno(), sum(map(piece_size, pieces)))
    written = begun = 0
    with Sources(paths) as sources:
        for view in stream(pieces, sources):
            size = len(view)
            while view:
                view = view[out.write(view) :]
            written += size
            if sync and written - begun >= WRITEBACK:
                _begin_writeback(out.fileno(), begun, written - begun)
                begun = written
            tick(size)


def _begin_writeback(descriptor: int, offset: int, size: int) -> None:
    """Linux: have the disk write these bytes while the next are copied, so that fsync has little
    left to wait for. Only a hint: what fails here fails in fsync too, and is reported there."""
    if sys.platform == "linux":
        write = 2  # SYNC_FILE_RANGE_WRITE
        libc = ctypes.CDLL(None)
        libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), write)


def _preallocate(descriptor: int, size: int) -> None:
    """Linux: reserve the extents, which makes the writes that follow cheaper and finds out now
    whether they fit. fallocate itself, because glibc's posix_fallocate writes every block where
    the file system cannot."""
    if sys.platform != "linux" or not size:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise OSError(number, os.strerror(number))
