"""Activations in 8 bits, as products with quantized weights read them.

FP8 (E4M3): q = x / scale with scale = amax / 448 of a group: 128 values of a token for block-scaled
weights (DeepSeek-V3 report, section 3.3), or the whole token. The last group may be shorter.

Q8_1: groups of 32 as in ggml (`quantize_row_q8_1_ref`): d = amax / 127, q = round(x / d), halves
away from zero, and s = d · Σq, which a weight's minimum is multiplied by. ggml keeps d and s in
float16 beside each 32 values; here they are float32 and planar: q int8 [M, K], d and s [M, K / 32].

Both multiply by 1 / scale, rounded once a group, so that GPU and reference agree bit for bit.
A group whose amax is under 1e-30 (the inverse would overflow) becomes zeros with scale 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import (
    INTERPRETED,
    check,
    jit,
    launch,
    pdl,
    register,
    start_next,
    tl,
    triton,
    wait_for_previous,
)

FP8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Rows wider than this do not fit into the registers of one program.
WIDEST = 32768

if tl is not None:
    _FP8_MAX = tl.constexpr(448.0)
    _INT8_MAX = tl.constexpr(127.0)
    _TINY = tl.constexpr(1e-30)
    _INTERPRETED = tl.constexpr(INTERPRETED)


def _grouped(x: Tensor, group: int) -> Tensor:
    return F.pad(x.float().contiguous(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _scale(groups: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The scale of every group, and what its values are multiplied by."""
    amax = groups.abs().amax(-1)
    # a tensor: on CUDA, torch divides by a number by multiplying with its rounded inverse
    scale = torch.where(amax < 1e-30, 0.0, amax / torch.full_like(amax, most))
    return scale, torch.where(scale == 0, 0.0, 1 / scale)[..., None]


def quantize_fp8_reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = _grouped(x, group or x.shape[-1])
    scale, inverse = _scale(groups, 448.0)
    return (groups * inverse).flatten(-2)[..., : x.shape[-1]].to(FP8), scale


def quantize_q8_1_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = _grouped(x, 32)
    d, inverse = _scale(groups, 127.0)
    # floor(|x| + 1/2) without adding, which could round a half up or become a fused multiply-add
    q = ((groups.abs() * (2 * inverse)).floor() + 1).div(2).floor().copysign(groups)
    return q.flatten(-2).to(torch.int8), d, d * q.sum(-1)


@jit
def to_fp8(x):
    """float32 to the nearest E4M3, ties to even. Triton's interpreter rounds wrongly, so there x is
    first brought to a multiple of its unit in the last place, 2^(exponent - 3), at least 2^-9."""
    if _INTERPRETED:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 · 2^20
        x = (x + shift) - shift
    return x.to(tl.float8e4nv)


@jit
def store_quantized(
    y, q, scale, sums, row, start, rows, width, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """Quantize a tile y [ROWS, BLOCK], float32 and zero outside the input, whose rows are `row`
    [ROWS, 1] and whose first column is `start`, into contiguous outputs: Q8_1 with `sums`, else
    FP8."""
    ROWS: tl.constexpr = y.shape[0]
    groups = tl.reshape(y, (ROWS, BLOCK // GROUP, GROUP))
    amax = tl.max(tl.abs(groups), 2)
    step = tl.where(amax < _TINY, 0.0, tl.div_rn(amax, _FP8_MAX if sums is None else _INT8_MAX))
    inverse = tl.where(step == 0.0, 0.0, tl.div_rn(1.0, tl.where(step == 0.0, 1.0, step)))
    count = tl.cdiv(width, GROUP)
    group = start // GROUP + tl.arange(0, BLOCK // GROUP)[None, :]
    inside = (row < rows) & (group < count)
    tl.store(scale + row * count + group, step, inside)
    if sums is None:
        rounded = to_fp8(groups * inverse[:, :, None])
    else:  # floor(|x| + 1/2), as in the reference
        size = ((tl.abs(groups) * (2 * inverse)[:, :, None]).to(tl.int32) + 1) >> 1
        rounded = tl.where(groups < 0, -size, size)
        tl.store(sums + row * count + group, step * tl.sum(rounded, 2).to(tl.float32), inside)
        rounded = rounded.to(tl.int8)
    column = start + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    tl.store(q + row * width + column, tl.reshape(rounded, (ROWS, BLOCK)), inside)


@jit
def row_starts(row, inner, outer_stride, inner_stride):
    """Offsets of rows numbered through two dimensions; nothing to divide where inner is 1."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@jit
def _quantize(
    x, q, scale, sums, rows, inner, outer_stride, inner_stride, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    wait_for_previous(PDL)
    at = row_starts(row, inner, outer_stride, inner_stride) + column
    y = tl.load(x + at, (row < rows) & (column < WIDTH), 0.0).to(tl.float32)
    store_quantized(y, q, scale, sums, row.to(tl.int64), start, rows, WIDTH, BLOCK, GROUP)


def strided_rows(*tensors: Tensor) -> tuple[int, int, list[tuple[int, int]]] | None:
    """How to walk the rows (last dimensions) of tensors of one shape together: (rows, inner,
    [(outer stride, inner stride), …]), row r being r // inner, r % inner. None where their leading
    dimensions do not merge into two."""
    dims: list[tuple[int, ...]] = []
    for size, *strides in zip(
        tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors), strict=True
    ):
        if dims and all(a == size * b for a, b in zip(dims[-1][1:], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, *strides)
        elif size != 1:
            dims.append((size, *strides))
    if len(dims) > 2:
        return None
    (outer, *first), (inner, *second) = (dims + [(1, *[0] * len(tensors))] * 2)[:2]
    return outer * inner, inner, list(zip(first, second, strict=True))


def check_rows(name: str, x: Tensor, device: torch.device) -> None:
    """`x` has rows that a kernel can read: floats, next to each other, on `device`."""
    check(x.device == device, f"{name}: expected on {device}, found on {x.device}")
    check(x.dtype in FLOATS, f"{name}: expected float32, float16 or bfloat16, found {x.dtype}")
    check(x.ndim >= 1, f"{name}: expected rows [..., K], found a scalar")


def check_groups(group: int | None, width: int) -> None:
    """`group` values a scale: 128, or 0 for a whole row, is FP8; None is Q8_1."""
    if group is None:
        check(width % 32 == 0, f"x: Q8_1 expects rows of a multiple of 32, found {width}")
    else:
        check(group in (0, 128), f"group: expected 128, or 0 for the whole row, found {group}")
    check(group != 0 or width <= WIDEST, f"x: at most {WIDEST} in a row, found {width}")


def quantized_like(x: Tensor, group: int | None) -> tuple[Tensor, ...]:
    """Empty outputs for x [..., K]: (q, scale) for FP8, (q, d, s) for Q8_1."""
    *rows, width = x.shape
    if group is None:
        d = x.new_empty(*rows, width // 32, dtype=torch.float32)
        return x.new_empty(x.shape, dtype=torch.int8), d, torch.empty_like(d)
    scale = x.new_empty(*rows, -(-width // (group or width)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8), scale


#: (values a program, warps) for a step of decoding, and for many rows.
CONFIGS = ((1024, 4), (2048, 4))
#: Programs of the smaller size from which on throughput counts, not the latency of one.
MANY = 2048


def launch_quantize(x: Tensor, group: int | None) -> tuple[Tensor, ...]:
    check_rows("x", x, x.device)
    width = x.shape[-1]
    check_groups(group, width)
    q, scale, *sums = out = quantized_like(x, group)
    if x.stride(-1) != 1 or strided_rows(x) is None:
        x = x.contiguous()
    rows, inner, ((outer_stride, inner_stride),) = strided_rows(x)
    few, many = CONFIGS
    values, warps = many if rows * width >= MANY * few[0] else few
    block = max(group or 32, triton.next_power_of_2(width))
    if group == 0:
        warps = max(warps, min(16, block // 512))
    else:
        block = min(block, values)
    tile = max(1, values // block)
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, block))
    launch(
        _quantize, grid, x, q, scale, *(sums or [None]), rows, inner, outer_stride, inner_stride,
        WIDTH=width, ROWS=tile, BLOCK=block, GROUP=block if group == 0 else group or 32, pdl=pdl(x),
        num_warps=warps,
    )  # fmt: skip
    return out


quantize_fp8 = register(
    "quantize_fp8(Tensor x, int group) -> (Tensor, Tensor)",
    cuda=launch_quantize,
    cpu=quantize_fp8_reference,
    fake=quantized_like,
)
quantize_q8_1 = register(
    "quantize_q8_1(Tensor x) -> (Tensor, Tensor, Tensor)",
    cuda=lambda x: launch_quantize(x, None),
    cpu=quantize_q8_1_reference,
    fake=lambda x: quantized_like(x, None),
)
