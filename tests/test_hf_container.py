"""Hugging Face directories as files: strict reading, lossless editing, byte-identical restoring."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import raw_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_safetensors import BITS, INDEX, contents, header, layer, pack, there_and_back, write
from safetensors import SafetensorError, deserialize

import fuseweights
from fuseweights import CorruptError, FuseweightsError, RefusedError, manifest, open_checkpoint
from fuseweights.checkpoint import jsontext

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ONE = ("a", "U8", (4,), None)
TWO = ("b", "F32", (2, 3), None)


def single(directory: Path, raw: bytes) -> Path:
    """A directory with these bytes for a file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").write_bytes(raw)
    return directory


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CorruptError) as caught:
        fuseweights.plan(path)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said and str(path) in said and caught.value.exit_code == 4
    assert len(said) < 600


# --- the header ---------------------------------------------------------------------------------


@st.composite
def tensor_lists(draw, min_size: int = 0) -> list[raw_safetensors.Tensor]:
    names = draw(st.lists(st.text(max_size=8), unique=True, min_size=min_size, max_size=6))
    names = [name for name in names if name != "__metadata__"]
    tensors = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        if BITS[dtype] < 8:
            shape = [*shape, 4]
        tensors.append((name, dtype, shape, None))
    return tensors


@RELAXED
@given(
    tensors=tensor_lists(),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    last=st.booleans(),
    pad=st.sampled_from([1, 8, 512]),
    data=st.data(),
)
def test_reads_what_the_library_reads(tmp_path_factory, tensors, metadata, last, pad, data):
    rows = header(tensors, metadata, last)
    rows = {key: rows[key] for key in data.draw(st.permutations(list(rows)))}
    ascii_only = data.draw(st.booleans())
    raw = pack(tensors, text=json.dumps(rows, ensure_ascii=ascii_only), pad=pad)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.write_bytes(raw)
    (file,) = open_checkpoint(path).files
    theirs = {
        name: (row["dtype"], list(row["shape"]), row["data"]) for name, row in deserialize(raw)
    }
    ours = {
        t.name: (t.dtype, list(t.shape), raw[t.offset : t.offset + t.size]) for t in file.tensors
    }
    assert ours == theirs
    assert (file.metadata or {}) == (metadata or {})


def corrupted(rows: Any, rng: random.Random) -> Any:
    """JSON with one value replaced, removed or moved."""
    junk = [None, -1, 1 << 62, 1.5, True, "x", [], {}, [0], [0, 1, 2], "F32", "U8", 10**30, 0, 4]
    rows = json.loads(json.dumps(rows))
    spots = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            spots.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(rows)
    where, key = rng.choice(spots)
    kind = rng.randrange(4)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[f"{key}'"] = where.pop(key)
    elif kind == 2 and isinstance(where[key], int):
        where[key] += rng.choice([-1, 1, 4])
    else:
        where[key] = rng.choice(junk)
    return rows


def test_accepts_nothing_that_the_library_rejects(tmp_path):
    """1,500 corrupted headers: stricter than the library in places, nowhere laxer."""
    rng, path = random.Random(3), tmp_path / "x.safetensors"
    tensors = [ONE, TWO, ("c", "BF16", (0, 7), None), ("d", "F16", (), None)]
    accepted = stricter = 0
    for _ in range(1500):
        rows = corrupted(header(tensors, {"format": "pt"}), rng)
        raw = pack(tensors, text=json.dumps(rows))
        path.write_bytes(raw)
        try:
            deserialize(raw)
            fine = True
        except SafetensorError:
            fine = False
        try:
            open_checkpoint(path)
            accepted += 1
            assert fine, rows
        except CorruptError as error:
            stricter += fine
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert accepted > 50 and stricter < 100


def row(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets, **more})


A = f'"a":{row()}'
#: (header, bytes of data, words of the message); the library accepts those that end in True
LYING: dict[str, tuple[str | bytes, int, str] | tuple[str | bytes, int, str, bool]] = {
    "a key twice": (f'{{{A},"b":{row(offsets=(4, 8))},{A}}}', 8, "'a' occurs twice", True),
    "a key twice, once escaped": (f'{{{A},"\\u0061":{row()}}}', 4, "'a' occurs twice", True),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{},' + A + "}", 4, "occurs twice"),
    "a field twice": (
        '{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, "occurs twice",
    ),
    "a metadata key twice": ('{"__metadata__":{"x":"1","x":"2"},' + A + "}", 4, "'x' occurs", True),
    "a hole": (f'{{{A},"b":{row(offsets=(5, 9))}}}', 9, "'b' leaves a hole after 'a'"),
    "a hole before the first": (f'{{"a":{row(offsets=(1, 5))}}}', 5, "hole after 'the header'"),
    "an overlap": (f'{{{A},"b":{row(offsets=(3, 7))}}}', 7, "'b' overlaps 'a'"),
    "the same bytes": (f'{{{A},"b":{row()}}}', 4, "overlaps"),
    "trailing bytes": (f"{{{A}}}", 5, "the tensors end at byte"),
    "truncated": (f"{{{A}}}", 3, "the tensors end at byte"),
    "nothing but data": ("{}", 5, "the tensors end at byte"),
    "an unknown dtype": (f'{{"a":{row(dtype="U4")}}}', 4, "unknown dtype 'U4'"),
    "a dtype in small letters": (f'{{"a":{row(dtype="u8")}}}', 4, "unknown dtype"),
    "a dtype that is a list": (f'{{"a":{row(dtype=["U8"])}}}', 4, "malformed"),
    "a dtype that is none": (f'{{"a":{row(dtype=None)}}}', 4, "unknown dtype"),
    "a shape too large": (f'{{"a":{row(shape=[5])}}}', 4, "needs 5 bytes, its offsets give 4"),
    "a shape beyond 64 bits": (f'{{"a":{row(shape=[2**40, 2**40])}}}', 4, "needs"),
    "a negative shape": (f'{{"a":{row(shape=[-4])}}}', 4, "no sizes"),
    "two negative sizes": (f'{{"a":{row(shape=[-2, -2])}}}', 4, "no sizes"),
    "a shape of floats": (f'{{"a":{row(shape=[4.0])}}}', 4, "no sizes"),
    "a shape of truths": (f'{{"a":{row(shape=[True, 4])}}}', 4, "no sizes"),
    "a shape that is a number": (f'{{"a":{row(shape=4)}}}', 4, "no lists"),
    "a shape that is an object": (f'{{"a":{row(shape={})}}}', 4, "no lists"),
    "offsets backwards": (f'{{"a":{row(offsets=(4, 0))}}}', 4, "give -4"),
    "negative offsets": (f'{{"a":{row(offsets=(-4, 0))}}}', 4, "no sizes"),
    "three offsets": (f'{{"a":{row(offsets=(0, 4, 4))}}}', 4, "no lists"),
    "offsets beyond 64 bits": (f'{{"a":{row(offsets=(2**70, 2**70 + 4))}}}', 4, "hole"),
    "half a byte": (f'{{"a":{row("F4", [3], (0, 1))}}}', 1, "needs 1.5 bytes"),
    "a field missing": ('{"a":{"dtype":"U8","shape":[4]}}', 4, "needs dtype, shape and"),
    "a tensor that is a list": ('{"a":["U8",[4],[0,4]]}', 4, "needs dtype, shape and", True),
    "a tensor that is null": ('{"a":null}', 0, "needs dtype, shape and"),
    "metadata of numbers": ('{"__metadata__":{"x":1}}', 0, "not an object of strings"),
    "metadata of objects": ('{"__metadata__":{"x":{}}}', 0, "not an object of strings"),
    "metadata that is a list": ('{"__metadata__":[]}', 0, "not an object of strings"),
    "a list": ("[]", 0, "not a JSON object"),
    "a string": ('"abcdef"', 0, "not a JSON object"),
    "nothing": ("", 0, "not a JSON object"),
    "half a JSON": ('{"a":', 0, "not a JSON object"),
    "two objects": ("{}{}", 0, "not a JSON object"),
    "not UTF-8": (b'{"\xff":1}', 0, "not a JSON object"),
    "half a surrogate in UTF-8": (b'{"\xed\xa0\x80":{}}', 0, "not a JSON object"),
    "a byte order mark": (b"\xef\xbb\xbf{}", 0, "not a JSON object"),
    "depth": ('{"a":' + "[" * 200_000, 0, "not a JSON object"),
    "depth that closes": ('{"a":' + "[" * 99_999 + "]" * 99_999 + "}", 0, "not a JSON object"),
    "a number of 5000 digits": ('{"a":' + "9" * 5000 + "}", 0, "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING)
def test_lying_header(tmp_path, case):
    text, size, said, *fine = LYING[case]
    raw = pack([("x", "U8", (size,), None)], text=text, pad=1)
    refused(single(tmp_path / "a", raw), said)
    if fine:
        deserialize(raw)
    else:
        with pytest.raises(SafetensorError):
            deserialize(raw)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0", bytes(7), b"\xff" * 8, b"\xff" * 100, (1 << 63).to_bytes(8, "little") + b"{}",
     (100_000_001).to_bytes(8, "little") + bytes(100), (9).to_bytes(8, "little") + b"{}",
     b"GGUF" + bytes(100), b"PK\x03\x04" + bytes(100), b"\x80\x02" + bytes(100)],
)  # fmt: skip
def test_header_lengths_that_cannot_be(tmp_path, raw):
    refused(single(tmp_path / "a", raw), "not a safetensors file")


# --- directories --------------------------------------------------------------------------------


def sharded(directory: Path) -> Path:
    tensors = layer(0)
    return write(directory, tensors[:3], tensors[3:6], tensors[6:])


FIRST, SECOND, THIRD = (raw_safetensors.shard_name(i, 3) for i in range(3))
DOWN = "model.layers.0.mlp.down_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        found = json.loads((directory / INDEX).read_text())
        change(found)
        (directory / INDEX).write_text(json.dumps(found))

    return edit


def mapped(name: str, file: Any) -> Callable[[Path], None]:
    return index(lambda found: found["weight_map"].update({name: file}))


def text(name: str, raw: str | bytes) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())


def in_two_files(directory: Path) -> None:
    (directory / SECOND).write_bytes(pack([*layer(0)[3:6], layer(0)[1]]))


def away(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def loop(directory: Path) -> None:
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to(SECOND)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"a file called {name!r}": (mapped(DOWN, name), "weight_map leaves the directory")
        for name in (
            "../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "",
            ".", "..", "./model-00001-of-00003.safetensors", "C:\\x", "a/../" + FIRST, "//a",
        )
    },
    "a file that is not there": (mapped(DOWN, "b.safetensors"), "1 files of the index are missing"),
    "a name too long for a file": (mapped(DOWN, "b" * 300), ""),
    "a name with a zero byte": (mapped(DOWN, "a\0b"), "missing"),
    "a shard that is missing": (away(SECOND), f"1 files of the index are missing: {SECOND}"),
    "a shard that is a directory": (
        lambda d: (away(SECOND)(d), (d / SECOND).mkdir()), "1 files of the index are missing",
    ),
    "a shard that links to itself": (loop, "missing"),
    "an empty shard": (text(SECOND, b""), "not a safetensors file"),
    "a key in two files": (in_two_files, f"is in {FIRST} too"),
    "a key that the index lacks": (
        index(lambda found: found["weight_map"].pop(DOWN)), f"{DOWN!r} is in {THIRD}, the index",
    ),
    "a key that only the index has": (mapped("x", THIRD), "'x' is in none, the index says"),
    "a key in another file": (mapped(DOWN, FIRST), "disagrees with the files on 1 tensors"),
    "a file that is a number": (mapped(DOWN, 3), "not an object of file names"),
    "a file that is null": (mapped(DOWN, None), "not an object of file names"),
    "a weight_map that is a list": (
        index(lambda found: found.update(weight_map=[])), "not an object of file names",
    ),
    "an empty weight_map": (index(lambda found: found.update(weight_map={})), "is empty"),
    "no weight_map": (index(lambda found: found.pop("weight_map")), "not an object of file names"),
    "an index that is no JSON": (text(INDEX, "{"), "not a JSON object"),
    "an index that is a list": (text(INDEX, "[]"), "expected an object"),
    "an index with a key twice": (
        text(INDEX, '{"weight_map":{"a":"x","a":"y"}}'), "'a' occurs twice",
    ),
    "an index that is not UTF-8": (text(INDEX, b'{"\xff":1}'), "not UTF-8"),
    "a deep index": (text(INDEX, '{"a":' * 99_999 + "1" + "}" * 99_999), "not a JSON object"),
    "no index": (away(INDEX), f"neither model.safetensors nor {INDEX}"),
    "a config that is no JSON": (text("config.json", "{'a': 1}"), "not a JSON object"),
    "a config that is a list": (text("config.json", "[]"), "expected an object"),
    "a config with a key twice": (text("config.json", '{"a":1,"a":1}'), "'a' occurs twice"),
    "a config that is not UTF-8": (text("config.json", b'{"\xff":1}'), "not UTF-8"),
    "a config with a byte order mark": (text("config.json", b"\xef\xbb\xbf{}"), "not a JSON"),
    "a deep config": (text("config.json", '{"a":' * 99_999 + "1" + "}" * 99_999), "not a JSON"),
    "a model type that is a number": (text("config.json", '{"model_type":3}'), "not a string"),
    "quantize_config that is no JSON": (text("quantize_config.json", "{"), "not a JSON object"),
    "hf_quant_config that is a list": (text("hf_quant_config.json", "[1]"), "expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_directory(tmp_path, case):
    src = sharded(tmp_path / "src")
    edit, said = DAMAGED[case]
    edit(src)
    refused(src, said)
    if (src / FIRST).is_file():
        refused_as_a_file = src / INDEX if (src / INDEX).is_file() else src
        with pytest.raises(CorruptError):
            open_checkpoint(refused_as_a_file)


def quantized(**entries: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": entries}


def parts(*tensors: raw_safetensors.Tensor) -> list[raw_safetensors.Tensor]:
    return [
        (f"model.layers.0.self_attn.{p}_proj.{suffix}", dtype, shape, raw)
        for p in "qkv"
        for suffix, dtype, shape, raw in tensors
    ]


FP8 = parts(("weight", "F8_E4M3", (128, 256), None), ("weight_scale_inv", "F32", (1, 2), None))
INT4 = parts(
    ("weight_packed", "I32", (128, 16), None),
    ("weight_scale", "BF16", (128, 2), None),
    ("weight_shape", "I64", (2,), b"".join(n.to_bytes(8, "little") for n in (128, 128))),
)
GPTQ = parts(
    ("qweight", "I32", (16, 128), None),
    ("qzeros", "I32", (2, 16), None),
    ("scales", "F16", (2, 128), None),
    ("g_idx", "I32", (128,), bytes(512)),
)


def bnb(state: bytes, weight: tuple[int, ...] = (2048, 1), absmax: tuple[int, ...] = (64,)) -> list:
    return parts(
        ("weight", "U8", weight, None),
        ("weight.absmax", "F32", absmax, None),
        ("weight.quant_map", "F32", (16,), bytes(64)),
        ("weight.quant_state.bitsandbytes__nf4", "U8", (len(state),), state),
    )


def shape(dtype: str, dims: tuple[int, ...], raw: bytes) -> list:
    return [(n, dtype, dims, raw) if "shape" in n else (n, t, s, d) for n, t, s, d in INT4]


def ct(groups: Any) -> dict[str, Any]:
    return quantized(quant_method="compressed-tensors", config_groups=groups)


def gptq(**entries: Any) -> dict[str, Any]:
    return quantized(**{"quant_method": "gptq", "bits": 4, **entries})


BITS4 = {"weights": {"num_bits": 4}}
STATE = b'{"quant_type": "nf4", "blocksize": 64, "shape": [64, 64]}'
DIGITS = "9" * 5000
#: (tensors, config)
ABSURD: dict[str, tuple[list, dict]] = {
    **{
        f"weight_block_size {value!r}": (
            FP8, quantized(quant_method="fp8", weight_block_size=value),
        )
        for value in (5, "x", [], ["a"], [0, 0], [-1, 1], {"a": 1}, [None], [1.5], True)
    },
    **{
        f"quant_method {value!r}": (FP8, quantized(quant_method=value))
        for value in (3, None, [], {}, "FP8")
    },
    **{
        f"config_groups {value!r}": (INT4, ct(value))
        for value in (
            [], "x", {"g": 3}, {"g": None}, {"g": {"weights": [1]}}, {"g": {**BITS4, "targets": 3}},
            {"g": {"weights": {"num_bits": 0}}}, {"g": {"weights": {"num_bits": "4"}}},
            {"g": {"weights": {"num_bits": [4]}}}, {"g": {**BITS4, "targets": [3]}},
            {"g": {**BITS4, "targets": ["re:("]}}, {"g": {"weights": {"num_bits": -4}}},
        )
    },
    **{f"bits {value!r}": (GPTQ, gptq(bits=value)) for value in (0, "4", None, -4, 4.0, [4], True)},
    "no bits": (GPTQ, quantized(quant_method="gptq")),
    **{f"AWQ bits {value!r}": (GPTQ, quantized(quant_method="awq", bits=value)) for value in "x4"},
    **{
        f"dynamic {value!r}": (GPTQ, gptq(dynamic=value))
        for value in ([], 3, {"(": {}}, {"-:*": {}}, {"": 3})
    },
    **{
        f"a state of {state[:20]!r}": (bnb(state), quantized(quant_method="bitsandbytes"))
        for state in (
            b"x", b"", b"[]", b'{"shape":[]}', b'{"shape":[1,"x"]}', b'{"shape":[-1]}', b"\xff",
            b"[" * 99_999, b'{"shape":[true,64]}', b'{"shape":[64,64],"x":NaN}',
        )
    },
    "companions without a weight": (
        [t for t in bnb(STATE) if t[0] != "model.layers.0.self_attn.q_proj.weight"],
        quantized(quant_method="bitsandbytes"),
    ),
    "a scalar for a weight": (bnb(STATE, ()), quantized(quant_method="bitsandbytes")),
    "a scalar for scales": (bnb(STATE, absmax=()), quantized(quant_method="bitsandbytes")),
    "weight_shape of I32": (shape("I32", (2,), bytes(8)), ct({"g": BITS4})),
    "weight_shape of three": (shape("I64", (3,), bytes(24)), ct({"g": BITS4})),
    "weight_shape beyond 64 bits": (
        shape("I64", (2,), (2**62).to_bytes(8, "little") * 2), ct({"g": BITS4}),
    ),
    "an expert's number of 5000 digits": (
        [(f"model.layers.0.mlp.experts.{DIGITS}.gate_proj.weight", "U8", (1,), None)],
        {"model_type": "qwen3_moe"},
    ),
    "a layer's number of 5000 digits": (
        [(n.replace(".0.", f".{DIGITS}."), t, s, d) for n, t, s, d in layer(0)],
        {"model_type": "llama"},
    ),
    "half a surrogate in a name": ([*layer(0), ("\ud800", "U8", (1,), None)], {}),
    "scalars for weights": ([(n, t, (), d) for n, t, s, d in layer(0)], {"model_type": "llama"}),
    "no rows": ([(n, t, (0, 8), d) for n, t, s, d in layer(0)], {"model_type": "llama"}),
    "no columns": ([(n, t, (8, 0), d) for n, t, s, d in layer(0)], {"model_type": "llama"}),
    "many dimensions": (
        [(n, t, (1,) * 60 + (2,), d) for n, t, s, d in layer(0)], {"model_type": "llama"},
    ),
    **{
        f"fusion_config {value!r}": (layer(0), {"model_type": "llama", "fusion_config": value})
        for value in (None, {}, {"patch_embeddings": True}, {"fuseweights": True}, [1], 3, "x")
    },
    "a text_config that is a list": (layer(0), {"model_type": "llama", "text_config": [1]}),
    "a quantization_config that is a list": (
        layer(0), {"model_type": "llama", "quantization_config": [1]},
    ),
    **{
        f"plain, {key} {value!r}": (layer(0), quantized(quant_method="fp8", **{key: value}))
        for key in ("modules_to_not_convert", "ignore", "quantized_layers", "config_groups")
        for value in (3, "x", [3], {"a": 3}, None)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_configurations_and_companions_crash_nothing(tmp_path, case):
    """Whatever is decided, it is decided: fused and restored, refused, or an error of ours."""
    tensors, config = ABSURD[case]
    src = write(tmp_path / "src", tensors, config=config)
    try:
        there_and_back(src, tmp_path)
    except (RefusedError, CorruptError) as error:
        assert "\n" not in str(error)
        assert not (tmp_path / "fused").exists() and "fused" not in str(error)


def test_a_name_twice_in_a_long_header_takes_no_time(tmp_path):
    names = [*range(60_000), 59_999]
    rows = ",".join(f'"{n}":{row(shape=[0], offsets=(0, 0))}' for n in names)
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack([], text="{" + rows + "}"))
    code = "import sys, fuseweights\ntry: fuseweights.open_checkpoint(sys.argv[1])\n"
    code += "except fuseweights.CorruptError as error: print(error)"
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    assert "'59999' occurs twice" in done.stdout


# --- what lies beside the tensors ---------------------------------------------------------------


def cache(root: Path, *files: Any, **options: Any) -> tuple[Path, Path]:
    """The hub's cache: (snapshot, blobs), every file of the one a relative link into the other."""
    repository = root / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    plain = write(root / "plain", *files, **options)
    (plain / "tokenizer.json").write_text("{}")
    (plain / "1_Pooling").mkdir()
    (plain / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    blobs.mkdir(parents=True)
    for number, (name, raw) in enumerate(contents(plain).items()):
        blob, link = blobs / f"{number:064x}", snapshot / name
        blob.write_bytes(raw)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot, blobs


def state_of(root: Path) -> dict[str, tuple]:
    return {
        str(path): (
            path.is_symlink(),
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_hubs_cache_is_read_and_never_written_through(tmp_path):
    snapshot, _ = cache(tmp_path, layer(0)[:5], layer(0)[5:])
    before = state_of(snapshot.parents[1])
    (tmp_path / "out").mkdir()
    there_and_back(snapshot, tmp_path / "out")
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(made) == 12 and not any(path.is_symlink() for path in made)
    for dst in (snapshot, snapshot.parent, snapshot.parents[1]):
        with pytest.raises(RefusedError):
            fuseweights.convert(snapshot, dst, sync=False)
        with pytest.raises(FuseweightsError):
            fuseweights.convert(snapshot, dst, overwrite=True, sync=False)
    assert state_of(snapshot.parents[1]) == before


def test_overwriting_another_snapshot_replaces_its_links(tmp_path):
    """A directory of links is replaced by one of files; what the links led to stays."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    snapshot, _ = cache(tmp_path / "one", layer(0))
    other, blobs = cache(tmp_path / "two", layer(1))
    before = {**state_of(blobs), **state_of(snapshot.parents[1])}
    fuseweights.convert(snapshot, other, overwrite=True, sync=False)
    assert not any(path.is_symlink() for path in other.rglob("*"))
    assert {**state_of(blobs), **state_of(snapshot.parents[1])} == before
    fuseweights.unfuse(other, tmp_path / "back", sync=False)
    assert contents(tmp_path / "back") == contents(snapshot)


COMES = """
    tokenizer.json tokenizer_config.json generation_config.json chat_template.jinja merges.txt
    preprocessor_config.json vocab.txt spiece.model tokenizer.model modeling_x.py LICENSE README.md
    special_tokens_map.json additional_chat_templates/tool.jinja assets/pic.png notice. a\\b
"""
STAYS = """
    pytorch_model.bin pytorch_model.bin.index.json model.pth consolidated.safetensors model.ckpt
    consolidated.00.pth consolidated.safetensors.index.json tf_model.h5 flax_model.msgpack
    model.gguf model.onnx onnx/model.onnx onnx/model.onnx_data original/consolidated.00.pth
    model.fp16.safetensors model.fp16.safetensors.index.json optimizer.pt training_args.bin
    text_encoder/model.safetensors rust_model.ot MODEL.BIN .cache/x.json .gitattributes
    original/consolidated.params
"""


@pytest.mark.parametrize("shards", [1, 2])
def test_what_comes_along_and_what_does_not(tmp_path, shards):
    tensors = layer(0)
    files = [tensors] if shards == 1 else [tensors[:4], tensors[4:]]
    src = write(tmp_path / "src", *files)
    comes, stays = COMES.split(), STAYS.split()
    for name in (*comes, *stays):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(f"this is {name}".encode())
    if shards == 1:  # an index left over from before, and its shards
        (src / "model-00001-of-00001.safetensors").write_bytes(b"old")
        (src / INDEX).write_text("old")
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    fuseweights.unfuse(tmp_path / "fused", tmp_path / "back", sync=False)
    weights = {path.name for path in src.glob("model*.safetensors")} - {"model.fp16.safetensors"}
    weights -= {"model-00001-of-00001.safetensors"}
    ours = {"config.json", *weights, *([INDEX] if shards > 1 else [])}
    for directory in ("fused", "back"):
        found = contents(tmp_path / directory)
        assert found.keys() == {*ours, *comes}
        assert all(found[name] == (src / name).read_bytes() for name in comes)
    back = contents(tmp_path / "back")
    assert all(back[name] == (src / name).read_bytes() for name in ours)


def test_links_that_loop_or_leave(tmp_path):
    """A directory that links to its own parent is not walked; a link to a file is followed."""
    src = write(tmp_path / "src", layer(0))
    (src / "again").symlink_to(src, target_is_directory=True)
    (src / "itself").symlink_to("itself")
    (src / "gone").symlink_to("nowhere")
    (tmp_path / "elsewhere.txt").write_text("elsewhere")
    (src / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    os.mkfifo(src / "pipe")
    plan = fuseweights.convert(src, tmp_path / "fused", sync=False)
    assert [output.name for output in plan.outputs] == [
        "model.safetensors", "config.json", "notes.txt"
    ]  # fmt: skip
    assert (tmp_path / "fused" / "notes.txt").read_text() == "elsewhere"
    assert not (tmp_path / "fused" / "notes.txt").is_symlink()


# --- one bare file ------------------------------------------------------------------------------


def test_a_bare_file_with_a_config_beside_it(tmp_path):
    src = write(tmp_path / "src", layer(0, bias=True), metadata={"format": "pt"})
    (src / "model.safetensors").rename(src / "weights.safetensors")
    before = contents(src)
    plan = there_and_back(src / "weights.safetensors", tmp_path)
    assert [group.group for group in plan.groups] == ["qkv", "gate_up"]
    assert [output.name for output in plan.outputs] == ["weights.safetensors"]
    assert contents(src) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "back.safetensors", "fused.safetensors"
    ]  # fmt: skip


def test_a_bare_file_without_a_config_is_of_no_known_family(tmp_path):
    src = tmp_path / "weights.safetensors"
    src.write_bytes(pack(layer(0)))
    with pytest.raises(RefusedError, match="nothing to fuse") as caught:
        fuseweights.convert(src, tmp_path / "fused.safetensors", sync=False)
    assert {r.reason for r in caught.value.refusals} == {"unknown-architecture"}


def test_any_file_of_a_directory_stands_for_it(tmp_path):
    src = sharded(tmp_path / "src")
    whole = fuseweights.plan(src)
    for name in (FIRST, SECOND, INDEX):
        assert fuseweights.plan(src / name).outputs == whole.outputs


def test_a_directory_without_safetensors_says_what_to_do(tmp_path):
    for number, (name, said) in enumerate(
        {
            "adapter_model.safetensors": "LoRA", "model.gguf": "GGUF", "README.md": "weights",
            "pytorch_model.bin": "pickled", "x.safetensors": "x.safetensors",
        }.items()
    ):  # fmt: skip
        src = tmp_path / str(number)
        src.mkdir()
        (src / name).write_bytes(b"")
        with pytest.raises(CorruptError, match="has neither") as caught:
            open_checkpoint(src)
        assert said in caught.value.hint


# --- JSON edited as text ------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)
SEPARATORS = [(",", ":"), (", ", ": "), (" ,", " : "), (",\t", ":\n"), (",  ", ":  ")]


def containers(value: Any, path: tuple = ()) -> list[tuple[tuple, Any]]:
    """Every list and object in `value`, with its path."""
    if not isinstance(value, list | dict):
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [(path, value)] + [found for k, v in inner for found in containers(v, (*path, k))]


@st.composite
def texts(draw) -> tuple[Any, str, dict]:
    value = draw(st.dictionaries(st.text(max_size=6), JSON, max_size=5))
    style: dict[str, Any] = {"ensure_ascii": draw(st.booleans())}
    if draw(st.booleans()):
        style["indent"] = draw(st.sampled_from([0, 1, 2, 4, "\t"]))
    else:
        style["separators"] = draw(st.sampled_from(SEPARATORS))
    before, after = (
        draw(st.sampled_from(["", " ", "\n", "\r\n "])),
        draw(st.sampled_from(["", "\n"])),
    )
    return value, before + json.dumps(value, **style) + after, style


def check_one_insertion(old: str, new: str) -> None:
    def common(a: str, b: str) -> int:
        pairs = enumerate(zip(a, b, strict=False))
        return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

    prefix, suffix = common(old, new), common(old[::-1], new[::-1])
    assert prefix + suffix >= len(old) and len(new) > len(old)


@RELAXED
@given(document=texts(), data=st.data())
def test_adding_keeps_every_other_character(document, data):
    value, text, style = document
    path, where = data.draw(st.sampled_from(containers(value)))
    crlf = "indent" in style and data.draw(st.booleans())
    text = text.replace("\n", "\r\n") if crlf else text
    key = None
    if isinstance(where, dict):
        key = data.draw(st.text(max_size=6).filter(lambda k: k not in where))
    news = data.draw(st.lists(JSON, min_size=1, max_size=1 if key is not None else 3))
    was_empty = not where
    new = jsontext.added(text, path, news, None if key is None else [key])
    check_one_insertion(text, new)
    if isinstance(where, dict):
        where[key] = news[0]
    else:
        where.extend(news)
    read = json.loads(new)
    assert read == value and json.dumps(read) == json.dumps(value)  # the order too
    plain = not any(isinstance(item, list | dict) for item in news)
    if style.get("indent") and style["ensure_ascii"] and plain and not was_empty and not crlf:
        assert new.strip() == json.dumps(value, **style)  # as if the same writer had written it


@RELAXED
@given(document=texts(), news=JSON, data=st.data())
def test_replacing_keeps_every_other_character(document, news, data):
    value, text, _ = document
    path, where = data.draw(st.sampled_from([c for c in containers(value) if c[1]] or [((), None)]))
    if where is None:
        with pytest.raises(KeyError):
            jsontext.locate(text, ["x"])
        return
    step = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
    begin, end = jsontext.locate(text, [*path, step])
    assert json.loads(text[begin:end]) == where[step]
    new = jsontext.replaced(text, [*path, step], news)
    assert new.startswith(text[:begin]) and new.endswith(text[end:])
    where[step] = news
    assert json.dumps(json.loads(new)) == json.dumps(value)
    for wrong in ([*path, "no such key" * 3], [*path, step, "x", "y"]):
        if not isinstance(news, list | dict) or wrong[-1] != "y":
            with pytest.raises(KeyError):
                jsontext.locate(new, wrong)


CONFIGS = [
    '{"model_type":"llama"}',
    '{ "model_type" : "llama" , "x":[1,2 ,3] }\n\n',
    '{"model_type": "llama", "big": 123456789012345678901234567890, "tiny": 1e-400, "one": 1.0}',
    '{\r\n    "model_type": "llama",\r\n    "a": "\u00fc\\u00fc\\/"\r\n}\r\n',
    '\n\t{\n\t"model_type":\n\t"llama"}',
    '{"model_type":"llama","fusion_config":null}',
    '{"model_type":"llama","fusion_config":{}}',
    '{"model_type":"llama","fusion_config":{"patch_embeddings":true},"z":0}',
    '{"nested": {"fusion_config": 1, "model_type": "x"}, "model_type": "llama", "s": "fusion"}',
    '{"model_type":"llama","esc\\"aped}":"a\\\\","\\u007b":"}"}',
]


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_of_every_style(tmp_path, config):
    src = write(tmp_path / "src", layer(0))
    (src / "config.json").write_bytes(config.encode())
    there_and_back(src, tmp_path)
    new = (tmp_path / "fused" / "config.json").read_bytes().decode()
    if "null" not in config:
        check_one_insertion(config, new)
    read, was = json.loads(new), json.loads(config)
    assert read.pop("fusion_config") == {
        **(was.pop("fusion_config", None) or {}),
        "fuseweights": True,
    }
    assert json.dumps(read) == json.dumps(was)


# --- the whole way, over random directories -----------------------------------------------------


@st.composite
def directories(draw) -> dict[str, Any]:
    """Files of tensors in random order, headers and JSON in random style."""
    family = draw(st.sampled_from(["llama", "qwen3_moe", "qwen3_5", "deepseek_v3"]))
    kinds = ["BF16", "F16", "F32", "F64"]
    tensors: list[raw_safetensors.Tensor] = []
    for n in range(draw(st.integers(1, 3))):
        dtype, width = draw(st.sampled_from(kinds)), draw(st.integers(0, 5))
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        if family == "qwen3_moe":
            experts = range(draw(st.integers(0, 3)))
            names += [f"mlp.experts.{e}.{p}_proj" for e in experts for p in ("gate", "up")]
        if family == "qwen3_5":
            names += [f"linear_attn.in_proj_{p}" for p in ("qkv", "z", "b", "a")]
        if family == "deepseek_v3":
            names += ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]
        odd = draw(st.sets(st.sampled_from(names), max_size=2))
        absent = draw(st.sets(st.sampled_from(names), max_size=1))
        bias = draw(st.sampled_from([None, "self_attn", "mlp"]))
        expert_rows = draw(st.integers(0, 3))
        for name in names:
            rows = expert_rows if "experts" in name else draw(st.integers(0, 6))
            kind = draw(st.sampled_from(kinds)) if name in odd else dtype
            if name in absent:
                continue
            path = f"model.layers.{n}.{name}"
            tensors.append((f"{path}.weight", kind, (rows, width), None))
            if bias and name.startswith(bias) and "experts" not in name:
                tensors.append((f"{path}.bias", kind, (rows,), None))
    if draw(st.booleans()):
        tensors.append(("lm_head.weight", "BF16", (3, 2), None))
    tensors.append((draw(st.sampled_from(["model.norm.weight", "", "ü\n", '"'])), "U8", (), None))
    tensors = draw(st.permutations(tensors))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(tensors) - 1)), max_size=3)))
    files = [tensors[a:b] for a, b in zip([0, *cuts], [*cuts, len(tensors)], strict=True)]
    return {
        "family": family,
        "files": [file for file in files if file],
        "styles": [
            {
                "metadata": draw(
                    st.sampled_from([None, {}, {"format": "pt"}, {"ü": '"', "z": ""}])
                ),
                "last": draw(st.booleans()),
                "order": draw(st.sampled_from(["data", "name", "backwards"])),
                "separators": draw(st.sampled_from([(",", ":"), (", ", ": ")])),
                "ensure_ascii": draw(st.booleans()),
                "pad": draw(st.sampled_from([1, 8, 64, 4096])),
            }
            for _ in files
        ],
        "index": {
            "indent": draw(st.sampled_from([None, 2, 4])),
            "sort_keys": draw(st.booleans()),
            "newline": draw(st.sampled_from(["", "\n"])),
            "parameters": draw(st.booleans()),
        },
    }


def put(directory: Path, drawn: dict[str, Any]) -> Path:
    directory.mkdir()
    files = drawn["files"]
    names = [raw_safetensors.shard_name(i, len(files)) for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, tensors, style in zip(names, files, drawn["styles"], strict=False):
        rows = header(tensors, style["metadata"], style["last"])
        if style["order"] != "data":
            rows = dict(sorted(rows.items(), reverse=style["order"] == "backwards"))
        text = json.dumps(rows, separators=style["separators"], ensure_ascii=style["ensure_ascii"])
        (directory / name).write_bytes(pack(tensors, text=text, pad=style["pad"]))
    if len(files) > 1:
        style = drawn["index"]
        whole = raw_safetensors.index(dict(zip(names, files, strict=True)))
        if style["parameters"]:
            whole["metadata"]["total_parameters"] = 12345
        dumped = json.dumps(whole, indent=style["indent"], sort_keys=style["sort_keys"])
        (directory / INDEX).write_text(dumped + style["newline"])
    config = {"num_hidden_layers": 3, "model_type": drawn["family"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@settings(RELAXED, max_examples=200)
@given(drawn=directories(), consumer=st.sampled_from(["torch", "torch", "vllm", "sglang"]))
def test_random_directories(tmp_path_factory, drawn, consumer):
    directory = tmp_path_factory.mktemp("random")
    src = put(directory / "src", drawn)
    try:
        plan = there_and_back(src, directory, consumer=consumer)
    except RefusedError as error:
        assert "nothing to fuse" in str(error)
        return
    merged = [part.name for g in plan.groups for t in g.tensors for part in t.parts]
    assert len(set(merged)) == len(merged)
    assert plan.copied == sum(map(len, drawn["files"])) - len(merged)


def test_a_first_file_that_empties_leaves_the_manifest_to_the_next(tmp_path):
    tensors = layer(0)
    k_proj = [tensors.pop(2)]
    plan = there_and_back(write(tmp_path / "src", k_proj, tensors), tmp_path)
    assert plan.outputs[0].name == raw_safetensors.shard_name(1, 2)


def test_metadata_that_is_empty_comes_back(tmp_path):
    there_and_back(write(tmp_path / "src", layer(0), metadata={}), tmp_path)


def test_other_entries_of_the_index_stay(tmp_path):
    src = sharded(tmp_path / "src")
    index(lambda found: found.update(origin={"name": "x"}))(src)
    there_and_back(src, tmp_path)
    assert json.loads((tmp_path / "fused" / INDEX).read_text())["origin"] == {"name": "x"}


@pytest.mark.parametrize("metadata", [[1], 3, "x", {"total_parameters": "5"}, {}, None])
def test_metadata_of_the_index_that_is_none(tmp_path, metadata):
    src = sharded(tmp_path / "src")
    index(lambda found: found.update(metadata=metadata))(src)
    there_and_back(src, tmp_path)


def test_numbers_that_json_lacks(tmp_path):
    src = write(tmp_path / "src", layer(0))
    (src / "config.json").write_text('{"model_type": "llama", "a": NaN, "b": -Infinity}')
    there_and_back(src, tmp_path)


def test_a_directory_may_have_any_name(tmp_path):
    src = write(tmp_path / "src", layer(0))
    fuseweights.convert(src, tmp_path / "out.gguf", sync=False)
    assert (tmp_path / "out.gguf" / "config.json").is_file()


def forged(fused: Path, change: Callable[[dict], object]) -> None:
    """Another manifest in a fused directory's first file, with a checksum that fits."""
    path = sorted(fused.glob("*.safetensors"))[0]
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    rows = json.loads(raw[8:start])
    claims = json.loads(rows["__metadata__"][manifest.KEY])
    del claims["sha256"]
    change(claims)
    claims["sha256"] = manifest._checksum(claims)
    rows["__metadata__"][manifest.KEY] = json.dumps(claims)
    text = json.dumps(rows).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def renamed_text(claims: dict, name: str) -> None:
    claims["texts"][name] = claims["texts"].pop("config.json")


FORGED: dict[str, Callable[[dict], object]] = {
    **{
        f"{what} {name!r}": (lambda claims, edit=edit, name=name: edit(claims, name))
        for what, edit in (
            ("a file", lambda claims, name: claims["files"][0].update(name=name)),
            ("a text", renamed_text),
        )
        for name in ("../evil", "/tmp/evil", "a/b", "..", ".", "", "a\\b", "a\0b", "x" * 5000)
    },
    "two files of one name": lambda c: c["files"][1].update(name=c["files"][0]["name"]),
    "a file too few": lambda claims: claims["files"].pop(),
    "a part's file": lambda claims: claims["entries"][0]["parts"][0].__setitem__(2, 9),
    "a part's place": lambda claims: claims["entries"][0]["parts"][0].__setitem__(3, 10**9),
    "two parts in one place": lambda claims: claims["entries"][0]["parts"].__setitem__(
        1, claims["entries"][0]["parts"][0]
    ),
    "a part's rows": lambda claims: claims["entries"][0]["parts"][0].__setitem__(4, 7),
    "a part's shape": lambda claims: claims["entries"][0]["parts"][0].__setitem__(1, [1 << 60, 8]),
    "a merge": lambda claims: claims["entries"][0].update(merge="literal"),
    "an axis": lambda claims: claims["entries"][0].update(axis=1),
    "no entries": lambda claims: claims["entries"].clear(),
    "an entry twice": lambda claims: claims["entries"].append(claims["entries"][0]),
    "a fused tensor that is not there": lambda c: c["entries"][0].update(name="x"),
    "another schema": lambda claims: claims.update(schema=2),
    "files that are none": lambda claims: claims.update(files={}),
    "texts that are none": lambda claims: claims.update(texts=[1]),
}


@pytest.mark.parametrize("case", FORGED, ids=lambda case: case[:40].replace("\0", "0"))
def test_a_forged_manifest_writes_nothing(tmp_path, case):
    fuseweights.convert(sharded(tmp_path / "src"), tmp_path / "fused", sync=False)
    forged(tmp_path / "fused", FORGED[case])
    before = {path for path in tmp_path.rglob("*")} | set(Path("/tmp").glob("evil*"))
    with pytest.raises((CorruptError, RefusedError)) as caught:
        fuseweights.unfuse(tmp_path / "fused", tmp_path / "back", sync=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000
    assert {path for path in tmp_path.rglob("*")} | set(Path("/tmp").glob("evil*")) == before


def test_a_text_that_is_gone_is_missed(tmp_path):
    """Without its configuration the original cannot come back whole, and that is said."""
    fuseweights.convert(sharded(tmp_path / "src"), tmp_path / "fused", sync=False)
    (tmp_path / "fused" / "config.json").unlink()
    try:
        plan = fuseweights.unfuse(tmp_path / "fused", tmp_path / "back", sync=False)
    except CorruptError:
        return
    whole = contents(tmp_path / "back") == contents(tmp_path / "src")
    assert whole or plan.inexact


def test_a_pattern_that_would_take_for_ever_is_refused(tmp_path):
    src = write(tmp_path / "src", layer(0))
    config = {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(.*)*x$": {}}}
    (src / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": config})
    )
    with pytest.raises(CorruptError, match="repeats a group"):
        fuseweights.plan(src)


def test_a_target_inside_the_source_is_refused(tmp_path):
    src = write(tmp_path / "src", layer(0))
    before = contents(src)
    with pytest.raises(RefusedError, match="inside the source"):
        fuseweights.convert(src, src / "fused")
    assert contents(src) == before


# --- damage -------------------------------------------------------------------------------------

MUTANTS = r"""
import json, random, shutil, sys, time
from pathlib import Path
import fuseweights
from fuseweights import CorruptError, RefusedError

def flip(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)

def early(raw, rng):
    at = rng.randrange(min(len(raw), 700))
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]

def length(raw, rng):
    said = rng.choice([0, (1 << 64) - 1, 1 << 62, len(raw), 99_999_999])
    return said.to_bytes(8, "little") + raw[8:]

def splice(raw, rng):
    a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:a] + raw[b:] if rng.random() < 0.5 else raw[:b] + raw[a:]

def word(raw, rng):
    words = [b"0", b"1", b"-1", b"null", b"[]", b"{}", b'"x"', b"1e999", b"9" * 40, b"true", b'"',
             b"[", b'{"a":1}', b"[" * 5000]
    starts = [i for i, c in enumerate(raw[:3000]) if c in b":[,"]
    if not starts:
        return raw
    at = rng.choice(starts) + 1
    end = at
    while end < len(raw) and raw[end] not in b",]}":
        end += 1
    return raw[:at] + rng.choice(words) + raw[end:]

KINDS = [lambda raw, rng: raw[: rng.randrange(len(raw))], flip, early, length, splice, word, word,
         lambda raw, rng: raw + rng.randbytes(rng.randrange(1, 9)), lambda raw, rng: b""]

bases, work, count = [Path(p) for p in sys.argv[3:]], Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(5)
outcomes, slowest, faults = {"corrupt": 0, "refused": 0, "harmless": 0}, 0.0, []
for number in range(count):
    base = bases[number % len(bases)]
    src, fused, back = (work / f"{name}{number}" for name in ("src", "fused", "back"))
    shutil.copytree(base, src)
    files = sorted(p for p in src.iterdir() if p.suffix in (".json", ".safetensors"))
    victim = rng.choice(files)
    kind = rng.randrange(len(KINDS) + 2)
    if kind < len(KINDS):
        victim.write_bytes(KINDS[kind](victim.read_bytes(), rng))
    elif kind == len(KINDS):
        victim.unlink()
    else:
        other = rng.choice(files)
        a, b = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(b), other.write_bytes(a)
    begun = time.process_time()
    try:
        if fuseweights.inspect(src).fused_for:
            fuseweights.unfuse(src, fused, sync=False)
        else:
            fuseweights.convert(src, fused, sync=False)
            if not fuseweights.verify(src, fused).ok:
                faults.append([number, victim.name, kind, "differs"])
            fuseweights.unfuse(fused, back, sync=False)
            for path in src.iterdir():
                restored = back / path.name
                if restored.is_file() and path.read_bytes() != restored.read_bytes():
                    faults.append([number, victim.name, kind, "comes back changed: " + path.name])
        outcomes["harmless"] += 1
    except (CorruptError, RefusedError) as error:
        outcomes["corrupt" if isinstance(error, CorruptError) else "refused"] += 1
        if "\n" in str(error) or str(work) not in str(error):
            faults.append([number, victim.name, kind, str(error)])
    except Exception as error:
        faults.append([number, victim.name, kind, repr(error)[:200]])
    slowest = max(slowest, time.process_time() - begun)
    for path in (src, fused, back):
        shutil.rmtree(path, ignore_errors=True)
peak = next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]
print(json.dumps({**outcomes, "slowest": slowest, "peak": int(peak), "faults": faults}))
"""


def bases(root: Path) -> list[Path]:
    """One of each kind: sharded, quantized in four ways, fused already."""
    fp8 = quantized(quant_method="fp8", weight_block_size=[128, 128])
    made = [
        sharded(root / "sharded"),
        write(root / "plain", [*layer(0, bias=True), *layer(1)], metadata={"format": "pt"}),
        write(root / "fp8", [*FP8, *layer(1)], config=fp8),
        write(root / "int4", INT4, config=ct({"g": {**BITS4, "targets": ["Linear"]}})),
        write(root / "gptq", GPTQ, config=gptq(dynamic={"-:lm_head": {}})),
        write(root / "bnb", bnb(STATE), config=quantized(quant_method="bitsandbytes")),
        root / "fused",
        root / "fused-shards",
    ]
    (root / "gptq" / "quantize_config.json").write_text('{"bits": 4, "dynamic": {}}')
    fuseweights.convert(made[1], made[6], sync=False)
    fuseweights.convert(made[0], made[7], sync=False)
    return made


@pytest.mark.parametrize("count", [600, pytest.param(6000, marks=pytest.mark.slow)])
def test_damaged_directories_are_refused_or_harmless(tmp_path, count):
    """In a process of its own: nothing hangs, crashes, eats memory or is changed silently."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", MUTANTS, tmp_path / "work", str(count), *bases(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["faults"], found["faults"][:20]
    assert found["corrupt"] > count // 2 and found["harmless"]
    assert found["slowest"] < 2 and found["peak"] < 200_000
