"""Reading GGUF headers: against gguf-py's own reader, and against damage."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import time

import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from raw_gguf import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    U64,
    layer,
    pack,
    write,
    write_split,
)

from fuseweights import CorruptError, open_checkpoint
from fuseweights.checkpoint.ggml import TENSOR_TYPES
from fuseweights.checkpoint.gguf import irregularity, read_array


def test_types_are_ggufs():
    assert {t.value: (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType} == TENSOR_TYPES


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
def test_agrees_with_gguf_py(tmp_path, version, alignment):
    metadata = [
        ("tokenizer.ggml.tokens", ARRAY, (STRING, ["", "a", "é" * 40, "x" * 300])),
        ("some.floats", ARRAY, (F32, [1.0, 2.0])),
        ("some.empty", ARRAY, (STRING, [])),
        ("some.flag", BOOL, True),
        ("llama.block_count", U32, 2),
    ]
    path = write(
        tmp_path / "a.gguf",
        [*layer(0, dtype="Q8_0"), *layer(1, dtype="F16", bias=True)],
        metadata,
        version=version,
        alignment=alignment,
    )
    ours, theirs = open_checkpoint(path), GGUFReader(path)
    assert ours.architecture == "llama"
    assert [(t.name, t.shape, t.dtype, t.offset, t.size) for t in ours.tensors.values()] == [
        (
            t.name,
            tuple(int(n) for n in reversed(t.shape)),
            t.tensor_type.name,
            t.data_offset,
            t.n_bytes,
        )
        for t in theirs.tensors
    ]
    file = ours.files[0]
    assert file.get("llama.block_count") == 2
    assert file.get("some.flag") is True
    assert read_array(file, "tokenizer.ggml.tokens") == ["", "a", "é" * 40, "x" * 300]
    assert irregularity(file) is None


@pytest.mark.parametrize("dtype", [t.name for t in GGMLQuantizationType])
def test_every_type_is_sized(tmp_path, dtype):
    path = write(tmp_path / "a.gguf", [("a", (3, 256), dtype, None), ("b", (2,), "F32", None)])
    tensors = open_checkpoint(path).tensors
    assert tensors["a"].size == GGUFReader(path).tensors[0].n_bytes
    assert tensors["a"].dtype == dtype


def test_big_endian(tmp_path):
    path = write(tmp_path / "a.gguf", layer(), [("llama.block_count", U32, 7)], order=">")
    checkpoint = open_checkpoint(path)
    assert checkpoint.files[0].get("llama.block_count") == 7
    assert len(checkpoint.tensors) == len(layer())


def test_vocabulary_is_skipped_in_c_and_exactly(tmp_path):
    """Lengths around the C matcher's limit, in every run position, and a fast big one."""
    rng = random.Random(0)
    words = ["x" * rng.choice([0, 1, 5, 62, 63, 64, 65, 255, 256, 300]) for _ in range(20_000)]
    short = ["y" * rng.randrange(12) for _ in range(300_000)]
    path = write(
        tmp_path / "a.gguf",
        layer(),
        [("words", ARRAY, (STRING, words)), ("short", ARRAY, (STRING, short)), ("end", U32, 9)],
    )
    begun = time.process_time()
    checkpoint = open_checkpoint(path)
    seconds = time.process_time() - begun
    assert checkpoint.files[0].get("end") == 9
    assert read_array(checkpoint.files[0], "words") == words
    assert seconds < 0.5  # about 0.03; gguf-py takes several seconds


def test_vocabulary_only(tmp_path):
    path = write(tmp_path / "a.gguf", [], [("tokens", ARRAY, (STRING, ["a", ""]))])
    assert open_checkpoint(path).tensors == {}


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_split_set_through_any_file(tmp_path, opened):
    write_split(tmp_path, [[], layer(0), layer(1)])
    files = sorted(tmp_path.glob("*.gguf"))
    checkpoint = open_checkpoint(files[opened])
    assert [file.path for file in checkpoint.files] == files
    assert len(checkpoint.tensors) == 2 * len(layer())


def _rewritten(tmp_path, change):
    write_split(tmp_path, [layer(0), layer(1)])
    change(tmp_path)
    return tmp_path / "model-00001-of-00002.gguf"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda d: (d / "model-00002-of-00002.gguf").unlink(), "missing from the split set"),
        (
            lambda d: (d / "model-00002-of-00002.gguf").write_bytes(
                (d / "model-00001-of-00002.gguf").read_bytes()
            ),
            "occurs twice",
        ),
        (
            lambda d: write(
                d / "model-00002-of-00002.gguf",
                [("other", (4,), "F32", None)],
                [("split.no", 2, 1), ("split.count", 2, 2), ("split.tensors.count", I32, 99)],
            ),
            "split.tensors.count",
        ),
    ],
)
def test_broken_split_set(tmp_path, change, said):
    with pytest.raises(CorruptError, match=said):
        open_checkpoint(_rewritten(tmp_path, change))


def test_split_file_with_another_name(tmp_path):
    write_split(tmp_path, [layer(0), layer(1)])
    (tmp_path / "model-00001-of-00002.gguf").rename(tmp_path / "first.gguf")
    with pytest.raises(CorruptError, match="not named like one"):
        open_checkpoint(tmp_path / "first.gguf")


def _info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    raw = name.encode()
    return (
        struct.pack("<Q", len(raw))
        + raw
        + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    )


def _file(tensors: int, fields: int, body: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def _field(key: str, kind: int, raw: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + raw


DATA = bytes(4096)
LYING = {
    "empty": (b"", "not a GGUF"),
    "other magic": (b"PK\x03\x04" + DATA, "not a GGUF"),
    "version 1": (_file(0, 0, b"", version=1), "version 1 is not supported"),
    "version 9": (_file(0, 0, b"", version=9), "version 9 is not supported"),
    "count of tensors": (_file(1 << 60, 0, DATA), "claims 1152921504606846976 tensors"),
    "count of keys": (_file(0, 1 << 60, DATA), "metadata keys"),
    "key length": (_file(0, 1, struct.pack("<Q", 1 << 40) + DATA), "at most 65535"),
    "value type": (_file(0, 1, _field("a", 99, DATA)), "unknown type 99"),
    "string length": (_file(0, 1, _field("a", 8, struct.pack("<Q", 1 << 50)) + DATA), "needs"),
    "array count": (_file(0, 1, _field("a", 9, struct.pack("<IQ", 4, 1 << 61)) + DATA), "needs"),
    "array of strings": (
        _file(0, 1, _field("a", 9, struct.pack("<IQ", 8, 1 << 61)) + DATA),
        "too many",
    ),
    "array type": (_file(0, 1, _field("a", 9, struct.pack("<IQ", 77, 1)) + DATA), "element type"),
    "nested arrays": (
        _file(0, 1, _field("a", 9, struct.pack("<IQ", 9, 1) * 500) + DATA),
        "element type 9",
    ),
    "key twice": (_file(0, 2, _field("a", 4, b"1234") * 2 + DATA), "occurs twice"),
    "alignment": (
        _file(0, 1, _field("general.alignment", 4, struct.pack("<I", 48)) + DATA),
        "power of two",
    ),
    "alignment 0": (
        _file(0, 1, _field("general.alignment", 4, bytes(4)) + DATA),
        "power of two",
    ),
    "dimensions": (_file(1, 0, _info("a", (1,) * 5, 0, 0) + DATA), "at most 4"),
    "tensor type": (_file(1, 0, _info("a", (32,), 4, 0) + DATA), "has type 4, whose size"),
    "row of a block": (_file(1, 0, _info("a", (33, 2), 8, 0) + DATA), "expected a multiple of 32"),
    "huge tensor": (_file(1, 0, _info("a", (1 << 62,) * 4, 0, 0) + DATA), "ends at byte"),
    "offset outside": (_file(1, 0, _info("a", (8,), 0, 1 << 40) + DATA), "ends at byte"),
    "offset unaligned": (_file(1, 0, _info("a", (8,), 0, 4) + DATA), "not aligned"),
    "overlap": (
        _file(2, 0, _info("a", (16,), 0, 0) + _info("b", (16,), 0, 32) + DATA),
        "'a' and 'b' overlap",
    ),
    "name twice": (
        _file(2, 0, _info("a", (8,), 0, 0) + _info("a", (8,), 0, 32) + DATA),
        "'a' occurs twice",
    ),
    "name not UTF-8": (
        _file(1, 0, struct.pack("<Q", 1) + b"\xff" + struct.pack("<IQIQ", 1, 8, 0, 0) + DATA),
        "not UTF-8",
    ),
    "architecture": (
        _file(0, 1, _field("general.architecture", 4, b"1234")),
        "general.architecture is not a string",
    ),
    "alignment type": (
        _file(0, 1, _field("general.alignment", 8, struct.pack("<Q", 2) + b"32")),
        "power of two",
    ),
    "count beyond the header": (_file(0, 3, _field("a", 10, bytes(8)) + b"\0" * 30), "twice"),
    "u64 scalar": (_file(0, 1, _field("a", U64, b"1234")), "needs 8 bytes"),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_header(tmp_path, case):
    raw, said = LYING[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with pytest.raises(CorruptError) as caught:
        open_checkpoint(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lies_are_not_read_into_memory(tmp_path):
    """A sparse file big enough to justify its counts: skipped, never loaded."""
    path = tmp_path / "a.gguf"
    path.write_bytes(_file(0, 1, _field("a", 9, struct.pack("<IQ", 10, 1 << 30))))
    with open(path, "r+b") as file:
        file.truncate(9 << 30)
    code = (
        "import sys; from fuseweights import open_checkpoint; open_checkpoint(sys.argv[1]);"
        # not ru_maxrss, which a child inherits from the process that started it
        "print([l for l in open('/proc/self/status') if 'VmHWM' in l][0].split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000


def test_500_damaged_files_are_refused_or_harmless(tmp_path):
    """Every mutant of a real header either raises CorruptError or still reads as a checkpoint
    whose tensors lie inside the file; none hangs, crashes or eats memory."""
    whole = pack(
        [*layer(0, bias=True), *layer(1, dtype="Q4_K", k_width=256)],
        [("tokens", ARRAY, (STRING, [str(i) for i in range(50)])), ("n", U32, 1)],
    )
    header = whole.index(b"blk.1.ffn_up.weight") + 60
    rng = random.Random(1)
    path = tmp_path / "a.gguf"
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1500):
        raw = bytearray(whole)
        kind = number % 3
        if kind == 0:
            raw = raw[: rng.randrange(len(raw))]
        elif kind == 1:
            raw[rng.randrange(header)] = rng.randrange(256)
        else:
            at = rng.randrange(4, header - 8)
            raw[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 62)])
        path.write_bytes(raw)
        begun = time.process_time()
        try:
            checkpoint = open_checkpoint(path)
        except CorruptError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert all(t.offset + t.size <= len(raw) for t in checkpoint.tensors.values())
        assert time.process_time() - begun < 2
    assert refused > 900
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
