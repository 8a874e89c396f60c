"""Cloning: outputs made of the source's own blocks equal copied ones, wherever it works or not.

XFS and btrfs are mounted from images. Where that is not possible, cloning is emulated by an exact
stand-in for the system call, so everything but the sharing itself is tested anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuseweights
from fuseweights import SourceChangedError, WriteError, api, clone, writer
from fuseweights.checkpoint.pieces import (
    Piece,
    Sources,
    Strand,
    Weave,
    Zeros,
    piece_size,
    span,
    stacked,
    stream,
)
from fuseweights.cli import app
from fuseweights.clone import BLOCK, LEAST, Clone, Copy, best_start, clone_ranges

linux = pytest.mark.skipif(sys.platform != "linux", reason="FICLONERANGE is Linux's")
MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
LAYERS, HIDDEN, KV, MLP, VOCAB = 3, 512, 128, 1024, 1024


# --- what the tests are made of ---------------------------------------------------------------


def tensors() -> dict[str, tuple[int, ...]]:
    """A small Qwen3: every weight a multiple of 4096 bytes, 256-byte norms between them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{at}.{name}_proj.weight": (KV, HIDDEN) for name in "kv"}
        shapes |= {f"{at}.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{at}.{name}_norm.weight": (128,) for name in "qk"}
        shapes |= {f"{mlp}.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes[f"{mlp}.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


def save(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """A bf16 file as `save_file` lays it out: sorted by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = np.random.default_rng(seed).bytes(end)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def make_source(root: Path) -> Path:
    """Two files; the last layer's gate and up are in different ones."""
    root.mkdir()
    shapes = tensors()
    late = {n for n in shapes if ".2." in n and "gate" not in n}
    files = [{n: s for n, s in shapes.items() if (n in late) == second} for second in (0, 1)]
    weight_map = {}
    for number, content in enumerate(files):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save(root / name, content, number)
        weight_map |= dict.fromkeys(content, name)
    total = sum(2 * prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"model_type": "qwen3", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN}
    (root / "config.json").write_text(json.dumps(config))
    (root / "tokenizer.json").write_bytes(np.random.default_rng(9).bytes(3 * LEAST + 77))
    return root


def mounted(kind: str, image: Path, where: Path) -> None:
    """Make a file system in `image` and mount it, or skip and say why not."""
    tool = MAKE[kind][0]
    if sys.platform != "linux" or os.geteuid() or shutil.which(tool) is None:
        pytest.skip(f"needs Linux, root and {tool}")
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
    where.mkdir()
    mount = subprocess.run(["mount", "-o", "loop", image, where], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting {kind} is not possible: {mount.stderr.strip()}")


@pytest.fixture(scope="module", params=MAKE)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A directory on a file system that shares blocks, with a source in it."""
    base = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        stack.callback((base / "image").unlink, missing_ok=True)
        mounted(request.param, base / "image", base / "mnt")
        stack.callback(subprocess.run, ["umount", "--lazy", base / "mnt"], check=True)
        make_source(base / "mnt" / "src")
        yield base / "mnt"


@pytest.fixture
def room(volume: Path) -> Iterator[Path]:
    """An empty directory on the volume."""
    path = volume / "room"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def stand_in(out: int, source: int, request: Clone) -> None:
    """FICLONERANGE's contract, by copying."""
    if request.offset % BLOCK or request.target % BLOCK or request.size % BLOCK:
        raise OSError(errno.EINVAL, "misaligned")
    data = os.pread(source, request.size, request.offset)
    if len(data) < request.size:
        raise OSError(errno.EINVAL, "beyond the end")
    os.pwrite(out, data, request.target)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[Clone]:
    """Cloning works here; the requests that were carried out."""
    done: list[Clone] = []

    def request(out: int, source: int, wanted: Clone) -> None:
        stand_in(out, source, wanted)
        done.append(wanted)

    monkeypatch.setattr(clone, "_clone_range", request)
    return done


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shared(path: Path) -> int:
    """Bytes of a file in blocks that another file has too (FIEMAP)."""
    import fcntl

    count, total, start = 256, 0, 0
    with open(path, "rb") as file:
        while True:
            request = bytearray(struct.pack("=QQIIII", start, 1 << 62, 1, 0, count, 0))
            request += bytes(56 * count)
            fcntl.ioctl(file, 0xC020660B, request)
            found = struct.unpack_from("=I", request, 20)[0]
            for i in range(found):
                logical, _, length, _, _, flags = struct.unpack_from(
                    "=QQQQQI", request, 32 + 56 * i
                )
                total += length if flags & 0x2000 else 0
                start = logical + length
                if flags & 1:
                    return total
            if not found:
                return total


def weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def shared_part(directory: Path) -> float:
    paths = weights(directory)
    return sum(map(shared, paths)) / sum(path.stat().st_size for path in paths)


def free(path: Path) -> int:
    os.sync()
    stat = os.statvfs(path)
    return stat.f_bfree * stat.f_frsize


# --- what is cloned and what is copied --------------------------------------------------------

SOURCE_SIZES = (4096, 1000)


@st.composite
def woven(draw: st.DrawFn) -> Piece:
    kind = draw(st.sampled_from(["bytes", "zeros", "span", "weave"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "zeros":
        return Zeros(draw(st.integers(0, 100)))
    file = draw(st.integers(0, 1))
    if kind == "span":
        offset = draw(st.integers(0, SOURCE_SIZES[file]))
        return span(file, offset, draw(st.integers(0, SOURCE_SIZES[file] - offset)))
    rounds = draw(st.integers(0, 5))
    strands = []
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.sampled_from([0, 7, 16, 32, 48, 64, 100]))
        stride = draw(st.sampled_from([0, size, size + 16, size + 5]))
        room = SOURCE_SIZES[file] - size - stride * max(0, rounds - 1)
        strands.append(Strand(file, draw(st.integers(0, room)), size, stride))
    return Weave(rounds, tuple(strands))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("sources")
    paths = [directory / str(number) for number in range(len(SOURCE_SIZES))]
    for path, size in zip(paths, SOURCE_SIZES, strict=True):
        path.write_bytes(np.random.default_rng(size).bytes(size))
    return paths


@settings(deadline=None)
@given(
    pieces=st.lists(woven(), max_size=8),
    block=st.sampled_from([8, 16]),
    least=st.sampled_from([1, 32, 64]),
    usable=st.sampled_from([None, {0}, {0, 1}, set()]),
)
def test_ranges_cover_the_output(sources, pieces, block, least, usable) -> None:
    ranges = list(clone_ranges(pieces, usable, block=block, least=least))
    end = 0
    for item in ranges:
        assert item.target == end
        end += item.size
        if isinstance(item, Clone):
            assert not (item.target % block or item.offset % block or item.size % block)
            assert item.size >= max(least, block)
            assert usable is None or item.file in usable
        else:
            assert item.size == piece_size(item.piece)
    assert end == sum(map(piece_size, pieces))
    as_pieces = [
        span(item.file, item.offset, item.size) if isinstance(item, Clone) else item.piece
        for item in ranges
    ]
    with Sources(sources) as opened:
        expected = b"".join(map(bytes, stream(pieces, opened)))
        assert b"".join(map(bytes, stream(as_pieces, opened))) == expected


def test_the_whole_blocks_of_a_run() -> None:
    pieces = [b"x" * 100, span(0, 5 * BLOCK + 100, LEAST + 2 * BLOCK)]
    assert list(clone_ranges(pieces)) == [
        Copy(0, 100, b"x" * 100),
        Copy(100, BLOCK - 100, span(0, 5 * BLOCK + 100, BLOCK - 100)),
        Clone(BLOCK, LEAST + BLOCK, 0, 6 * BLOCK),
        Copy(LEAST + 2 * BLOCK, 100, span(0, LEAST + 7 * BLOCK, 100)),
    ]


def test_a_misaligned_or_short_run_is_copied_whole() -> None:
    for piece in (span(0, 1, 1 << 20), span(0, 0, LEAST - 1)):
        assert list(clone_ranges([piece])) == [Copy(0, piece_size(piece), piece)]


def test_neighbours_are_cloned_together() -> None:
    pieces = [span(0, at, BLOCK + 256) for at in range(0, 32 * (BLOCK + 256), BLOCK + 256)]
    assert [type(item) for item in clone_ranges(pieces)] == [Clone]


def test_neighbours_in_two_files_are_none() -> None:
    pieces = [span(0, 0, LEAST), span(1, LEAST, LEAST)]
    assert list(clone_ranges(pieces)) == [Clone(0, LEAST, 0, 0), Clone(LEAST, LEAST, 1, LEAST)]


def test_each_long_run_of_experts_is_cloned() -> None:
    """gate and up of four experts, stacked as [E, 2I, H]: the sources are [E, I, H]."""
    size = 4 * LEAST
    weave = stacked([(0, 0, size), (1, BLOCK, size)], (4, 1, 1), 1)
    expected = [
        Clone((2 * expert + part) * LEAST, LEAST, part, expert * LEAST + part * BLOCK)
        for expert in range(4)
        for part in range(2)
    ]
    assert list(clone_ranges([weave])) == expected


def test_short_runs_stay_one_piece() -> None:
    weave = stacked([(0, 0, 1 << 20), (1, 0, 1 << 20)], (1 << 10, 1), 1)
    assert list(clone_ranges([weave])) == [Copy(0, 2 << 20, weave)]


@given(
    lost=st.integers(0, 200).map(lambda n: 8 * n),
    offset=st.integers(0, 1000).map(lambda n: 8 * n),
)
def test_best_start_makes_up_for_what_got_lost(lost: int, offset: int) -> None:
    """Small tensors before the large ones shrink when they merge: 3 weight_shapes into 1."""
    pieces = [span(0, offset, 64), span(0, offset + 64 + lost, 1 << 20)]
    start = best_start(pieces)
    assert start is not None
    cloned = [r.size for r in clone_ranges([Zeros(start), *pieces]) if isinstance(r, Clone)]
    assert sum(cloned) > (1 << 20) - 2 * BLOCK


def test_best_start_is_where_most_bytes_want_it() -> None:
    assert best_start([span(0, 16, LEAST), span(0, 5 << 20, 9 * LEAST)]) == 0
    assert best_start([span(0, 16, 9 * LEAST), span(0, 5 << 20, LEAST)]) == 16
    assert best_start([span(0, 4, 9 * LEAST), span(0, 5 << 20, LEAST)]) is not None
    assert best_start([b"", Zeros(9), span(0, 0, LEAST - 1)]) is None


# --- file systems that share blocks -----------------------------------------------------------


def test_a_clone_equals_a_copy(volume: Path, room: Path) -> None:
    src = volume / "src"
    before = free(room)
    fuseweights.convert(src, room / "copied", clone=False)
    copied = before - free(room)
    fuseweights.convert(src, room / "cloned")
    cloned = before - copied - free(room)
    assert files(room / "cloned") == files(room / "copied")
    assert fuseweights.verify(src, room / "cloned").ok
    assert shared_part(room / "copied") == 0
    planned = api.plan(src)
    usable = clone.clonable(planned.checkpoint.paths, room)
    own = sum(clone.copied_size(output.pieces, usable) for output in planned.outputs)
    assert shared_part(room / "cloned") > 0.85
    assert cloned < copied / 4 and cloned < own + (2 << 20)
    assert shared(room / "cloned" / "tokenizer.json") >= 3 * LEAST


def test_unfusing_clones_back(volume: Path, room: Path) -> None:
    fuseweights.convert(volume / "src", room / "fused", sync=False)
    fuseweights.unfuse(room / "fused", room / "back", sync=False)
    assert files(room / "back") == files(volume / "src")
    assert shared_part(room / "back") > 0.85
    fuseweights.unfuse(room / "fused", room / "copy", clone=False, sync=False)
    assert files(room / "copy") == files(volume / "src")
    assert shared_part(room / "copy") == 0


def test_out_of_the_volume_and_into_it(volume: Path, room: Path, tmp_path: Path) -> None:
    fuseweights.convert(volume / "src", tmp_path / "fused", sync=False)
    fuseweights.unfuse(tmp_path / "fused", room / "back", sync=False)
    assert files(room / "back") == files(volume / "src")
    assert shared_part(room / "back") == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EINVAL], ids=errno.errorcode.get)
def test_the_real_call_fails_midway(volume: Path, room: Path, monkeypatch, code: int) -> None:
    real, calls = clone._clone_range, []

    def fails_later(out: int, source: int, request: Clone) -> None:
        calls.append(request)
        if len(calls) > 7:
            raise OSError(code, os.strerror(code))
        real(out, source, request)

    monkeypatch.setattr(clone, "_clone_range", fails_later)
    fuseweights.convert(volume / "src", room / "dst", threads=1, sync=False)
    assert fuseweights.verify(volume / "src", room / "dst").ok
    assert 0 < shared_part(room / "dst") < 0.8


# --- and those that do not --------------------------------------------------------------------


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_source(tmp_path / "src")


@linux
@pytest.mark.parametrize("where", ["/dev/shm", None], ids=["tmpfs", "where the tests are"])
def test_falls_back_to_copying(src: Path, tmp_path: Path, where: str | None) -> None:
    if where is not None and not os.access(where, os.W_OK):
        pytest.skip(f"{where} cannot be written")
    out = Path(where or tmp_path) / f"fuseweights-test-{os.getpid()}"
    try:
        fuseweights.convert(src, out, sync=False)
        fuseweights.convert(src, tmp_path / "copied", clone=False, sync=False)
        assert files(out) == files(tmp_path / "copied")
    finally:
        shutil.rmtree(out, ignore_errors=True)


@linux
def test_without_clones_nothing_is_asked_again(src: Path, tmp_path: Path, monkeypatch) -> None:
    """One question a source, and then each file is reserved and copied as ever."""
    asked: list[Clone] = []
    reserved: list[int] = []

    def refuses(out: int, source: int, request: Clone) -> None:
        asked.append(request)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(clone, "_clone_range", refuses)
    monkeypatch.setattr(writer, "_preallocate", lambda out, size: reserved.append(size))
    planned = fuseweights.convert(src, tmp_path / "dst", sync=False)
    assert len(asked) == len(planned.checkpoint.paths)
    assert sorted(reserved) == sorted(output.size for output in planned.outputs)


@linux
def test_cloned_files_are_not_reserved(src: Path, tmp_path: Path, emulated, monkeypatch) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(writer, "_preallocate", lambda out, size: reserved.append(size))
    fuseweights.convert(src, tmp_path / "dst", sync=False)
    assert max(reserved) < LEAST, "only the small files beside the weights"


@linux
def test_no_clone_asks_nothing(src: Path, tmp_path: Path, emulated: list[Clone]) -> None:
    fuseweights.convert(src, tmp_path / "dst", clone=False, sync=False)
    assert emulated == []


@linux
def test_the_flag(src: Path, tmp_path: Path, emulated: list[Clone]) -> None:
    for verb, source in (("convert", src), ("unfuse", tmp_path / "convert")):
        for flag in ([], ["--no-clone"]):
            emulated.clear()
            target = tmp_path / f"{verb}{''.join(flag)}"
            app([verb, str(source), str(target), "--quiet", *flag], standalone_mode=False)
            assert bool(emulated) == (not flag)


@linux
def test_clones_need_no_room(src: Path, tmp_path: Path, emulated, monkeypatch) -> None:
    size = sum(path.stat().st_size for path in weights(src))
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WriteError, match="needs"):
        fuseweights.convert(src, tmp_path / "dst", clone=False)
    fuseweights.convert(src, tmp_path / "dst", sync=False)
    assert fuseweights.verify(src, tmp_path / "dst").ok


@linux
def test_emulated_clones_equal_a_copy(src: Path, tmp_path: Path, emulated: list[Clone]) -> None:
    calls: list[tuple[int, int]] = []
    planned = fuseweights.convert(
        src, tmp_path / "cloned", sync=False, progress=lambda *c: calls.append(c)
    )
    assert sum(request.size for request in emulated) > 0.85 * planned.bytes
    assert calls[-1] == (planned.bytes, planned.bytes) and calls == sorted(calls)
    fuseweights.convert(src, tmp_path / "copied", clone=False, sync=False)
    assert files(tmp_path / "cloned") == files(tmp_path / "copied")
    fuseweights.unfuse(tmp_path / "cloned", tmp_path / "back", sync=False)
    assert files(tmp_path / "back") == files(src)


@linux
@pytest.mark.parametrize("working", [0, 1, 4])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL], ids=errno.errorcode.get)
def test_what_fails_midway_is_copied(
    src: Path, tmp_path: Path, monkeypatch, working: int, code: int
) -> None:
    """After `working` calls that succeed every call fails, having written rubbish."""
    planned = api.plan(src)
    calls: list[Clone] = []

    def fails_later(out: int, source: int, request: Clone) -> None:
        calls.append(request)
        if len(calls) > len(planned.checkpoint.paths) + working:
            os.pwrite(out, b"rubbish", request.target)
            raise OSError(code, os.strerror(code))
        stand_in(out, source, request)

    monkeypatch.setattr(clone, "_clone_range", fails_later)
    progress: list[int] = []
    fuseweights.convert(
        src, tmp_path / "dst", threads=1, sync=False, progress=lambda done, _: progress.append(done)
    )
    assert fuseweights.verify(src, tmp_path / "dst").ok
    assert progress[-1] == planned.bytes


@linux
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_progress_that_raises_is_heard(src: Path, tmp_path: Path, emulated, error) -> None:
    def progress(done: int, total: int) -> None:
        raise error("stop")

    with pytest.raises((error, WriteError)):
        fuseweights.convert(src, tmp_path / "dst", progress=progress, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@linux
@pytest.mark.parametrize("gone", [True, False], ids=["deleted", "shrunk"])
def test_a_source_that_vanishes(src: Path, tmp_path: Path, emulated, gone: bool) -> None:
    """Copying what could not be cloned reports it."""
    planned = api.plan(src)
    last = weights(src)[-1]
    last.unlink() if gone else os.truncate(last, LEAST)
    output = next(o for o in planned.outputs if o.name == last.name)
    paths = planned.checkpoint.paths
    with pytest.raises(WriteError if gone else SourceChangedError):
        writer.write_file(output.pieces, paths, tmp_path / "out", usable={0, 1})


def test_no_clones_elsewhere(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert clone.clonable([src / "config.json"], tmp_path) == frozenset()


@linux
def test_asking_leaves_nothing_behind(src: Path, tmp_path: Path, emulated: list[Clone]) -> None:
    empty, missing = tmp_path / "empty", tmp_path / "missing"
    empty.touch()
    (tmp_path / "out").mkdir()
    paths = [*weights(src), empty, missing]
    assert clone.clonable(paths, tmp_path / "out") == {0, 1}
    assert clone.clonable(paths, missing) == frozenset()
    assert list((tmp_path / "out").iterdir()) == []


def test_write_says_when_nothing_was_cloned(tmp_path: Path) -> None:
    def never(count: int) -> None:
        raise AssertionError

    tick: Callable[[int], None] = never
    with FileIO(tmp_path / "out", "w") as out:
        assert not clone.write(out, [b"abc", span(0, 0, 1 << 20)], [tmp_path / "in"], {0}, tick)
    assert (tmp_path / "out").read_bytes() == b""
