"""y = x Wᵀ for the few rows of x that a decoding step has, as fast as the weights can be read.

W [N, K] is row-major, as checkpoints store it. Up to `SKINNY` rows of x share one read of W; above
that cuBLAS takes over. The epilogue adds a bias and a residual or, for gated_mlp.py, multiplies an
activation of the product with the first half of the rows of W by that with the second half.

Two kernels, chosen by shape from what an H200 measured (`config`):

`_rows`, multiply-add, for one row of x (two where gated, four of float32): a program holds whole
rows of W in registers, and asks for its next ones before it multiplies these.

`_tiles`, tensor cores, for the others: a program walks along K through a pipeline in shared memory,
BLOCK_N rows of W being the long operand and x, padded to 8 or 16 rows, the short one.

Both ask for weights before the previous kernel has ended, so that between two products the memory
never rests. So a weight must not be what the kernel just before, being one of this package, writes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous

#: Rows of x for which the kernels here read W; more go to cuBLAS.
SKINNY = 16

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rows(NamedTuple):
    """`_rows`: `split` of a program's `warps` share a row of W; each takes `groups` rows, one after
    the other. `programs` a multiprocessor loop over all rows; 0: a program for every few rows."""

    warps: int
    split: int
    groups: int = 1
    programs: int = 0


class Tiles(NamedTuple):
    """`_tiles`: tiles of W of block_n rows × block_k, `stages` of them in flight. `warps` have rows
    each or, where `split` is their number, a part of block_k each. x is padded to block_m."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    block_m: int = 16


# Kernels. N: columns of the result; r: some of them (rows of W); k: places along a tile's row.


@jit
def _sigmoid(x):
    """exp never overflows here, and 1 - q is rounded less than 1 / (1 + q)."""
    e = tl.exp(-tl.abs(x))
    q = e / (1 + e)
    return tl.where(x > 0, 1 - q, q)


@jit
def activation(x, ACT: tl.constexpr):
    """silu, gelu or gelu_tanh of float32 as torch.nn.functional defines them, with
    (1 + tanh(u)) / 2 = sigmoid(2u)."""
    if ACT == "silu":
        return x * _sigmoid(x)
    elif ACT == "gelu_tanh":
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@jit
def _load(at, k, K, wanted, EVEN_K: tl.constexpr, EVICT: tl.constexpr):
    """What is `wanted`, or anything; 0 past K, where BLOCK_K does not divide it."""
    if EVEN_K:
        return tl.load(at, mask=wanted, eviction_policy=EVICT)
    else:
        return tl.load(at, mask=(k < K) & wanted, other=0.0, eviction_policy=EVICT)


@jit
def _row_tiles(
    weight,
    up,
    stride,
    row,
    N,
    K,
    wanted,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """GROUPS × TILE_ROWS rows of W from `row` on, and as many of `up`, if any: CHUNKS tiles each,
    a tile being one load of 16 bytes a thread."""
    tiles = ()
    for half in tl.static_range(1 if up is None else 2):
        for g in tl.static_range(GROUPS):
            r = row + g * TILE_ROWS + tl.arange(0, TILE_ROWS)
            r = tl.minimum(r, N - 1).to(tl.int64)  # past the end: any row, it is not stored
            rows = ((weight if half == 0 else up) + r * stride)[:, None]
            for c in tl.static_range(CHUNKS):
                k = c * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
                tiles += (_load(rows + k, k, K, wanted, EVEN_K, "evict_first"),)
    return tiles


@jit
def _x_tiles(
    x,
    K,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A row of x, TILE_ROWS times: in the layout of W's tiles no thread needs another's x."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        k = tl.broadcast_to(c * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], [TILE_ROWS, BLOCK_K])
        tiles += (_load(x + k, k, K, True, EVEN_K, ""),)
    return tiles


@jit
def _product(w, first: tl.constexpr, x, x_first: tl.constexpr, CHUNKS: tl.constexpr):
    """Row sums of w[first] · x[x_first] + the next + …, CHUNKS of them, in float32."""
    total = w[first].to(tl.float32) * x[x_first].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        total += w[first + c].to(tl.float32) * x[x_first + c].to(tl.float32)
    return tl.sum(total, 1)


@jit
def _finish(y, up, bias, residual, out, r, N, residual_at, out_at, ACT: tl.constexpr):
    """The epilogue, rounded once, when it is stored."""
    mask = r < N
    if bias is not None:
        y += tl.load(bias + r, mask=mask).to(tl.float32)
    if ACT is not None:
        if bias is not None:
            up += tl.load(bias + N + r, mask=mask).to(tl.float32)
        y = activation(y, ACT) * up
    if residual is not None:
        y += tl.load(residual + residual_at, mask=mask).to(tl.float32)
    tl.store(out + out_at, y, mask=mask)


@jit
def _rows(
    x,
    weight,
    up,
    bias,
    residual,
    out,
    x_stride,
    weight_stride,
    residual_stride,
    N,
    K,
    M: tl.constexpr,
    ACT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    LOOP: tl.constexpr,
    PDL: tl.constexpr,
):
    step = tl.num_programs(0) * TILE_ROWS * GROUPS
    first = tl.program_id(0) * TILE_ROWS * GROUPS
    w = _row_tiles(
        *(weight, up, weight_stride, first, N, K, True),
        *(GROUPS, CHUNKS, TILE_ROWS, BLOCK_K, EVEN_K),
    )
    start_next(PDL)
    wait_for_previous(PDL)
    HELD: tl.constexpr = M <= 2  # x stays in registers while the program goes on to other rows
    if HELD:
        xs = ()
        for m in tl.static_range(M):
            xs += _x_tiles(x + m * x_stride, K, CHUNKS, TILE_ROWS, BLOCK_K, EVEN_K)
    for row in range(first, N, step):
        if LOOP:  # the next rows are under way while these are multiplied
            then = row + step
            ahead = _row_tiles(
                *(weight, up, weight_stride, then, N, K, then < N),
                *(GROUPS, CHUNKS, TILE_ROWS, BLOCK_K, EVEN_K),
            )
        for m in tl.static_range(M):
            if not HELD:
                xs = _x_tiles(x + m * x_stride, K, CHUNKS, TILE_ROWS, BLOCK_K, EVEN_K)
            for g in tl.static_range(GROUPS):
                r = row + g * TILE_ROWS + tl.arange(0, TILE_ROWS)
                y = _product(w, g * CHUNKS, xs, m * HELD * CHUNKS, CHUNKS)
                z = y
                if ACT is not None:
                    z = _product(w, (GROUPS + g) * CHUNKS, xs, m * HELD * CHUNKS, CHUNKS)
                _finish(y, z, bias, residual, out, r, N, m * residual_stride + r, m * N + r, ACT)
        if LOOP:
            w = ahead


@jit
def _to_l2(weight, stride, r, K, AHEAD: tl.constexpr):
    """Ask L2 for the first AHEAD columns of rows r, one line of 128 bytes after the other."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    k = tl.minimum(tl.arange(0, AHEAD // LINE) * LINE, K - 1)
    at = ((weight + r * stride)[:, None] + k[None, :]).to(tl.int64)
    ask: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(ask, "=r,l", [at], tl.int32, False, 1)


@jit
def _tiles(
    x,
    weight,
    up,
    bias,
    residual,
    out,
    x_stride,
    weight_stride,
    residual_stride,
    N,
    K,
    M,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(r, N - 1).to(tl.int64)  # past the end: any row, it is not stored
    if PDL:
        _to_l2(weight, weight_stride, inside, K, 4 * BLOCK_K)
        if ACT is not None:
            _to_l2(up, weight_stride, inside, K, 4 * BLOCK_K)
    start_next(PDL)
    wait_for_previous(PDL)
    PART: tl.constexpr = BLOCK_K // SPLIT
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, PART)
    if SPLIT == 1:
        rows, kw, kx, ms = inside[:, None], k[None, :], k[:, None], m[None, :]
        y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:  # a batch of products, one a warp
        part = (tl.arange(0, SPLIT) * PART)[:, None, None]
        rows, kw, kx = inside[None, :, None], part + k[None, None, :], part + k[None, :, None]
        ms = m[None, None, :]
        y = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.float32)
    z = y
    w_at, x_at = weight + rows * weight_stride + kw, x + ms * x_stride + kx
    if ACT is not None:
        up_at = up + rows * weight_stride + kw
    for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w = _load(w_at + at, at + kw, K, True, EVEN_K, "evict_first")
        # masked, not clamped to the last row: thousands of programs would ask L2 for one line
        columns = tl.load(x_at + at, mask=(ms < M) & (EVEN_K | (at + kx < K)), other=0.0)
        y = tl.dot(w, columns, y)
        if ACT is not None:
            w = _load(up_at + at, at + kw, K, True, EVEN_K, "evict_first")
            z = tl.dot(w, columns, z)
    if SPLIT > 1:
        y, z = tl.sum(y, 0), tl.sum(z, 0)
    r = tl.where(m[None, :] < M, r[:, None], N)  # what is not wanted is past the end
    m = tl.broadcast_to(m[None, :], r.shape)
    _finish(y, z, bias, residual, out, r, N, m * residual_stride + r, m * N + r, ACT)


# Launching


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H200's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_2(least: float) -> int:
    return 1 << max(0, math.ceil(least) - 1).bit_length()


def config(n: int, k: int, m: int, size: int, gated: bool) -> Rows | Tiles:
    """How to multiply m rows of x by weights [n, k] of `size` bytes (n counts gate and up): what an
    H200 was fastest with at the shapes of tests/gpu_gated_mlp.py."""
    if m == 1 or size == 4 or (m == 2 and gated):
        loads = k * size * (1 + gated) / 512  # of 16 bytes a lane, for one column of the result
        split = min(8, _power_of_2(loads / 8))
        if m > 1:
            return Rows(max(4, split), split, 1 if gated or loads > 8 * split else 2)
        if size == 2 and 8e6 < n * k * size < 250e6 and loads <= 8 * split:
            return Rows(8, split, programs=2)
        return Rows(8, min(8, _power_of_2(loads / 4)))
    if n * k * size > 250e6:
        return Tiles(64, 128, 4, 4)
    if n <= 2048:
        return Tiles(16, 512, 4, 4 if gated else 6, 4, 8 if m <= 8 else 16)
    if gated:
        return Tiles(32, 128, 2 if m <= 8 else 1, 4)
    if m <= 8 and k > 2048:
        return Tiles(16, 256, 4, 8, 4, 8) if n <= 4096 else Tiles(16, 256, 2, 6, 2, 8)
    if m <= 8:
        return Tiles(32, 128, 2, 8, 2, 8)
    if n <= 4096:
        return Tiles(32, 256, 2, 6)
    return Tiles(32, 256, 1, 4) if k > 2048 else Tiles(32, 128, 2, 6)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None = None,
    how: Rows | Tiles | None = None,
) -> Tensor:
    """x [M ≤ SKINNY, K] · weight [N or, with `act`, 2N, K] → [M, N]."""
    (m, k), size = x.shape, weight.element_size()
    n = weight.shape[0] // (1 if act is None else 2)
    out = x.new_empty(m, n)
    if not out.numel():
        return out
    how = how or config(weight.shape[0], k, m, size, act is not None)
    up = None if act is None else weight[n:]
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    given = (x, weight, up, bias, residual, out, *strides, n, k, m)
    meta = {"ACT": act, "num_warps": how.warps, "pdl": pdl(x)}
    if isinstance(how, Rows):
        tile, block_k = how.warps // how.split, how.split * 32 * (16 // size)
        grid = -(-n // (tile * how.groups))
        if how.programs:
            grid = min(grid, how.programs * _multiprocessors(x.device))
        meta |= {"TILE_ROWS": tile, "GROUPS": how.groups, "CHUNKS": -(-k // block_k)}
        kernel, meta["LOOP"] = _rows, how.programs > 0
    else:
        block_k, grid, kernel = how.block_k, -(-n // how.block_n), _tiles
        meta |= {"BLOCK_N": how.block_n, "BLOCK_M": how.block_m}
        meta |= {"STAGES": how.stages, "SPLIT": how.split, "num_stages": how.stages}
    launch(kernel, (grid,), *given, BLOCK_K=block_k, EVEN_K=k % block_k == 0, **meta)
    return out


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None = None) -> None:
    """What every product here asks of its operands; messages say what was found."""
    check(weight.dim() == 2, f"weight: expected [N, K], found shape {list(weight.shape)}")
    n, k = weight.shape
    check(x.dim() > 0 and x.shape[-1] == k, f"x: expected [..., {k}], found {list(x.shape)}")
    check(x.dtype == weight.dtype, f"x: expected weight's {weight.dtype}, found {x.dtype}")
    if bias is not None:
        check(bias.shape == (n,), f"bias: expected [{n}], found {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", other)):
        if tensor is not None:
            check(tensor.device == x.device, f"{name}: expected on {x.device}, not {tensor.device}")
            check(tensor.dtype == x.dtype, f"{name}: expected {x.dtype}, found {tensor.dtype}")


def _refuse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    refuse(x, weight, bias, residual)
    if residual is not None:
        shape = [*x.shape[:-1], weight.shape[0]]
        found = list(residual.shape)
        check(found == shape, f"residual: expected {shape}, found {found}")


def by_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels here are the ones for this product: few rows of x (of float32, which has
    no tensor cores, fewer), and rows of W that 16-byte loads can read and registers hold."""
    k, size = x.shape[-1], weight.element_size()
    few = 0 < x.numel() <= k * (SKINNY if size == 2 else 4)
    aligned = weight.stride(1) == 1 and weight.stride(0) * size % 16 == 0
    return few and aligned and k * size <= 1 << 16 and weight.dtype in DTYPES


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [M, K] with neighbours in a row next to each other."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    _refuse_linear(x, weight, bias, residual)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    _refuse_linear(x, weight, bias, residual)
    if not by_kernel(x, weight):
        return linear_reference(x, weight, bias, residual)
    residual = residual if residual is None else rows_of(residual)
    return matvec(rows_of(x), weight, bias, residual).view(*x.shape[:-1], -1)


def _linear_fake(x, weight, bias=None, residual=None):
    _refuse_linear(x, weight, bias, residual)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


#: skinny_linear(x [..., K], weight [N, K], bias [N] or None, residual [..., N] or None) → [..., N]:
#: residual + x·weightᵀ + bias, accumulated in float32, for any number of rows. Where the kernels
#: here compute it all of it is rounded once: the product's own rounding would be one error more.
skinny_linear = register(
    "skinny_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    cuda=linear_cuda,
    cpu=linear_reference,
    fake=_linear_fake,
)
