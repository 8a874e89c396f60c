"""FP8 weights (E4M3) and their scales: what a scale covers, and dequantizing.

weight [N, K] float8_e4m3fn; scale float32 or bfloat16, one for 128 × 128 ([⌈N/128⌉, ⌈K/128⌉],
DeepSeek's `weight_scale_inv`), for 1 × 128 ([N, ⌈K/128⌉]), for a row ([N] or [N, 1]) or for all
(one element). value = weight · scale, in float32, rounded once to the dtype asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import (
    KernelError,
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


def blocks(weight: Tensor, scale: Tensor) -> tuple[int, int]:
    """(rows, columns) of the weight that one scale covers; KernelError where they do not fit."""
    rows, columns = weight.shape
    if scale.numel() == 1:
        return max(rows, 1), max(columns, 1)
    shape = tuple(scale.shape) if scale.ndim == 2 else (*scale.shape, 1)
    for block in ((1, columns), (128, 128), (1, 128)):
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    found = f"found {list(scale.shape)} for a weight {list(weight.shape)}"
    raise KernelError(f"scale: expected one for 128 × 128, 1 × 128, a row or all, {found}")


def dequantize_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = blocks(weight, scale)
    wide = torch.promote_types(dtype, torch.float32)
    spread = scale.to(wide).reshape(-(-weight.shape[0] // rows), -1)
    spread = spread.repeat_interleave(rows, 0)[: weight.shape[0]]
    spread = spread.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return (weight.to(wide) * spread).to(dtype)


def check_weight(weight: Tensor, scale: Tensor) -> None:
    check(weight.dtype == FP8 and weight.ndim == 2, f"weight: expected [N, K] {FP8}, found "
          f"{list(weight.shape)} {weight.dtype}")  # fmt: skip
    check(weight.is_contiguous(), f"weight: expected contiguous rows, strides {weight.stride()}")
    check(weight.numel() > 0, f"weight: nothing in {list(weight.shape)}")
    kinds = (torch.float32, torch.bfloat16)
    check(scale.dtype in kinds, f"scale: expected float32 or bfloat16, found {scale.dtype}")
    check(scale.is_contiguous(), f"scale: expected contiguous, strides {scale.stride()}")
    check(scale.device == weight.device, f"scale: expected on {weight.device} as the weight")


def scale_steps(weight: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    """(rows of a scale, strides of scales along rows and columns, blocked along columns)."""
    rows, columns = blocks(weight, scale)
    blocked = columns == 128 and weight.shape[1] > 128
    per_row = -(-weight.shape[1] // columns)
    return rows, 0 if scale.numel() == 1 else per_row, int(blocked), blocked


@jit
def _dequantize(
    weight, scale, out, rows, scale_row, scale_column, K: tl.constexpr, SCALE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (row < rows) & (column < K)
    at = row.to(tl.int64) * K + column
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    # blocks of 128 columns: one scale for each 16 of them, as in matvec
    group = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K // 16)[None, :] * 16
    where = row // SCALE_ROWS * scale_row + group // 128 * scale_column
    s = tl.load(scale + where, (row < rows) & (group < K), 0.0).to(tl.float32)
    w = tl.reshape(w, (BLOCK_N, BLOCK_K // 16, 16)) * s[:, :, None]
    wait_for_previous(PDL)
    tl.store(out + at, tl.reshape(w, (BLOCK_N, BLOCK_K)), inside)


#: (rows of a tile, columns, warps).
CONFIG = (1, 2048, 4)


def dequantize_cuda(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_weight(weight, scale)
    rows, columns = weight.shape
    out = torch.empty_like(weight, dtype=dtype)
    scale_rows, *steps, _ = scale_steps(weight, scale)
    tile, block, warps = CONFIG
    launch(
        _dequantize, (triton.cdiv(rows, tile), triton.cdiv(columns, block)), weight, scale, out,
        rows, *steps, K=columns, SCALE_ROWS=scale_rows, BLOCK_N=tile, BLOCK_K=block,
        pdl=pdl(weight), num_warps=warps,
    )  # fmt: skip
    return out


dequantize_fp8 = register(
    "dequantize_fp8(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    cuda=dequantize_cuda,
    cpu=dequantize_reference,
    fake=lambda weight, scale, dtype: torch.empty_like(weight, dtype=dtype),
)
