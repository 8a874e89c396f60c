"""Where outputs go: what may be replaced, the hidden directory beside the target in which they are
made, and moving them into place whole.

That directory holds a journal: locked, so that two runs cannot write the same target; and with a
fingerprint of the plan, so that `resume` continues only what was begun. Whole files move on to a
directory of their own inside it, `files`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .checkpoint.gguf import SPLIT_NAME, split_name
from .checkpoint.model import Checkpoint
from .errors import RefusedError, WriteError
from .planner import Output

JOURNAL = "journal.json"
FILES = "files"


def hidden(dst: Path, what: str) -> Path:
    """A path of ours beside `dst`."""
    name = f".{dst.name}.fuseweights-{what}"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(dst.name)).hexdigest()}.fuseweights-{what}"
    return dst.with_name(name)


def target_paths(outputs: Sequence[Output], dst: Path) -> list[Path]:
    """Where each output goes: `dst` itself, a split set named after `dst`, or a directory."""
    if not is_directory(outputs, dst):
        if len(outputs) == 1:
            return [dst]
        name = SPLIT_NAME.match(dst.name)
        stem = name["stem"] if name else dst.name.removesuffix(".gguf")
        return [dst.with_name(split_name(stem, i, len(outputs))) for i in range(len(outputs))]
    return [dst / output.name for output in outputs]


def is_directory(outputs: Sequence[Output], dst: Path) -> bool:
    """Several files are a directory, but for a split set that is given the name of a file."""
    split = dst.suffix == ".gguf" and all(output.name.endswith(".gguf") for output in outputs)
    return len(outputs) > 1 and not split


def check_target(
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
        if checkpoint.root.is_dir() and target.resolve().is_relative_to(checkpoint.root.resolve()):
            raise RefusedError(
                f"{target}: is inside the source", hint="Write beside it: it would become part."
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


def check_space(dst: Path, needed: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if needed > free:
        raise WriteError(
            f"{dst}: needs {needed:,} bytes, {dst.parent} has {free:,} free",
            hint="Nothing was written. Free some space or write to another disk.",
        )


@contextmanager
def workspace(
    dst: Path, outputs: Sequence[Output], checkpoint: Checkpoint, resume: bool
) -> Iterator[Path]:
    """The hidden directory, locked; kept after a failure only if files in it can be resumed."""
    partial = hidden(dst, "partial")
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
        try:
            _begin(journal, partial, fingerprint, resume)
        except OSError as error:
            if not resume:  # else what can be resumed stays
                with suppress(OSError):
                    _remove(partial)
            raise WriteError(f"{partial}: {error.strerror}") from error
        try:
            yield partial
        except BaseException as error:
            finished = sum((files / output.name).exists() for output in outputs)
            try:
                if len(outputs) > 1 and finished:
                    error.add_note(f"{finished} of {len(outputs)} files are done: --resume")
                    _clear(partial, keep_files=True)
                else:
                    _remove(partial)
            except OSError as left:
                error.add_note(f"{partial} is left behind ({left.strerror}): delete it")
            raise
        try:
            _remove(partial)
        except OSError as error:
            raise WriteError(
                f"{partial}: cannot be removed: {error.strerror}",
                hint=f"{dst} is whole; what is left is safe to delete.",
            ) from error


def _begin(journal: BinaryIO, partial: Path, fingerprint: str, resume: bool) -> None:
    """Clear what an earlier run left, but for what this one resumes, and say what is begun."""
    journal.seek(0)
    recorded = journal.read().decode(errors="replace")
    if resume and recorded not in ("", fingerprint):
        raise RefusedError(
            f"{partial}: was begun from another source or with other options",
            hint="Run without --resume to start again.",
        )
    _clear(partial, keep_files=resume)
    (partial / FILES).mkdir(exist_ok=True)
    journal.seek(0)
    journal.truncate()
    journal.write(fingerprint.encode())
    journal.flush()


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
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            raise WriteError(f"{partial}: {error.strerror}") from error
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


def publish(
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
    old = hidden(dst, "replaced")
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
