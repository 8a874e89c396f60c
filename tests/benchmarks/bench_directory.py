"""fuseweights on a sharded bf16 directory beside cp and what a user would write with torch.

    python tests/benchmarks/bench_directory.py [--dir SCRATCH] [--layers 7] [--rounds 5] [--json F]

Two files with Qwen3-8B's layer shapes, cut so that one gate and its up lie in different files.
SCRATCH needs four times their size. The rows with torch are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from math import prod
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

HIDDEN, QUERY, KEY_VALUE, FEED_FORWARD, HEAD, VOCABULARY = 4096, 4096, 1024, 12288, 128, 75_968
MEMORY_MB = 60
SLOW_ROUNDS = 2
PACKAGES = ("fuseweights", "safetensors")

CONVERT = """
import sys, fuseweights as f
f.convert(sys.argv[1], sys.argv[2], sync=False, clone=False, threads=int(sys.argv[3]))
"""
VERIFY = "import sys, fuseweights as f; assert f.verify(sys.argv[1], sys.argv[2]).ok"
USERS_SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
tensors = {}
for path in sorted(source.glob("*.safetensors")):
    tensors |= load_file(path)
for name in [name for name in tensors if ".q_proj." in name]:
    parts = [tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
    tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
for name in [name for name in tensors if ".gate_proj." in name]:
    parts = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
    tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
save_file(tensors, target / "model.safetensors")
"""
# Touch every page of what was loaded: mapped files are not read before.
LOAD = """
import json, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
begun = time.perf_counter()
tensors = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    tensors |= load_file(path)
if sys.argv[2] == "cat":
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in [name for name in tensors if f".{names[0]}." in name]:
            parts = [tensors.pop(name.replace(names[0], other)) for other in names]
            tensors[name.replace(names[0], "fused")] = torch.cat(parts)
total = sum(int(t.view(torch.uint8).view(-1)[::4096].sum()) for t in tensors.values())
print(json.dumps({sys.argv[3]: time.perf_counter() - begun}))
"""
MAKE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import bench_directory
bench_directory.make(sys.argv[1], int(sys.argv[2]))
"""


def shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, in the order in which save_file writes them: by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        at = f"model.layers.{n}."
        found |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
            f"{at}mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.k_norm.weight": (HEAD,),
            f"{at}self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, QUERY),
            f"{at}self_attn.q_norm.weight": (HEAD,),
            f"{at}self_attn.q_proj.weight": (QUERY, HIDDEN),
            f"{at}self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
        }
    return sorted((found | {"model.norm.weight": (HIDDEN,)}).items())


def make(directory: str, layers: int) -> None:
    """Random bytes under those names, in two files cut between a gate and its up."""
    import random

    folder, rows = Path(directory), shapes(layers)
    folder.mkdir()
    middle = f"model.layers.{layers // 2}.mlp.up_proj.weight"
    cut = next(i for i, (name, _) in enumerate(rows) if name == middle)
    weight_map = {}
    block = random.Random(0).randbytes(1 << 20)
    for number, part in enumerate((rows[:cut], rows[cut:])):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in part:
            size = 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for at in range(0, end, len(block)):
                file.write(block[: min(len(block), end - at)])
    total = sum(2 * prod(shape) for _, shape in rows)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
    config = {"model_type": "qwen3", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def cases(source: Path, fused: Path, copy: Path) -> list[Case]:
    out = source.with_name("out")
    a, b, c = str(source), str(fused), str(out)
    writes = {"inputs": (source,), "output": out}
    memory = {"aim_mb": MEMORY_MB}
    command = [sys.executable, "-m", "fuseweights", "convert", a, c, "--quiet"]
    synced = ["sh", "-c", f"cp -r '{a}' '{c}' && sync '{c}'/*"]
    found = [
        Case("cp -r", ["cp", "-r", a, c], **writes),
        Case("convert, 1 thread", python(CONVERT, a, c, 1), "cp -r", **writes, **memory),
        Case(
            "convert, a thread per file",
            python(CONVERT, a, c, 2),
            "cp -r",
            **writes,
            **memory,
            aim_ratio=0.5,
        ),
        Case("cp -r + sync", synced, **writes),
        Case("convert (command)", command, "cp -r + sync", **writes, **memory, aim_ratio=0.8),
        Case("diff -r", ["diff", "-r", a, str(copy)], inputs=(source, copy)),
        Case("verify", python(VERIFY, a, b), "diff -r", inputs=(source, fused), **memory),
    ]
    if find_spec("torch"):
        apart, whole = "load and concatenate", "load fused"
        found += [
            Case(
                "torch.cat + save_file",
                python(USERS_SCRIPT, a, c),
                "cp -r",
                **writes,
                rounds=SLOW_ROUNDS,
            ),
            Case(apart, python(LOAD, a, "cat", apart), inputs=(source,), reports=True),
            Case(whole, python(LOAD, b, "", whole), inputs=(fused,), reports=True),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "fuseweights-bench"
    )
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    about = environment(args.dir, PACKAGES)
    source, fused, copy = (args.dir / f"{name}-{args.layers}" for name in ("bf16", "fused", "copy"))
    if not source.exists():
        subprocess.run(python(MAKE, source, args.layers), check=True)
    remove(fused)
    remove(copy)
    subprocess.run(python(CONVERT, source, fused, 2), check=True)
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    size = sum(path.stat().st_size for path in source.iterdir())
    todo = cases(source, fused, copy)
    load = [os.getloadavg()[0]]
    try:
        run_rounds(todo, args.rounds, lambda line: print(line, file=sys.stderr))
    finally:
        for path in (fused, copy, source.with_name("out")):
            remove(path)
    load.append(os.getloadavg()[0])
    about |= {"bytes": size, "rounds": args.rounds, "load": load}
    rows = results(todo)
    title = (
        f"{size / 1e9:.2f} GB in two files, {about['cpus']} CPUs, {about['file_system']}, warm "
        f"page cache, medians of {args.rounds} rounds, load {load[0]:.1f} to {load[1]:.1f}"
    )
    print_table(title, rows, size)
    if args.json:
        args.json.write_text(json.dumps(about | {"results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
