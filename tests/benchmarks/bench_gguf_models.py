"""Batch 1 decoding of whole GGUF models on this GPU: files with random blocks, written here and
loaded with fuseweights.load_model.

    python tests/benchmarks/bench_gguf_models.py [--json FILE] [--only NAME …] [--scratch FOLDER]

The floor is the bytes that a token touches at 4.3 TB/s. `llama.cpp` is what its CUDA build did on
an H200 with the same shapes and types, in another run. Needs 10 GB of disk and 12 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
QWEN3_8B = {
    "block_count": 36, "embedding_length": 4096, "feed_forward_length": 12288,
    "attention.head_count": 32, "attention.head_count_kv": 8,
}  # fmt: skip
QWEN3_30B = {
    "block_count": 24, "embedding_length": 2048, "feed_forward_length": 6144,
    "attention.head_count": 32, "attention.head_count_kv": 4,
    "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
}  # fmt: skip
COMMON = {
    "context_length": 40960, "attention.key_length": 128, "attention.value_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1000000.0,
}  # fmt: skip
VOCABULARY = 151936
#: Name: architecture, hyper-parameters, mix, and llama.cpp's tokens a second.
MODELS: dict[str, tuple[str, dict[str, Any], str, float | None]] = {
    "Qwen3-8B Q4_K": ("qwen3", QWEN3_8B, "Q4_K", 227.5),
    "Qwen3-8B Q4_K_M": ("qwen3", QWEN3_8B, "Q4_K_M", 217.5),
    "Qwen3-8B Q8_0": ("qwen3", QWEN3_8B, "Q8_0", None),
    "Qwen3-30B-A3B, 24 layers, Q4_K": ("qwen3moe", QWEN3_30B, "Q4_K", 457.0),
}
PROMPT, TOKENS, LENGTH = 64, 200, 1024


def tensors(hparams: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's row-major shape."""
    h, i = hparams["embedding_length"], hparams["feed_forward_length"]
    q, kv = (128 * hparams[f"attention.head_count{end}"] for end in ("", "_kv"))
    layer = {
        "attn_norm": (h,), "attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h),
        "attn_q_norm": (128,), "attn_k_norm": (128,), "attn_output": (h, q), "ffn_norm": (h,),
    }  # fmt: skip
    if experts := hparams.get("expert_count"):
        i = hparams["expert_feed_forward_length"]
        layer |= {"ffn_gate_inp": (experts, h), "ffn_down_exps": (experts, h, i)}
        layer |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, i, h))
    else:
        layer |= {"ffn_gate": (i, h), "ffn_up": (i, h), "ffn_down": (h, i)}
    layers = range(hparams["block_count"])
    named = {f"blk.{n}.{name}": shape for n in layers for name, shape in layer.items()}
    ends = {"token_embd": (VOCABULARY, h), "output_norm": (h,), "output": (VOCABULARY, h)}
    return {f"{name}.weight": shape for name, shape in (named | ends).items()}


def write(path: Path, architecture: str, hparams: dict[str, Any], mix: str) -> None:
    """The file: what llama-quantize gives each tensor, with random blocks made on the GPU."""
    import gguf
    import gguf_models
    import torch
    from ggml_random import random_blocks

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (COMMON | hparams).items():
        gguf_models.add_value(writer, f"{architecture}.{key}", value)
    for name, shape in tensors(hparams).items():
        kind = gguf_models._type(name, shape[-1], len(shape), mix, hparams["block_count"])
        if kind == "F32":
            scale, mean = (shape[-1] ** -0.5, 0) if len(shape) > 1 else (0.1, 1)
            values = mean + scale * torch.randn(shape)
            writer.add_tensor(name, values.numpy())
            continue
        number = gguf.GGMLQuantizationType[kind]
        blocks = random_blocks(int(number), *shape, device="cuda").cpu().numpy()
        writer.add_tensor(name, blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def touched(hparams: dict[str, Any], path: Path) -> int:
    """Bytes of weights that one token reads."""
    import fuseweights

    share = hparams.get("expert_used_count", 1) / hparams.get("expert_count", 1)
    checkpoint = fuseweights.open_checkpoint(path)
    sizes = {name: tensor.size for name, tensor in checkpoint.tensors.items()}
    del sizes["token_embd.weight"]
    return int(sum(size * (share if "_exps" in name else 1) for name, size in sizes.items()))


def measure(name: str, folder: Path) -> dict[str, Any]:
    import torch

    import fuseweights
    from fuseweights.nn import Decoder

    architecture, hparams, mix, llama_cpp = MODELS[name]
    path = folder / "model.gguf"
    write(path, architecture, hparams, mix)
    size, begun = touched(hparams, path), time.perf_counter()
    model = fuseweights.load_model(path, device="cuda")
    loaded = time.perf_counter() - begun
    decoder = Decoder(model, max_length=LENGTH)
    ids = torch.randint(0, VOCABULARY, (1, PROMPT), device="cuda")
    seconds = []
    for _ in range(5):
        decoder.generate(ids, 2)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(TOKENS):
            logits = decoder._advance()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / TOKENS)
    assert logits.isfinite().all()
    path.unlink()
    return {
        "model": name,
        "bytes": size,
        "floor_tokens_per_second": 4.3e12 / size,
        "tokens_per_second": 1 / median(seconds),
        "llama_cpp_tokens_per_second": llama_cpp,
        "load_seconds": loaded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write environment and results here")
    parser.add_argument("--only", nargs="*", default=[], choices=MODELS)
    parser.add_argument("--scratch", type=Path, default=None)
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import torch
    from bench_kernels import environment

    found, results, failed = environment(), [], 0
    for name in given.only or MODELS:
        try:
            with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
                results.append(measure(name, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
        except Exception:
            traceback.print_exc()
            failed = 1
        gc.collect()
        torch.cuda.empty_cache()
        if given.json:
            given.json.write_text(json.dumps({**found, "models": results}, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
