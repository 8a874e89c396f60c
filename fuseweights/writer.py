"""Outputs → files: the only code that writes.

Everything is written in a hidden directory beside the target, synced, and renamed into place, so
the target appears whole or not at all. That directory holds a journal: locked, so that two runs
cannot write the same target; and with a fingerprint of the plan, so that `resume` continues only
what was begun. Whole files move on to a directory of their own inside it, `files`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from uuid import uuid4

from . import clone
from .checkpoint.gguf import SPLIT_NAME, split_name
from .checkpoint.model import Checkpoint
from .checkpoint.pieces import Piece, Sources, piece_size, stream
from .errors import RefusedError, WriteError
from .planner import Output

JOURNAL = "journal.json"
FILES = "files"
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
    ours = _hidden(dst, "partial") / FILES if resume else None
    _check_target(checkpoint, dst, places, overwrite, ours)
    with _workspace(dst, outputs, checkpoint, resume) as partial:
        _check_target(checkpoint, dst, places, overwrite, ours)  # again: others are locked out now
        files = partial / FILES
        todo = [o for o in outputs if not (files / o.name).exists()]
        usable = clone.clonable(checkpoint.paths, files) if share else frozenset()
        _check_space(dst, sum(clone.copied_size(output.pieces, usable) for output in todo))
        _write_all(todo, checkpoint.paths, files, places, usable, sync, executor, threads, progress)
        for file in checkpoint.files:
            file.check_unchanged()
        _publish(files, dst, places, _is_directory(outputs, dst), overwrite, sync)
    return targets


def _hidden(dst: Path, what: str) -> Path:
    """A path of ours beside `dst`."""
    name = f".{dst.name}.fuseweights-{what}"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(dst.name)).hexdigest()}.fuseweights-{what}"
    return dst.with_name(name)


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
    checkpoint: Checkpoint,
    dst: Path,
    places: Mapping[str, Path],
    overwrite: bool,
    ours: Path | None,
) -> None:
    """`ours` holds the files of a run to resume: it may have been cut off with some in place."""
    names = {target: name for name, target in places.items()}
    for target in {dst: None, **names}:
        for source in checkpoint.files:
            if _same(target, source.path) or (
                target.is_dir() and source.path.resolve().is_relative_to(target.resolve())
            ):
                raise RefusedError(
                    f"{target}: is the source itself", hint="Write to another name or directory."
                )
        if target.is_dir() and target in names:
            raise RefusedError(f"{target}: is a directory", hint="Name the file to write.")
        if ours and target in names and _same(target, ours / names[target]):
            continue
        if os.path.lexists(target) and not overwrite:
            raise RefusedError(f"{target}: exists already", hint="--overwrite replaces it.")
    if overwrite and dst.is_dir() and not dst.is_symlink():
        tops = {Path(name).parts[0] for name in places}
        kinds = {Path(name).suffix for name in places}
        found = [p for p in dst.iterdir() if p.name not in tops]
        if others := sorted(p.name for p in found if p.is_dir() or p.suffix not in kinds):
            raise RefusedError(
                f"{dst}: holds other things than a checkpoint: {', '.join(others[:5])}",
                hint="Replacing it would delete them. Write to another directory.",
            )
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
    partial = _hidden(dst, "partial")
    files = partial / FILES
    fingerprint = _fingerprint(outputs, checkpoint)
    try:
        partial.mkdir(exist_ok=True)
        journal = open(partial / JOURNAL, "a+b")  # noqa: SIM115 (held until the end)
    except OSError as error:
        if isinstance(error, FileNotFoundError | FileExistsError) and not partial.is_file():
            raise _busy(dst) from None  # another run ends at this moment
        raise WriteError(f"{partial}: {error.strerror}") from error
    with journal:
        _lock(journal.fileno(), partial, dst)
        journal.seek(0)
        recorded = journal.read().decode(errors="replace")
        if resume and recorded not in ("", fingerprint):
            raise RefusedError(
                f"{partial}: was begun from another source or with other options",
                hint="Run without --resume to start again.",
            )
        _clear(partial, keep_files=resume)
        files.mkdir(exist_ok=True)
        journal.seek(0)
        journal.truncate()
        journal.write(fingerprint.encode())
        journal.flush()
        try:
            yield partial
        except BaseException as error:
            finished = sum((files / output.name).exists() for output in outputs)
            if len(outputs) > 1 and finished:
                error.add_note(f"{finished} of {len(outputs)} files are done: --resume")
                _clear(partial, keep_files=True)
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
    raise _busy(dst)


def _busy(dst: Path) -> RefusedError:
    return RefusedError(
        f"{dst}: is being written by another run", hint="Wait for it, or write to another name."
    )


def _clear(partial: Path, keep_files: bool) -> None:
    """Remove what a run has begun, with `keep_files` only what it had not finished."""
    for path in partial.iterdir():
        if path.name not in (JOURNAL, FILES):
            path.unlink()
    if not keep_files and (partial / FILES).exists():
        shutil.rmtree(partial / FILES)


def _remove(partial: Path) -> None:
    """The journal last: once it is gone, another run may begin here."""
    _clear(partial, keep_files=False)
    (partial / JOURNAL).unlink()
    with suppress(OSError):  # another has begun
        partial.rmdir()


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
            _copy(out, pieces, paths, tick)
        if sync:
            os.fsync(out.fileno())


def _copy(
    out: FileIO, pieces: Sequence[Piece], paths: Sequence[Path], tick: Callable[[int], None]
) -> None:
    _preallocate(out.fileno(), sum(map(piece_size, pieces)))
    with Sources(paths) as sources:
        for view in stream(pieces, sources):
            size = len(view)
            while view:
                view = view[out.write(view) :]
            tick(size)


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
    files: Path,
    dst: Path,
    places: Mapping[str, Path],
    directory: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Move into place, the first file last: it is the one that consumers open."""
    try:
        if directory:
            if sync:
                _sync_directory(files)
            _place_directory(files, dst, overwrite)
        else:
            _place_files(files, places, overwrite)
        if sync:
            _sync_directory(dst.parent)
    except OSError as error:
        raise WriteError(f"{dst}: {error.strerror}") from error


def _place_files(files: Path, places: Mapping[str, Path], overwrite: bool) -> None:
    first, *rest = places.items()
    if overwrite and rest:
        first[1].unlink(missing_ok=True)  # files of two sets are never one that opens
    placed = []
    try:
        for name, target in reversed([first, *rest]):
            _place_file(files / name, target, overwrite)
            placed.append(target)
    except BaseException:
        for target in [] if overwrite else placed:
            target.unlink()
        raise


def _place_file(file: Path, target: Path, overwrite: bool) -> None:
    """A link, so that the file stays ours to recognize or to take back until all are placed."""
    if overwrite:
        file.replace(target)
    elif not _same(file, target):  # else an earlier run has placed it
        try:
            os.link(file, target)
        except OSError as error:
            if os.path.lexists(target):
                raise RefusedError(
                    f"{target}: exists already", hint="--overwrite replaces it."
                ) from error
            file.rename(target)  # a file system without hard links


def _place_directory(files: Path, dst: Path, overwrite: bool) -> None:
    old = _hidden(dst, "replaced")
    if overwrite and os.path.lexists(dst):
        _discard(old)  # of a run that was killed
        dst.rename(old)
    try:
        files.rename(dst)
    except OSError:
        if os.path.lexists(old):
            old.rename(dst)
        raise
    _discard(old)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened, and renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
