"""qkv_rope on a GPU: `check()` against float64 and in graphs, `rows()` for the benchmark's table.

`problems(...)` compares one case on any device; tests/test_kernel_qkv_rope.py calls it too.
"""

from __future__ import annotations

import torch
from fuseweights.kernels.qkv_rope import qkv_rope, qkv_rope_cache, reference

#: name → (heads, kv_heads, head_dim, options of `given`)
MODELS = {
    "llama": (32, 8, 64, {"qk_norm": False}),
    "qwen3": (16, 8, 128, {}),
    "qwen3.5": (6, 2, 256, {"turned": 64, "norm": "gemma", "gate": True}),
    "gemma3": (3, 1, 256, {"norm": "gemma"}),
    "gemma4": (5, 3, 128, {"norm": "late", "v_is_k": True, "v_norm": True}),
    "phi3": (3, 3, 96, {"qk_norm": False}),
    "cohere2": (8, 2, 128, {"rope": "pairs", "qk_norm": False}),
    "glm4": (7, 1, 128, {"rope": "glm", "turned": 64, "qk_norm": False}),
    "gpt-oss": (8, 1, 64, {"rope": "compact", "qk_norm": False}),
    "smollm3 without rope": (4, 2, 64, {"turned": 0, "qk_norm": False}),
}


def given(
    model: str, batch: int, tokens: int, dtype: torch.dtype, device: str, *, strided: bool = False
) -> tuple:
    """(qkv, heads, kv_heads, head_dim, cos, …, v_norm): random arguments of `qkv_rope`."""
    heads, kv_heads, d, about = MODELS[model]
    about = {"turned": d, "norm": "llama", "rope": "halves", "qk_norm": True, **about}
    like = {"dtype": dtype, "device": device}
    gate, rope, turned = about.get("gate", False), about["rope"], about["turned"]
    width = (heads * (1 + gate) + kv_heads * (1 if about.get("v_is_k") else 2)) * d
    qkv = torch.randn(tokens, batch, width + 16, **like).transpose(0, 1)[..., 16:]
    if not strided:
        qkv = qkv.contiguous()
    angles = torch.rand(batch, tokens, turned // 2, device=device) * 6
    if rope in ("halves", "glm"):
        angles = torch.cat((angles, angles), -1)
    elif rope == "pairs":
        angles = angles.repeat_interleave(2, -1)
    cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if turned else (None, None)
    weights = [torch.randn(d, **like) if about["qk_norm"] else None for _ in range(2)]
    options = cos, sin, *weights, 1e-6, about["norm"], rope, gate, about.get("v_norm", False)
    return qkv, heads, kv_heads, d, *options


def wide(arguments: tuple) -> tuple:
    """Floating point tensors in float64, the rest as it is."""
    wide = (torch.is_tensor(a) and a.is_floating_point() for a in arguments)
    return tuple(a.double() if is_wide else a for a, is_wide in zip(arguments, wide, strict=True))


def distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    out = out.double() - exact
    return float(out.norm() / exact.norm()) if exact.numel() else float(out.numel())


def problems(
    model: str, batch: int, tokens: int, dtype: torch.dtype, device: str, *, strided: bool = False
) -> list[str]:
    """Both operations against float64: no further from it than 1.1 × plain PyTorch, which is exact
    where values are only copied (float32: or than the 2⁻²³ of one rounding, since a head's scale
    rounds all of it one way); nothing else of the caches is written."""
    arguments = given(model, batch, tokens, dtype, device, strided=strided)
    exact, plain = reference(*wide(arguments)), reference(*arguments)
    ours = qkv_rope(*arguments)
    found = []
    for name, a, b, c in zip("qkv", ours, plain, exact, strict=True):
        if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
            found.append(f"{name}: {a.shape} {a.stride()} {a.dtype}, expected as {b.stride()}")
            continue
        error, limit = distance(a, c), distance(b, c)
        limit = max(1.1 * limit, 2**-23) if limit else 0.0
        if not error <= limit:
            found.append(f"{name}: error {error:.2e}, at most {limit:.2e}")

    kv_heads, d, rows = arguments[2], arguments[3], 3 * tokens + 5
    caches = torch.full((2, batch, rows, kv_heads, d), 7.0, dtype=dtype, device=device)
    caches = caches.transpose(2, 3) if strided else caches.view(2, batch, kv_heads, rows, d)
    positions = torch.rand(batch, rows, device=device).argsort(-1)[:, :tokens]
    expected = caches.clone()
    for cache, values in zip(expected, ours[1:], strict=True):
        cache.scatter_(2, positions[:, None, :, None].expand_as(values), values)
    q = qkv_rope_cache(arguments[0], *caches, positions, *arguments[1:])
    if not (torch.equal(q, ours[0]) and torch.equal(caches, expected)):
        found.append("the cache's variant differs")
    where = f"{model} B={batch} T={tokens} {dtype}{' strided' if strided else ''}: "
    return [where + problem for problem in found]


class Block(torch.nn.Module):
    """A module that calls the registered operations, for torch.compile and torch.export."""

    def forward(self, qkv, key_cache, value_cache, positions, cos, sin, weight):
        shape = 4, 2, 64
        q, k, v = torch.ops.fuseweights.qkv_rope(qkv, *shape, cos, sin, weight, weight)
        same = torch.ops.fuseweights.qkv_rope_cache(
            qkv, key_cache, value_cache, positions, *shape, cos, sin, weight, weight
        )
        return q + same, k + 1, v


def block_inputs(device: str, dtype: torch.dtype = torch.float32, tokens: int = 3) -> list:
    like = {"dtype": dtype, "device": device}
    caches = [torch.zeros(2, 2, 16, 64, **like) for _ in range(2)]
    positions = torch.arange(tokens, device=device) + 5
    angles = [torch.randn(1, tokens, 64, **like) for _ in range(2)]
    qkv, weight = torch.randn(2, tokens, 512, **like), torch.randn(64, **like)
    return [qkv, *caches, positions, *angles, weight]


def _graph_problems() -> list[str]:
    """A captured step follows its positions; torch.compile sees one graph."""
    qkv, *rest = given("qwen3", 2, 1, torch.bfloat16, "cuda")
    caches = torch.zeros(2, 2, 8, 64, 128, dtype=torch.bfloat16, device="cuda")
    positions = torch.zeros(1, dtype=torch.int64, device="cuda")
    qkv_rope_cache(qkv, *caches, positions, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = qkv_rope_cache(qkv, *caches, positions, *rest)
    expected = torch.zeros_like(caches)
    caches.zero_()
    for at in (3, 63, 17):
        qkv.normal_()
        positions.fill_(at)
        q.fill_(float("nan"))
        graph.replay()
        same, k, v = qkv_rope(qkv, *rest)
        expected[0, :, :, at], expected[1, :, :, at] = k[:, :, 0], v[:, :, 0]
        if not (torch.equal(q, same) and torch.equal(caches, expected)):
            return [f"graph replay at position {at} differs"]
    inputs = block_inputs("cuda", torch.bfloat16)
    out = torch.compile(Block(), fullgraph=True)(*inputs)
    kept = [t.clone() for t in inputs[1:3]]
    for a, b in zip((*out, *kept), (*Block()(*inputs), *inputs[1:3]), strict=True):
        if not torch.equal(a, b):
            return ["torch.compile differs"]
    return []


def check() -> list[str]:
    torch.manual_seed(0)
    found = []
    for model in MODELS:
        for tokens in (1, 65):
            found += problems(model, 2, tokens, torch.bfloat16, "cuda")
    for tokens in (2, 15, 63, 64, 1000):
        found += problems("qwen3", 1, tokens, torch.bfloat16, "cuda")
    for model in ("qwen3.5", "gemma4", "glm4"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found += problems(model, 3, 17, dtype, "cuda", strided=True)
    found += problems("qwen3", 0, 4, torch.bfloat16, "cuda")
    return found + _graph_problems()


SHAPES = {
    # name: (tokens, heads, kv_heads, head_dim, norm)
    "qwen3-8b": (1, 32, 8, 128, True),
    "llama-3-8b": (1, 32, 8, 128, False),
    "qwen3-8b prefill": (2048, 32, 8, 128, True),
}


def step(tokens: int, heads: int, kv_heads: int, d: int, norm: bool) -> tuple:
    """Arguments of `qkv_rope_cache` as a model's layer calls it."""
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    qkv = torch.randn(1, tokens, (heads + 2 * kv_heads) * d, **like)
    caches = torch.zeros(2, 1, kv_heads, max(4096, tokens), d, **like)
    positions = torch.arange(tokens, device="cuda") + (128 if tokens == 1 else 0)
    angles = [torch.randn(1, tokens, d, **like) for _ in range(2)]
    weights = [torch.randn(d, **like) if norm else None for _ in range(2)]
    return qkv, *caches, positions, heads, kv_heads, d, *angles, *weights


def plain(qkv, key_cache, value_cache, positions, heads, kv_heads, d, *options) -> torch.Tensor:
    """What a transformers layer launches: split, norms, rotation, index_copy_ into the cache."""
    q, k, v = qkv.unflatten(-1, (-1, d)).split((heads, kv_heads, kv_heads), 2)
    cos, sin, q_weight, k_weight = options

    def normed(x, weight):
        if weight is None:
            return x
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return weight * y.to(x.dtype)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    q, k = (turned(normed(x, w).transpose(1, 2)) for x, w in ((q, q_weight), (k, k_weight)))
    key_cache.index_copy_(2, positions, k)
    value_cache.index_copy_(2, positions, v.transpose(1, 2))
    return q


def rows() -> list[dict]:
    from gpu import microseconds, rotated

    table = []
    for name, (tokens, heads, kv_heads, d, norm) in SHAPES.items():
        moved = 2 * (tokens * (heads + 2 * kv_heads) * d * 2) + tokens * 2 * d * 2 + tokens * 8
        sets = rotated(lambda s=(tokens, heads, kv_heads, d, norm): step(*s), max(moved, 8 << 20))
        launches = 200 if tokens == 1 else 40
        compiled = torch.compile(plain, fullgraph=True)
        for s in sets[:2]:
            compiled(*s)
        table.append(
            {
                "kernel": "qkv_rope",
                "shape": f"{name}, T={tokens}, {heads}/{kv_heads} heads of {d}"
                + (", norms" if norm else ""),
                "bytes": moved,
                "floor_us": moved / 4.3e6,
                "ours_us": microseconds(lambda s: qkv_rope_cache(*s), sets, launches),
                "pytorch_us": microseconds(lambda s: plain(*s), sets, launches),
                "compiled_us": microseconds(lambda s, f=compiled: f(*s), sets, launches),
            }
        )
        del sets
        torch.cuda.empty_cache()
    return table
