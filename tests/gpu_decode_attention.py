"""decode_attention on a GPU: `check()` against float64 and in graphs, `rows()` for the benchmark's
table. `problems(...)` compares one case on any device; tests/test_kernel_decode_attention.py calls
it too."""

from __future__ import annotations

import torch
from fuseweights.kernels.decode_attention import decode_attention, reference
from fuseweights.kernels.qkv_rope import qkv_rope_cache

#: name → (heads, kv_heads, head_dim, what else the model has)
MODELS = {
    "qwen3-8b": (32, 8, 128, {}),
    "qwen3.5": (16, 2, 256, {"gate": True}),
    "gpt-oss": (16, 2, 64, {"sinks": True, "window": 100}),
    "gemma2": (4, 2, 256, {"softcap": 20.0}),
    "phi3": (3, 3, 96, {"window": 70}),
    "gemma": (5, 1, 64, {"gate": True, "sinks": True, "softcap": 30.0}),
}


def given(
    model: str,
    lengths: list[int],
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    strided: bool = False,
) -> tuple[tuple, dict]:
    """Random arguments of `decode_attention`; behind each sequence's end the cache holds NaN."""
    heads, kv_heads, d, about = MODELS[model]
    batch, like = len(lengths), {"dtype": dtype, "device": device}
    q = torch.randn(batch, tokens, heads, d, **like).transpose(1, 2)
    caches = torch.randn(2, batch, rows, kv_heads, d, **like).transpose(2, 3)
    if not strided:
        q, caches = q.contiguous(), caches.contiguous()
    for b, length in enumerate(lengths):
        caches[:, b, :, length:] = float("nan")
    length = torch.tensor(lengths, device=device)
    if len(set(lengths)) == 1 and not strided:
        length = length[0]
    options = {name: about.get(name) for name in ("window", "softcap")}
    if about.get("sinks"):
        options["sinks"] = torch.randn(heads, **like)
    if about.get("gate"):
        options["gate"] = torch.randn(batch, tokens, heads, 2 * d, **like)[..., d:]
    return (q, *caches, length, d**-0.5), options


def wide(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def problems(model, lengths, rows, tokens, dtype, device, *, strided=False) -> list[str]:
    """Against float64: no further from it than 1.1 × plain PyTorch (float32: or than 2⁻²¹, what one
    rounding of a logit of 8 does to its weight)."""
    arguments, options = given(model, lengths, rows, tokens, dtype, device, strided=strided)
    exact = reference(*map(wide, arguments), **{n: wide(o) for n, o in options.items()})
    limit = 1.1 * distance(reference(*arguments, **options), exact)
    limit = max(limit, 2**-21) if dtype == torch.float32 else limit
    where = f"{model} {lengths} of {rows} T={tokens} {dtype}{' strided' if strided else ''}: "
    out = decode_attention(*arguments, **options)
    if not (out.shape == exact.shape and out.is_contiguous() and out.dtype == dtype):
        return [f"{where}{out.shape} {out.stride()} {out.dtype}"]
    if not (error := distance(out, exact)) <= limit:
        return [f"{where}error {error:.2e}, at most {limit:.2e}"]
    return []


class Block(torch.nn.Module):
    """A module that calls the registered operation, for torch.compile and torch.export."""

    def forward(self, q, key_cache, value_cache, length):
        return torch.ops.fuseweights.decode_attention(q, key_cache, value_cache, length, 0.125) + 1


def block_inputs(device: str, dtype: torch.dtype = torch.float32) -> list:
    like = {"dtype": dtype, "device": device}
    caches = [torch.randn(2, 2, 300, 64, **like) for _ in range(2)]
    return [torch.randn(2, 4, 1, 64, **like), *caches, torch.tensor([299, 130], device=device)]


def _graph_problems() -> list[str]:
    """A captured step follows its length, and repeats to the bit; torch.compile sees one graph."""
    (q, keys, values, _, scale), _ = given("qwen3-8b", [4096] * 3, 4096, 1, torch.bfloat16, "cuda")
    length = torch.ones(3, dtype=torch.int64, device="cuda")
    queries = [torch.randn_like(q) for _ in range(20)]
    decode_attention(q, keys, values, length, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [decode_attention(q, keys, values, length, scale) for q in queries]
    for lengths in ([100, 4096, 1], [1500, 129, 2048], [4096] * 3, [33, 777, 4000]):
        length.copy_(torch.tensor(lengths))
        first = [decode_attention(q, keys, values, length, scale) for q in queries]
        exact = reference(*map(wide, (queries[0], keys, values, length)), scale)
        limit = 1.1 * distance(reference(queries[0], keys, values, length, scale), exact)
        if not distance(first[0], exact) <= limit:
            return [f"{lengths}: error {distance(first[0], exact)}, at most {limit}"]
        for _ in range(20):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            if not all(torch.equal(a, b) for a, b in zip(outs, first, strict=True)):
                return [f"{lengths}: a replay gives something else"]
    if not _step_is_right():
        return ["a step whose new row is written just before differs"]
    inputs = block_inputs("cuda", torch.bfloat16)
    if not torch.equal(torch.compile(Block(), fullgraph=True)(*inputs), Block()(*inputs)):
        return ["torch.compile differs"]
    return []


def _step_is_right() -> bool:
    """One captured step after another: length + 1, the new row of K and V by qkv_rope, attention,
    which may start before those have ended."""
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    caches, qkv = torch.randn(2, 1, 8, 2048, 128, **like), torch.empty(1, 1, 48 * 128, **like)
    length = torch.tensor([500], device="cuda")
    tokens = torch.randn(64, 48 * 128, **like)

    def step():
        qkv.copy_(tokens[length % 64, None])
        q = qkv_rope_cache(qkv, *caches, length, 32, 8, 128)
        length.add_(1)
        return q, decode_attention(q, *caches, length, 128**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, out = step()
    for at in range(501, 1300):
        caches[:, :, :, at] = float("nan")
        graph.replay()
        if at % 37 == 0:
            new = tokens[at % 64].view(48, 128)
            if not torch.equal(caches[:, 0, :, at], new[32:].view(2, 8, 128)):
                return False
            exact = reference(*map(wide, (q, *caches, length)), 128**-0.5)
            limit = 1.1 * distance(reference(q, *caches, length, 128**-0.5), exact)
            if not distance(out, exact) <= limit:
                return False
    return True


def check() -> list[str]:
    torch.manual_seed(0)
    found = []
    for model in MODELS:
        for lengths in ([1], [128], [1000, 1]):
            found += problems(model, lengths, 1024, 1, torch.bfloat16, "cuda")
    for model, tokens, lengths in (
        ("phi3", 2, [65, 64, 63]),
        ("gpt-oss", 15, [700]),
        ("qwen3-8b", 16, [16, 1024]),
        ("qwen3.5", 16, [777]),
    ):
        found += problems(model, lengths, 1024, tokens, torch.bfloat16, "cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found += problems("gemma", [300, 257], 300, 1, dtype, "cuda", strided=True)
    found += problems("qwen3-8b", [32768], 32768, 1, torch.bfloat16, "cuda")
    found += problems("qwen3-8b", [31000], 32768, 5, torch.bfloat16, "cuda")
    return found + _graph_problems()


def step(length: int, rows: int, heads: int = 32, kv_heads: int = 8, d: int = 128) -> tuple:
    """q, the caches, the length on the device, the mask that transformers makes."""
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(1, heads, 1, d, **like)
    caches = torch.randn(2, 1, kv_heads, rows, d, **like)
    mask = torch.arange(rows, device="cuda")[None, None, None] < length
    return q, *caches, torch.tensor(length, device="cuda"), mask


def eager(q, keys, values, mask) -> torch.Tensor:
    """transformers' "eager": heads repeated, two products, softmax."""
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (keys, values))
    logits = q @ keys.mT * q.shape[-1] ** -0.5 + torch.where(mask, 0.0, float("-inf")).to(q.dtype)
    return (logits.float().softmax(-1).to(q.dtype) @ values).transpose(1, 2).contiguous()


def masked(q, keys, values, mask) -> torch.Tensor:
    """transformers' "sdpa" over a static cache: a group's query heads are rows of one product."""
    rows = q.view(q.shape[0], keys.shape[1], -1, q.shape[-1])
    out = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return out.reshape(q.shape).transpose(1, 2).contiguous()


def flash(q, keys, values) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


LENGTHS = ((128, 4096), (1024, 4096), (32768, 32768))


def rows() -> list[dict]:
    from gpu import microseconds, rotated
    from torch.nn.attention import SDPBackend, sdpa_kernel

    table = []
    for length, size in LENGTHS:
        moved = 2 * length * 8 * 128 * 2 + 2 * 32 * 128 * 2 + 8
        sets = rotated(lambda a=length, b=size: step(a, b), moved)
        repeats = 200 if length < 32768 else 20
        compiled = torch.compile(masked, fullgraph=True)
        compiled(*sets[0][:3], sets[0][4])

        def ours(s):
            return decode_attention(*s[:4], 128**-0.5)

        def exact(s, length=length):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return flash(s[0], s[1][:, :, :length], s[2][:, :, :length])

        times = [
            microseconds(call, sets, repeats)
            for call in (
                ours,
                lambda s: masked(*s[:3], s[4]),
                lambda s, f=compiled: f(*s[:3], s[4]),
                exact,
            )
        ]
        table.append(
            {
                "kernel": "decode_attention",
                "shape": f"length {length} of {size}, 32/8 heads of 128",
                "bytes": moved,
                "floor_us": moved / 4.3e6,
                "ours_us": times[0],
                "pytorch_us": times[1],
                "compiled_us": times[2],
                "peer": f"SDPA flash, length known to the host ({torch.__version__})",
                "peer_us": times[3],
                "note": "pytorch: SDPA with a mask over the static cache, as transformers calls it",
            }
        )
        del sets
        torch.cuda.empty_cache()
    return table
