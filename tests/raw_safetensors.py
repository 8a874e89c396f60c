"""safetensors files and Hugging Face directories packed by hand, and the whole way there and back.

Needs neither torch nor the safetensors library's writer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

import fuseweights

# bits of one element
BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
INDEX = "model.safetensors.index.json"
# (name, dtype, shape, bytes or None for random ones)
Tensor = tuple[str, str, Sequence[int], bytes | None]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * BITS[dtype] // 8


def header(
    tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None, last: bool = False
) -> dict[str, Any]:
    """The header's JSON object, `last` with the metadata at the end."""
    rows, offset = {}, 0
    for name, dtype, shape, _ in tensors:
        end = offset + nbytes(dtype, shape)
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    if metadata is None:
        return rows
    return {**rows, "__metadata__": metadata} if last else {"__metadata__": metadata, **rows}


def pack(
    tensors: Sequence[Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    text: str | bytes | None = None,
    pad: int = 8,
    seed: int = 0,
) -> bytes:
    """A whole file; `text` is a header to use instead of the usual one."""
    if text is None:
        text = json.dumps(header(tensors, metadata), separators=(",", ":"))
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * (-len(raw) % pad)
    rng = random.Random(seed)
    data = b"".join(
        rng.randbytes(nbytes(dtype, shape)) if given is None else given
        for _, dtype, shape, given in tensors
    )
    return len(raw).to_bytes(8, "little") + raw + data


def index(files: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    rows = [(row, name) for name, tensors in files.items() for row in tensors]
    total = sum(nbytes(dtype, shape) for (_, dtype, shape, _), _ in rows)
    return {"metadata": {"total_size": total}, "weight_map": {row[0]: name for row, name in rows}}


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write(
    directory: Path,
    *files: Sequence[Tensor],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A directory of one file or of shards with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [shard_name(i, len(files)) for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        whole = index(dict(zip(names, files, strict=True)))
        (directory / INDEX).write_text(json.dumps(whole, indent=2) + "\n")
    for number, (name, tensors) in enumerate(zip(names, files, strict=True)):
        (directory / name).write_bytes(pack(tensors, metadata, seed=number))
    text = json.dumps({"model_type": "llama"} if config is None else config, indent=2)
    (directory / "config.json").write_text(text + "\n")
    return directory


def layer(
    n: int, q: int = 8, kv: int = 4, width: int = 8, dtype: str = "BF16", bias: bool = False
) -> list[Tensor]:
    """The linear layers of a llama layer, and its norm."""
    rows = {"q": q, "k": kv, "v": kv}
    prefix = f"model.layers.{n}"
    tensors: list[Tensor] = [(f"{prefix}.input_layernorm.weight", dtype, (width,), None)]
    for part, count in rows.items():
        name = f"{prefix}.self_attn.{part}_proj"
        tensors.append((f"{name}.weight", dtype, (count, width), None))
        if bias:
            tensors.append((f"{name}.bias", dtype, (count,), None))
    tensors.append((f"{prefix}.self_attn.o_proj.weight", dtype, (width, q), None))
    for part in ("gate", "up"):
        tensors.append((f"{prefix}.mlp.{part}_proj.weight", dtype, (6, width), None))
    tensors.append((f"{prefix}.mlp.down_proj.weight", dtype, (width, 6), None))
    return tensors


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def tensors_of(root: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """(dtype, shape, bytes) of every tensor, read by the safetensors library."""
    found = {}
    for path in sorted(root.glob("*.safetensors")) if root.is_dir() else [root]:
        for name, row in deserialize(path.read_bytes()):
            assert name not in found
            found[name] = row["dtype"], list(row["shape"]), bytes(row["data"])
    return found


def there_and_back(src: Path, directory: Path, **options: Any) -> fuseweights.Plan:
    """Convert, verify, un-fuse; compare every byte of every file and the virtual original."""
    fused, back = directory / "fused", directory / "back"
    if src.is_file():
        fused, back = directory / "fused.safetensors", directory / "back.safetensors"
    dry = fuseweights.convert(src, fused, dry_run=True, **options)
    assert not fused.exists()
    plan = fuseweights.convert(src, fused, sync=False, **options)
    assert (plan.groups, plan.refusals, plan.outputs) == (dry.groups, dry.refusals, dry.outputs)
    _holds_what_the_plan_says(src, fused, plan)
    found = fuseweights.verify(src, fused)
    assert found.differences == () and found.checked == len(tensors_of(fused))
    unfused = fuseweights.unfuse(fused, back, sync=False)
    assert plan.inexact is None and unfused.inexact is None
    before, after = _bytes(src), _bytes(back)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    sums = {name: hashlib.sha256(raw).hexdigest() for name, raw in before.items()}
    assert fuseweights.verify_source_sha256(fused, sums if src.is_dir() else sums[""]).ok
    return plan


def _bytes(path: Path) -> dict[str, bytes]:
    return contents(path) if path.is_dir() else {"": path.read_bytes()}


def _holds_what_the_plan_says(src: Path, fused: Path, plan: fuseweights.Plan) -> None:
    """Every tensor is where it was or in a fused one, and the index tells where and how much."""
    old, new = tensors_of(src), tensors_of(fused)
    for group in plan.groups:
        for tensor in group.tensors:
            parts = [old.pop(part.name) for part in tensor.parts]
            dtype, shape, raw = new.pop(tensor.name)
            assert (dtype, tuple(shape)) == (tensor.dtype, tensor.shape)
            if tensor.merge == "stack":
                assert raw == _stacked(parts, tensor.axis)
    assert new == old and len(new) == plan.copied
    if fused.is_dir():
        files = {path.name: tensors_of(path) for path in fused.glob("*.safetensors")}
        for output in plan.outputs:
            assert (fused / output.name).stat().st_size == output.size
        if (fused / INDEX).exists():
            read = json.loads((fused / INDEX).read_text())
            where = {name: file for file, rows in files.items() for name in rows}
            assert read["weight_map"] == where
            total = sum(len(raw) for rows in files.values() for *_, raw in rows.values())
            assert read["metadata"]["total_size"] == total


def _stacked(parts: Sequence[tuple[str, list[int], bytes]], axis: int) -> bytes:
    """numpy's own concatenation of raw elements."""
    arrays = []
    for dtype, shape, raw in parts:
        width = BITS[dtype] // 8
        if not width or not raw:  # two elements a byte: only rows can be stacked
            assert axis == 0
            return b"".join(raw for *_, raw in parts)
        arrays.append(np.frombuffer(raw, np.uint8).reshape(*shape, width))
    return np.concatenate(arrays, axis).tobytes()
