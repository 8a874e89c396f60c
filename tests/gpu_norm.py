"""kernels/norm.py and quantize.py on a GPU: correctness, and the rows of the benchmark table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fuseweights.kernels import norm as norms
from fuseweights.kernels import quantize
from gpu import COLD, error, microseconds, rotated

op = torch.ops.fuseweights
EPS = 1e-6
BANDWIDTH = 4.3e6  # bytes a microsecond


def data(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, residual or gate, and a weight around one."""
    make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.float32)  # noqa: E731
    return [(make(*rows, width) * 3).to(dtype), make(*rows, width).to(dtype),
            (1 + make(width) / 4).to(dtype)]  # fmt: skip


def _worse(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """Than 1.1 × PyTorch's error; in float32, than four roundings (test_kernel_norm.py)."""
    if not exact.numel():
        return ours.shape != exact.shape
    found, most = error(ours, exact), max(1.1 * error(plain, exact), 4 * 2**-24)
    if not found <= most:
        print(f"error {found:.3e}, at most {most:.3e}")
    return not found <= most


def back(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantized values as float64. A sum in another order may move the last bit of a value, and
    that a whole group: so the quantized outputs of norms are compared by error, too."""
    width, groups = q.shape[-1], scale.shape[-1]
    size = {1: width, width // 32: 32}.get(groups, 128)
    return q.double() * scale.double().repeat_interleave(size, -1)[..., :width]


def _norm_problems(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> Iterator[str]:
    x, other, w = data(rows, width, dtype)
    wide = [t.double() for t in (x, other, w)]
    for norm in norms.CONVENTIONS if width == 4096 else ("gemma",):
        ours, plain = (f(x, w, EPS, norm) for f in (op.rms_norm, norms.rms_norm_reference))
        if _worse(ours, plain, norms.rms_norm_reference(wide[0], wide[2], EPS, norm)):
            yield f"rms_norm {norm}"
        (ours, total), (plain, sums) = (
            f(x, other, w, EPS, norm) for f in (op.add_rms_norm, norms.add_rms_norm_reference)
        )
        # against the exact norm of the rounded total: both read that one
        exact = norms.rms_norm_reference(sums.double(), wide[2], EPS, norm)
        if not torch.equal(total, sums) or _worse(ours, plain, exact):
            yield f"add_rms_norm {norm}"
        written = other.clone()
        if not torch.equal(op.add_rms_norm_(x, written, w, EPS, norm), ours):
            yield f"add_rms_norm_ {norm}"
        if not torch.equal(written, total):
            yield f"add_rms_norm_ {norm}: residual"
        for group in (128, 0):
            q, scale, sums = op.add_rms_norm_fp8(x, other, w, EPS, norm, group)
            expected = back(*quantize.quantize_fp8_reference(plain, group))
            if not torch.equal(sums, total) or _worse(back(q, scale), expected, exact):
                yield f"add_rms_norm_fp8 {norm} {group}"
        if width % 32 == 0:
            q, d, s, sums = op.add_rms_norm_q8_1(x, other, w, EPS, norm)
            expected = back(*quantize.quantize_q8_1_reference(plain)[:2])
            if not torch.equal(sums, total) or _worse(back(q, d), expected, exact):
                yield f"add_rms_norm_q8_1 {norm}"
            if not torch.equal(s, d * q.unflatten(-1, (-1, 32)).sum(-1)):
                yield f"add_rms_norm_q8_1 {norm}: s"
    if _worse(op.rms_norm(x, None, EPS, "late"), *(
        norms.rms_norm_reference(t, None, EPS, "late") for t in (x, wide[0])
    )):  # fmt: skip
        yield "rms_norm without a weight"
    given = (x, other, w, EPS)
    exact = norms.gated_rms_norm_reference(*wide, EPS)
    if _worse(op.gated_rms_norm(*given), norms.gated_rms_norm_reference(*given), exact):
        yield "gated_rms_norm"


def _quantize_problems(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> Iterator[str]:
    x = data(rows, width, dtype)[0]
    x[..., : min(width, 32)] = 0
    for group in (128, 0):
        found, expected = op.quantize_fp8(x, group), quantize.quantize_fp8_reference(x, group)
        if not all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True)):
            yield f"quantize_fp8 {group}"
    if width % 32 == 0:
        found, expected = op.quantize_q8_1(x), quantize.quantize_q8_1_reference(x)
        if not all(map(torch.equal, found, expected)):
            yield "quantize_q8_1"


def _strided_problems() -> Iterator[str]:
    qkv = torch.randn(5, 48 * 128, device="cuda", dtype=torch.bfloat16)
    heads = qkv.view(5, 48, 128)[:, 8:40]
    w = torch.rand(128, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(op.rms_norm(heads, w, EPS, "llama"),
                       op.rms_norm(heads.contiguous(), w, EPS, "llama")):  # fmt: skip
        yield "per head, out of a fused projection"
    wide = torch.randn(7, 3, 320, device="cuda", dtype=torch.bfloat16)
    x, residual = wide[:, 1, 32:288], wide.clone()[:, 2, :256]
    w = torch.rand(256, device="cuda", dtype=torch.bfloat16)
    y, total = op.add_rms_norm(x.contiguous(), residual.contiguous(), w, EPS, "gemma")
    if not torch.equal(op.add_rms_norm_(x, residual, w, EPS, "gemma"), y):
        yield "strided rows"
    if not torch.equal(residual, total):
        yield "strided rows: residual"


def _graph_problems() -> Iterator[str]:
    x, residual, w = data((3,), 4096, torch.bfloat16)
    step = lambda x, residual: op.add_rms_norm_q8_1(x, residual, w, EPS, "llama")  # noqa: E731
    expected = step(x, residual)
    if not all(map(torch.equal, torch.compile(step, fullgraph=True)(x, residual), expected)):
        yield "torch.compile"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x, residual)
    x.normal_()
    for t in found:
        t.view(torch.uint8).fill_(255)
    graph.replay()
    if not all(map(torch.equal, found, step(x, residual))):
        yield "CUDA graph"


def check() -> list[str]:
    torch.manual_seed(0)
    problems = []
    for dtype, rows, width in (
        *((torch.bfloat16, (m,), 4096) for m in (0, 1, 2, 15, 63, 64, 65, 1000)),
        *((torch.bfloat16, (3,), width) for width in (32, 64, 100, 320, 2048, 5120, 16384)),
        (torch.bfloat16, (2, 3, 8), 128),
        (torch.bfloat16, (600, 16), 128),
        (torch.bfloat16, (2048,), 2880),
        (torch.float16, (65,), 4096),
        (torch.float16, (700,), 16384),
        (torch.float32, (17,), 4096),
    ):
        for kind in (_norm_problems, _quantize_problems):
            problems += [f"{p}: {rows} {width} {dtype}" for p in kind(rows, width, dtype)]
    return [*problems, *_strided_problems(), *_graph_problems()]


def _kept(run: Callable[..., Any]) -> Callable[[dict], None]:
    """`run` on a set, its result kept with it: so that results, too, have memory of their own."""

    def call(given: dict) -> None:
        given["out"] = run(*given["in"])

    return call


def timed(make: Callable[[], list], bytes_each: int, runs: dict[str, Callable | None]) -> dict:
    """{column: µs} of every run on its own cold sets."""
    columns = {}
    for column, run in runs.items():
        if run is None:
            continue
        sets = rotated(lambda: {"in": make()}, bytes_each)
        columns[column] = round(microseconds(_kept(run), sets), 2)
        del sets
        torch.cuda.empty_cache()
    return columns


def _liger() -> Callable | None:
    try:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward as forward
    except Exception as problem:
        print(f"liger-kernel: {problem}")
        return None
    return lambda x, residual, w: forward(x, residual, w, EPS, 0.0, "llama")


def _flag_gems() -> Callable | None:
    try:
        from flag_gems.fused.fused_add_rms_norm import fused_add_rms_norm
    except Exception as problem:
        print(f"FlagGems: {problem}")
        return None
    return lambda x, residual, w: fused_add_rms_norm(x, residual, (x.shape[-1],), w, EPS)


def _row(kernel: str, shape: str, bytes_each: int, columns: dict, **more: Any) -> dict:
    floor = round(bytes_each / BANDWIDTH, 2)
    return dict(kernel=kernel, shape=shape, bytes=bytes_each, floor_us=floor, **columns, **more)


def rows() -> list[dict]:
    from importlib.metadata import version

    found = []
    plain = lambda x, r, w: norms.add_rms_norm_reference(x, r, w, EPS, "llama")  # noqa: E731
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    liger, gems = _liger(), _flag_gems()
    for m in (1, 16, 2048, 8192):
        columns = timed(lambda m=m: data((m,), 4096, torch.bfloat16), 8 * m * 4096, {
            "ours_us": lambda x, r, w: op.add_rms_norm(x, r, w, EPS, "llama"),
            "pytorch_us": plain, "compiled_us": compiled, "peer_us": liger, "gems": gems,
        })  # fmt: skip
        note = f"FlagGems fused_add_rms_norm {columns.pop('gems')} µs" if gems else ""
        found.append(_row("add_rms_norm", f"M={m} 4096 bf16", 8 * m * 4096, columns,
                          peer=f"liger-kernel {version('liger-kernel')}", note=note))  # fmt: skip
    for m in (1, 2048):
        columns = timed(lambda m=m: data((m,), 4096, torch.bfloat16), 7 * m * 4096, {
            "ours_us": lambda x, r, w: op.add_rms_norm_q8_1(x, r, w, EPS, "llama"),
            "pytorch_us": lambda x, r, w: quantize.quantize_q8_1_reference(plain(x, r, w)[0]),
        })  # fmt: skip
        found.append(_row("add_rms_norm_q8_1", f"M={m} 4096", 7 * m * 4096, columns))
        columns = timed(lambda m=m: data((m,), 4096, torch.bfloat16), 7 * m * 4096, {
            "ours_us": lambda x, r, w: op.add_rms_norm_fp8(x, r, w, EPS, "llama", 128),
            "pytorch_us": lambda x, r, w: quantize.quantize_fp8_reference(plain(x, r, w)[0], 128),
        })  # fmt: skip
        found.append(_row("add_rms_norm_fp8", f"M={m} 4096, groups", 7 * m * 4096, columns))
        columns = timed(lambda m=m: data((m, 32), 128, torch.bfloat16), 6 * m * 4096, {
            "ours_us": lambda x, g, w: op.gated_rms_norm(x, g, w, EPS),
            "pytorch_us": lambda x, g, w: norms.gated_rms_norm_reference(x, g, w, EPS),
        })  # fmt: skip
        found.append(_row("gated_rms_norm", f"M={m} 32 heads of 128", 6 * m * 4096, columns))
        columns = timed(lambda m=m: data((m,), 12288, torch.bfloat16), 3 * m * 12288, {
            "ours_us": lambda x, *_: op.quantize_q8_1(x),
            "pytorch_us": lambda x, *_: quantize.quantize_q8_1_reference(x),
        })  # fmt: skip
        found.append(_row("quantize_q8_1", f"M={m} 12288", 3 * m * 12288, columns))
    assert COLD  # the rotation's size
    return found
