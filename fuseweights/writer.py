"""Outputs → files: the only code that writes.

Everything is written in a hidden directory beside the target, synced, and renamed into place, so
the target appears whole or not at all. That directory holds a journal: locked, so that two runs
cannot write the same target; and with a fingerprint of the plan, so that `resume` continues only
what was begun.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from uuid import uuid4

from .checkpoint.gguf import SPLIT_NAME, split_name
from .checkpoint.model import Checkpoint
from .checkpoint.pieces import Piece, Sources, piece_size, stream
from .errors import RefusedError, WriteError
from .planner import Output

JOURNAL = "journal.json"
UNFINISHED = ".part"
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
    sync: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `outputs` at `dst`; returns the paths of the files, the first one first.

    Raises RefusedError (the target exists, is the source, or is being written by another run),
    WriteError (no space, I/O), SourceChangedError. After any of them `dst` is as it was.
    """
    targets = target_paths(outputs, dst)
    _check_target(checkpoint, dst, targets, overwrite)
    with _workspace(dst, outputs, checkpoint, resume) as partial:
        _check_target(checkpoint, dst, targets, overwrite)  # again, now that others are locked out
        todo = [o for o in outputs if not (partial / o.name).exists()]
        _check_space(dst, sum(output.size for output in todo))
        _write_all(todo, checkpoint.paths, partial, sync, executor, threads, progress)
        for file in checkpoint.files:
            file.check_unchanged()
        _publish(partial, outputs, dst, targets, overwrite, sync)
    return targets


def target_paths(outputs: Sequence[Output], dst: Path) -> list[Path]:
    """Where each output goes: `dst` itself, a split set named after `dst`, or a directory."""
    if not _is_directory(outputs, dst):
        if len(outputs) == 1:
            return [dst]
        name = SPLIT_NAME.match(dst.name)
        stem = name["stem"] if name else dst.name.removesuffix(".gguf")
        return [dst.with_name(split_name(stem, i, len(outputs))) for i in range(len(outputs))]
    return [dst / output.name for output in outputs]


def _is_directory(outputs: Sequence[Output], dst: Path) -> bool:
    return dst.suffix != ".gguf" and len(outputs) > 1


def _check_target(
    checkpoint: Checkpoint, dst: Path, targets: Sequence[Path], overwrite: bool
) -> None:
    for target in {dst, *targets}:
        for source in checkpoint.files:
            if _same(target, source.path) or (
                target.is_dir() and source.path.resolve().is_relative_to(target.resolve())
            ):
                raise RefusedError(
                    f"{target}: is the source itself", hint="Write to another name or directory."
                )
        if target.is_dir() and target in targets:
            raise RefusedError(f"{target}: is a directory", hint="Name the file to write.")
        if os.path.lexists(target) and not overwrite:
            raise RefusedError(f"{target}: exists already", hint="--overwrite replaces it.")
    if not dst.parent.is_dir():
        raise WriteError(f"{dst.parent}: is not a directory", hint="Create it first.")


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _check_space(dst: Path, needed: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if needed > free:
        raise WriteError(
            f"{dst}: needs {needed:,} bytes, {dst.parent} has {free:,} free",
            hint="Nothing was written. Free some space or write to another disk.",
        )


@contextmanager
def _workspace(
    dst: Path, outputs: Sequence[Output], checkpoint: Checkpoint, resume: bool
) -> Iterator[Path]:
    """The hidden directory, locked; kept after a failure only if files in it can be resumed."""
    partial = dst.with_name(f".{dst.name}.fuseweights-partial")
    fingerprint = _fingerprint(outputs, checkpoint)
    try:
        partial.mkdir(exist_ok=True)
        journal = open(partial / JOURNAL, "a+b")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise WriteError(f"{partial}: {error.strerror}") from error
    with journal:
        _lock(journal.fileno(), partial, dst)
        journal.seek(0)
        recorded = journal.read().decode(errors="replace")
        begun = [path for path in _files(partial) if path.name != JOURNAL]
        if resume and begun and recorded != fingerprint:
            raise RefusedError(
                f"{partial}: was begun from another source or with other options",
                hint="Run without --resume to start again.",
            )
        for path in begun:
            if not resume or path.name.endswith(UNFINISHED):
                path.unlink()
        journal.seek(0)
        journal.truncate()
        journal.write(fingerprint.encode())
        journal.flush()
        try:
            yield partial
        except BaseException as error:
            finished = [o.name for o in outputs if (partial / o.name).exists()]
            if len(outputs) > 1 and finished:
                error.add_note(f"{len(finished)} of {len(outputs)} files are done: --resume")
                _remove(partial, keep={partial / JOURNAL, *(partial / n for n in finished)})
            else:
                _remove(partial)
            raise
        _remove(partial)


def _fingerprint(outputs: Sequence[Output], checkpoint: Checkpoint) -> str:
    """What a resumed run must share with the one that was begun."""
    digest = hashlib.sha256()
    for file in checkpoint.files:
        digest.update(repr((str(file.path), file.size, file.mtime_ns, file.inode)).encode())
    for output in outputs:
        digest.update(repr(output).encode())
    return json.dumps({"plan": digest.hexdigest()})


def _lock(descriptor: int, partial: Path, dst: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(partial / JOURNAL).st_ino:
            return
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            return  # a file system without locks
    raise RefusedError(
        f"{dst}: is being written by another run", hint="Wait for it, or write to another name."
    )


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]


def _remove(partial: Path, keep: Collection[Path] = ()) -> None:
    """Only ever our own hidden directory."""
    for path in _files(partial):
        if path not in keep:
            path.unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(
    outputs: Sequence[Output],
    paths: Sequence[Path],
    partial: Path,
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
            write_output(output, paths, partial, sync, tick)
        return
    own = ThreadPoolExecutor(workers) if executor is None else None
    extra = (tick,) if own else ()
    sizes = {
        (own or executor).submit(write_output, output, paths, partial, sync, *extra): output.size  # type: ignore[union-attr]
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
    partial: Path,
    sync: bool,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one output whole in `partial`. A task of its own: picklable, and safe to run again or
    twice at a time, since each attempt writes under a name of its own and then renames.

    Raises WriteError with the path, SourceChangedError.
    """
    target = partial / output.name
    unfinished = target.with_name(f"{target.name}.{uuid4().hex[:8]}{UNFINISHED}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(output.pieces, paths, unfinished, sync=sync, tick=tick)
        unfinished.replace(target)
    except OSError as error:
        where = error.filename or target
        raise WriteError(f"{where}: {error.strerror or error}") from error


def write_file(
    pieces: Sequence[Piece],
    paths: Sequence[Path],
    target: Path,
    *,
    sync: bool = True,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one file of `pieces`; `tick` is told of each block's bytes."""
    with FileIO(target, "w") as out, Sources(paths) as sources:
        _preallocate(out.fileno(), sum(map(piece_size, pieces)))
        for view in stream(pieces, sources):
            size = len(view)
            while view:
                view = view[out.write(view) :]
            tick(size)
        if sync:
            os.fsync(out.fileno())


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


def _publish(
    partial: Path,
    outputs: Sequence[Output],
    dst: Path,
    targets: Sequence[Path],
    overwrite: bool,
    sync: bool,
) -> None:
    """Rename into place, the first file last: it is the one that consumers open."""
    try:
        if _is_directory(outputs, dst):
            for left in set(_files(partial)) - {partial / output.name for output in outputs}:
                left.unlink()  # the journal, and what a killed worker began
            if sync:
                _sync_directory(partial)
            _place_directory(partial, dst, overwrite)
        else:
            for output, target in reversed(list(zip(outputs, targets, strict=True))):
                _place_file(partial / output.name, target, overwrite)
        if sync:
            _sync_directory(dst.parent)
    except OSError as error:
        raise WriteError(f"{error.filename or dst}: {error.strerror}") from error


def _place_file(file: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        file.replace(target)
        return
    try:
        os.link(file, target)  # unlike rename, fails if the target has appeared meanwhile
    except FileExistsError:
        raise RefusedError(f"{target}: exists already", hint="--overwrite replaces it.") from None
    except OSError:  # a file system without hard links
        file.rename(target)
    else:
        file.unlink()


def _place_directory(partial: Path, dst: Path, overwrite: bool) -> None:
    if not (overwrite and os.path.lexists(dst)):
        partial.rename(dst)
        return
    old = dst.with_name(f".{dst.name}.fuseweights-replaced")
    dst.rename(old)
    try:
        partial.rename(dst)
    except OSError:
        old.rename(dst)
        raise
    shutil.rmtree(old) if not old.is_symlink() else old.unlink()


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened, and renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
