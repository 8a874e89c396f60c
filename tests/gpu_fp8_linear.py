"""kernels/fp8_linear.py on a GPU: correctness, and the rows of the benchmark table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from fuseweights.kernels import fp8_linear as linear
from fuseweights.kernels import fp8_weights
from gpu import error, microseconds, rotated

op = torch.ops.fuseweights
FP8 = torch.float8_e4m3fn
BANDWIDTH = 4.3e6  # bytes a microsecond
FLOPS = 790e6  # of bf16 a microsecond
#: Relative error of rounding Gaussian activations to E4M3 (the module's docstring).
W8A8_ERROR = 2.8e-2
#: What FP8 tensor cores add: they keep about 14 bits of a sum, which is float32 every 128 columns.
TENSOR_CORES = 1e-4


def weights(rows: int, columns: int, per: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = -(-columns // 128)
    shape = {"block": (-(-rows // 128), blocks), "group": (rows, blocks),
             "row": (rows, 1), "all": (1,)}[per]  # fmt: skip
    weight = torch.randn(rows, columns, device="cuda") * 100
    return weight.clamp(-448, 448).to(FP8), torch.rand(shape, device="cuda") * 4e-4 + 1e-4


def _product_problems(
    tokens: int, rows: int, columns: int, per: str, act: str | None, more: bool, dtype: torch.dtype
) -> Iterator[str]:
    """`more`: with a bias and a residual."""
    weight, scale = weights(rows, columns, per)
    width = rows if act is None else rows // 2
    x, bias, residual = (
        torch.randn(*shape, device="cuda", dtype=dtype)
        for shape in ((tokens, columns), (rows,), (tokens, width))
    )
    rest = (bias, residual) if more else (None, None)
    wide = (bias.double(), residual.double()) if more else (None, None)
    exact = linear.fp8_linear_reference(x.double(), weight, scale, *wide, act)
    ours = op.fp8_linear(x, weight, scale, *rest, act)
    if not tokens:  # nothing to compare but shapes
        if ours.shape != exact.shape:
            yield "fp8_linear: no tokens"
        return
    found = error(ours, exact)
    plain = error(linear.fp8_linear_reference(x, weight, scale, *rest, act), exact)
    if not found <= 1.1 * plain:
        yield f"fp8_linear: {found:.2e}, plain {plain:.2e}"
    if not torch.equal(op.dequantize_fp8(weight, scale, dtype),
                       fp8_weights.dequantize_reference(weight, scale, dtype)):  # fmt: skip
        yield "dequantize_fp8"
    yield from _w8a8_problems(x, weight, scale, rest[0])


def _w8a8_problems(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[str]:
    for group in (0, 128):
        q, q_scale = op.quantize_fp8(x, group)
        same = linear.w8a8_reference(q, q_scale, weight, scale, bias, torch.float64)
        found = error(op.fp8_linear_w8a8(q, q_scale, weight, scale, bias, x.dtype), same)
        rounding = error(same.to(x.dtype), same)
        if not found <= 1.1 * rounding + TENSOR_CORES:
            yield f"fp8_linear_w8a8 {group}: {found:.2e}, rounding {rounding:.2e}"
        true = F.linear(x.double(), fp8_weights.dequantize_reference(weight, scale, torch.float64))
        if bias is None and not error(same, true) <= W8A8_ERROR:
            yield f"fp8_linear_w8a8 {group}: {error(same, true):.2e} from exact"


def _graph_problems() -> Iterator[str]:
    for tokens in (1, 16, 300):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        weight, scale = weights(512, 1024, "block")
        step = partial(op.fp8_linear, weight=weight, scale=scale, act="silu")
        if not torch.equal(torch.compile(step, fullgraph=True)(x), step(x)):
            yield f"torch.compile {tokens}"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(x)
        x.normal_()
        found.fill_(torch.nan)
        graph.replay()
        if not torch.equal(found, step(x)):
            yield f"CUDA graph {tokens}"


def check() -> list[str]:
    torch.manual_seed(0)
    bf16, problems = torch.bfloat16, []
    for case in (
        *((m, 512, 1024, "block", "silu", True, bf16) for m in (0, 1, 2, 15, 16, 63, 64, 65, 1000)),
        *((m, 384, 320, "block", None, False, bf16) for m in (1, 3, 40, 300)),
        *((m, 200, 1112, per, act, True, bf16) for m in (1, 16, 100) for per, act in (
            ("block", None), ("group", "gelu"), ("row", "gelu_tanh"), ("all", None))),
        *((m, 4096, 12288, "block", None, False, torch.float16) for m in (1, 5, 16)),
        *((m, 24576, 4096, "block", "silu", False, bf16) for m in (1, 4, 16, 32, 128)),
        *((m, 6144, 4096, "row", None, False, bf16) for m in (1, 9)),
        *((m, 512, 1024, "block", None, False, bf16) for m in (128, 1001)),  # W8A8 by cuBLAS
    ):  # fmt: skip
        try:
            problems += [f"{problem}: {case}" for problem in _product_problems(*case)]
        except Exception as problem:
            problems.append(f"{type(problem).__name__} {str(problem)[:200]}: {case}")
    return [*problems, *_graph_problems()]


def timed(tokens: int, rows: int, columns: int, runs: dict[str, Callable]) -> dict[str, float]:
    """{name: µs} of run(x, weight, scale), over cold weights."""

    def make() -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        return (x, *weights(rows, columns, "block"))

    found, sets = {}, rotated(make, rows * columns)
    for name, run in runs.items():
        try:
            found[name] = round(microseconds(partial(_call, run), sets, _launches(tokens)), 2)
        except Exception as problem:
            print(f"{name} {tokens}: {type(problem).__name__} {str(problem)[:150]}")
        torch.cuda.empty_cache()
    return found


def _call(run: Callable, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return run(*given)


def _launches(tokens: int) -> int:
    return 200 if tokens <= 64 else 20


def _cublas(tokens: int, rows: int, columns: int) -> float:
    """µs of the same product alone with weights that are bfloat16 already: twice the bytes."""

    def make() -> tuple[torch.Tensor, ...]:
        shapes = ((tokens, columns), (rows, columns))
        return tuple(torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in shapes)

    sets = rotated(make, 2 * rows * columns)
    return round(microseconds(partial(_call, F.linear), sets, _launches(tokens)), 2)


def _w8a8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return op.fp8_linear_w8a8(*op.quantize_fp8(x, 128), weight, scale, None, x.dtype)


def _scaled_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """cuBLAS's own block-scaled product; it wants the activation's scales by columns."""
    q, s = op.quantize_fp8(x, 128)
    return torch._scaled_mm(q, weight.t(), s.t().contiguous().t(), scale.t(), out_dtype=x.dtype)


def _flag_gems() -> Callable | None:
    try:
        from flag_gems.ops.per_token_group_quant_fp8 import per_token_group_quant_fp8 as quantized
        from flag_gems.runtime.backend._nvidia.hopper.ops import w8a8_block_fp8_matmul as hopper
    except Exception as problem:
        print(f"FlagGems: {problem}")
        return None

    product = getattr(hopper, "w8a8_block_fp8_matmul", hopper)  # its module or the function itself

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q, s = quantized(x, 128)
        return product(q, weight, s, scale, [128, 128], x.dtype)

    return run


#: (tokens, N, K, activation): gate_up, qkv and down of Qwen3-8B's shape. Few tokens first: after
#: a long product the card's clock is lower.
SHAPES = (
    (1, 24576, 4096, "silu"), (1, 6144, 4096, None), (1, 4096, 12288, None),
    (4, 24576, 4096, "silu"), (16, 24576, 4096, "silu"), (16, 4096, 12288, None),
    *((tokens, 24576, 4096, "silu") for tokens in (64, 256, 2048)),
)  # fmt: skip


def rows() -> list[dict]:
    found, gems = [], _flag_gems()
    for tokens, n, k, act in SHAPES:
        runs = {
            "ours_us": partial(op.fp8_linear, act=act),
            "pytorch_us": partial(linear.fp8_linear_reference, act=act),
            "W8A8, alone": _w8a8,
        }
        if tokens >= 16:
            runs["cuBLAS W8A8, alone"] = _scaled_mm
        if tokens in (16, 2048) and gems:  # it tunes itself for every shape
            runs["peer_us"] = gems
        columns = timed(tokens, n, k, runs)
        notes = [f"{name} {columns.pop(name)}" for name in list(columns) if name.endswith("alone")]
        if "peer_us" in columns:
            columns["peer"] = f"FlagGems {version('flag-gems')} W8A8, alone"
        size = n * k + 4 * (n // 128) * (k // 128) + 2 * tokens * (n + k)
        found.append({
            "kernel": "fp8_linear", "shape": f"M={tokens} {n}×{k} {act or ''}".strip(),
            "bytes": size, "floor_us": round(max(size / BANDWIDTH, 2 * tokens * n * k / FLOPS), 2),
            **columns, "compiled_us": _cublas(tokens, n, k),
            "note": "compiled: cuBLAS, bf16 weights, product alone; µs of " + ", ".join(notes),
        })  # fmt: skip
        torch.cuda.empty_cache()
    return found


def sweep(tokens: int, n: int, k: int, run: Callable, table: dict, key: Any, tries: list) -> dict:
    """{configuration: µs} for the tables of shipped configurations."""
    found, old = {}, table[key]
    for config in tries:
        table[key] = config
        found[config] = timed(tokens, n, k, {"us": run}).get("us")
    table[key] = old
    return found
