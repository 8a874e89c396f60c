"""Attention of a decoding step: few query tokens against a static key-value cache.

softmax(q Kᵀ · scale) V over the first `length` rows of a cache [B, Hkv, S, d]. `length` lives on
the device and the grid depends on S alone, so a CUDA graph is replayed as the sequence grows. A
program takes every `splits`-th block of one key head's keys and all the query heads that read it,
so K and V are read once (online softmax: Milakov & Gimelshein, 2018); a second kernel adds the
programs' parts by their log-sum-exp (Flash-Decoding, Dao et al., 2023).

One launch, whose last program to arrive adds the parts, was measured too: its fence and its
counter cost more than a second kernel that is already waiting (programmatic dependent launch).
The next kernel is called only after the wait for the previous one: earlier, its programs take
their places beside those that still run, and are spread unevenly.

Products take the inputs' dtype and accumulate in float32; the softmax is float32, and its weights
are rounded to the inputs' dtype for the product with V, as transformers' attention does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous
from .qkv_rope import check_device, power_of_2, prefetch

LOG2E = None if tl is None else tl.constexpr(1 / math.log(2))
MOST_TOKENS = 16
#: Programs over which the sequences are split, for an H200's 132 multiprocessors; the most of one.
PROGRAMS, MOST_SPLITS = 128, 64
#: Elements of the parts that a warp of a combining program holds.
COMBINED = 2048

#: Bytes of a row of K → keys a block, warps, stages of the loads; for up to 16 queries (the least
#: of the tensor cores), and for up to 64.
FEW = {128: (64, 4, 4), 256: (64, 4, 4), 512: (32, 4, 4), 1024: (16, 4, 3)}
MANY = {128: (128, 4, 3), 256: (64, 4, 3), 512: (32, 8, 3), 1024: (16, 8, 2)}


def reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain PyTorch, rounded where transformers' eager attention rounds."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, groups = q.shape[2], q.shape[1] // key_cache.shape[1]
    at = torch.arange(key_cache.shape[2], device=q.device)
    last = length.expand(q.shape[0])[:, None] - tokens + torch.arange(tokens, device=q.device)
    seen = at <= last[..., None]
    if window is not None:
        seen = seen & (at > last[..., None] - window)
    seen = seen[:, None]
    key, value = (t.repeat_interleave(groups, 1) for t in (key_cache, value_cache))
    # what lies behind the sequence's end may be anything, NaN too
    value = value.masked_fill(~(at < length.expand(q.shape[0])[:, None])[:, None, :, None], 0)
    logits = q @ key.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits.dtype)
        logits = torch.cat((logits, column), -1)
    weights = logits.to(wide).softmax(-1)[..., : at.numel()].to(q.dtype)
    weights = weights.masked_fill(~seen, 0)  # a query that sees nothing: 0, not NaN
    out = (weights @ value).transpose(1, 2)
    return (out if gate is None else out * torch.sigmoid(gate)).contiguous()


@jit
def _bounds(lengths, tokens, rows, WINDOW: tl.constexpr):
    """(the first key that any query sees, the first that none does) of one sequence."""
    length = tl.load(lengths, cache_modifier=".cg")  # not into L1, which could keep an older one
    length = tl.minimum(tl.maximum(length, 0), rows).to(tl.int32)
    return (tl.maximum(length - tokens + 1 - WINDOW, 0) if WINDOW else 0), length


@jit
def _capped(logits, softcap):
    """softcap · tanh(logits), by its power series where 1 − 2 / (1 + e^2x) would cancel."""
    square = logits * logits
    series = -17 / 315 + square * (62 / 2835)
    series = logits * (1 + square * (-1 / 3 + square * (2 / 15 + square * series)))
    tanh = 1 - 2 / (1 + tl.exp2(logits * (2 * LOG2E)))
    return softcap * tl.where(square < 0.09, series, tanh)


@jit
def _part_kernel(
    q, k, v, lengths, partial, lse, scale, softcap, tokens, rows, splits,
    length_batch, q_strides, k_strides, v_strides,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """softmax(q Kᵀ) V over every splits-th block of one key head's keys, for BLOCK_M of the queries
    that read it, into partial [B · Hkv, splits, queries, D] and lse (base 2), both float32; query
    token · GROUPS + head of the group. LINE: elements of 128 bytes."""
    queries = GROUPS * tokens
    split, m_blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(1) // m_blocks
    batch, kv = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row = tl.program_id(1) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    one, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    lengths += batch * length_batch
    k += batch * k_strides[0] + kv * k_strides[1]
    v += batch * v_strides[0] + kv * v_strides[1]
    q += batch * q_strides[0] + kv * GROUPS * q_strides[1]
    q += ((row % GROUPS) * q_strides[1] + (row // GROUPS) * q_strides[2])[:, None] + d
    mask = (row < queries)[:, None] & (d < D)

    if PDL:  # the length of a step ago names nearly the same keys, and prefetching changes nothing
        first, length = _bounds(lengths, tokens, rows, WINDOW)
        near = tl.minimum(first + split * BLOCK_N + one, rows - 1).to(tl.int64)[:, None]
        if first + split * BLOCK_N < length:
            line = tl.arange(0, BLOCK_D // LINE)[None, :] * LINE
            prefetch(k + near * k_strides[2] + line, PDL)
            prefetch(v + near * v_strides[2] + line, PDL)
    wait_for_previous(PDL)
    start_next(PDL)

    first, length = _bounds(lengths, tokens, rows, WINDOW)
    first += split * BLOCK_N
    if first >= length:
        return
    block_q = tl.load(q, mask, 0.0)
    last = length - tokens + row // GROUPS  # the last key that a query sees
    k += first.to(tl.int64) * k_strides[2]
    v += first.to(tl.int64) * v_strides[2]
    k_at, v_at = one[:, None] * k_strides[2] + d, one[:, None] * v_strides[2] + d
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, length, splits * BLOCK_N):
        key = start + one
        inside = (key < length)[:, None] & (d < D)  # beyond, anything may lie, NaN too
        block_k, block_v = tl.load(k + k_at, inside, 0.0), tl.load(v + v_at, inside, 0.0)
        k += splits * BLOCK_N * k_strides[2]
        v += splits * BLOCK_N * v_strides[2]
        logits = tl.dot(block_q, tl.trans(block_k), input_precision="ieee") * scale
        if softcap is not None:
            logits = _capped(logits, softcap)
        seen = key[None, :] <= last[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > last[:, None] - WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen no key yet
        weights, decay = tl.exp2(logits - base[:, None]), tl.exp2(most - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(block_v.dtype), block_v, acc, input_precision="ieee")
        most = new
    at = (pair.to(tl.int64) * splits + split) * queries + row
    tl.store(partial + at[:, None] * D + d, acc / tl.where(total == 0, 1.0, total)[:, None], mask)
    tl.store(lse + at, most + tl.log2(total), row < queries)


@jit
def _combine_kernel(
    lengths, out, sinks, gate, partial, lse, tokens, rows, splits, length_batch, gate_strides,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query head of one token: the sum of its parts, BLOCK at once, weighted with 2^lse; sink
    and gate."""
    queries = GROUPS * tokens
    pair, row = tl.program_id(0) // queries, tl.program_id(0) % queries
    batch, t = (pair // KV_HEADS).to(tl.int64), row // GROUPS
    head = pair % KV_HEADS * GROUPS + row % GROUPS
    one, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    lse += pair * splits * queries + row
    partial += (pair.to(tl.int64) * splits * queries + row) * D
    most, total, acc = float("-inf"), 0.0, tl.zeros([BLOCK_D], tl.float32)
    wait_for_previous(PDL)
    start_next(PDL)

    first, length = _bounds(lengths + batch * length_batch, tokens, rows, WINDOW)
    if gate is not None:
        gate += batch * gate_strides[0] + t * gate_strides[1] + head * gate_strides[2]
        gate = tl.load(gate + d, d < D, 0.0).to(tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + one
        # loaded before `length` has come: what was not written is ignored
        logs = tl.load(lse + split * queries, split < splits, 0.0)
        at = split[:, None] * (queries * D) + d[None, :]
        parts = tl.load(partial + at, (split < splits)[:, None] & (d < D)[None, :], 0.0)
        written = first + split * BLOCK_N < length
        logs = tl.where(written, logs, float("-inf"))
        new = tl.maximum(most, tl.max(logs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights, decay = tl.exp2(logs - base), tl.exp2(most - base)
        total = total * decay + tl.sum(weights, 0)
        parts = tl.where(written[:, None], parts, 0.0)
        acc = acc * decay + tl.sum(parts * weights[:, None], 0)
        most = new
    if sinks is not None:  # one more logit, whose value is 0
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - most)
    acc = acc / tl.where(total == 0, 1.0, total)
    if gate is not None:
        acc = acc * tl.sigmoid(gate)
    out += ((batch * tokens + t) * (KV_HEADS * GROUPS) + head) * D
    tl.store(out + d, acc.to(out.dtype.element_ty), d < D)


def _check_input(q, key_cache, value_cache, length, window, softcap, sinks, gate) -> None:
    check(q.dim() == 4, f"q: expected [B, H, T, d], found {list(q.shape)}")
    batch, heads, tokens, head_dim = q.shape
    check(
        q.dtype in (torch.bfloat16, torch.float16, torch.float32),
        f"q: expected bfloat16, float16 or float32, found {q.dtype}",
    )
    check(tokens <= MOST_TOKENS, f"q: expected at most {MOST_TOKENS} tokens, found {tokens}")
    check(head_dim <= 256, f"q: expected heads of at most 256, found {head_dim}")
    check(q.stride(-1) == 1, f"q: expected rows without gaps, found strides {q.stride()}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check(
            cache.dim() == 4
            and cache.shape == key_cache.shape
            and (cache.shape[0], cache.shape[3]) == (batch, head_dim)
            and cache.shape[1] > 0
            and heads % cache.shape[1] == 0
            and cache.stride(-1) == 1,
            f"{name}: expected [{batch}, a divisor of {heads}, S, {head_dim}], rows without gaps, "
            f"found {list(cache.shape)}",
        )
        check(cache.dtype == q.dtype, f"{name}: expected {q.dtype}, found {cache.dtype}")
    check(
        length.dtype == torch.int64 and list(length.shape) in ([], [1], [batch]),
        f"length: expected int64, one or [{batch}], found {length.dtype} {list(length.shape)}",
    )
    check(
        sinks is None or (list(sinks.shape) == [heads] and sinks.is_contiguous()),
        f"sinks: expected [{heads}], found {sinks is not None and list(sinks.shape)}",
    )
    expected = [batch, tokens, heads, head_dim]
    check(
        gate is None or (list(gate.shape) == expected and gate.stride(-1) == 1),
        f"gate: expected {expected}, found {gate is not None and list(gate.shape)}",
    )
    check(softcap is None or softcap > 0, f"softcap: expected more than 0, found {softcap}")
    check(window is None or window > 0, f"window: expected at least 1, found {window}")
    check_device(q, key_cache=key_cache, value_cache=value_cache, length=length)
    check_device(q, sinks=sinks, gate=gate)


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """softmax(q Kᵀ · scale) V, times sigmoid(gate) → [B, T, H, d], contiguous.

    q [B, H, T ≤ 16, d ≤ 256] bfloat16, float16 or float32; key_cache, value_cache [B, Hkv, S, d], H
    a multiple of Hkv; any strides but the last. `length` int64, [] or [B], on the device: how many
    rows of the cache are valid, the T queries' own (the last of them) included; nothing behind them
    has an effect, and query t sees the rows up to its own: at most `window` of them. A query that
    sees nothing is 0. `softcap` c: logits are c · tanh(logits / c). `sinks` [H]: one more logit a
    head that takes part in the softmax alone (gpt-oss). `gate` [B, T, H, d], any strides but the
    last.

    Raises KernelError for other shapes, dtypes or devices.
    """
    _check_input(q, key_cache, value_cache, length, window, softcap, sinks, gate)
    batch, heads, tokens, head_dim = q.shape
    kv_heads, rows = key_cache.shape[1:3]
    out = q.new_empty(batch, tokens, heads, head_dim)
    queries = heads // kv_heads * tokens
    block_d = power_of_2(head_dim)
    block_m = 16 if queries <= 16 else 64
    table = FEW if queries <= 16 else MANY
    block_n, warps, stages = table[max(128, block_d * q.element_size())]
    pairs = batch * kv_heads * -(-queries // block_m)
    keys = rows if window is None else min(rows, window + tokens - 1)
    splits = max(1, min(PROGRAMS // max(1, pairs), MOST_SPLITS, -(-keys // block_n)))
    partial = q.new_empty(batch * kv_heads * splits * queries * (head_dim + 1), dtype=torch.float32)
    lse = partial[batch * kv_heads * splits * queries * head_dim :]
    length_batch = length.stride(0) if length.dim() and length.numel() > 1 else 0
    shape = {
        "KV_HEADS": kv_heads,
        "GROUPS": heads // kv_heads,
        "D": head_dim,
        "WINDOW": window or 0,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }
    launch(
        _part_kernel,
        (splits, pairs),
        *(q, key_cache, value_cache, length, partial, lse),
        scale / (softcap or math.log(2)),
        None if softcap is None else softcap / math.log(2),
        *(tokens, rows, splits, length_batch),
        *(t.stride()[:3] for t in (q, key_cache, value_cache)),
        pdl=pdl(q),
        **shape,
        BLOCK_M=block_m,
        LINE=min(block_d, 128 // q.element_size()),
        num_warps=warps,
        num_stages=stages,
    )
    block = power_of_2(splits)
    launch(
        _combine_kernel,
        (batch * heads * tokens,),
        *(length, out, sinks, gate, partial, lse, tokens, rows, splits, length_batch),
        None if gate is None else gate.stride()[:3],
        pdl=pdl(q),
        **shape,
        BLOCK=min(block, 8 * COMBINED // block_d),
        num_warps=max(1, min(8, block * block_d // COMBINED)),
    )
    return out


def _fake(q: Tensor, *_) -> Tensor:
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads, head_dim)


register(
    "decode_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor length, float scale, "
    "int? window=None, float? softcap=None, Tensor? sinks=None, Tensor? gate=None) -> Tensor",
    cuda=decode_attention,
    cpu=reference,
    fake=_fake,
)
