"""The writer: a target appears whole or not at all, and nothing else is ever touched."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Barrier, Event
from unittest import mock

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_gguf import layer, write, write_split

import fuseweights
from fuseweights import RefusedError, SourceChangedError, WriteError, target, writer
from fuseweights.checkpoint import pieces
from fuseweights.checkpoint.pieces import Sources, Strand, Weave, Zeros, piece_size, stream

CLI = [sys.executable, "-m", "fuseweights"]
PARTIAL = ".{}.fuseweights-partial"

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")


# --- what the tests are made of ---------------------------------------------------------------


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A single file alone in its directory, a few hundred kB."""
    return write(tmp_path / "in.gguf", [t for n in range(4) for t in layer(n, q=512, kv=256)])


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The first of a split set of four files alone in their directory."""
    return write_split(tmp_path, [layer(n, q=512, kv=256) for n in range(4)], stem="in")


@pytest.fixture
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory to write into, apart from the source."""
    return tmp_path_factory.mktemp("out")


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256(file.read()).hexdigest()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def snapshot(directory: Path) -> dict[str, tuple]:
    """Every path below `directory`: what it is, which inode, and what it holds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        held = path.readlink() if path.is_symlink() else path.is_file() and digest(path)
        found[str(path.relative_to(directory))] = path.lstat().st_mode, path.lstat().st_ino, held
    return found


@contextmanager
def untouched(*directories: Path) -> Iterator[None]:
    """Nothing below `directories` is added, removed, replaced or changed."""
    before = [snapshot(directory) for directory in directories]
    yield
    assert [snapshot(directory) for directory in directories] == before


def small_blocks(size: int = 4096):
    """Copy in blocks so small that there is a middle to interfere with."""
    return mock.patch.object(pieces, "BUFFER", size)


def halfway(action: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that calls `action` once, when half the bytes are written."""
    pending = [action]

    def progress(done: int, total: int) -> None:
        if 2 * done >= total and pending:
            pending.pop()()

    return progress


def raising(error: BaseException) -> Callable[..., None]:
    def action(*args: object, **kwargs: object) -> None:
        raise error

    return action


def cli(*args: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, **options)


def big(path: Path, layers: int, rows: int) -> Path:
    """`layers` of q, k, v and experts of 1 kB rows, written without holding them in memory."""
    file = gguf.GGUFWriter(path, "llama")
    raw = np.random.default_rng(0).integers(0, 256, (rows, 1088), dtype=np.uint8)
    parts = {"attn_q": raw, "attn_k": raw[: rows // 2], "attn_v": raw[: rows // 2]}
    parts |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), raw.reshape(32, rows // 32, 1088))
    for n in range(layers):
        for name, data in parts.items():
            kind = gguf.GGMLQuantizationType.Q8_0
            file.add_tensor(f"blk.{n}.{name}.weight", data, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


# --- killed -----------------------------------------------------------------------------------


def run_and_kill(
    src: Path, dst: Path, delay: float, wait_for: Path | None = None
) -> tuple[int, float]:
    """Convert in a child, killed `delay` seconds after it began, or after `wait_for` appeared.
    Its exit code, and how long it lasted from that moment on."""
    child = subprocess.Popen([*CLI, "convert", src, dst, "--quiet"])
    while wait_for and child.poll() is None and not wait_for.exists():
        time.sleep(0.0005)
    begun = time.perf_counter()
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.kill()
    return child.wait(), time.perf_counter() - begun


@posix
def test_killed_fifty_times(tmp_path: Path) -> None:
    src, dst = big(tmp_path / "in.gguf", 3, 4096), tmp_path / "out.gguf"
    partial = tmp_path / PARTIAL.format("out.gguf")
    lasts = {}
    for moment in (None, partial):
        code, lasts[moment] = run_and_kill(src, dst, 60, moment)
        assert code == 0
        good, original = dst.read_bytes(), src.read_bytes()
        dst.unlink()

    rng, killed, leftovers = random.Random(0), 0, 0
    for i in range(50):
        # One in five at any time from the start on; the others once writing has begun, half of
        # what lasts from then on being the process's end.
        moment, share = (partial, 0.6) if i % 5 else (None, 1)
        delay = (i + rng.random()) / 50 * share * lasts[moment]
        code, _ = run_and_kill(src, dst, delay, moment)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        leftovers += partial.exists()
        unchanged = src.read_bytes() == original  # named, so that a failure does not print both
        assert unchanged
        whole = not dst.exists() or dst.read_bytes() == good
        assert whole
        dst.unlink(missing_ok=True)
        fuseweights.convert(src, dst, sync=False)
        whole = dst.read_bytes() == good
        assert whole
        assert names(tmp_path) == ["in.gguf", "out.gguf"]
        dst.unlink()
    assert killed >= 10
    assert leftovers >= 5


KILL_AT = """
import os, signal, sys, fuseweights
def progress(done, total):
    if done > float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
fuseweights.convert(sys.argv[1], sys.argv[2], threads=1, progress=progress)
"""


def kill_at(src: Path, dst: Path, share: float) -> None:
    """Convert one file after the other; killed when `share` of the bytes is written."""
    child = subprocess.run([sys.executable, "-c", KILL_AT, src, dst, str(share)])
    assert child.returncode == -signal.SIGKILL


SETS = [
    ("out.gguf", [f"out-0000{i}-of-00004.gguf" for i in range(1, 5)]),
    ("out-00009-of-00042.gguf", [f"out-0000{i}-of-00004.gguf" for i in range(1, 5)]),
    ("out", [f"out/in-0000{i}-of-00004.gguf" for i in range(1, 5)]),
]


@pytest.mark.parametrize(("name", "expected"), SETS)
@pytest.mark.parametrize("threads", [None, 1, 9])
def test_split_set(split: Path, out: Path, name: str, expected: list[str], threads) -> None:
    with untouched(split.parent):
        fuseweights.convert(split, out / name, threads=threads)
    assert [str(p.relative_to(out)) for p in sorted(out.rglob("*.gguf"))] == expected
    assert names(out) == sorted({Path(e).parts[0] for e in expected})
    assert fuseweights.verify(split, out / expected[2]).ok
    fuseweights.unfuse(out / expected[0], out / "back")
    assert [p.read_bytes() for p in sorted((out / "back").iterdir())] == [
        p.read_bytes() for p in sorted(split.parent.iterdir())
    ]


@posix
@pytest.mark.parametrize(("name", "expected"), SETS[::2])
def test_resume_keeps_finished_files(
    split: Path, out: Path, name: str, expected: list[str]
) -> None:
    with untouched(split.parent):
        kill_at(split, out / name, 0.6)
        partial = out / PARTIAL.format(name)
        assert names(out) == [partial.name]
        done = {path.name: path.stat() for path in sorted(partial.rglob("*.gguf"))}
        assert len(done) == 2
        written = []
        fuseweights.convert(
            split, out / name, resume=True, progress=lambda done, total: written.append(total)
        )
    for path, before in zip([out / e for e in expected], done.values(), strict=False):
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert max(written) == sum((out / e).stat().st_size for e in expected[2:])
    assert names(out) == sorted({Path(e).parts[0] for e in expected})
    assert fuseweights.verify(split, out / expected[0]).ok


@posix
def test_without_resume_a_killed_run_is_begun_anew(split: Path, out: Path) -> None:
    kill_at(split, out / "out.gguf", 0.6)
    for path in (out / PARTIAL.format("out.gguf")).rglob("*.gguf"):
        path.write_bytes(b"of another run")
    fuseweights.convert(split, out / "out.gguf")
    assert len(names(out)) == 4
    assert fuseweights.verify(split, out / "out-00001-of-00004.gguf").ok


OTHER = {
    "source touched": lambda split: (os.utime(split, ns=(1, 1)), {})[1],
    "last file replaced": lambda split: (
        shutil.copy(p := split.with_name("in-00004-of-00004.gguf"), split.parent / "new"),
        (split.parent / "new").replace(p),
        {},
    )[-1],
    "another consumer": lambda split: {"consumer": "torch"},
}


@posix
@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_resume_refuses_what_another_run_began(split: Path, out: Path, change) -> None:
    kill_at(split, out / "out.gguf", 0.6)
    options = change(split)
    with untouched(split.parent, out), pytest.raises(RefusedError, match="another source or") as e:
        fuseweights.convert(split, out / "out.gguf", resume=True, **options)
    assert e.value.exit_code == 3
    fuseweights.convert(split, out / "out.gguf", **options)
    assert len(names(out)) == 4


def test_resume_without_a_beginning(src: Path, split: Path, out: Path) -> None:
    fuseweights.convert(src, out / "one.gguf", resume=True)
    with pytest.raises(RefusedError, match="exists already"):
        fuseweights.convert(src, out / "one.gguf", resume=True)
    assert names(out) == ["one.gguf"]


# --- full disk --------------------------------------------------------------------------------


class FullAfter(io.FileIO):
    """A file on a disk with room for 100 kB."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FileIO", FullAfter)
    monkeypatch.setattr(writer, "_preallocate", lambda *args: None)


def fails(name: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    error = OSError(number, os.strerror(number))
    return lambda monkeypatch: monkeypatch.setattr(f"fuseweights.{name}", raising(error))


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: mock.Mock(free=100_000))


FAILURES = {
    "no room at the start": (no_room, "100,000 free"),
    "no room to reserve": (fails("writer._preallocate", errno.ENOSPC), "No space left"),
    "no room in the middle": (full, "No space left"),
    "quota": (fails("writer._preallocate", errno.EDQUOT), "quota"),
    "fsync fails": (fails("writer.os.fsync", errno.EIO), "Input/output error"),
    "rename fails": (fails("target._place_file", errno.EIO), "Input/output error"),
}


@pytest.mark.parametrize("old", [None, b"the old one"])
@pytest.mark.parametrize(("prepare", "message"), FAILURES.values(), ids=FAILURES)
def test_the_system_refuses_to_write(src, out, monkeypatch, prepare, message, old) -> None:
    dst = out / "out.gguf"
    if old:
        dst.write_bytes(old)
    with untouched(src.parent, out), small_blocks():
        prepare(monkeypatch)
        with pytest.raises(WriteError, match=message) as caught:
            fuseweights.convert(src, dst, overwrite=old is not None)
    assert caught.value.exit_code == 4
    assert str(dst) in str(caught.value)
    assert str(src) not in str(caught.value)


def test_exactly_enough_room(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = fuseweights.plan(src).bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: mock.Mock(free=size))
    fuseweights.convert(src, out / "out.gguf")
    assert (out / "out.gguf").stat().st_size == size


def test_a_file_of_a_set_does_not_fit(split: Path, out: Path, monkeypatch) -> None:
    """What fits stays for --resume; what was begun goes."""
    original, begun = writer.write_file, []

    def third_fails(*args, **options) -> None:
        begun.append(args)
        if len(begun) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args, **options)

    with untouched(split.parent):
        monkeypatch.setattr(writer, "write_file", third_fails)
        with pytest.raises(WriteError, match=r"out-00003-of-00004\.gguf.*No space") as caught:
            fuseweights.convert(split, out / "out.gguf", threads=1)
        assert "2 of 4 files are done: --resume" in caught.value.__notes__
        assert names(out) == [PARTIAL.format("out.gguf")]
        monkeypatch.undo()
        fuseweights.convert(split, out / "out.gguf", resume=True)
    assert len(names(out)) == 4


@posix
def test_file_size_limit(src: Path, out: Path) -> None:
    import resource

    dst, limit = out / "out.gguf", 100_000
    with untouched(src.parent, out):
        done = cli(
            *("convert", src, dst),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"Error: {dst}: ")
    assert "Traceback" not in done.stderr


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """A tmpfs on `directory`."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("only root mounts")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("sees", ["at the start", "when reserving", "in the middle"])
def test_small_file_system(src: Path, out: Path, monkeypatch, sees: str) -> None:
    with mounted(out, "size=128k"), untouched(src.parent, out):
        if sees != "at the start":
            monkeypatch.setattr(writer, "check_space", lambda *args: None)
        if sees == "in the middle":
            monkeypatch.setattr(writer, "_preallocate", lambda *args: None)
        ticks: list[int] = []
        with small_blocks(), pytest.raises(WriteError, match=r"free|No space left") as caught:
            fuseweights.convert(src, out / "out.gguf", progress=lambda done, _: ticks.append(done))
        assert str(out / "out.gguf") in str(caught.value)
        assert bool(ticks) == (sees == "in the middle"), "found out before anything is written"


# --- targets that cannot be written -----------------------------------------------------------


@contextmanager
def read_only_mode(directory: Path) -> Iterator[None]:
    if os.name == "nt" or not os.geteuid():
        pytest.skip("root and Windows ignore a directory's mode")
    directory.chmod(0o555)
    try:
        yield
    finally:
        directory.chmod(0o755)


@contextmanager
def immutable(directory: Path) -> Iterator[None]:
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", directory]).returncode:
        pytest.skip("no immutable directories here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", directory], check=True)


@pytest.mark.parametrize(
    "protect",
    [read_only_mode, immutable, lambda directory: mounted(directory, "ro")],
    ids=["mode", "immutable", "mounted read-only"],
)
def test_read_only_directory(src: Path, out: Path, protect) -> None:
    with protect(out), untouched(src.parent, out):
        done = cli("convert", src, out / "out.gguf")
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.startswith("Error: ")
        assert str(out) in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("parent", ["absent", "a file"])
def test_no_parent_directory(src: Path, out: Path, parent: str) -> None:
    (out / "a file").touch()
    with untouched(src.parent, out), pytest.raises(WriteError, match=f"{parent}: is not a dir"):
        fuseweights.convert(src, out / parent / "out.gguf")


def link_to_source(src: Path, out: Path) -> Path:
    (out / "link.gguf").symlink_to(src)
    return out / "link.gguf"


def hard_link_to_source(src: Path, out: Path) -> Path:
    target = src.parent / "hard.gguf"
    os.link(src, target)
    return target


def through_a_linked_directory(src: Path, out: Path) -> Path:
    (out / "there").symlink_to(src.parent, target_is_directory=True)
    return out / "there" / src.name


THE_SOURCE = {
    "itself": lambda src, out: src,
    "other spelling": lambda src, out: src.parent / ".." / src.parent.name / src.name,
    "symlink": link_to_source,
    "hard link": hard_link_to_source,
    "linked directory": through_a_linked_directory,
    "its directory": lambda src, out: src.parent,
    "a directory above": lambda src, out: src.parent.parent,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", THE_SOURCE.values(), ids=THE_SOURCE)
def test_target_is_the_source(src: Path, out: Path, target, overwrite: bool) -> None:
    dst = target(src, out)
    with untouched(src.parent, out), pytest.raises(RefusedError, match="is the source") as caught:
        fuseweights.convert(src, dst, overwrite=overwrite)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["in.gguf", "in-00001-of-00004.gguf", "in-00003-of-00004.gguf", ""]
)
def test_target_is_the_source_set(split: Path, out: Path, name: str, overwrite: bool) -> None:
    """Any name of the set, the set's stem, its directory, or a link to one of its files."""
    with untouched(split.parent, out), pytest.raises(RefusedError, match="is the source"):
        fuseweights.convert(split, split.parent / name, overwrite=overwrite)
    (out / "out-00002-of-00004.gguf").symlink_to(split.with_name("in-00003-of-00004.gguf"))
    with untouched(split.parent, out), pytest.raises(RefusedError, match="is the source"):
        fuseweights.convert(split, out / "out.gguf", overwrite=overwrite)


def old_file(out: Path) -> Path:
    (out / "out.gguf").write_bytes(b"old")
    return out / "out.gguf"


def link_to(target: str) -> Callable[[Path], Path]:
    def make(out: Path) -> Path:
        (out / "other").mkdir()
        (out / "other" / "file").write_bytes(b"other")
        (out / "out.gguf").symlink_to(out / "other" / target)
        return out / "out.gguf"

    return make


def second_name(out: Path) -> Path:
    (out / "other").mkdir()
    (out / "other" / "file").write_bytes(b"other")
    os.link(out / "other" / "file", out / "out.gguf")
    return out / "out.gguf"


def directory(out: Path) -> Path:
    (out / "out.gguf").mkdir()
    (out / "out.gguf" / "file").write_bytes(b"other")
    return out / "out.gguf"


REPLACEABLE = {
    "file": old_file,
    "link": link_to("file"),
    "dangling link": link_to("absent"),
    "second name of a file": second_name,
}


@pytest.mark.parametrize("occupy", [*REPLACEABLE.values(), directory, link_to(".")])
def test_target_exists(src: Path, out: Path, occupy) -> None:
    dst = occupy(out)
    with (
        untouched(src.parent, out),
        pytest.raises(RefusedError, match=r"exists|is a dir") as caught,
    ):
        fuseweights.convert(src, dst)
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("occupy", REPLACEABLE.values(), ids=REPLACEABLE)
def test_overwrite_replaces_the_name_only(src: Path, out: Path, occupy) -> None:
    dst = occupy(out)
    other = {name: held for name, held in snapshot(out).items() if name != "out.gguf"}
    with untouched(src.parent):
        fuseweights.convert(src, dst, overwrite=True)
    assert not dst.is_symlink()
    assert fuseweights.verify(src, dst).ok
    assert {name: held for name, held in snapshot(out).items() if name != "out.gguf"} == other


@pytest.mark.parametrize("occupy", [directory, link_to(".")], ids=["directory", "link to one"])
def test_a_file_never_replaces_a_directory(src: Path, out: Path, occupy) -> None:
    dst = occupy(out)
    with untouched(src.parent, out), pytest.raises(RefusedError, match="is a directory"):
        fuseweights.convert(src, dst, overwrite=True)


@pytest.mark.parametrize("number", [1, 3])
def test_a_file_of_the_target_set_exists(split: Path, out: Path, number: int) -> None:
    (out / f"out-0000{number}-of-00004.gguf").write_bytes(b"old")
    with untouched(split.parent, out), pytest.raises(RefusedError, match="exists already"):
        fuseweights.convert(split, out / "out.gguf")
    fuseweights.convert(split, out / "out.gguf", overwrite=True)
    assert fuseweights.verify(split, out / "out-00001-of-00004.gguf").ok


def earlier_set(dst: Path) -> None:
    dst.mkdir()
    write_split(dst, [layer(n) for n in range(7)], stem="in")


OCCUPIED = {
    "empty directory": Path.mkdir,
    "an earlier set": earlier_set,
    "file": Path.touch,
    "dangling link": lambda dst: dst.symlink_to(dst.parent / "absent"),
}


@pytest.mark.parametrize("occupy", OCCUPIED.values(), ids=OCCUPIED)
def test_target_directory_exists(split: Path, out: Path, occupy) -> None:
    dst = out / "out"
    occupy(dst)
    with untouched(split.parent, out), pytest.raises(RefusedError, match="exists already"):
        fuseweights.convert(split, dst)
    fuseweights.convert(split, dst, overwrite=True)
    assert names(out) == ["out"]
    assert names(dst) == names(split.parent)
    assert fuseweights.verify(split, dst / split.name).ok


def test_overwrite_spares_what_is_no_checkpoint(split: Path, out: Path) -> None:
    """A directory that holds other things too is not deleted for the sake of a few files."""
    dst = out / "models"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    with untouched(split.parent, out), pytest.raises(RefusedError):
        fuseweights.convert(split, dst, overwrite=True)


KILL_IN = """
import os, shutil, signal, sys, fuseweights
from pathlib import Path
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
if sys.argv[3] == "shutil.rmtree":
    shutil.rmtree = kill
else:
    Path.rename = lambda old, new: (kill if new == Path(sys.argv[2]) else rename)(old, new)
fuseweights.convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@posix
@pytest.mark.parametrize("call", ["Path.rename", "shutil.rmtree"])
def test_killed_while_a_directory_is_replaced(split: Path, out: Path, call: str) -> None:
    """The old directory, moved aside, is neither in the way of the next run nor left over."""
    dst = out / "out"
    fuseweights.convert(split, dst)
    child = subprocess.run([sys.executable, "-c", KILL_IN, split, dst, call])
    assert child.returncode == -signal.SIGKILL
    fuseweights.convert(split, dst, overwrite=True)
    assert names(out) == ["out"]
    assert fuseweights.verify(split, dst / split.name).ok


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [".", "..", "below/.."])
def test_target_without_a_name(split: Path, out: Path, monkeypatch, name, overwrite) -> None:
    (out / "here" / "below").mkdir(parents=True)
    (out / "here" / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(out / "here")
    with untouched(split.parent, out), pytest.raises(RefusedError):
        fuseweights.convert(split, name, overwrite=overwrite)


@pytest.mark.parametrize("name", ["journal.json", "x.part", "files", ".in.fuseweights-partial"])
def test_source_named_like_our_own_files(src: Path, out: Path, name: str) -> None:
    named = src.rename(src.with_name(name))
    fuseweights.convert(named, out / "out.gguf")
    assert fuseweights.verify(named, out / "out.gguf").ok
    assert names(out) == ["out.gguf"]


def test_long_name(src: Path, out: Path) -> None:
    """The longest name that the file system allows is allowed."""
    dst = out / ("n" * 250 + ".gguf")
    fuseweights.convert(src, dst)
    assert names(out) == [dst.name]


# --- the source changes -----------------------------------------------------------------------


def replace_by_copy(src: Path) -> None:
    shutil.copy2(src, src.with_name("copy"))
    src.with_name("copy").replace(src)


def grow(src: Path) -> None:
    with open(src, "ab") as file:
        file.write(bytes(64))


CHANGES = {
    "truncated": lambda src: os.truncate(src, 200_000),
    "emptied": lambda src: os.truncate(src, 0),
    "grown": grow,
    "touched": lambda src: os.utime(src, ns=(1, 1)),
    "replaced": replace_by_copy,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("verb", [fuseweights.convert, fuseweights.unfuse])
def test_source_changes_while_it_is_read(src: Path, out: Path, change, verb) -> None:
    if verb is fuseweights.unfuse:
        fuseweights.convert(src, src.with_name("fused.gguf"))
        src = src.with_name("fused.gguf")
    with small_blocks(), untouched(out), pytest.raises(SourceChangedError) as caught:
        verb(src, out / "out.gguf", progress=halfway(lambda: change(src)))
    assert str(src) in str(caught.value)
    assert caught.value.exit_code == 4


class Unreadable(io.FileIO):
    """A file on a disk with a bad sector."""

    def readinto(self, buffer) -> int:
        if self.tell() >= 200_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def test_source_cannot_be_read(src: Path, out: Path, monkeypatch) -> None:
    monkeypatch.setattr(pieces, "FileIO", Unreadable)
    with small_blocks(), untouched(src.parent, out), pytest.raises(WriteError) as caught:
        fuseweights.convert(src, out / "out.gguf")
    assert str(caught.value) == f"{src}: Input/output error"


def test_a_file_of_the_source_set_changes(split: Path, out: Path) -> None:
    last = split.with_name("in-00004-of-00004.gguf")
    with small_blocks(), pytest.raises(SourceChangedError, match="00004"):
        fuseweights.convert(split, out / "o.gguf", progress=halfway(lambda: os.truncate(last, 99)))
    assert not list(out.glob("*.gguf"))


# --- interrupted, and raced -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("old", [None, b"the old one"])
def test_progress_raises(src: Path, out: Path, kind, old) -> None:
    if old:
        (out / "out.gguf").write_bytes(old)
    with small_blocks(), untouched(src.parent, out), pytest.raises(kind):
        fuseweights.convert(
            src, out / "out.gguf", overwrite=bool(old), progress=halfway(raising(kind()))
        )


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_interrupted_set(split: Path, out: Path, threads: int, name: str) -> None:
    with small_blocks(), untouched(split.parent, out), pytest.raises(KeyboardInterrupt):
        fuseweights.convert(
            split, out / name, threads=threads, progress=raising(KeyboardInterrupt())
        )
    with small_blocks(), untouched(split.parent), pytest.raises(KeyboardInterrupt):
        fuseweights.convert(
            split, out / name, threads=1, progress=halfway(raising(KeyboardInterrupt()))
        )
    assert names(out) == [PARTIAL.format(name)]
    assert not list(out.rglob("*.part"))
    fuseweights.convert(split, out / name, resume=True)
    assert not list(out.glob(".*"))


HANG = """
import sys, time
from fuseweights import cli, writer
def hang(descriptor):
    sys.stderr.write("hanging"); sys.stderr.flush()
    time.sleep(60)
writer.os.fsync = hang
sys.argv[0] = "fuseweights"
cli.main()
"""


@posix
@pytest.mark.parametrize("extra", [[], ["--json"], ["--quiet"]])
def test_interrupt_signal(src: Path, out: Path, extra: list[str]) -> None:
    with untouched(src.parent, out):
        child = subprocess.Popen(
            [sys.executable, "-c", HANG, "convert", src, out / "out.gguf", *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        assert child.stderr.read(7) == "hanging"
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=20)
    assert (child.returncode, stdout, stderr.strip()) == (130, "", "Interrupted.")


def test_two_runs_at_once(src: Path, out: Path) -> None:
    dst, begun, go_on = out / "out.gguf", Event(), Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(30)

    with small_blocks(), ThreadPoolExecutor(1) as pool, untouched(src.parent):
        first = pool.submit(fuseweights.convert, src, dst, progress=halfway(hold))
        try:
            assert begun.wait(30)
            with untouched(out):
                for extra in ([], ["--overwrite"], ["--resume"]):
                    second = cli("convert", src, dst, *extra)
                    assert (second.returncode, second.stdout) == (3, "")
                    assert f"{dst}: is being written by another run" in second.stderr
        finally:
            go_on.set()
        first.result()
    assert names(out) == ["out.gguf"]
    assert fuseweights.verify(src, dst).ok


def test_many_runs_at_once(src: Path, out: Path) -> None:
    """One wins each time; the others are refused, whatever moment they come at."""
    runs, rounds = 6, 400
    barrier = Barrier(runs)
    planned = fuseweights.plan(src)

    def one(number: int) -> str:
        barrier.wait()
        time.sleep(number % 3 * 0.0004)
        try:
            writer.write(planned.outputs, planned.checkpoint, out / "out.gguf", sync=False)
        except RefusedError:
            return "refused"
        except Exception as error:
            return repr(error)
        return "done"

    with ThreadPoolExecutor(runs) as pool:
        for _ in range(rounds):
            results = sorted(pool.map(one, range(runs)))
            assert results == ["done"] + ["refused"] * (runs - 1)
            assert names(out) == ["out.gguf"]
            (out / "out.gguf").unlink()


@pytest.mark.parametrize("prepare", [None, "no hard links"])
def test_target_appears_meanwhile(src: Path, out: Path, monkeypatch, prepare) -> None:
    """Someone else's file that comes up during the run is not replaced."""
    dst = out / "out.gguf"
    if prepare:
        monkeypatch.setattr(writer.os, "link", raising(OSError(errno.EPERM, "no links here")))
    with small_blocks(), untouched(src.parent), pytest.raises(RefusedError, match="exists already"):
        fuseweights.convert(src, dst, progress=halfway(lambda: dst.write_bytes(b"someone's")))
    assert (names(out), dst.read_bytes()) == (["out.gguf"], b"someone's")


def test_a_file_of_the_target_set_appears_meanwhile(split: Path, out: Path) -> None:
    """Then none of the set does."""
    other = out / "out-00002-of-00004.gguf"
    with small_blocks(), untouched(split.parent), pytest.raises(RefusedError):
        fuseweights.convert(
            split, out / "out.gguf", progress=halfway(lambda: other.write_bytes(b"someone's"))
        )
    assert [n for n in names(out) if not n.startswith(".")] == [other.name]


KILL_IN_PUBLISHING = """
import os, signal, sys, fuseweights
from fuseweights import target
place, count = target._place_file, 0
def place_two(*args):
    global count
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    place(*args)
    count += 1
target._place_file = place_two
fuseweights.convert(sys.argv[1], sys.argv[2])
"""


@posix
def test_killed_while_a_set_is_published(split: Path, out: Path) -> None:
    """The first file, the one that is opened, comes last; --resume brings the rest."""
    child = subprocess.run([sys.executable, "-c", KILL_IN_PUBLISHING, split, out / "out.gguf"])
    assert child.returncode == -signal.SIGKILL
    first = out / "out-00001-of-00004.gguf"
    assert not first.exists()
    with untouched(split.parent):
        fuseweights.convert(split, out / "out.gguf", resume=True)
    assert fuseweights.verify(split, first).ok
    assert len(names(out)) == 4


# --- written well -----------------------------------------------------------------------------


def test_synced_before_it_is_visible(src: Path, out: Path, monkeypatch) -> None:
    dst, events = out / "out.gguf", []

    def fsync(descriptor: int) -> None:
        synced = os.fstat(descriptor)
        kind = "directory" if synced.st_ino == out.stat().st_ino else synced.st_size
        events.append((kind, dst.exists()))

    monkeypatch.setattr(writer.os, "fsync", fsync)
    planned = fuseweights.convert(src, dst)
    assert events == [(planned.bytes, False), ("directory", True)]


def test_progress_counts_every_byte(split: Path, out: Path) -> None:
    calls = []
    with small_blocks():
        planned = fuseweights.convert(
            split, out / "out.gguf", threads=4, progress=lambda *call: calls.append(call)
        )
    assert calls == sorted(calls)
    assert calls[-1] == (planned.bytes, planned.bytes)
    assert {total for _, total in calls} == {planned.bytes}


def test_mode_is_the_usual_one(src: Path, out: Path) -> None:
    fuseweights.convert(src, out / "out.gguf")
    (out / "plain").touch()
    assert (out / "out.gguf").stat().st_mode == (out / "plain").stat().st_mode


MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "fuseweights", *sys.argv[1:]], check=True,
               stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(*args: object) -> float:
    """Peak memory of a command in MiB. A launcher starts it, because a child's peak begins at its
    parent's size, and pytest is large."""
    command = [sys.executable, "-c", MEASURE, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / (1 << (10 if sys.platform == "linux" else 20))


@posix
def test_memory_does_not_grow(tmp_path: Path) -> None:
    peaks = []
    for layers, rows in ((1, 768), (25, 3072)):
        src = big(tmp_path / f"{layers}.gguf", layers, rows)
        dst, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
        peaks.append(
            {
                "convert": peak("convert", src, dst, "--for", "torch"),
                "verify": peak("verify", src, dst),
                "hash": peak("verify", dst, "--source-sha256", digest(src)),
                "unfuse": peak("unfuse", dst, back),
            }
        )
        size = src.stat().st_size
        for path in (src, dst, back):
            path.unlink()
    assert size > 290e6
    for verb, small in peaks[0].items():
        assert peaks[1][verb] < small + 10, verb
        assert peaks[1][verb] < 50, verb


# --- the bytes of pieces ----------------------------------------------------------------------

LENGTHS = (300, 331)
SOURCE_BYTES = tuple(random.Random(n).randbytes(size) for n, size in enumerate(LENGTHS))
small = st.integers(0, 12)


@st.composite
def strands(draw: st.DrawFn, rounds: int) -> Strand:
    """Runs that lie inside their file; they may touch, or overlap, or be empty."""
    file = draw(st.integers(0, 1))
    size, stride = draw(small), draw(st.integers(0, 24))
    if draw(st.booleans()):
        stride = size
    room = LENGTHS[file] - size - max(0, rounds - 1) * stride
    return Strand(file, draw(st.integers(0, max(0, room))), size, stride)


@st.composite
def weaves(draw: st.DrawFn) -> Weave:
    rounds = draw(small)
    return Weave(rounds, tuple(draw(st.lists(strands(rounds), max_size=4))))


def naive(piece: pieces.Piece) -> bytes:
    """What a piece is, as its definition says it."""
    if isinstance(piece, Zeros):
        return bytes(piece.size)
    if isinstance(piece, bytes):
        return piece
    return b"".join(
        SOURCE_BYTES[file][offset + i * stride :][:size]
        for i in range(piece.rounds)
        for file, offset, size, stride in piece.strands
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("sources") / str(n) for n in range(len(SOURCE_BYTES))]
    for path, data in zip(paths, SOURCE_BYTES, strict=True):
        path.write_bytes(data)
    return paths


@settings(deadline=None, max_examples=400)
@given(
    listed=st.lists(
        st.one_of(weaves(), st.builds(Zeros, st.integers(0, 99)), st.binary(max_size=40)),
        max_size=5,
    ),
    buffer=st.integers(1, 80),
    handles=st.integers(1, 2),
)
def test_stream_is_what_the_pieces_say(sources, listed, buffer, handles) -> None:
    with (
        small_blocks(buffer),
        mock.patch.object(pieces, "OPEN_FILES", handles),
        Sources(sources) as opened,
    ):
        views = [bytes(view) for view in stream(listed, opened)]
    literal = max((len(piece) for piece in listed if isinstance(piece, bytes)), default=0)
    assert b"".join(views) == b"".join(map(naive, listed))
    assert all(len(view) <= max(buffer, literal) for view in views)
    assert list(map(piece_size, listed)) == [len(naive(piece)) for piece in listed]


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@settings(deadline=None, max_examples=200)
@given(shape=shapes, data=st.data(), buffer=st.integers(1, 200))
def test_stacked_and_section_are_concatenate_and_split(tmp_path_factory, shape, data, buffer):
    """Against numpy: weights of two bytes, parts of different heights along any axis."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    heights = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    arrays = [
        np.random.default_rng(n).integers(0, 1 << 16, [*shape[:axis], h, *shape[axis + 1 :]])
        for n, h in enumerate(heights)
    ]
    arrays = [array.astype(np.uint16) for array in arrays]
    places, begin = [], 3
    for array in arrays:
        places.append((0, begin, array.nbytes))
        begin += array.nbytes + 5
    path = tmp_path_factory.getbasetemp() / "stacked"
    path.write_bytes(b"abc" + b"".join(array.tobytes() + b"other" for array in arrays))
    whole = np.concatenate(arrays, axis)
    if axis:  # parts of one height share the rounds; `stacked` takes the first one's shape
        assert {array.shape[:axis] for array in arrays} == {whole.shape[:axis]}
    with small_blocks(buffer):
        with Sources([path]) as opened:
            stacked = pieces.stacked(places, arrays[0].shape, axis)
            assert b"".join(map(bytes, stream([stacked], opened))) == whole.tobytes()
        path.write_bytes(b"abc" + whole.tobytes())
        begin = 0
        with Sources([path]) as opened:
            for array, height in zip(arrays, heights, strict=True):
                place = (0, 3, whole.nbytes)
                cut = pieces.section(place, whole.shape, axis, begin, begin + height)
                assert b"".join(map(bytes, stream([cut], opened))) == array.tobytes()
                begin += height


@pytest.mark.parametrize("call", ["_begin", "flock"])
def test_a_fault_before_anything_is_written(src: Path, out: Path, monkeypatch, call: str) -> None:
    """The journal cannot be written, or locked for another reason than another run."""
    owner = pytest.importorskip("fcntl") if call == "flock" else target
    fault = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(owner, call, mock.Mock(side_effect=fault))
    with pytest.raises(WriteError, match=r"fuseweights-partial: Input/output error"):
        fuseweights.convert(src, out / "o.gguf")
    assert not list(out.glob("*.gguf"))
    if call == "_begin":
        assert not list(out.iterdir())


def test_what_cannot_be_removed_is_named(src: Path, out: Path, monkeypatch) -> None:
    fault = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(target, "_remove", mock.Mock(side_effect=fault))
    with pytest.raises(WriteError, match=r"fuseweights-partial: cannot be removed") as caught:
        fuseweights.convert(src, out / "o.gguf")
    assert "is whole" in caught.value.hint
    assert fuseweights.verify(src, out / "o.gguf").ok
