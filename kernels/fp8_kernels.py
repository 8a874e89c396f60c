"""Triton kernels of fp8_linear.py: one token, some tokens, and adding the parts of a split K.

A weight tile's rows are rows of W, in pairs n, n + N/2 where an activation wants gate and up.
"""

from __future__ import annotations

from .launch import jit, start_next, tl, wait_for_previous


@jit
def _activated(gate, up, ACT: tl.constexpr):
    if ACT == "silu":
        y = gate * tl.sigmoid(gate)
    elif ACT == "gelu_tanh":  # 1 + tanh(z) = 2 · sigmoid(2 z)
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        y = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    return y * up


@jit
def _finish(
    y, bias, residual, out, m, row, tile, tokens, width, BLOCK_N: tl.constexpr, ACT: tl.constexpr
):
    """y [BLOCK_M, rows] of tokens m [BLOCK_M, 1] and weight rows `row` (gate and up in turn where
    ACT) becomes the output tile [BLOCK_M, BLOCK_N]."""
    if bias is not None:
        y += tl.load(bias + row).to(tl.float32)[None, :]
    if ACT is not None:
        gate, up = tl.split(tl.reshape(y, (y.shape[0], BLOCK_N, 2)))
        y = _activated(gate, up, ACT)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    _store(y, residual, out, m.to(tl.int64) * width + n, (m < tokens) & (n < width))


@jit
def _store(y, residual, out, at, inside):
    if residual is not None:
        y += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, y, inside)


@jit
def _rows(tile, width, BLOCK_N: tl.constexpr, ACT: tl.constexpr):
    """Weight rows of an output tile; beyond the last, the last again."""
    PAIR: tl.constexpr = 1 if ACT is None else 2
    lane = tl.arange(0, PAIR * BLOCK_N)
    return tl.minimum(tile * BLOCK_N + lane // PAIR, width - 1) + lane % PAIR * width


@jit
def matvec(
    x, weight, scale, bias, residual, out, width, scale_row, scale_column,
    K: tl.constexpr, SCALE_ROWS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token. A thread multiplies 16 weights of one row, which one scale covers, at a time; the
    next tile is asked for before this one is used, and the first before the previous kernel ends.
    """
    start_next(PDL)
    row = _rows(tl.program_id(0), width, BLOCK_N, ACT)
    LANES: tl.constexpr = BLOCK_K // 16
    column = tl.arange(0, BLOCK_K)
    group = tl.arange(0, LANES) * 16
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    scale += (row // SCALE_ROWS)[:, None] * scale_row
    w = tl.load(at, (column < K)[None, :], 0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    total = tl.zeros((row.shape[0], LANES), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        at_scale = scale + ((k + group) // 128)[None, :] * scale_column
        s = tl.load(at_scale, (k + group < K)[None, :], 0.0)
        v = tl.load(x + k + column, k + column < K, 0.0).to(tl.float32)
        products = w.to(tl.float32) * v[None, :]
        total += tl.sum(tl.reshape(products, (row.shape[0], LANES, 16)), 2) * s.to(tl.float32)
        if k + BLOCK_K < K:
            inside = (k + BLOCK_K + column < K)[None, :]
            w = tl.load(at + k + BLOCK_K, inside, 0.0, eviction_policy="evict_first")
    y = tl.sum(total, 1)[None, :]
    m = tl.zeros((1, 1), tl.int32)
    _finish(y, bias, residual, out, m, row, tl.program_id(0), 1, width, BLOCK_N, ACT)


@jit
def product(
    x, x_scale, weight, scale, bias, residual, out, tokens, width, x_stride, x_groups,
    scale_row, scale_column, K: tl.constexpr, SPAN: tl.constexpr, SCALE_ROWS: tl.constexpr,
    BLOCKED: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x · Wᵀ of a tile of tokens and weight rows over SPAN columns, 128 at a time. W8A8 where there
    is an `x_scale`. With SPLIT `out` [splits, tokens, N] gets float32 parts for `combine`.

    WEIGHT_FIRST computes (W · xᵀ)ᵀ: the weights, converted in registers, are then wgmma's left
    factor, which may stay there; on the right they would go through shared memory once more."""
    row = _rows(tl.program_id(1), width, BLOCK_N, ACT)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = m < tokens
    first = tl.program_id(2) * SPAN
    column = tl.arange(0, 128)
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    x += m.to(tl.int64)[:, None] * x_stride + column[None, :]
    scale += row // SCALE_ROWS * scale_row
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK_M, row.shape[0]), tl.float32)
    for k in range(first, min(first + SPAN, K), 128):
        # no token is read twice to fill the tile: all programs would ask for that one at once
        if K % 128 == 0:
            w, v = tl.load(at + k), tl.load(x + k, known[:, None], 0.0)
        else:
            inside = (k + column < K)[None, :]
            w, v = tl.load(at + k, inside, 0.0), tl.load(x + k, known[:, None] & inside, 0.0)
        if x_scale is None:  # through float32: two fast conversions for a slow one
            w = w.to(tl.float32).to(v.dtype)
        part = tl.trans(tl.dot(w, tl.trans(v))) if WEIGHT_FIRST else tl.dot(v, tl.trans(w))
        if BLOCKED:
            part *= tl.load(scale + k // 128 * scale_column).to(tl.float32)[None, :]
        if x_scale is not None and x_groups > 1:
            part *= tl.load(x_scale + m * x_groups + k // 128, known, 0.0)[:, None]
        total += part
    # not before: these programs fill the machine once, and those of a next kernel that already sat
    # beside some of them would leave it unbalanced (30 µs became 41)
    start_next(PDL)
    if not BLOCKED:
        total *= tl.load(scale).to(tl.float32)[None, :]
    if x_scale is not None and x_groups == 1:
        total *= tl.load(x_scale + m, known, 0.0)[:, None]
    if SPLIT:
        count = width if ACT is None else 2 * width
        at = (tl.program_id(2).to(tl.int64) * tokens + m)[:, None] * count + row[None, :]
        tl.store(out + at, total, known[:, None])
    else:
        tile = tl.program_id(1)
        _finish(total, bias, residual, out, m[:, None], row, tile, tokens, width, BLOCK_N, ACT)


@jit
def _summed(parts, bias, m, n, inside, tokens, count, SPLITS: tl.constexpr):
    y = tl.zeros(n.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        row = tl.cast(split * tokens + m, tl.int64)
        y += tl.load(parts + row * count + n, inside, 0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + n, inside, 0.0).to(tl.float32)
    return y


@jit
def combine(
    parts, bias, residual, out, tokens, width, SPLITS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's output from parts [SPLITS, tokens, N], gate and up each in one piece."""
    start_next(PDL)
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    count = width if ACT is None else 2 * width
    wait_for_previous(PDL)
    y = _summed(parts, bias, m, n, inside, tokens, count, SPLITS)
    if ACT is not None:
        y = _activated(y, _summed(parts, bias, m, width + n, inside, tokens, count, SPLITS), ACT)
    _store(y, residual, out, m.to(tl.int64) * width + n, inside)
