"""linear.py and gated_mlp.py on a GPU: right, and how fast beside cuBLAS and the peers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuseweights.kernels import gated_mlp, linear
from gpu import error, microseconds, rotated

BANDWIDTH = 4.3e6  # bytes/µs
FLOPS = 790e6  # bf16, per µs


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def _compare(name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> list[str]:
    found, theirs = error(ours, exact), error(plain, exact)
    return [] if found <= 1.1 * theirs else [f"{name}: error {found:.3e}, PyTorch {theirs:.3e}"]


def _exact(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


def _check_products(dtype: torch.dtype, m: int, n: int, k: int, extra: bool) -> list[str]:
    name = f"{dtype} M={m} N={n} K={k} extra={extra}"
    x = _random(m, k + 8 * extra, dtype=dtype)[:, :k]
    weight = _random(2 * n, k, dtype=dtype, scale=k**-0.5)
    bias = _random(2 * n, dtype=dtype) if extra else None
    residual = _random(m, 2 * n, dtype=dtype) if extra else None
    given = (x, weight, bias, residual)
    found = _compare(
        f"skinny_linear {name}",
        linear.skinny_linear(*given),
        linear.linear_reference(*given),
        linear.linear_reference(*_exact(*given)),
    )
    for act in gated_mlp.ACTIVATIONS if k == 256 else ["silu"]:
        exact_x, exact_weight, exact_bias = _exact(x, weight, bias)
        found += _compare(
            f"gated_linear {act} {name}",
            gated_mlp.gated_linear(x, weight, act, bias),
            gated_mlp.gated_linear_reference(x, weight, act, bias),
            gated_mlp.gated_linear_reference(exact_x, exact_weight, act, exact_bias),
        )
    return found


def _check_gated(dtype: torch.dtype, act: str) -> list[str]:
    found = []
    for rows, n in ((1, 4000), (65, 1000), (7, 12288)):
        gate_up = _random(rows, 2 * n + 8, dtype=dtype, scale=3.0)[:, : 2 * n]
        found += _compare(
            f"gated {act} {dtype} {rows}×{n}",
            gated_mlp.gated(gate_up, act),
            gated_mlp.gated_reference(gate_up, act),
            gated_mlp.gated_reference(gate_up.double(), act),
        )
    return found


def _check_graph() -> list[str]:
    """Capture and replay of a whole MLP with other values in x; torch.compile without a break."""
    x, gate_up, down = _random(4, 512), _random(2048, 512, scale=0.04), _random(512, 1024)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ops.fuseweights.gated_linear(x, gate_up, "silu")
        return torch.ops.fuseweights.skinny_linear(hidden, down, None, x)

    mlp(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mlp(x)
    x.copy_(_random(4, 512))
    expected = mlp(x)
    out.fill_(torch.nan)
    graph.replay()
    found = [] if torch.equal(out, expected) else ["CUDA graph: replay differs"]
    compiled = torch.compile(mlp, fullgraph=True)(x)
    return found + ([] if torch.equal(compiled, expected) else ["torch.compile differs"])


def check() -> list[str]:
    torch.manual_seed(0)
    found = []
    for dtype in linear.DTYPES:
        shapes = itertools.product((1, 2, 4, 5, 16, 17), ((1024, 256), (1001, 520), (777, 4096)))
        for m, (n, k) in shapes:
            found += _check_products(dtype, m, n, k, extra=n == 1001)
        for act in gated_mlp.ACTIVATIONS:
            found += _check_gated(dtype, act)
    # what is left of the configurations
    sizes = ((2500, 4096), (1500, 4096), (2500, 2048), (65536, 1024))
    for m, (n, k) in itertools.product((1, 4, 16), sizes):
        found += _check_products(torch.bfloat16, m, n, k, extra=False)
    torch.cuda.empty_cache()
    return found + _check_graph()


# Times

Calls = dict[str, Callable[[Any], Any]]


def _row(kernel: str, shape: str, bytes_: float, sets: list, calls: Calls, **more: Any) -> dict:
    row = {"kernel": kernel, "shape": shape, "bytes": int(bytes_), "floor_us": bytes_ / BANDWIDTH}
    for name, call in calls.items():
        try:
            row[name] = microseconds(call, sets, launches=100, rounds=7)
        except Exception as problem:  # a peer that does not run has no column
            print(f"{kernel} {shape} {name}: {type(problem).__name__}: {problem}"[:300])
    return row | more


def _linear_row(name: str, n: int, k: int, m: int = 1, parts: tuple[int, ...] = ()) -> dict:
    x = _random(m, k)
    bytes_ = 2 * (n * k + m * (n + k))
    sets = rotated(lambda: _random(n, k, scale=k**-0.5), bytes_)
    calls: Calls = {
        "ours_us": lambda w: linear.skinny_linear(x, w),
        "compiled_us": lambda w: F.linear(x, w),
    }
    if parts:
        calls["pytorch_us"] = lambda w: [F.linear(x, part) for part in w.split(parts)]
    return _row("skinny_linear", f"{name} {k}→{n} M={m}", bytes_, sets, calls)


def _silu_mul() -> tuple[str, Callable[..., torch.Tensor]] | None:
    with contextlib.suppress(Exception):
        from importlib.metadata import version

        import liger_kernel.ops.swiglu as swiglu

        return f"liger-kernel {version('liger_kernel')}", swiglu.LigerSiLUMulFunction.apply
    return None


def _gated_row(m: int) -> dict:
    k, n = 4096, 12288
    x = _random(m, k)
    bytes_ = 2 * (2 * n * k + m * (n + k))
    sets = rotated(lambda: _random(2 * n, k, scale=k**-0.5), bytes_)
    calls: Calls = {
        "ours_us": lambda w: gated_mlp.gated_linear(x, w, "silu"),
        "pytorch_us": lambda w: F.silu(F.linear(x, w[:n])) * F.linear(x, w[n:]),
        "compiled_us": lambda w: F.linear(x, w),
    }
    note = "compiled_us: cuBLAS, the product alone"
    return _row("gated_linear", f"{k}→2×{n} M={m}", bytes_, sets, calls, note=note)


def _mlp_row(m: int) -> dict:
    k, n = 4096, 12288
    x = _random(m, k)
    bytes_ = 2 * (3 * n * k + 2 * m * k)
    sets = rotated(lambda: (_random(2 * n, k, scale=k**-0.5), _random(k, n, scale=n**-0.5)), bytes_)

    def ours(w):
        return linear.skinny_linear(gated_mlp.gated_linear(x, w[0], "silu"), w[1])

    def plain(w):
        return F.linear(F.silu(F.linear(x, w[0][:n])) * F.linear(x, w[0][n:]), w[1])

    def fused(x, gate_up, down):
        return F.linear(gated_mlp.gated_reference(F.linear(x, gate_up), "silu"), down)

    compiled = torch.compile(fused, dynamic=False)
    calls: Calls = {"ours_us": ours, "pytorch_us": plain, "compiled_us": lambda w: compiled(x, *w)}
    peer = _silu_mul()
    if peer:
        calls["peer_us"] = lambda w: F.linear(
            peer[1](F.linear(x, w[0][:n]), F.linear(x, w[0][n:])), w[1]
        )
    row = _row("gated_mlp", f"{k}, {n} M={m}", bytes_, sets, calls, peer=peer and peer[0])
    row["floor_us"] = max(row["floor_us"], 6 * m * n * k / FLOPS)
    return row


def _activation_row(m: int) -> dict:
    n = 12288
    bytes_ = 6 * m * n
    sets = rotated(lambda: _random(m, 2 * n), bytes_)
    halves = [tuple(part.contiguous() for part in t.chunk(2, -1)) for t in sets]
    calls: Calls = {
        "ours_us": lambda t: gated_mlp.gated(t, "silu"),
        "pytorch_us": lambda t: F.silu(t[:, :n]) * t[:, n:],
    }
    row = _row("gated", f"{m}×2×{n}", bytes_, sets, calls)
    if peer := _silu_mul():
        row |= _row("gated", row["shape"], bytes_, halves, {"peer_us": lambda t: peer[1](*t)})
        row["peer"] = peer[0]
    with contextlib.suppress(Exception):
        import flag_gems

        found = _row("gated", "", 0, halves, {"us": lambda t: flag_gems.silu_and_mul(*t)})
        row["note"] = f"FlagGems {flag_gems.__version__} silu_and_mul: {found['us']:.1f} µs"
    return row


def rows() -> list[dict]:
    made = [
        lambda: _linear_row("qkv", 6144, 4096, parts=(4096, 1024, 1024)),
        lambda: _linear_row("GDN in_proj", 12352, 2048, parts=(8192, 4096, 32, 32)),
        lambda: _linear_row("o_proj", 4096, 4096),
        lambda: _linear_row("down_proj", 4096, 12288),
        lambda: _linear_row("GDN out_proj", 2048, 4096),
        lambda: _linear_row("router", 256, 2048),
        lambda: _linear_row("shared gate_up", 1024, 2048),
        lambda: _linear_row("shared down", 2048, 512),
        lambda: _linear_row("lm_head", 151936, 4096),
        lambda: _linear_row("lm_head", 248320, 2048),
        *(lambda m=m: _gated_row(m) for m in (1, 2, 4, 8, 16)),
        *(lambda m=m: _mlp_row(m) for m in (1, 4, 16, 2048)),
        lambda: _activation_row(2048),
    ]
    found = []
    for make in made:
        found.append(make())
        torch.cuda.empty_cache()
    return found
