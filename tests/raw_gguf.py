"""GGUF files packed by hand with struct: independent of the package and of gguf's writer."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 2, 4, 5, 6, 7, 8, 9, 10
# (name, row-major shape, type name, bytes or None for random ones)
Tensor = tuple[str, Sequence[int], str, bytes | None]


def nbytes(shape: Sequence[int], dtype: str) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return prod(shape) // block * size


def value(order: str, kind: int, item: object) -> bytes:
    if kind == STRING:
        raw = item if isinstance(item, bytes) else str(item).encode()
        return struct.pack(order + "Q", len(raw)) + raw
    if kind == ARRAY:
        inner, items = item
        return struct.pack(order + "IQ", inner, len(items)) + b"".join(
            value(order, inner, x) for x in items
        )
    return struct.pack(order + SCALARS[kind], item)


def pack(
    tensors: Iterable[Tensor] = (),
    metadata: Iterable[tuple[str, int, object]] = (),
    *,
    architecture: str | None = "llama",
    version: int = 3,
    order: str = "<",
    alignment: int | None = None,
    tail: int | None = None,
    seed: int = 0,
) -> bytes:
    """A whole file; `tail` is the number of bytes after the last tensor, None pads as usual."""
    rng = random.Random(seed)
    tensors = list(tensors)
    fields = [("general.architecture", STRING, architecture)] if architecture is not None else []
    fields += [("general.alignment", U32, alignment)] if alignment else []
    fields += list(metadata)
    align = alignment or 32
    out = bytearray(b"GGUF" + struct.pack(order + "IQQ", version, len(tensors), len(fields)))
    for key, kind, item in fields:
        out += value(order, STRING, key) + struct.pack(order + "I", kind)
        out += value(order, kind, item)
    data = bytearray()
    for name, shape, dtype, raw in tensors:
        data += bytes(-len(data) % align)
        out += value(order, STRING, name)
        out += struct.pack(f"{order}I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack(order + "IQ", GGMLQuantizationType[dtype], len(data))
        data += rng.randbytes(nbytes(shape, dtype)) if raw is None else raw
    if tensors:
        out += bytes(-len(out) % align)
    out += data
    return bytes(out + bytes(-len(out) % align if tail is None else tail))


def layer(
    n: int = 0,
    *,
    q: int = 8,
    kv: int = 4,
    k_width: int = 64,
    dtype: str = "Q8_0",
    bias: bool = False,
    **dtypes: str,
) -> list[Tensor]:
    """A llama block's attention and feed-forward; `dtypes` overrides a module's type."""
    rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": k_width}
    rows |= {"ffn_gate": 12, "ffn_up": 12}
    tensors: list[Tensor] = [(f"blk.{n}.attn_norm.weight", (k_width,), "F32", None)]
    for module, count in rows.items():
        kind = dtypes.get(module, dtype)
        tensors.append((f"blk.{n}.{module}.weight", (count, k_width), kind, None))
        if bias and module in ("attn_q", "attn_k", "attn_v"):
            tensors.append((f"blk.{n}.{module}.bias", (count,), "F32", None))
    return tensors


def write(path: Path, tensors: Iterable[Tensor] = (), *args, **kwargs) -> Path:
    path.write_bytes(pack(tensors, *args, **kwargs))
    return path


def write_split(
    directory: Path,
    files: Sequence[Sequence[Tensor]],
    stem: str = "model",
    metadata: Sequence[tuple[str, int, object]] = (),
    **kwargs,
) -> Path:
    """A split set; returns its first file."""
    total = sum(map(len, files))
    for number, tensors in enumerate(files):
        keys = [
            ("split.no", U16, number),
            ("split.count", U16, len(files)),
            ("split.tensors.count", I32, total),
        ]
        keys = [*metadata, *keys] if number == 0 else keys
        path = directory / f"{stem}-{number + 1:05d}-of-{len(files):05d}.gguf"
        architecture = "llama" if number == 0 else None
        write(path, tensors, keys, architecture=architecture, seed=number, **kwargs)
    return directory / f"{stem}-00001-of-{len(files):05d}.gguf"
