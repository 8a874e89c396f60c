"""kernels/gguf_linear.py and gguf_experts.py on a GPU: checks with the real compiler, and rows for
the benchmark table (bench_kernels.py)."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import torch
from fuseweights.kernels import gguf_linear as linear
from fuseweights.kernels.gguf_experts import experts_reference
from fuseweights.kernels.gguf_types import TYPES
from ggml_random import random_blocks

op = torch.ops.fuseweights
Q8_0, Q4_K, Q6_K = 8, 12, 14
#: Qwen3-8B's.
SHAPES = {"gate_up": (24576, 4096), "qkv": (6144, 4096), "o": (4096, 4096), "down": (4096, 12288)}
blocks = partial(random_blocks, device="cuda")


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def weights(type: int, stored: torch.Tensor, columns: int, planar: bool) -> torch.Tensor:
    return linear.dequantize_reference(stored, type, columns, planar).double()


def check_type(type: int, thorough: bool) -> list[str]:
    """One type: odd N; `thorough`, every kernel and raw blocks too."""
    problems, columns, name = [], 1280, TYPES[type].name

    def demand(right: bool, what: str, *numbers: float) -> None:
        if not right:
            problems.append(f"{name} {what}: {', '.join(f'{n:.2e}' for n in numbers)}")

    for planar in {TYPES[type].has_planar, TYPES[type].has_planar and not thorough}:
        stored = blocks(type, 333, columns, is_planar=planar)
        w = weights(type, stored, columns, planar)
        got = op.gguf_dequantize(stored, type, columns, torch.float32, planar)
        demand(torch.equal(got.double(), w), f"dequantize, planar {planar}")
        for m in (1, 2, 8, 15, 64) if thorough and planar is TYPES[type].has_planar else (1,):
            x = torch.randn(columns, m, device="cuda").T
            exact = x.double() @ w.T
            plain = error(x @ w.float().T, exact)
            if thorough and m in (1, 15):
                out = op.gguf_linear(x, stored, type, planar, exact=True)
                demand(error(out, exact) <= 1.1 * plain, f"exact M={m}", error(out, exact), plain)
            x = x.bfloat16()
            q, d, _ = op.quantize_q8_1(x)
            seen, exact = linear._dequantized_q8_1(q.double(), d.double()) @ w.T, x.double() @ w.T
            out = op.gguf_linear(x, stored, type, planar)
            if m <= linear.MATVEC:
                rounded = error(seen.bfloat16(), seen)
                demand(error(out, seen) <= 1.1 * rounded, f"M={m}", error(out, seen), rounded)
                largest = float((seen - exact).abs().max() / exact.abs().max())
                # what rounding x to Q8_1 costs, in any implementation: 7.6e-3 is the most seen
                demand(largest < 8e-3, f"8 bits M={m}", largest)
            else:
                plain = error(x @ w.bfloat16().T, exact)
                demand(error(out, exact) <= 1.1 * plain, f"M={m}", error(out, exact), plain)
    return problems


def check_experts() -> list[str]:
    gate_up, down = blocks(Q4_K, 6, 512, 512), blocks(Q4_K, 6, 512, 256)
    problems = []
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 512, device="cuda")
        index = torch.randint(0, 6, (tokens, 4), device="cuda")
        scores = torch.rand(tokens, 4, device="cuda")
        given = (gate_up, Q4_K, down, Q4_K, "silu", False)
        exact = experts_reference(x.double(), index, scores.double(), *given)
        for how, most in ((True, 1e-6), (False, 1.5e-2)):
            found = error(op.gguf_experts(x, index, scores, *given, how), exact)
            if not found <= (most if tokens <= 16 else 2e-3):  # tokens > 16: tf32 products
                problems.append(f"experts T={tokens} exact={how}: {found:.1e}")
    return problems


def check_torch() -> list[str]:
    """Epilogue, CUDA graph, torch.compile."""
    stored, x = blocks(Q4_K, 512, 512), torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)

    def call(x: torch.Tensor) -> torch.Tensor:
        return op.gguf_linear(x, stored, Q4_K, act="silu", residual=residual)

    expected, problems = call(x), []
    q, d, _ = op.quantize_q8_1(x)  # the kernel multiplies what this says, not x
    seen = linear._dequantized_q8_1(q.double(), d.double()) @ weights(Q4_K, stored, 512).T
    gate, up = seen.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up + residual.double()
    if not error(expected, exact) <= 1.1 * error(exact.bfloat16(), exact):
        problems.append("epilogue")
    if not torch.equal(torch.compile(call, fullgraph=True)(x), expected):
        problems.append("torch.compile differs")
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    static.copy_(x)
    graph.replay()
    if not torch.equal(out, expected):
        problems.append("a replayed graph differs")
    return problems


def check() -> list[str]:
    torch.manual_seed(0)
    problems = check_torch() + check_experts()
    for type in TYPES:
        problems += check_type(type, thorough=type in (Q4_K, Q8_0))
    return problems


def _peer():
    """vllm-gguf-plugin's CUDA kernels, where its wheel is installed and loads."""
    try:
        spec = importlib.util.find_spec("vllm_gguf_plugin")
        torch.ops.load_library(str(Path(spec.origin).parent / "_C_gguf.abi3.so"))
        return torch.ops._C_gguf.ggml_mul_mat_vec_a8
    except Exception as error:
        print("vllm-gguf-plugin:", repr(error)[:200])
        return None


def _row(type: int, name: str, m: int, peer, copies: list, timed) -> dict:
    n, k = SHAPES[name]
    planar = TYPES[type].has_planar
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    given = op.quantize_q8_1(x)
    size = copies[0].numel() + m * (k + n * 2)
    row = {
        "kernel": f"gguf_linear {TYPES[type].name}",
        "shape": f"{name} {n}×{k}, M={m}",
        "bytes": size,
        "floor_us": size / 4.3e6,
        "ours_us": timed(
            lambda w: op.gguf_linear_q8_1(*given, w, type, torch.bfloat16, planar), copies
        ),
    }
    if peer:
        raw = [torch.empty_like(c) for c in copies] if planar else copies
        for copy in raw if planar else ():
            copy.random_(0, 256)
        row["peer"] = "vllm-gguf-plugin 0.0.3"
        row["peer_us"] = timed(lambda w: peer(w, x, type, n), raw)
    return row


def rows() -> list[dict]:
    import gpu

    peer, found = _peer(), []
    timed = partial(gpu.microseconds, rounds=5)
    for type in (Q4_K, Q6_K, Q8_0):
        for name in SHAPES:
            n, k = SHAPES[name]
            size = TYPES[type].row_bytes(k, TYPES[type].has_planar) * n
            make = partial(blocks, type, n, k, is_planar=TYPES[type].has_planar)
            copies = gpu.rotated(make, size, 64)
            few = (1, 2, 4, 8, 16) if type == Q4_K else (1, 8)
            for m in few if name == "gate_up" else (1,):
                found.append(_row(type, name, m, peer, copies, timed))
            del copies
            torch.cuda.empty_cache()
    for type in (Q4_K, Q6_K, Q8_0):
        found.append(_prefill(type, partial(gpu.microseconds, launches=10, rounds=5)))
    return found


def _prefill(type: int, timed) -> dict:
    n, k = SHAPES["gate_up"]
    planar, m = TYPES[type].has_planar, 2048
    stored = blocks(type, n, k, is_planar=planar)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    size = stored.numel() + m * (n + k) * 2
    return {
        "kernel": f"gguf_linear {TYPES[type].name}",
        "shape": f"gate_up {n}×{k}, M={m}",
        "bytes": size,
        "floor_us": 2 * m * n * k / 790e6,
        "ours_us": timed(lambda x: op.gguf_linear(x, stored, type, planar), xs),
        "compiled_us": timed(lambda x: torch.nn.functional.linear(x, weight), xs),
        "note": "compiled: bf16 cuBLAS; floor: 790 TFLOP/s",
    }
