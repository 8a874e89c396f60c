"""qkv_rope's shipped configurations for tests/sass.py, at models' shapes, in bfloat16."""

import torch
from fuseweights.kernels.qkv_rope import qkv_rope_cache


def _case(tokens, heads, kv_heads, head_dim, turned, *, norm=None, **options):
    def run():
        width = (heads * (2 if options.get("gate") else 1) + 2 * kv_heads) * head_dim
        like = {"dtype": torch.bfloat16}
        qkv = torch.empty(1, tokens, width, **like)
        angles = torch.empty(1, tokens, turned, **like)
        weight = torch.empty(head_dim, **like) if norm else None
        rest = (heads, kv_heads, head_dim, angles, angles, weight, weight, 1e-6, norm or "llama")
        cache = torch.empty(1, kv_heads, 4096, head_dim, **like)
        positions = torch.empty(tokens, dtype=torch.int64)
        return qkv_rope_cache(qkv, cache, cache, positions, *rest, **options)

    return run


SASS = {
    "qwen3-8b, 1 token": _case(1, 32, 8, 128, 128, norm="llama"),
    "qwen3-8b, 2048 tokens": _case(2048, 32, 8, 128, 128, norm="llama"),
    "qwen3.5-35b-a3b, 1 token": _case(1, 16, 2, 256, 64, norm="gemma", gate=True),
    "qwen3.5-35b-a3b, 2048 tokens": _case(2048, 16, 2, 256, 64, norm="gemma", gate=True),
    "gpt-oss, 1 token": _case(1, 64, 8, 64, 32, rope="compact"),
    "phi-3-mini, 2048 tokens": _case(2048, 32, 32, 96, 96),
}
