"""decode_attention's shipped configurations for tests/sass.py, at models' shapes, in bfloat16."""

import torch
from fuseweights.kernels.decode_attention import decode_attention


def _case(heads, kv_heads, head_dim, *, tokens=1, gate=False, sinks=False, **options):
    def run():
        like = {"dtype": torch.bfloat16}
        q = torch.empty(1, tokens, heads, head_dim, **like).transpose(1, 2)
        cache = torch.empty(1, kv_heads, 32768, head_dim, **like)
        given = torch.empty(1, tokens, heads, 2 * head_dim, **like)[..., head_dim:]
        return decode_attention(
            q,
            cache,
            cache,
            torch.empty((), dtype=torch.int64),
            head_dim**-0.5,
            sinks=torch.empty(heads, **like) if sinks else None,
            gate=given if gate else None,
            **options,
        )

    return run


SASS = {
    "qwen3-8b": _case(32, 8, 128),
    "qwen3-8b, 16 tokens": _case(32, 8, 128, tokens=16),
    "qwen3.5-35b-a3b": _case(16, 2, 256, gate=True),
    "gpt-oss": _case(64, 8, 64, sinks=True, window=128),
    "gemma-2-9b": _case(16, 8, 256, softcap=50.0),
}
