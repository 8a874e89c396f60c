"""fuseweights on a GGUF beside cp, cmp and gguf-py: time and memory.

    python tests/benchmarks/bench_gguf.py [--dir SCRATCH] [--gb 3] [--rounds 5] [--json FILE]

SCRATCH needs five times the size of the file, and memory enough to keep four of them cached. The
source is kept there for the next run, all else is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from common import (  # noqa: E402
    Case,
    environment,
    print_table,
    python,
    remove,
    results,
    run_rounds,
)

VOCABULARY, MERGES = 151_936, 151_387
HIDDEN, QUERY, KEY_VALUE, FEED_FORWARD = 4096, 4096, 1024, 12288
BLOCK_BYTES = {"Q4_K": 144, "Q6_K": 210}  # of 256 values
PACKAGES = ("fuseweights", "gguf", "numpy")
SLOW_ROUNDS = 2
OUT = "out.gguf"
MEMORY_MB = 50

CONVERT = "import sys, fuseweights as f; f.convert(sys.argv[1], sys.argv[2], sync=False)"
UNFUSE = "import sys, fuseweights as f; f.unfuse(sys.argv[1], sys.argv[2], sync=False)"
VERIFY = """
import sys, fuseweights as f
assert f.verify(sys.argv[1], sys.argv[2], threads=int(sys.argv[3])).ok
"""
OPEN = """
import json, sys, time, fuseweights
from fuseweights.api import open_checkpoint
times = [time.perf_counter()]
open_checkpoint(sys.argv[1])
times.append(time.perf_counter())
fuseweights.plan(sys.argv[1])
times.append(time.perf_counter())
rows = "open, in process", "open + plan, in process"
print(json.dumps({row: b - a for row, a, b in zip(rows, times, times[1:])}))
"""
READER = """
import json, sys, time, gguf
begun = time.perf_counter()
gguf.GGUFReader(sys.argv[1])
print(json.dumps({"open, gguf-py GGUFReader": time.perf_counter() - begun}))
"""
OWN = f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench_gguf as own; "
MAKE = OWN + "own.make(sys.argv[1], float(sys.argv[2]))"
FUSE_WITH_GGUF_PY = OWN + "own.fuse_with_gguf_py(sys.argv[1], sys.argv[2])"


# --- the file --------------------------------------------------------------------------------


def tensor_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, row-major shape, type) of a Qwen3-8B of `layers` layers in Q4_K_M."""
    yield "output.weight", (VOCABULARY, HIDDEN), "Q6_K"
    yield "output_norm.weight", (HIDDEN,), "F32"
    yield "token_embd.weight", (VOCABULARY, HIDDEN), "Q4_K"
    for layer in range(layers):
        better = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        mixed = "Q6_K" if better else "Q4_K"
        shapes = (
            ("attn_k", (KEY_VALUE, HIDDEN), "Q4_K"),
            ("attn_k_norm", (128,), "F32"),
            ("attn_norm", (HIDDEN,), "F32"),
            ("attn_output", (HIDDEN, QUERY), "Q4_K"),
            ("attn_q", (QUERY, HIDDEN), "Q4_K"),
            ("attn_q_norm", (128,), "F32"),
            ("attn_v", (KEY_VALUE, HIDDEN), mixed),
            ("ffn_down", (HIDDEN, FEED_FORWARD), mixed),
            ("ffn_gate", (FEED_FORWARD, HIDDEN), "Q4_K"),
            ("ffn_norm", (HIDDEN,), "F32"),
            ("ffn_up", (FEED_FORWARD, HIDDEN), "Q4_K"),
        )
        for name, shape, kind in shapes:
            yield f"blk.{layer}.{name}.weight", shape, kind


def byte_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """Of the raw bytes; its product is their number."""
    row = shape[-1] * 4 if kind == "F32" else shape[-1] // 256 * BLOCK_BYTES[kind]
    return (*shape[:-1], row)


def layers_for(gb: float) -> int:
    """How many layers make a file of about `gb`; enough for some to keep one type."""

    def size(layers: int) -> int:
        total = 0
        for _, shape, kind in tensor_shapes(layers):
            rows, row = (1, *byte_shape(shape, kind))[-2:]
            total += rows * row
        return total

    fixed, eight = size(0), size(8)
    return max(4, round((gb * 1e9 - fixed) / ((eight - fixed) / 8)))


def make(path: str, gb: float) -> None:
    """Write the file: random blocks, and a vocabulary of the real size as arrays of strings."""
    import gguf
    import numpy as np

    layers = layers_for(gb)
    writer = gguf.GGUFWriter(path, "qwen3")
    add_metadata(writer, layers)
    tensors = [(name, byte_shape(s, kind), kind) for name, s, kind in tensor_shapes(layers)]
    for name, shape, kind in tensors:
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        told = (shape[0] // 4,) if kind == "F32" else shape
        size = int(np.prod(shape))
        writer.add_tensor_info(name, told, dtype, size, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, shape, _ in tensors:
        size = int(np.prod(shape))
        writer.write_tensor_data(
            rng.integers(0, 2**64, -(-size // 8), np.uint64).view(np.uint8)[:size]
        )
    writer.close()


def add_metadata(writer, layers: int) -> None:
    import random

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzĠäé中"

    def word() -> str:
        return "".join(rng.choices(letters, k=rng.randint(2, 10)))

    writer.add_name("benchmark")
    writer.add_block_count(layers)
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(QUERY // 128)
    writer.add_head_count_kv(KEY_VALUE // 128)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(15)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"{word()}{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([f"{word()} {word()}" for _ in range(MERGES)])
    writer.add_eos_token_id(151645)
    writer.add_chat_template("{{ messages }}" * 300)


# --- what a user would write with gguf-py ----------------------------------------------------


def fuse_with_gguf_py(source: str, target: str) -> None:
    """Stack q, k and v where their types agree, as `fuseweights convert` does."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if key == "general.architecture" or key.startswith("GGUF."):
            continue
        kind = value.types[0]
        of = value.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value.contents(), kind, sub_type=of)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        parent, _, part = name.removesuffix(".weight").rpartition(".")
        parts = [tensors.get(f"{parent}.attn_{p}.weight") for p in "qkv"]
        if part in ("attn_q", "attn_k", "attn_v") and len({t.tensor_type for t in parts}) == 1:
            if part != "attn_q":
                continue
            name = f"{parent}.attn_qkv.weight"
            data = np.concatenate([t.data for t in parts])
        else:
            data = tensor.data
        writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the comparison --------------------------------------------------------------------------


def cases(source: Path, fused: Path, copy: Path) -> list[Case]:
    out = source.with_name(OUT)
    writes = {"inputs": (source,), "output": out}
    reads = {"inputs": (source, fused)}
    command = (sys.executable, "-m", "fuseweights")
    a, b, c = str(source), str(fused), str(out)
    return [
        Case("cp", ["cp", a, c], **writes),
        Case(
            "convert, not synced",
            python(CONVERT, a, c),
            "cp",
            **writes,
            aim_ratio=0.7,
            aim_mb=MEMORY_MB,
        ),
        Case("unfuse, not synced", python(UNFUSE, b, c), "cp", (fused,), out, aim_mb=MEMORY_MB),
        Case(
            "gguf-py, not synced",
            python(FUSE_WITH_GGUF_PY, a, c),
            "cp",
            **writes,
            rounds=SLOW_ROUNDS,
        ),
        Case("cp + sync", ["sh", "-c", f"cp '{a}' '{c}' && sync '{c}'"], **writes),
        Case(
            "convert (command)",
            [*command, "convert", a, c, "--quiet"],
            "cp + sync",
            **writes,
            aim_ratio=0.85,
            aim_mb=MEMORY_MB,
        ),
        Case(
            "unfuse (command)",
            [*command, "unfuse", b, c, "--quiet"],
            "cp + sync",
            (fused,),
            out,
            aim_mb=MEMORY_MB,
        ),
        Case("cmp", ["cmp", a, str(copy)], inputs=(source, copy)),
        Case("verify, 1 thread", python(VERIFY, a, b, 1), "cmp", **reads, aim_mb=MEMORY_MB),
        Case(
            "verify, 2 threads",
            python(VERIFY, a, b, 2),
            "cmp",
            **reads,
            aim_ratio=0.7,
            aim_mb=MEMORY_MB,
        ),
        Case("open", python(OPEN, a), reports=True, aim_seconds=0.05, aim_mb=MEMORY_MB),
        Case("open, gguf-py", python(READER, a), rounds=SLOW_ROUNDS, reports=True),
        Case("fuseweights --help", [*command, "--help"], aim_seconds=0.25),
        Case("python -c pass", python("pass")),
    ]


def prepare(folder: Path, gb: float) -> tuple[Path, Path, Path]:
    """The source, a fused one, and a copy for cmp; made in children, so that this stays small."""
    source, fused, copy = (folder / f"{name}-{gb:g}gb.gguf" for name in ("source", "fused", "copy"))
    if not source.exists():
        unfinished = source.with_suffix(".part")
        subprocess.run(python(MAKE, unfinished, gb), check=True)
        unfinished.rename(source)
    remove(fused)
    subprocess.run(python(CONVERT, source, fused), check=True)
    subprocess.run(["cp", str(source), str(copy)], check=True)
    return source, fused, copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "fuseweights-bench"
    )
    parser.add_argument("--gb", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    about = environment(args.dir, PACKAGES)
    source, fused, copy = prepare(args.dir, args.gb)
    size = source.stat().st_size
    todo = cases(source, fused, copy)
    load = [os.getloadavg()[0]]
    try:
        run_rounds(todo, args.rounds, lambda line: print(line, file=sys.stderr))
    finally:
        remove(fused)
        remove(copy)
        remove(source.with_name(OUT))
    load.append(os.getloadavg()[0])
    about |= {"bytes": size, "rounds": args.rounds, "load": load}
    rows = results(todo)
    title = (
        f"{size / 1e9:.2f} GB, {about['cpus']} CPUs, {about['file_system']}, warm page cache, "
        f"medians of {args.rounds} rounds, load {load[0]:.1f} to {load[1]:.1f}"
    )
    print_table(title, rows, size)
    if args.json:
        args.json.write_text(json.dumps(about | {"results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
