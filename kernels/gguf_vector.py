"""Products of ggml blocks with one row of activations, or a few.

A lane takes units of a row of W (gguf_blocks.py), LANES units a chunk. Lanes share nothing but the
sum at the end, so one warp can be a program: it keeps its activations in registers, walks over
rows of W, and asks for the next row's words while it multiplies, for its first before the previous
kernel has ended. Signed bytes by dp4a: Σ d·s·dx·Σ(q·qx) − dmin·m·dx·Σqx, the integer sums exact;
or, EXACT, dequantized weights times x in float32.

TRAITS is a Decoder's: groups, scales, minima, offset, halved, units.
"""
# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from .gguf_dequantize import dequantized
from .gguf_words import at_floats, at_words, dp4a, split4, within
from .launch import jit, start_next, tl, wait_for_previous
from .linear import activation


@jit
def load_rows(
    w, first, N, index, LOAD: tl.constexpr, PLACES: tl.constexpr, ROW_BYTES: tl.constexpr,
    PER: tl.constexpr, ALL: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Stored words of rows first … first + ROWS − 1, and of those N behind them where GATED. ALL
    units are TOP experts' rows, one after the other, each lane reading its own expert's."""
    raw = ()
    for chunk in tl.static_range((ALL + LANES - 1) // LANES):
        _, unit = within(tl.arange(0, LANES) + chunk * LANES, ALL, LANES)
        base = w
        if TOP > 1:
            expert = tl.load(index + unit // (ALL // TOP)).to(tl.int64)
            base, unit = w + expert * N * ROW_BYTES, unit % (ALL // TOP)
        for r in tl.static_range(ROWS * (1 + GATED)):
            row = tl.minimum(first + r % ROWS, N - 1) + r // ROWS * N
            row = base + row.to(tl.int64) * ROW_BYTES
            raw = raw + (LOAD(row, unit // PER, unit % PER, 0, PLACES, 8),)
    return raw


@jit
def q8_1_units(
    x, d, s, first, M, K: tl.constexpr, ALL: tl.constexpr, TOP: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, TRAITS: tl.constexpr,
):  # fmt: skip
    """A lane's activations, chunk by chunk and column by column: words, d, and s where a minimum
    needs it. Units behind the last one count nothing."""
    found = ()
    for chunk in tl.static_range((ALL + LANES - 1) // LANES):
        inside, all = within(tl.arange(0, LANES) + chunk * LANES, ALL, LANES)
        group = all % (ALL // TOP) * TRAITS[0]
        for m in tl.static_range(COLUMNS):
            row = tl.minimum(first + m, M - 1)
            if TOP > 1:
                row = first * TOP + all // (ALL // TOP)
            q = at_words(x + (row.to(tl.int64) * K + group * 32), 8 * TRAITS[0], 16)
            at, sums = row * (K // 32) + group, ()
            if TRAITS[3] and TRAITS[2] < 2:
                sums = at_floats(s + at, inside, TRAITS[0])
            found = found + ((q, at_floats(d + at, inside, TRAITS[0]), sums),)
    return found


@jit
def q8_1_dot(weights, x, TRAITS: tl.constexpr):
    """Σ over a unit of weight · activation."""
    q, s, m, d, dmin = weights
    xq, xd, xs = x
    GROUPS: tl.constexpr = TRAITS[0]
    zero = xq[0] & 0
    total, least = zero.to(tl.float32), zero.to(tl.float32)
    for g in tl.static_range(GROUPS):
        dot, second = zero, zero
        for i in tl.static_range(8):
            if TRAITS[1] == 2 and i >= 4:
                second = dp4a(q[8 * g + i], xq[8 * g + i], second)
            else:
                dot = dp4a(q[8 * g + i], xq[8 * g + i], dot)
        if TRAITS[1] == 2:
            dot = dot * s[2 * g] + second * s[2 * g + 1]
        elif TRAITS[1] == 1:
            dot = dot * s[g]
        total += xd[g] * dot.to(tl.float32)
        if TRAITS[2] == 2:  # minima of 16 weights, sums of 32 activations: sum them here
            low, high = zero, zero
            for i in tl.static_range(4):
                low = dp4a(xq[8 * g + i], zero + 0x01010101, low)
                high = dp4a(xq[8 * g + 4 + i], zero + 0x01010101, high)
            least += xd[g] * (low * m[2 * g] + high * m[2 * g + 1]).to(tl.float32)
        elif TRAITS[2] == 1:
            least += xs[g] * m[g].to(tl.float32)
        elif TRAITS[3]:
            least += xs[g]
    total = total * d
    if TRAITS[3]:
        total -= least * dmin
    return total


@jit
def exact_dots(weights, x, row, unit, inside, stride, ROWS: tl.constexpr, TRAITS: tl.constexpr):
    """Σ over a unit of weights[r] · row `row` of x, in float32, for every r."""
    WORDS: tl.constexpr = 8 * TRAITS[0]
    at = x + (row.to(tl.int64) * stride + unit * (4 * WORDS))
    at = at[:, None] + tl.arange(0, 4)[None, :]
    total, sums = (), ()
    for _ in tl.static_range(4 * ROWS):  # one for each of a word's bytes: four short sums
        total = total + (tl.zeros(unit.shape, tl.float32),)
    for i in tl.static_range(WORDS):
        values = split4(tl.load(at + 4 * i, mask=inside[:, None], other=0.0).to(tl.float32))
        new = ()
        for r in tl.static_range(ROWS):
            w = dequantized(weights[r], i, TRAITS)
            for b in tl.static_range(4):
                new = new + (total[4 * r + b] + w[b] * values[b],)
        total = new
    for r in tl.static_range(ROWS):
        sums = sums + ((total[4 * r] + total[4 * r + 1]) + (total[4 * r + 2] + total[4 * r + 3]),)
    return sums


@jit
def tile_sums(
    raw, xs, x, x_stride, first, M, scores, UNPACK: tl.constexpr, TRAITS: tl.constexpr,
    ALL: tl.constexpr, TOP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums of COLUMNS rows of x, from `first` on, with each of a tile's ROWS."""
    acc = ()
    for _ in tl.static_range(COLUMNS * ROWS):
        acc = acc + (tl.zeros((LANES,), tl.float32),)
    for chunk in tl.static_range((ALL + LANES - 1) // LANES):
        inside, all = within(tl.arange(0, LANES) + chunk * LANES, ALL, LANES)
        unit, weights, new = all % (ALL // TOP), (), ()
        for r in tl.static_range(ROWS):
            weights = weights + (UNPACK(raw[chunk * ROWS + r], unit % TRAITS[5], 0, 8),)
        for m in tl.static_range(COLUMNS):
            row, factor = tl.minimum(first + m, M - 1), 1.0
            if TOP > 1:
                row = first * TOP + all // (ALL // TOP)
                factor = tl.load(scores + row).to(tl.float32)
            sums = ()
            if EXACT:
                sums = exact_dots(weights, x, row, unit, inside, x_stride, ROWS, TRAITS)
            else:
                for r in tl.static_range(ROWS):
                    sums = sums + (q8_1_dot(weights[r], xs[chunk * COLUMNS + m], TRAITS),)
            for r in tl.static_range(ROWS):
                new = new + (acc[m * ROWS + r] + sums[r] * factor,)
        acc = new
    result = ()
    for i in tl.static_range(COLUMNS * ROWS):
        result = result + (tl.sum(acc[i], 0),)
    return result


@jit
def finish(y, up, bias, residual, out, n, N, m, inside, expert, residual_stride, ACT: tl.constexpr):
    """The epilogue, rounded once: + bias, act(gate) · up, + residual."""
    GATED: tl.constexpr = ACT is not None
    if bias is not None:
        bias += expert * N * (1 + GATED) + n
        y += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        if bias is not None:
            up += tl.load(bias + N, mask=inside, other=0.0).to(tl.float32)
        y = activation(y, ACT) * up
    if residual is not None:
        y += tl.load(residual + m * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, y, mask=inside)


@jit
def vector_kernel(
    w, x, d, s, bias, residual, index, scores, out, N, M, x_stride, residual_stride,
    LOAD: tl.constexpr, UNPACK: tl.constexpr, PLACES: tl.constexpr, TRAITS: tl.constexpr,
    ROW_BYTES: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr, ACT: tl.constexpr,
    SLOTS: tl.constexpr, TOP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS columns of out [M, N], `LOOP` programs' stride apart, for COLUMNS of its rows.

    SLOTS: w is [experts, N or 2N, bytes], and `index` [tokens, SLOTS] says which to use. TOP = 1:
    each pair of a token and a slot has a row of out, and the token's row of x. TOP = SLOTS: each
    pair has a row of x, and a token's products are summed, times `scores`."""
    ALL: tl.constexpr = K // (32 * TRAITS[0]) * TOP
    GATED: tl.constexpr = ACT is not None
    column = tl.program_id(1) * COLUMNS
    start = tl.program_id(0) * ROWS
    x_row, expert, picked, step = column, 0, index, tl.num_programs(0) * ROWS
    if SLOTS > 0 and TOP == 1:
        wait_for_previous(PDL)  # which may be choosing experts
        expert = tl.load(index + column).to(tl.int32)
        w += expert.to(tl.int64) * N * (1 + GATED) * ROW_BYTES
        x_row = column // SLOTS
    elif TOP > 1:
        picked = index + column * TOP
    raw = load_rows(
        w, start, N, picked, LOAD, PLACES, ROW_BYTES, TRAITS[5], ALL, TOP, ROWS, GATED, LANES,
    )  # fmt: skip
    if SLOTS == 0 or TOP > 1:
        wait_for_previous(PDL)
    start_next(PDL)
    xs = ()
    if not EXACT:
        xs = q8_1_units(x, d, s, x_row, M, K, ALL, TOP, COLUMNS, LANES, TRAITS)
    for first in range(start, N if LOOP else start + 1, step):
        ahead = raw
        if LOOP:  # at the end the last row, which is in the cache by then
            ahead = load_rows(
                w, first + step, N, picked, LOAD, PLACES, ROW_BYTES, TRAITS[5], ALL, TOP, ROWS,
                GATED, LANES,
            )  # fmt: skip
        sums = tile_sums(
            raw, xs, x, x_stride, x_row, M, scores, UNPACK, TRAITS, ALL, TOP, COLUMNS,
            ROWS * (1 + GATED), LANES, EXACT,
        )  # fmt: skip
        for m in tl.static_range(COLUMNS):
            for r in tl.static_range(ROWS):
                y = sums[m * ROWS * (1 + GATED) + r]
                up = sums[m * ROWS * (1 + GATED) + ROWS * GATED + r]
                inside = (first + r < N) & (column + m < M)
                finish(
                    y, up, bias, residual, out, first + r, N, column + m, inside, expert,
                    residual_stride, ACT,
                )  # fmt: skip
        raw = ahead
