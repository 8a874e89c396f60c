"""The two kernels of the chunked gated delta rule (delta_chunks.py has the formulas).

`within` computes (I + A)⁻¹ and Q·Kᵀ ⊙ D of all chunks at once; `across` walks over the chunks of
one head with a block of the state's columns in registers, the next chunks on their way from memory.

Products are as exact as float32's, on fp16 tensor cores: a float32 number, scaled by a power of two
that brings it well inside fp16's range, is the sum of two fp16 ones to 24 bits, and three of their
four products are summed. A row of K or Q in bf16 or fp16, scaled likewise, is one fp16 row. With
β ≤ 2 and g ≤ 0 every step contracts the state, so no entry of (I + A)⁻¹ is above β: a fixed scale
does for it. What is below 2⁻³¹ of the largest number of its tile loses bits.
"""

from __future__ import annotations

import functools

from .launch import jit, start_next, tl, wait_for_previous

#: Compiled once for all numbers of tokens and heads.
COUNTS = {} if tl is None else {"do_not_specialize": ("T", "H", "R", "KEY_HEADS", "chunks")}


@jit
def _halves(x):
    """Two fp16 tensors whose sum is x. The second is not used where the first is exact."""
    first = x.to(tl.float16)
    return first, (x - first.to(tl.float32)).to(tl.float16)


@jit
def _power(largest):
    """The power of two that brings `largest` into [128, 256), and its reciprocal."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 30)
    power, reciprocal = (261 - exponent) << 23, (exponent - 7) << 23
    return power.to(tl.float32, bitcast=True), reciprocal.to(tl.float32, bitcast=True)


@jit
def _product(a, b, A: tl.constexpr):
    """a·b, a of A halves and b of two, the small products first."""
    total = tl.dot(a[0], b[1])
    if A > 1:
        total = tl.dot(a[1], b[0], total)
    return tl.dot(a[0], b[0], total)


@jit
def _square(a, b, N: tl.constexpr):
    return _product(a, b, 2) if N > 1 else tl.dot(a[0], b[0])


@jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@jit
def _exp_sum(coarse, fine):
    """exp(coarse + fine) for a coarse multiple of 2⁻¹⁰ and a small fine, as 2^whole · 2^part: the
    error is that of a part below 2, not of the whole exponent."""
    power = coarse * 1.4375  # exact; log2(e) = 1.4375 + 0.00519504…
    whole = tl.floor(power)
    part = (power - whole) + (coarse * 0.005195040888963407 + fine * 1.4426950408889634)
    return tl.exp2(whole) * tl.exp2(part)


@jit
def _softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(−|x|), as 2·artanh(e / (2 + e)): accurate for small e,
    where the sum would lose it and a state that decays slowly would notice."""
    e = _exp(-tl.abs(x))
    s = e / (2 + e)
    square, series = s * s, tl.zeros_like(s)
    for n in tl.static_range(17, 0, -2):
        series = series * square + 2 / n
    return tl.maximum(x, 0) + s * series


@jit
def _inverse(a):
    """(I + a)⁻¹ of a strictly lower triangular a [64, 64]: its four blocks on the diagonal by
    substitution, then two and two blocks together: [[X, 0], [Y, Z]]⁻¹ = [[X⁻¹, 0], [−Z⁻¹·Y·X⁻¹,
    Z⁻¹]]. Powers of a could overflow where keys are alike, substitution cannot."""
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    alike = i // 16 == j // 16
    blocks = tl.sum(tl.where(alike, a, 0).reshape(4, 16, 4, 16), 2)
    found = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(blocks)
    for n in tl.static_range(15):
        factor = tl.sum(tl.where(column == n, blocks, 0), 2)
        done = tl.sum(tl.where(row == n, found, 0), 1)
        found -= factor[:, :, None] * done[:, None, :]
    found = tl.broadcast_to(found[:, :, None, :], (4, 16, 4, 16)).reshape(64, 64)
    found = tl.where(alike, found, 0)
    for size in tl.static_range(16, 33, 16):  # 16 and 32
        under = (i // (2 * size) == j // (2 * size)) & (i // size > j // size)
        halves = _halves(found * 256)
        below = _product(_halves(tl.where(under, a * 256, 0)), halves, 2) * 2**-16
        found -= _product(halves, _halves(below * 256), 2) * 2**-16
    return found


@jit
def _store_halves(pointer, x):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    halves = _halves(x)
    tl.store(pointer + at, halves[0])
    tl.store(pointer + 4096 + at, halves[1])


@jit
def _unit(x, out, first, BK: tl.constexpr, N: tl.constexpr):
    """Rows x [64, BK] as fp16, each scaled by a power of two, and the factor that gives each length
    1 from there. The `first` program to need them stores them."""
    x = x.to(tl.float32)
    power, reciprocal = _power(tl.max(tl.abs(x), 1))
    halves = _halves(x * power[:, None])
    at = out + tl.arange(0, 64)[:, None] * BK + tl.arange(0, BK)[None, :]
    if first:
        tl.store(at, halves[0])
        if N > 1:
            tl.store(at + 64 * BK, halves[1])
    return halves, reciprocal * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@functools.partial(jit, **COUNTS)
def within(
    q, k, g, beta, A_log, dt_bias, unit, squares, rows, T, H, R, KEY_HEADS, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    DK: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: `unit` gets the chunk's K and Q in fp16 (once for a key head's value
    heads), `squares` the halves of 256·(I + A)⁻¹ and 256·(Q·Kᵀ ⊙ D), `rows` what `across`
    multiplies the chunk's rows by."""
    chunk, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    chunks = tl.num_programs(0)
    start, b, head = chunk.to(tl.int64) * 64, b.to(tl.int64), h // R % KEY_HEADS
    i, n = tl.arange(0, 64), tl.arange(0, BK)[None, :]
    row, column, inside = i[:, None], i[None, :], start + i < T
    mask = inside[:, None] & (n < DK)
    k += b * k_b + start * k_t + head * k_h
    q += b * q_b + start * q_t + head * q_h
    if GATED:
        rate = _exp(tl.load(A_log + h).to(tl.float32))
        bias = tl.load(dt_bias + h).to(tl.float32)
    wait_for_previous(PDL)
    g += b * g_b + start * g_t + h * g_h
    beta += b * beta_b + start * beta_t + h * beta_h
    g_rows = tl.load(g + i * g_t, mask=inside, other=0).to(tl.float32)
    weight = tl.load(beta + i * beta_t, mask=inside, other=0).to(tl.float32)
    k_rows = tl.load(k + row * k_t + n, mask=mask, other=0)
    first = (h % R == 0) & (h // R < KEY_HEADS)
    unit += ((b * KEY_HEADS + head) * chunks + chunk) * (2 * N * 64 * BK)
    k_halves, k_unit = _unit(k_rows, unit, first, BK, N)
    q_rows = tl.load(q + row * q_t + n, mask=mask, other=0)
    q_halves, q_unit = _unit(q_rows, unit + N * 64 * BK, first, BK, N)
    start_next(PDL)
    q_unit *= scale
    if GATED:
        g_rows = -rate * _softplus(g_rows + bias)
        g_rows = tl.where(inside, g_rows, 0)
        weight = tl.where(inside, 1 / (1 + _exp(-weight)), 0)
    coarse = tl.floor(g_rows * 1024) / 1024  # its sums and their differences are exact
    fine, coarse = tl.cumsum(g_rows - coarse, 0), tl.cumsum(coarse, 0)
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    between = _exp(tl.where(row >= column, between, 0)) * k_unit[None, :]
    last = tl.sum(tl.where(i == 63, coarse, 0), 0), tl.sum(tl.where(i == 63, fine, 0), 0)
    decay, left = _exp_sum(coarse, fine), _exp_sum(last[0] - coarse, last[1] - fine)

    at = (tl.program_id(1) * chunks + chunk).to(tl.int64)
    rows += at * 320 + i
    tl.store(rows, weight)
    tl.store(rows + 64, weight * decay * k_unit)
    tl.store(rows + 128, left * k_unit * 128)
    tl.store(rows + 192, decay * q_unit)
    tl.store(rows + 256, decay)
    turned = (tl.trans(k_halves[0]), tl.trans(k_halves[1]))
    scores = _square(q_halves, turned, N) * between * (q_unit * 256)[:, None]
    squares += at * 16384
    _store_halves(squares + 8192, tl.where(row >= column, scores, 0))
    system = _square(k_halves, turned, N) * between * (weight * k_unit)[:, None]
    _store_halves(squares, _inverse(tl.where(row > column, system, 0)) * 256)


@jit
def _load(descriptor, at, N: tl.constexpr):
    """64 rows' halves: the second's 64 rows are behind the first's."""
    first = descriptor.load([at, 0])
    second = first
    if N > 1:
        second = descriptor.load([at + 64, 0])
    return first, second


@functools.partial(jit, **COUNTS)
def across(
    unit, v, squares, rows, state, out, new_state, T, H, R, KEY_HEADS, chunks,
    v_b, v_t, v_h, state_b, state_h, state_k,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr,
    HAS_STATE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BV columns of one head's state, over all chunks. `state` may be `new_state`."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    i, n = tl.arange(0, 64), tl.arange(0, BK)
    block = tl.program_id(0) * BV
    m = block + tl.arange(0, BV)
    kept = (n < DK)[:, None] & (m < DV)[None, :]
    unit_row = (b * KEY_HEADS + h // R % KEY_HEADS) * chunks * (128 * N)
    square_row = tl.program_id(1) * chunks * 256
    rows += tl.program_id(1).to(tl.int64) * chunks * 320
    v += b.to(tl.int64) * v_b + h * v_h + m[None, :]
    columns = (m < DV)[None, :]
    wait_for_previous(PDL)
    if HAS_STATE:
        state += b.to(tl.int64) * state_b + h * state_h
        s = tl.load(state + n[:, None] * state_k + m[None, :], mask=kept, other=0).to(tl.float32)
    else:
        s = tl.zeros((BK, BV), tl.float32)
    beta, seen, weight = tl.load(rows + i), tl.load(rows + 64 + i), tl.load(rows + 128 + i)
    asked, last = tl.load(rows + 192 + i), tl.load(rows + 319)
    values = tl.load(v + i[:, None] * v_t, mask=columns & (i < T)[:, None], other=0)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        rows, v = rows + 320, v + 64 * v_t  # loads a chunk ahead
        inside = columns & (i < T - chunk * 64 - 64)[:, None]
        next_values = tl.load(v + i[:, None] * v_t, mask=inside, other=0)
        more = chunk + 1 < chunks
        next_beta, next_seen = tl.load(rows + i, mask=more), tl.load(rows + 64 + i, mask=more)
        next_weight = tl.load(rows + 128 + i, mask=more)
        next_asked, next_last = tl.load(rows + 192 + i, mask=more), tl.load(rows + 319, mask=more)

        k = _load(unit, unit_row, N)
        power, reciprocal = _power(tl.max(tl.abs(s)))
        s_halves = _halves(s * power)
        known = _product(k, s_halves, N)
        new = values.to(tl.float32) * beta[:, None] - known * (seen * reciprocal)[:, None]
        power, back = _power(tl.max(tl.abs(new)))
        new = _product(_load(squares, square_row, 2), _halves(new * power), 2) * 2**-8
        q = _load(unit, unit_row + 64 * N, N)
        o = _product(q, s_halves, N) * (asked * reciprocal)[:, None]
        scores = _load(squares, square_row + 128, 2)
        o += _product(scores, _halves(new), 2) * (back * 2**-8)
        out.store([b, h, chunk * 64, block], o.reshape(1, 1, 64, BV))
        turned = (tl.trans(k[0]), tl.trans(k[1]))
        added = _product(turned, _halves(new * weight[:, None]), N)
        s = s * last + added * (back * 2**-7)
        unit_row, square_row = unit_row + 128 * N, square_row + 256
        beta, seen, weight, asked, last = next_beta, next_seen, next_weight, next_asked, next_last
        values = next_values
    start_next(PDL)
    at = ((b.to(tl.int64) * H + h) * DK + n[:, None]) * DV + m[None, :]
    tl.store(new_state + at, s, mask=kept)
