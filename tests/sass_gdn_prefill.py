"""The prefill kernels of Gated DeltaNet at Qwen3.5-35B-A3B's shapes (tests/sass.py)."""

import torch
from fuseweights.kernels import causal_conv1d, delta_chunks


def _projected(tokens: int) -> torch.Tensor:
    """q | k | v as columns of the fused projection's output: 8192 of 12352."""
    return torch.empty(1, tokens, 12352, dtype=torch.bfloat16)[..., :8192]


def _conv(tokens: int):
    weight = torch.empty(8192, 4, dtype=torch.bfloat16)
    state = torch.empty(1, 8192, 4, dtype=torch.bfloat16)
    return lambda: causal_conv1d.causal_conv1d_prefill(_projected(tokens), weight, state)


def _delta(tokens: int):
    def run():
        q, k, v = torch.empty(1, tokens, 8192, dtype=torch.bfloat16).split((2048, 2048, 4096), -1)
        heads = torch.empty(1, tokens, 12352, dtype=torch.bfloat16)
        delta_chunks.delta_chunks(
            q.unflatten(-1, (16, 128)), k.unflatten(-1, (16, 128)), v.unflatten(-1, (32, 128)),
            heads[..., 12320:], heads[..., 12288:12320], torch.empty(1, 32, 128, 128),
            A_log=torch.empty(32), dt_bias=torch.empty(32),
        )  # fmt: skip

    return run


SASS = {"conv 2048": _conv(2048), "conv 64": _conv(64), "delta 2048": _delta(2048)}
