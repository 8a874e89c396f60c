"""Mixture of experts: the routed experts, a shared one with them, and the whole block.

`gate_up` [E, 2I, H] holds an expert's gate rows, then its up rows; `down` is [E, H, I]. No copy of
them is made: a program reads rows n and n + I of `gate_up` and multiplies act(gate) · up before it
stores. Products and sums are float32; what is rounded to x's dtype is that product (`hidden`), and
the sum over a token's experts.

Few tokens (this file): two launches of matrix-vector products,

    hidden[t, s] = act(gate_up[e, :I] x[t]) · (gate_up[e, I:] x[t])      e = index[t, s]
    out[t] = Σ_s score[t, s] · down[e] hidden[t, s]

with the shared expert as one more slot. The whole block needs one more launch, the router's
logits: both kernels pick the experts from those themselves. Many tokens: moe_grouped.py.

The second kernel loads its weights while the first still runs. It may read `index`, `scores` or
logits before it waits, because every program of the first waits for all earlier kernels before it
lets the second start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, wait_for_previous
from .moe_grouped import ACTIVATIONS, activate, grouped_experts
from .router import best, check_router, nth_best, power_of_two, router, router_logits
from .router import reference as router_reference

#: Tokens up to which matrix-vector products are used. On an H200 (256 experts, top 8, 2048 → 512)
#: four tokens of random experts take 52 µs so and 61 µs grouped, eight 96 and 94; but these read
#: an expert's weights again for each of its tokens: four alike take 39 and 23.
FEW_TOKENS = 4
#: Row pairs of an expert and elements of a row that a program of the first product holds, and its
#: warps: one, so that picking the expert needs no barrier.
GATE_UP = {"ROWS": 2, "BLOCK": 512, "num_warps": 1}
#: Elements of a token's output, elements of every chosen expert's row for them, and warps.
DOWN = {"ROWS": 4, "BLOCK": 256, "num_warps": 4}


def _activation(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def reference(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: str = "silu",
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_score: Tensor | None = None,
) -> Tensor:
    """`experts` in plain PyTorch, an expert at a time, rounded where transformers rounds."""
    tokens, k = index.shape
    parts = x.new_zeros(tokens * k, down.shape[1])
    flat = index.flatten()
    for expert in flat.unique().tolist():
        (pairs,) = torch.where(flat == expert)
        hidden = _activation(*F.linear(x[pairs // k], gate_up[expert]).chunk(2, -1), act)
        parts[pairs] = F.linear(hidden, down[expert])
    out = (parts.view(tokens, k, down.shape[1]) * scores[..., None]).sum(1).to(x.dtype)
    if shared_gate_up is None:
        return out
    shared = F.linear(_activation(*F.linear(x, shared_gate_up).chunk(2, -1), act), shared_down)
    if shared_score is not None:
        shared = shared * shared_score.reshape(-1, 1)
    return (out + shared).to(x.dtype)


@jit
def _prefetch(at):
    """Bring the 128-byte line at every pointer into L2, and go on at once."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _gate_up_kernel(
    x, index, gate_up, shared, hidden, x_stride,
    H: tl.constexpr, INTER: tl.constexpr, SHARED: tl.constexpr,
    E: tl.constexpr, EXPERTS: tl.constexpr,
    TOP: tl.constexpr, ROUTE: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of one token's `hidden` in one slot. `index`: chosen experts or, to ROUTE, logits."""
    token = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) - (SHARED + ROWS - 1) // ROWS
    if block < 0:  # the shared expert's weights need not wait for the router
        first, width, column = tl.program_id(0) * ROWS, SHARED, TOP * INTER
        weight = shared
    else:
        blocks: tl.constexpr = (INTER + ROWS - 1) // ROWS
        slot = block // blocks
        first, width, column = block % blocks * ROWS, INTER, slot * INTER
        wait_for_previous(PDL)
        if ROUTE:
            expert = nth_best(index + token * E, slot, E, EXPERTS)
        else:
            expert = tl.load(index + token * TOP + slot)
        weight = gate_up + expert.to(tl.int64) * INTER * H * 2
    row = first + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    real = row[:, None] < width
    gate_at = weight + row[:, None].to(tl.int64) * H + k
    up_at = gate_at + width * H
    gate = tl.load(gate_at, mask=real & (k < H), other=0.0)
    up = tl.load(up_at, mask=real & (k < H), other=0.0)
    wait_for_previous(PDL)
    start_next(PDL)
    x += token * x_stride + k
    gates, ups = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        part = tl.load(x + start, mask=k < H - start, other=0.0).to(tl.float32)
        gates += tl.sum(gate.to(tl.float32) * part, 1)
        ups += tl.sum(up.to(tl.float32) * part, 1)
        if start + BLOCK < H:
            mask = real & (k < H - start - BLOCK)
            gate = tl.load(gate_at + start + BLOCK, mask=mask, other=0.0)
            up = tl.load(up_at + start + BLOCK, mask=mask, other=0.0)
    at = hidden + token * (TOP * INTER + SHARED) + column + row
    tl.store(at, activate(gates, ACT) * ups, mask=row < width)


@jit
def _down_kernel(
    hidden, index, scores, shared_score, down, shared, out,
    H: tl.constexpr, INTER: tl.constexpr, SHARED: tl.constexpr,
    E: tl.constexpr, EXPERTS: tl.constexpr,
    TOP: tl.constexpr, ROUTE: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr,
    SCORED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    SHARED_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of one token's output, from all its slots."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    k = tl.arange(0, BLOCK)
    if SHARED > 0:
        shared_k = tl.arange(0, SHARED_BLOCK)
        shared_at = shared + row[:, None].to(tl.int64) * SHARED + shared_k
        w_shared = tl.load(shared_at, mask=(row[:, None] < H) & (shared_k < SHARED), other=0.0)
    if ROUTE:
        expert, score = best(index + token * E, E, TOP, SLOTS, EXPERTS, NORM)
    else:
        expert = tl.load(index + token * TOP + slot, mask=slot < TOP, other=0)
        score = tl.load(scores + token * TOP + slot, mask=slot < TOP, other=0.0).to(tl.float32)
    real = (row[:, None, None] < H) & (slot[None, :, None] < TOP)
    line = expert.to(tl.int64)[None, :, None] * H + row[:, None, None]
    at = down + line * INTER + k[None, None, :]
    w = tl.load(at, mask=real & (k[None, None, :] < INTER), other=0.0)
    if PDL and BLOCK < INTER:  # the rest of the rows, as far as L2
        step: tl.constexpr = 1024 // down.dtype.element_ty.primitive_bitwidth
        line_k = BLOCK + tl.arange(0, LINES) * step
        _prefetch(down + line * INTER + tl.minimum(line_k, INTER - 1)[None, None, :])
    wait_for_previous(PDL)
    start_next(PDL)
    hidden += token * (TOP * INTER + SHARED)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, INTER, BLOCK):
        mask = (slot[:, None] < TOP) & (k < INTER - start)
        part = tl.load(hidden + slot[:, None] * INTER + start + k, mask=mask, other=0.0)
        part = part.to(tl.float32) * score[:, None]
        product = w.to(tl.float32) * part[None, :, :]
        total += tl.sum(tl.reshape(product, (ROWS, SLOTS * BLOCK)), 1)
        if start + BLOCK < INTER:
            mask = real & (k[None, None, :] < INTER - start - BLOCK)
            w = tl.load(at + start + BLOCK, mask=mask, other=0.0)
    if SHARED > 0:
        scale = tl.load(shared_score + token).to(tl.float32) if SCORED else 1.0
        for start in tl.static_range(0, SHARED, SHARED_BLOCK):
            mask = shared_k < SHARED - start
            part = tl.load(hidden + TOP * INTER + start + shared_k, mask=mask, other=0.0)
            total += scale * tl.sum(w_shared.to(tl.float32) * part.to(tl.float32), 1)
            if start + SHARED_BLOCK < SHARED:
                mask = (row[:, None] < H) & (shared_k < SHARED - start - SHARED_BLOCK)
                w_shared = tl.load(shared_at + start + SHARED_BLOCK, mask=mask, other=0.0)
    tl.store(out + token * H + row, total, mask=row < H)


def _decode(
    x: Tensor, index: Tensor, scores: Tensor | None, top_k: int, normalize: bool,
    gate_up: Tensor, down: Tensor, act: str,
    shared_gate_up: Tensor | None, shared_down: Tensor | None, shared_score: Tensor | None,
) -> Tensor:  # fmt: skip
    """Two launches. `index` [T, k] with `scores`, or the router's logits [T, E] without."""
    (tokens, hidden), intermediate, experts = x.shape, down.shape[2], down.shape[0]
    width = 0 if shared_down is None else shared_down.shape[1]
    middle = x.new_empty(tokens, top_k * intermediate + width)
    out = x.new_empty(tokens, hidden)
    config = GATE_UP | {"BLOCK": min(GATE_UP["BLOCK"], power_of_two(hidden))}
    rows = config["ROWS"]
    same = {
        "H": hidden, "INTER": intermediate, "SHARED": width, "E": experts,
        "EXPERTS": power_of_two(experts), "TOP": top_k, "ROUTE": scores is None, "pdl": pdl(x),
    }  # fmt: skip
    launch(
        _gate_up_kernel, (top_k * -(-intermediate // rows) + -(-width // rows), tokens),
        x, index, gate_up, gate_up if shared_gate_up is None else shared_gate_up, middle,
        x.stride(0), ACT=ACTIVATIONS[act], **same, **config,
    )  # fmt: skip
    config = DOWN | {"BLOCK": min(DOWN["BLOCK"], power_of_two(intermediate))}
    launch(
        _down_kernel, (-(-hidden // config["ROWS"]), tokens),
        middle, index, index if scores is None else scores,
        index if shared_score is None else shared_score,
        down, down if shared_down is None else shared_down, out,
        LINES=power_of_two(max(1, (intermediate - config["BLOCK"]) * down.itemsize // 128)),
        SLOTS=power_of_two(top_k), NORM=normalize, SCORED=shared_score is not None,
        SHARED_BLOCK=min(DOWN["BLOCK"], power_of_two(width or 1)), **same, **config,
    )  # fmt: skip
    return out


def _check_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, act: str,
    shared_gate_up: Tensor | None, shared_down: Tensor | None,
) -> None:  # fmt: skip
    check(act in ACTIVATIONS, f"activation {act!r} is none of {', '.join(ACTIVATIONS)}")
    check(x.dim() == 2 and x.stride(1) == 1, f"x must be [T, H], rows of stride 1: {x.shape}")
    check(x.dtype in (torch.bfloat16, torch.float16, torch.float32), f"x cannot be {x.dtype}")
    check(down.dim() == 3, f"down must be [E, H, INTER], not {tuple(down.shape)}")
    experts, hidden, intermediate = down.shape
    check(hidden == x.shape[1], f"down gives rows of {hidden}, x has rows of {x.shape[1]}")
    given = [
        ("gate_up", gate_up, (experts, 2 * intermediate, hidden)),
        ("down", down, (experts, hidden, intermediate)),
    ]
    check(
        (shared_gate_up is None) == (shared_down is None),
        "a shared expert needs both shared_gate_up and shared_down",
    )
    if shared_gate_up is not None:
        width = shared_down.shape[-1]
        given.append(("shared_gate_up", shared_gate_up, (2 * width, hidden)))
        given.append(("shared_down", shared_down, (hidden, width)))
    for name, tensor, shape in given:
        check(tuple(tensor.shape) == shape, f"{name} must be {shape}, not {tuple(tensor.shape)}")
        check(tensor.dtype == x.dtype, f"{name} is {tensor.dtype}, x is {x.dtype}")
        check(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
        check(tensor.is_contiguous(), f"{name} must be contiguous")


def _check_choice(x: Tensor, index: Tensor, scores: Tensor, shared_score: Tensor | None) -> None:
    check(index.dim() == 2 and len(index) == len(x), f"index must be [T, k]: {index.shape}")
    check(index.dtype in (torch.int64, torch.int32), f"index cannot be {index.dtype}")
    check(scores.shape == index.shape, f"scores {scores.shape}, index {index.shape}")
    given = [("index", index), ("scores", scores)]
    if shared_score is not None:
        size = shared_score.numel()
        check(size == len(x), f"shared_score has {size} values for {len(x)} tokens")
        given.append(("shared_score", shared_score))
    for name, tensor in given:
        check(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
        check(name == "index" or tensor.dtype.is_floating_point, f"{name} cannot be {tensor.dtype}")


def experts(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: str = "silu",
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_score: Tensor | None = None,
) -> Tensor:
    """Σ over a token's experts of score · down(act(gate) · up), and the shared expert's share.

    x [T, H]; index [T, k] in [0, E), int64 or int32, repeats allowed; scores [T, k];
    gate_up [E, 2I, H], gate rows first; down [E, H, I]; act: silu, gelu_tanh or gelu;
    shared_gate_up [2Is, H], shared_down [H, Is]; shared_score [T] or [T, 1], already a sigmoid
    (without it the shared expert is simply added) → [T, H]. Weights in x's dtype: bf16, fp16 or
    fp32. Raises KernelError for any other shape, dtype, device or stride.
    """
    _check_experts(x, gate_up, down, act, shared_gate_up, shared_down)
    _check_choice(x, index, scores, shared_score)
    index, scores = index.contiguous(), scores.contiguous()
    weights = (gate_up, down, act, shared_gate_up, shared_down, shared_score)
    if len(x) <= FEW_TOKENS:
        return _decode(x, index, scores, index.shape[1], False, *weights)
    return grouped_experts(x, index, scores, *weights)


def sparse_moe(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    normalize: bool,
    gate_up: Tensor,
    down: Tensor,
    act: str = "silu",
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """A whole block: softmax router (router.py), experts, shared expert times sigmoid(x·gate).

    x [T, H], router_weight [E, H], shared_gate [1, H]; the rest as for `experts` → [T, H].
    """
    check_router(x, router_weight, top_k, shared_gate)
    weights = (gate_up, down, act, shared_gate_up, shared_down)
    _check_experts(x, *weights)
    check(len(router_weight) == len(down), f"{len(router_weight)} logits, {len(down)} experts")
    if len(x) <= FEW_TOKENS:
        logits, shared = router_logits(x, router_weight, shared_gate)
        score = None if shared_gate is None else shared
        return _decode(x, logits, None, top_k, normalize, *weights, score)
    _, scores, index, shared = router(x, router_weight, top_k, normalize, shared_gate)
    return experts(x, index, scores, *weights, None if shared_gate is None else shared)


def sparse_moe_reference(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    normalize: bool,
    gate_up: Tensor,
    down: Tensor,
    act: str = "silu",
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """`sparse_moe` in plain PyTorch."""
    _, scores, index, shared = router_reference(x, router_weight, top_k, normalize, shared_gate)
    score = None if shared_gate is None else shared
    return reference(x, index, scores, gate_up, down, act, shared_gate_up, shared_down, score)


def _fake(x, *_, **__):
    return x.new_empty(x.shape)


_SHARED = "Tensor? shared_gate_up=None, Tensor? shared_down=None"
register(
    "experts(Tensor x, Tensor index, Tensor scores, Tensor gate_up, Tensor down, str act='silu', "
    f"{_SHARED}, Tensor? shared_score=None) -> Tensor",
    cuda=experts,
    cpu=reference,
    fake=_fake,
)
register(
    "sparse_moe(Tensor x, Tensor router_weight, int top_k, bool normalize, Tensor gate_up, "
    f"Tensor down, str act='silu', {_SHARED}, Tensor? shared_gate=None) -> Tensor",
    cuda=sparse_moe,
    cpu=sparse_moe_reference,
    fake=_fake,
)
