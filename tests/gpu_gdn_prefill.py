"""Gated DeltaNet's prefill on a GPU: that it is right (`check`), and how fast (`rows`)."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch
from fuseweights.kernels import causal_conv1d as conv
from fuseweights.kernels import delta_chunks as delta
from gpu import error, microseconds, rotated
from torch import Tensor

OPS = torch.ops.fuseweights
BF16 = torch.bfloat16
BANDWIDTH = 4.3e6  # bytes a µs
#: Below one unit in float32's last place an error is the luck of one rounding.
ULP = 2.0**-23
#: Qwen3.5-35B-A3B: key heads, value heads, their width.
KEYS, VALUES, WIDTH = 16, 32, 128
CHANNELS = (2 * KEYS + VALUES) * WIDTH


def delta_inputs(
    batch: int, tokens: int, key_heads: int, heads: int, dk: int, dv: int, kind: torch.dtype,
    device: str = "cuda", alike: float = 0.0, decay: float = 0.3, state: bool = True,
) -> list[Any]:  # fmt: skip
    """q, k, v (views of one tensor), g, beta and the state. Keys are `alike` where they share a
    mean of that many standard deviations."""
    wide = torch.randn(batch, tokens, 2 * key_heads * dk + heads * dv, device=device)
    wide[..., : 2 * key_heads * dk] += alike
    q, k, v = wide.to(kind).split((key_heads * dk, key_heads * dk, heads * dv), -1)
    return [
        q.unflatten(-1, (key_heads, dk)),
        k.unflatten(-1, (key_heads, dk)),
        v.unflatten(-1, (heads, dv)),
        -torch.rand(batch, tokens, heads, device=device) * decay,
        torch.rand(batch, tokens, heads, device=device),
        torch.randn(batch, heads, dk, dv, device=device) if state else None,
    ]


def double(inputs: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in inputs]


def problem(name: str, ours: Any, plain: Any, exact: Any) -> list[str]:
    """Where our errors are not at most 1.1 × plain PyTorch's (or an ulp of float32)."""
    found = []
    for what, a, b, c in zip(("output", "state"), ours, plain, exact, strict=False):
        mine, theirs = (error(x, c) if c.numel() else 0.0 for x in (a, b))
        if not (mine <= max(1.1 * theirs, ULP) and a.shape == c.shape and a.dtype == b.dtype):
            found.append(f"{name}, {what}: {mine:.3g}, plain {theirs:.3g}, {a.dtype} {a.shape}")
    return found


def check() -> list[str]:
    """Every case on its own, a few at a time: most of the time is the compiler's."""
    torch.manual_seed(0)
    cases: list[Callable[[], list[str]]] = []
    for tokens, heads, kind, alike in itertools.chain(
        itertools.product((1, 2, 15, 63, 64, 65, 1000), ((16, 32),), (BF16,), (0.0, 2.0)),
        itertools.product((130,), ((2, 2), (2, 6), (2, 8), (1, 8)), (BF16,), (0.0,)),
        itertools.product((200,), ((4, 8),), (torch.float16, torch.float32), (0.0, 2.0)),
    ):
        cases.append(partial(_check_delta, tokens, heads, kind, alike))
    cases += [partial(_check_gates, dk, dv) for dk, dv in ((64, 128), (96, 40), (256, 128))]
    for kind, width, tokens in (
        (BF16, 4, (1, 2, 15, 64, 65, 1000)), (torch.float16, 2, (3, 63)), (torch.float32, 5, (63,)),
    ):  # fmt: skip
        cases.append(partial(_check_conv, kind, width, tokens))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda case: case(), cases))
    return sum(found, _check_graph())


def _check_delta(tokens: int, heads: tuple[int, int], kind: torch.dtype, alike: float) -> list[str]:
    found = []
    for tiled, decay in ((False, 0.3), (True, 0.01)):
        inputs = delta_inputs(2, tokens, *heads, 128, 128, kind, alike=alike, decay=decay)
        inputs += [tiled]
        name = f"delta T={tokens} heads={heads} {kind} alike={alike} {tiled=}"
        plain, exact = delta.reference(*inputs), delta.reference(*double(inputs))
        found += problem(name, delta.delta_chunks(*inputs), plain, exact)
    return found


def _check_gates(dk: int, dv: int) -> list[str]:
    """In_proj's a and b, other widths, no state."""
    inputs = delta_inputs(1, 300, 2, 4, dk, dv, BF16, state=False)
    inputs[3:5] = torch.randn(2, 1, 300, 4, device="cuda").bfloat16().unbind()
    inputs += [False, torch.randn(4, device="cuda"), torch.randn(4, device="cuda")]
    plain, exact = delta.reference(*inputs), delta.reference(*double(inputs))
    return problem(f"gates {dk=} {dv=}", delta.delta_chunks(*inputs), plain, exact)


def _check_conv(kind: torch.dtype, width: int, lengths: tuple[int, ...]) -> list[str]:
    found = []
    weight = torch.randn(800, width, device="cuda").to(kind)
    for tokens in lengths:
        name = f"conv T={tokens} W={width} {kind}"
        x = torch.randn(2, tokens, 1000, device="cuda").to(kind)[..., 8:808]
        for state in (None, torch.randn(2, 800, width, device="cuda").to(kind)):
            plain = conv.reference_prefill(x, weight, state)
            exact = conv.reference_prefill(*double([x, weight, state]))
            found += problem(name, conv.causal_conv1d_prefill(x, weight, state), plain, exact)
        padded = torch.randn(2, 800, tokens + width - 1, device="cuda").to(kind).mT
        plain, exact = (conv.reference(*t) for t in ((padded, weight), double([padded, weight])))
        found += problem(f"padded {name}", [conv.causal_conv1d(padded, weight)], [plain], [exact])
    return found


def core(mixed: Tensor, weight: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor):
    """Convolution and delta rule of a prompt's projections [B, T, CHANNELS], as the module calls
    them: three launches."""
    mixed, past = OPS.causal_conv1d_prefill(mixed, weight, None)
    q, k, v = split(mixed)
    return *OPS.delta_chunks(q, k, v, a, b, None, False, A_log, dt_bias), past


def split(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = mixed.split((KEYS * WIDTH, KEYS * WIDTH, VALUES * WIDTH), -1)
    return tuple(x.unflatten(-1, (-1, WIDTH)) for x in (q, k, v))


def core_inputs(tokens: int) -> list[Tensor]:
    projected = torch.randn(1, tokens, 12352, device="cuda").to(BF16)
    return [
        projected[..., :CHANNELS],
        torch.randn(CHANNELS, 4, device="cuda").to(BF16),
        projected[..., 12320:],
        projected[..., 12288:12320],
        torch.rand(VALUES, device="cuda").log(),
        torch.randn(VALUES, device="cuda"),
    ]


def _check_graph() -> list[str]:
    """A captured graph, torch.compile and no tokens at all."""
    found, inputs = [], core_inputs(130)
    expected = core(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = core(*inputs)
    for tensor in out:
        tensor.fill_(float("nan"))
    graph.replay()
    compiled = torch.compile(core, fullgraph=True)(*inputs)
    for name, got in {"graph": out, "compile": compiled}.items():
        if not all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)):
            found.append(f"{name} computes something else")
    empty = core(*core_inputs(0))
    if empty[0].shape != (1, 0, VALUES, WIDTH) or empty[1].abs().sum() != 0:
        found.append("T=0")
    if core(*(x[:0] if x.dim() == 3 else x for x in inputs))[1].shape[0]:
        found.append("B=0")
    return found


def slow(call: Callable[[], Any], times: int = 3) -> float:
    """µs of a call that takes milliseconds: a graph's replay where it can be captured."""
    call()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    except Exception as problem:
        print("timed without a graph:", str(problem)[:100], flush=True)
        torch.cuda.synchronize()
        run = call
    found = []
    run()
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return median(found)


def fla_chunks() -> Callable[..., Any]:
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q, k, v, g, beta, state, tiled=False):
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    return run


def transformers_chunks() -> Callable[..., Any]:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as models

    plain = inspect.unwrap(models.torch_chunk_gated_delta_rule)

    def run(q, k, v, g, beta, state, tiled=False):
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        return plain(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    return run


def _delta_row(tokens: int) -> dict[str, Any]:
    sets = rotated(
        lambda: delta_inputs(1, tokens, KEYS, VALUES, WIDTH, WIDTH, BF16), tokens * CHANNELS * 2
    )
    inputs = sets[0]
    exact = delta.reference(*double(inputs))
    moved = tokens * (CHANNELS * 2 + VALUES * (WIDTH * 4 + 8)) + 2 * VALUES * WIDTH**2 * 4
    row = {
        "kernel": "delta_chunks", "shape": f"T={tokens}, 16/32 heads of 128", "bytes": moved,
        "floor_us": moved / BANDWIDTH,
        "ours_us": microseconds(lambda x: delta.delta_chunks(*x), sets, 20, 5),
    }  # fmt: skip
    notes = [f"errors: ours {_errors(delta.delta_chunks(*inputs), exact)}"]
    for name, make in {"pytorch": lambda: delta.reference, "transformers": transformers_chunks,
                       "peer": fla_chunks}.items():  # fmt: skip
        try:
            run = make()
            notes.append(f"{name} {_errors(run(*inputs), exact)}")
            if name == "peer":
                row["peer"] = "fla-core 0.6.0 chunk_gated_delta_rule"
                row["peer_us"] = microseconds(lambda x, run=run: run(*x), sets, 20, 5)
            else:
                time = slow(lambda run=run: run(*inputs))
                row["pytorch_us"] = min(time, row.get("pytorch_us", time))
                notes.append(f"{time:.0f} µs")
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            torch.cuda.synchronize()
    return row | {"note": "; ".join(notes)}


def _errors(got: Any, exact: Any) -> str:
    return ", ".join(f"{error(x, y):.1e}" for x, y in zip(got, exact, strict=True))


def _conv_row(tokens: int) -> dict[str, Any]:
    sets = rotated(lambda: core_inputs(tokens)[:2], tokens * CHANNELS * 2)
    moved = tokens * CHANNELS * 4 + CHANNELS * 8
    copy = microseconds(lambda x: x[0].clone(memory_format=torch.contiguous_format), sets, 50, 5)

    def plain(x):
        return conv.reference_prefill(*x, None)

    return {
        "kernel": "causal_conv1d", "shape": f"T={tokens}, C={CHANNELS}, W=4", "bytes": moved,
        "floor_us": moved / BANDWIDTH,
        "ours_us": microseconds(lambda x: conv.causal_conv1d_prefill(*x), sets, 50, 5),
        "pytorch_us": microseconds(plain, sets, 10, 5),
        "compiled_us": microseconds(torch.compile(plain), sets, 20, 5),
        "note": f"a copy of x: {copy:.1f} µs",
    }  # fmt: skip


def _core_row(tokens: int) -> dict[str, Any]:
    sets = rotated(lambda: core_inputs(tokens), tokens * CHANNELS * 2)
    moved = tokens * (CHANNELS * 2 + VALUES * WIDTH * 4)

    def plain(mixed, weight, a, b, A_log, dt_bias):
        mixed, _ = conv.reference_prefill(mixed, weight, None)
        return delta.reference(*split(mixed), a, b, None, False, A_log, dt_bias)

    return {
        "kernel": "GDN prefill core", "shape": f"T={tokens}: convolution, gates, delta rule",
        "bytes": moved, "floor_us": moved / BANDWIDTH,
        "ours_us": microseconds(lambda x: core(*x), sets, 20, 5),
        "pytorch_us": slow(lambda: plain(*sets[0])),
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    found = []
    for make, tokens in (
        (_conv_row, 2048), (_delta_row, 2048), (_delta_row, 8192), (_core_row, 2048),
    ):  # fmt: skip
        found.append(make(tokens))
        torch.cuda.empty_cache()
    return found
