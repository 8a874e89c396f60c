"""What may come from outside, as bytes: each target takes any, and either works or raises one of
our errors. `tests/test_fuzz.py` runs the corpus through them; `fuzz.py` searches for more.

A target that hangs, recurses too deeply, takes memory that its input does not justify, raises
anything else, or leaves a file behind where it refused has found a bug.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import raw_gguf
import raw_safetensors

import fuseweights
from fuseweights.errors import FuseweightsError

SCRATCH = Path("/dev/shm") if os.path.isdir("/dev/shm") else None
#: What separates the files of a directory in one input.
CUT = b"\n--\n"


def gguf(folder: Path, data: bytes) -> None:
    """A GGUF file: its header, the plan for each consumer, converted, proven and taken back."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    for consumer in ("llama.cpp", "torch"):
        _there_and_back(folder, path, consumer)


def safetensors(folder: Path, data: bytes) -> None:
    """One safetensors file beside a usual configuration."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "model.safetensors").write_bytes(data)
    for consumer in ("torch", "vllm"):
        _there_and_back(folder, source, consumer)


def directory(folder: Path, data: bytes) -> None:
    """config.json, the index, and the header of each shard, between `CUT`s; shards get the data
    that their header asks for, up to a megabyte."""
    source = folder / "source"
    source.mkdir()
    config, _, rest = data.partition(CUT)
    index, *headers = rest.split(CUT)[:7]
    (source / "config.json").write_bytes(config)
    (source / raw_safetensors.INDEX).write_bytes(index)
    for number, header in enumerate(headers, 1):
        body = len(header).to_bytes(8, "little") + header + bytes(_asked(header))
        (source / f"model-{number:05d}-of-{len(headers):05d}.safetensors").write_bytes(body)
    _there_and_back(folder, source, "torch")


def manifest(folder: Path, data: bytes) -> None:
    """A fused file whose manifest is the input, with a checksum that fits it."""
    path = folder / "fused.gguf"
    path.write_bytes(_fused_with(_sealed(data)))
    _attempt(lambda: fuseweights.inspect(path))
    _attempt(lambda: fuseweights.verify(_source(folder), path))
    back = folder / "back.gguf"
    if not _attempt(lambda: fuseweights.unfuse(path, back)):
        assert not back.exists(), "refused, and yet there is a file"


TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    target.__name__: target for target in (gguf, safetensors, directory, manifest)
}


def run(target: Callable[[Path, bytes], None], data: bytes) -> None:
    folder = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="fuzz-"))
    try:
        target(folder, data)
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not hidden, f"left behind: {hidden}"
    finally:
        shutil.rmtree(folder)


def seeds() -> dict[str, list[bytes]]:
    """Well-formed inputs to start from."""
    layer = raw_gguf.layer(0)
    tensors = [("blk.0.odd", (3, 32), "F32", None), *layer]
    shards = _shards()
    config = b'{"model_type": "llama", "num_hidden_layers": 1}'
    return {
        "gguf": [
            raw_gguf.pack(tensors),
            raw_gguf.pack(tensors, version=2, alignment=64),
            raw_gguf.pack(layer, order=">"),
            raw_gguf.pack(layer, [("a", raw_gguf.ARRAY, (raw_gguf.STRING, ["x", "yz"]))]),
        ],
        "safetensors": [len(h).to_bytes(8, "little") + h + bytes(_asked(h)) for h in shards],
        "directory": [CUT.join([config, _index(shards), *shards])],
        "manifest": [_manifest()],
    }


def _there_and_back(folder: Path, source: Path, consumer: str) -> None:
    before = _digest(source)
    fused, back = folder / f"fused-{consumer}", folder / f"back-{consumer}"
    done = _attempt(lambda: fuseweights.convert(source, fused, consumer=consumer))
    if done:
        assert fuseweights.verify(source, fused).ok, "converted, and not equal"
        result = fuseweights.unfuse(fused, back)
        if not result.inexact:
            assert _digest(back) == before, "not the same bytes again"
    else:
        assert not fused.exists(), "refused, and yet there is a file"
    assert _digest(source) == before, "the source has changed"
    for path in (fused, back):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _attempt(verb: Callable[[], object]) -> bool:
    try:
        verb()
    except FuseweightsError:
        return False
    return True


def _digest(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    names = [file.name for file in files] if path.is_dir() else [""]
    return {
        name: hashlib.sha256(file.read_bytes()).digest()
        for name, file in zip(names, files, strict=True)
    }


def _asked(header: bytes) -> int:
    """The bytes that a safetensors header says it describes, if that is a reasonable number."""
    try:
        rows = json.loads(header)
        ends = [row["data_offsets"][1] for row in rows.values() if "data_offsets" in row]
        return min(max(0, *ends, 0), 1 << 20)
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return 0


def _shards() -> list[bytes]:
    names = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    return [
        json.dumps(
            raw_safetensors.header(
                [(f"model.layers.0.{module}.{part}.weight", "BF16", (4, 8), None) for part in parts]
            )
        ).encode()
        for module, parts in names.items()
    ]


def _index(shards: list[bytes]) -> bytes:
    count = len(shards)
    weights = {
        name: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, shard in enumerate(shards, 1)
        for name in json.loads(shard)
    }
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": weights}).encode()


def _source(folder: Path) -> Path:
    path = folder / "source.gguf"
    path.write_bytes(raw_gguf.pack(raw_gguf.layer(0)))
    return path


def _fused() -> tuple[bytes, bytes]:
    """The whole file, and its manifest."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="fuzz-"))
    try:
        fused = folder / "fused.gguf"
        fuseweights.convert(_source(folder), fused, consumer="torch")
        whole = fused.read_bytes()
    finally:
        shutil.rmtree(folder)
    key = b"fuseweights.manifest"
    at = whole.index(key) + len(key) + 4
    size = int.from_bytes(whole[at : at + 8], "little")
    return whole, whole[at + 8 : at + 8 + size]


def _manifest() -> bytes:
    return _fused()[1].rstrip(b" ")


def _sealed(data: bytes) -> bytes:
    """With the checksum that it should have, where it is an object at all."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(value, dict):
        return data
    value.pop("sha256", None)
    text = json.dumps(value, separators=(",", ":"))
    value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(value, separators=(",", ":")).encode()


_WHOLE: list[tuple[bytes, bytes]] = []


def _fused_with(text: bytes) -> bytes:
    """The fused file with another manifest, aligned anew."""
    if not _WHOLE:
        _WHOLE.append(_fused())
    whole, old = _WHOLE[0]
    at = whole.index(old) - 8
    path = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="fuzz-")) / "f.gguf"
    try:
        path.write_bytes(whole)
        start = fuseweights.open_checkpoint(path).files[0].data_start
    finally:
        shutil.rmtree(path.parent)
    header = whole[:at] + len(text).to_bytes(8, "little") + text
    header += whole[at + 8 + len(old) : start].rstrip(b"\0")
    tensors = whole[start:]
    return header + bytes(-len(header) % 32) + tensors
