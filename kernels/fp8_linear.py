"""y = x · Wᵀ with W in FP8 (E4M3) and its scales: dequantized where it is read, or W8A8.

weight [N, K] float8_e4m3fn with a scale for blocks, rows or all: fp8_weights.py.

fp8_linear: x in float16 or bfloat16, weights exact (E4M3 fits into either), products and sums in
float32, the scale on float32 partial sums of 128: closer to the exact product than dequantizing
into x's dtype, which rounds every weight. Up to MOST tokens it reads W once, from FP8; above that
it dequantizes into x's dtype and lets cuBLAS multiply: that rounding is then the reference's own.
`act` ("silu", "gelu_tanh", "gelu") makes it act(gate) · up, of rows n and n + N/2 of a stacked
weight, before anything is rounded. `bias` [N]; `residual` like the result is added to it.

fp8_linear_w8a8: x as quantize.quantize_fp8 or a norm's …_fp8 makes it, (q, scale), in groups of
128 or whole tokens. Both factors stay FP8, so the error is that of rounding x to three bits after
the first: ‖error‖ / ‖y‖ is 2.5e-2 for Gaussian x. Opt in: fp8_linear never does it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8_kernels import combine, matvec, product
from .fp8_weights import (
    FP8,
    check_weight,
    dequantize_cuda,
    dequantize_reference,
    scale_steps,
)
from .launch import check, launch, pdl, register, triton
from .quantize import FLOATS

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def _finished(y: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    if act is not None:
        gate, up = y.chunk(2, -1)
        tanh = "tanh" if act == "gelu_tanh" else "none"
        y = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate=tanh)) * up
    return y if residual is None else y + residual


def fp8_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, act: str | None = None,
) -> Tensor:  # fmt: skip
    y = F.linear(x, dequantize_reference(weight, scale, x.dtype), bias)
    return _finished(y, residual, act)


def w8a8_reference(
    q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    width, groups = q.shape[-1], q_scale.shape[-1]
    spread = q_scale.to(wide).repeat_interleave(128 if groups > 1 else width, -1)[..., :width]
    y = F.linear(q.to(wide) * spread, dequantize_reference(weight, scale, wide))
    return (y if bias is None else y + bias.to(wide)).to(dtype)


#: One token: (most rows, most columns) → (rows of a tile, columns at a time, warps), the first
#: that fits; and with an activation, in row pairs.
MATVEC = {
    (4096, 4096): (8, 2048, 8),
    (2**31, 4096): (8, 1024, 4),
    (2**31, 2**31): (4, 4096, 8),
}
MATVEC_GATED = (4, 2048, 4)
#: Most tokens of a tile → (weight rows, warps, stages, weight first).
PRODUCT = {
    16: (64, 4, 4, False),
    32: (64, 4, 3, True),
    64: (64, 4, 3, True),
    128: (64, 4, 3, True),
}
#: The same for W8A8.
PRODUCT_W8A8 = {
    16: (64, 4, 4, True),
    32: (64, 4, 4, True),
    64: (64, 4, 4, True),
    128: (128, 8, 4, False),
}
#: Beyond so many tokens, dequantizing and cuBLAS are faster.
MOST = 256
#: From so many tokens on, cuBLAS's own W8A8 is faster.
MANY = 128
#: `combine`: (outputs a program, warps).
COMBINE = (1024, 4)
#: Programs that fill the machine: narrower products are split along K.
FULL = 264


def _checked(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act: str | None
) -> None:
    check_weight(weight, scale)
    rows, columns = weight.shape
    check(x.ndim >= 1 and x.shape[-1] == columns, f"x: expected [..., {columns}] for the weight's "
          f"columns, found {list(x.shape)}")  # fmt: skip
    check(act is None or act in ACTIVATIONS, f"act: expected {ACTIVATIONS} or None, found {act}")
    check(act is None or rows % 2 == 0, f"weight: {rows} rows cannot be gate and up")
    if bias is not None:
        good = bias.shape == (rows,) and bias.is_contiguous() and bias.is_floating_point()
        check(good, f"bias: expected [{rows}], found {list(bias.shape)} {bias.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        check(t is None or t.device == x.device, f"{name}: expected on {x.device} as x")


def _config(tokens: int, rows: int, columns: int, table: dict) -> tuple[int, ...]:
    """(tokens of a tile, weight rows, columns of a split, splits, warps, stages, weight first)."""
    block = next((b for b in table if tokens <= b), max(table))
    tile, warps, stages, weight_first = table[block]
    programs = max(1, triton.cdiv(tokens, block) * triton.cdiv(rows, tile))
    steps = triton.cdiv(columns, 128)
    splits = min(max(1, FULL // programs), max(1, steps // 4))
    span = triton.cdiv(steps, splits)
    return block, tile, span * 128, triton.cdiv(steps, span), warps, stages, weight_first


def _multiply(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, out: Tensor, act: str | None,
) -> None:  # fmt: skip
    """out [M, width] from x [M, K] by `product`, and `combine` where K is split."""
    (tokens, width), (rows, columns) = out.shape, weight.shape
    table = PRODUCT if x_scale is None else PRODUCT_W8A8
    block, tile, span, splits, warps, stages, first = _config(tokens, rows, columns, table)
    scale_rows, *steps, blocked = scale_steps(weight, scale)
    split = splits > 1
    target = out.new_empty(splits, tokens, rows, dtype=torch.float32) if split else out
    launch(
        product, (triton.cdiv(tokens, block), triton.cdiv(rows, tile), splits),
        x, x_scale, weight, scale, None if split else bias, None if split else residual, target,
        tokens, width, x.stride(0), 0 if x_scale is None else x_scale.shape[-1], *steps,
        K=columns, SPAN=span, SCALE_ROWS=scale_rows, BLOCKED=blocked, ACT=act, SPLIT=split,
        WEIGHT_FIRST=first, BLOCK_M=block, BLOCK_N=tile if act is None else tile // 2, pdl=pdl(x),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split:
        _launch_combine(target, bias, residual, out, act)


def _launch_combine(
    parts: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, act: str | None
) -> None:
    (tokens, width), (block, warps) = out.shape, COMBINE
    launch(
        combine, (tokens, triton.cdiv(width, block)), parts, bias, residual, out, tokens, width,
        SPLITS=parts.shape[0], ACT=act, BLOCK_N=block, pdl=pdl(out), num_warps=warps,
    )  # fmt: skip


def _multiply_one(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, act: str | None,
) -> None:  # fmt: skip
    """out [1, width] from x [1, K] by `matvec`."""
    (_, width), (rows, columns) = out.shape, weight.shape
    tile, block, warps = MATVEC_GATED
    if act is None:
        tile, block, warps = next(c for (n, k), c in MATVEC.items() if rows <= n and columns <= k)
    scale_rows, *steps, _ = scale_steps(weight, scale)
    launch(
        matvec, (triton.cdiv(width, tile),), x, weight, scale, bias, residual, out, width,
        *steps, K=columns, SCALE_ROWS=scale_rows, ACT=act, BLOCK_N=tile, BLOCK_K=block,
        pdl=pdl(x), num_warps=warps,
    )  # fmt: skip


def fp8_linear_cuda(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, act: str | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] → [..., N], or [..., N/2] with `act`, in x's dtype. KernelError says which tensor
    has a shape, dtype, device or stride that is not taken."""
    check(x.dtype in (torch.float16, torch.bfloat16), f"x: expected float16 or bfloat16, found "
          f"{x.dtype}")  # fmt: skip
    _checked(x, weight, scale, bias, act)
    rows, columns = weight.shape
    shape = (*x.shape[:-1], rows if act is None else rows // 2)
    if residual is not None:
        good = (residual.shape, residual.dtype, residual.device) == (shape, x.dtype, x.device)
        check(good, f"residual: expected {list(shape)} {x.dtype}, found "
              f"{list(residual.shape)} {residual.dtype} on {residual.device}")  # fmt: skip
        residual = residual.contiguous()
    x = x.reshape(-1, columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] > MOST:
        y = F.linear(x, dequantize_cuda(weight, scale, x.dtype), bias).view(*shape[:-1], rows)
        if act is None:
            return y if residual is None else y + residual
        out = x.new_empty(shape)
        parts = y.view(1, -1, rows)
        _launch_combine(parts, None, residual, out.view(-1, shape[-1]), act)
        return out
    out = x.new_empty(shape)
    flat = out.view(-1, shape[-1])
    if x.shape[0] == 1:
        _multiply_one(x, weight, scale, bias, residual, flat, act)
    else:
        _multiply(x, None, weight, scale, bias, residual, flat, act)
    return out


def _cublas_multiplies(
    q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether cuBLAS (12.9 on, Hopper) has this product: 1 × 128 times 128 × 128 scales."""
    tokens, (rows, columns) = q.shape[0], weight.shape
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9)
        and tokens >= MANY
        and rows % 128 == columns % 128 == 0
        and q_scale.shape[1] == columns // 128 > 1
        and scale.shape == (rows // 128, columns // 128)
        and scale.dtype == torch.float32
        and dtype == torch.bfloat16
        and bias is None
    )


def _cublas_product(q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """It takes multiples of four tokens, and the activation's scales by columns."""
    tokens = q.shape[0]
    if tokens % 4:
        q = F.pad(q.view(torch.int8), (0, 0, 0, -tokens % 4)).view(FP8)
        q_scale = F.pad(q_scale, (0, 0, 0, -tokens % 4))
    by_column = q_scale.t().contiguous().t()
    y = torch._scaled_mm(q, weight.t(), by_column, scale.t(), out_dtype=torch.bfloat16)
    return y[:tokens]


def w8a8_cuda(
    q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """q [..., K] FP8, q_scale float32 [..., ⌈K/128⌉] or [..., 1] → [..., N] in `dtype`."""
    _checked(q, weight, scale, bias, None)
    rows, columns = weight.shape
    check(q.dtype == FP8, f"q: expected {FP8}, found {q.dtype}")
    good = q_scale.shape[:-1] == q.shape[:-1] and q_scale.shape[-1] in (1, -(-columns // 128))
    check(good and q_scale.dtype == torch.float32 and q_scale.device == q.device,
          f"q_scale: expected float32 [..., ⌈K / 128⌉] or [..., 1] as quantize_fp8 makes, found "
          f"{list(q_scale.shape)} {q_scale.dtype} on {q_scale.device}")  # fmt: skip
    check(dtype in FLOATS, f"dtype: expected float32, float16 or bfloat16, found {dtype}")
    shape = (*q.shape[:-1], rows)
    q = q.reshape(-1, columns).contiguous()
    scales = q_scale.reshape(-1, q_scale.shape[-1]).contiguous()
    if _cublas_multiplies(q, scales, weight, scale, bias, dtype):
        return _cublas_product(q, scales, weight, scale).view(shape)
    out = q.new_empty(shape, dtype=dtype)
    _multiply(q, scales, weight, scale, bias, None, out.view(-1, rows), None)
    return out


def _empty(x: Tensor, weight: Tensor, act: str | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (1 if act is None else 2), dtype=dtype)


fp8_linear = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
    "str? act=None) -> Tensor",
    cuda=fp8_linear_cuda,
    cpu=fp8_linear_reference,
    fake=lambda x, weight, scale, bias=None, residual=None, act=None: _empty(
        x, weight, act, x.dtype
    ),
)
fp8_linear_w8a8 = register(
    "fp8_linear_w8a8(Tensor q, Tensor q_scale, Tensor weight, Tensor scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    cuda=w8a8_cuda,
    cpu=w8a8_reference,
    fake=lambda q, q_scale, weight, scale, bias, dtype: _empty(q, weight, None, dtype),
)
