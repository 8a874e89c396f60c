"""What tests/test_kernel_moe.py has compiled for sm_90: the shipped shapes, Qwen3.5-35B-A3B's."""

import torch
from fuseweights.kernels import moe, router

E, K, H, I = 256, 8, 2048, 512  # noqa: E741


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def weights(dtype=torch.bfloat16):
    routed = empty(E, 2 * I, H, dtype=dtype), empty(E, H, I, dtype=dtype), "silu"
    return *routed, empty(2 * I, H, dtype=dtype), empty(H, I, dtype=dtype)


def experts(tokens):
    index = empty(tokens, K, dtype=torch.int64)
    moe.experts(empty(tokens, H), index, empty(tokens, K), *weights(), empty(tokens))


def block(tokens, dtype=torch.bfloat16):
    x, router, gate = (empty(n, H, dtype=dtype) for n in (tokens, E, 1))
    moe.sparse_moe(x, router, K, True, *weights(dtype), gate)


SASS = {
    "experts decode": lambda: experts(1),
    "block decode": lambda: block(1),
    "experts M=32": lambda: experts(32),
    "experts M=512": lambda: experts(512),
    "experts M=2048": lambda: experts(2048),
    "block decode fp32": lambda: block(1, torch.float32),
    "router M=16": lambda: router.router(empty(16, H), empty(E, H), K, True, empty(1, H)),
}
