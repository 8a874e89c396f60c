"""Products of ggml blocks with up to 16 rows of activations a program, by tensor cores.

The integer sums of gguf_vector.py, 16 rows of W × 32 weights × 8 rows of x at a time
(mma.m16n8k32, PTX ISA, "Matrix Fragments for mma.m16n8k32"): four lanes share a row of W, each
with a quarter of every group. Warps share the blocks of a row and add up at the end. What binds is
the L1 cache, which x comes from again and again: so a program has several times 16 rows.

TRAITS is a Decoder's: groups, scales, minima, offset, halved, units.
"""
# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from .gguf_vector import finish
from .gguf_words import EMULATED, at_floats, at_words, dp4a, within
from .launch import jit, start_next, tl, wait_for_previous


@jit
def mma(a, b0, b1, WARPS: tl.constexpr):
    """16 × 32 times 32 × 8 signed bytes; a lane has the result's rows g and g + 8 in columns 2t and
    2t + 1, with g = lane / 4, t = lane % 4. Operands: see the PTX ISA; any order of the 32 does,
    if a and b have the same."""
    if EMULATED:
        out = ()
        for half in tl.static_range(2):
            total = tl.zeros((WARPS, 8, 8, 4), tl.int32)
            for part in tl.static_range(2):
                rows = tl.reshape(a[half + 2 * part], (WARPS, 8, 1, 4))
                columns = tl.reshape(b1 if part else b0, (WARPS, 1, 8, 4))
                total = dp4a(rows + (columns & 0), columns + (rows & 0), total)
            one, two = tl.split(tl.reshape(tl.sum(total, 3), (WARPS, 8, 4, 2)))
            out = out + (tl.reshape(one, (32 * WARPS,)), tl.reshape(two, (32 * WARPS,)))
        return out
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $10, $10, $10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r",
        [a[0], a[1], a[2], a[3], b0, b1, a[0] & 0],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@jit
def matrix_rows(
    w, first, N, g, span, t, LOAD: tl.constexpr, PLACES: tl.constexpr, ROW_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr, UNITS: tl.constexpr,
    HALVES: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Quarter t of SPAN blocks of HALVES · 8 rows, lane by lane g, g + 8, …; where GATED the second
    half of them is N behind the first."""
    ROWS: tl.constexpr = HALVES // (1 + GATED)
    raw = ()
    for i in tl.static_range(SPAN):
        _, block = within(span * SPAN + i, BLOCKS, STEP)
        for sub in tl.static_range(UNITS):
            for h in tl.static_range(HALVES):
                row = tl.minimum(first + g + 8 * (h % ROWS), N - 1) + h // ROWS * N
                row = w + row.to(tl.int64) * ROW_BYTES
                raw = raw + (LOAD(row, block, sub, t, PLACES, 2),)
    return raw


@jit
def fragment(x, unit, t, TRAITS: tl.constexpr):
    """The words of a row of x that meet quarter t of a unit."""
    GROUPS: tl.constexpr = TRAITS[0]
    at, words = x + unit * (32 * GROUPS), ()
    for i in tl.static_range(GROUPS):
        if TRAITS[4]:
            words = words + at_words(at + 32 * i + 4 * t, 1, 4)
            words = words + at_words(at + 32 * i + 4 * t + 16, 1, 4)
        else:
            words = words + at_words(at + 32 * i + 8 * t, 2, 8)
    return words


@jit
def matrix_unit(
    acc, weights, xq, xd, xs, t, HALVES: tl.constexpr, TRAITS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """acc + a unit's products: per half (8 rows) two columns. xd, xs: per column, per group."""
    GROUPS: tl.constexpr = TRAITS[0]
    new, total, least = (), (), ()
    zero = xd[0][0] * 0
    for _ in tl.static_range(2 * HALVES):
        total, least = total + (zero,), least + (zero,)
    for i in tl.static_range(GROUPS):
        b0, b1 = xq[2 * i], xq[2 * i + 1]
        dots, seconds, ones = (), (), ()
        if TRAITS[1] == 2 or TRAITS[2] == 2:  # lanes 0 and 1 have the first 16 of a group
            none = b0 & 0
            c0, c1 = tl.where(t < 2, none, b0), tl.where(t < 2, none, b1)
            b0, b1 = tl.where(t < 2, b0, none), tl.where(t < 2, b1, none)
        for h in tl.static_range(HALVES // 2):
            q, p = weights[2 * h][0], weights[2 * h + 1][0]
            a = (q[2 * i], p[2 * i], q[2 * i + 1], p[2 * i + 1])
            dots = dots + mma(a, b0, b1, WARPS)
            if TRAITS[1] == 2:
                seconds = seconds + mma(a, c0, c1, WARPS)
        if TRAITS[2] == 2:
            one = (b0 & 0) + 0x01010101
            one = (one, one, one, one)
            ones = mma(one, b0, b1, WARPS) + mma(one, c0, c1, WARPS)
        add, sub = (), ()
        for h in tl.static_range(HALVES):
            _, s, m, _, _ = weights[h]
            for c in tl.static_range(2):
                dot = dots[2 * h + c]
                if TRAITS[1] == 2:
                    dot = dot * s[2 * i] + seconds[2 * h + c] * s[2 * i + 1]
                elif TRAITS[1] == 1:
                    dot = dot * s[i]
                add = add + (total[2 * h + c] + xd[c][i] * dot.to(tl.float32),)
                low = least[2 * h + c]
                if TRAITS[2] == 2:
                    both = ones[c] * m[2 * i] + ones[4 + c] * m[2 * i + 1]
                    low += xd[c][i] * both.to(tl.float32)
                elif TRAITS[2] == 1:
                    low += xs[c][i] * m[i].to(tl.float32)
                elif TRAITS[3]:
                    low += xs[c][i]
                sub = sub + (low,)
        total, least = add, sub
    for h in tl.static_range(HALVES):
        for c in tl.static_range(2):
            y = total[2 * h + c] * weights[h][3]
            if TRAITS[3]:
                y -= least[2 * h + c] * weights[h][4]
            new = new + (acc[2 * h + c] + y,)
    return new


@jit
def over_warps(x, WARPS: tl.constexpr):
    """Sums of what the warps' equal lanes have."""
    return tl.sum(tl.reshape(x, (WARPS, 32)), 0)


@jit
def matrix_kernel(
    w, x, d, s, bias, residual, out, N, M, residual_stride,
    LOAD: tl.constexpr, UNPACK: tl.constexpr, PLACES: tl.constexpr, TRAITS: tl.constexpr,
    ROW_BYTES: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS (a multiple of 16) columns of out [M, N] for COLUMNS (a multiple of 8) of its rows.
    Warps share the blocks of the rows of W, SPAN at a time; AHEAD asks for the next ones
    while these are multiplied."""
    GATED: tl.constexpr = ACT is not None
    HALVES: tl.constexpr = ROWS // 8 * (1 + GATED)
    BLOCKS: tl.constexpr = K // (32 * TRAITS[0] * TRAITS[5])
    UNITS: tl.constexpr = TRAITS[5]
    STEPS: tl.constexpr = (BLOCKS + SPAN * WARPS - 1) // (SPAN * WARPS)
    column, first = tl.program_id(1) * COLUMNS, tl.program_id(0) * ROWS
    thread = tl.arange(0, 32 * WARPS)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4
    raw = matrix_rows(
        w, first, N, g, warp, t, LOAD, PLACES, ROW_BYTES, BLOCKS, SPAN * WARPS, SPAN, UNITS, HALVES,
        GATED,
    )  # fmt: skip
    wait_for_previous(PDL)
    start_next(PDL)
    acc = ()
    for _ in tl.static_range(COLUMNS // 8 * 2 * HALVES):
        acc = acc + (tl.zeros((32 * WARPS,), tl.float32),)
    for step in range(STEPS):
        span, next = warp + step * WARPS, raw
        after = warp + tl.minimum(step + 1, STEPS - 1) * WARPS
        if AHEAD:
            next = matrix_rows(
                w, first, N, g, after, t, LOAD, PLACES, ROW_BYTES, BLOCKS, SPAN * WARPS, SPAN,
                UNITS, HALVES, GATED,
            )  # fmt: skip
        for u in tl.static_range(SPAN * UNITS):
            unit = span * (SPAN * UNITS) + u
            inside, unit = within(unit, BLOCKS * UNITS, SPAN * WARPS * UNITS)
            weights, new = (), ()
            for h in tl.static_range(HALVES):
                weights = weights + (UNPACK(raw[u * HALVES + h], u % UNITS, t, 2),)
            for j in tl.static_range(COLUMNS // 8):
                row = tl.minimum(column + 8 * j + g, M - 1)
                xq, xd, xs = fragment(x + row.to(tl.int64) * K, unit, t, TRAITS), (), ()
                for c in tl.static_range(2):
                    row = tl.minimum(column + 8 * j + 2 * t + c, M - 1)
                    group = row * (K // 32) + unit * TRAITS[0]
                    xd = xd + (at_floats(d + group, inside, TRAITS[0]),)
                    if TRAITS[3] and TRAITS[2] < 2:
                        xs = xs + (at_floats(s + group, inside, TRAITS[0]),)
                part = acc[2 * HALVES * j : 2 * HALVES * (j + 1)]
                new = new + matrix_unit(part, weights, xq, xd, xs, t, HALVES, TRAITS, WARPS)
            acc = new
        if not AHEAD:
            next = matrix_rows(
                w, first, N, g, after, t, LOAD, PLACES, ROW_BYTES, BLOCKS, SPAN * WARPS, SPAN,
                UNITS, HALVES, GATED,
            )  # fmt: skip
        raw = next
    place = tl.arange(0, 32)
    for j in tl.static_range(COLUMNS // 8):
        for h in tl.static_range(ROWS // 8):
            for c in tl.static_range(2):
                y = over_warps(acc[2 * (HALVES * j + h) + c], WARPS)
                up = y
                if GATED:
                    up = over_warps(acc[2 * (HALVES * j + h + ROWS // 8) + c], WARPS)
                n, m = first + place // 4 + 8 * h, column + 8 * j + 2 * (place % 4) + c
                inside = (n < N) & (m < M)
                finish(y, up, bias, residual, out, n, N, m, inside, 0, residual_stride, ACT)
