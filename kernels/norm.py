"""Root mean square norms of rows, with what stands next to them in a model.

y = x / √(mean(x²) + eps) · w (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019),
with three conventions for the weight, rounded where transformers rounds:

    llama  w · round(y)      Llama, Qwen3, Mistral
    gemma  round((1 + w) · y)   Gemma 2 and 3, Qwen3-Next, Qwen3.5
    late   round(w · y)      Gemma 4, OLMo 2

rms_norm(x, weight or None); add_rms_norm(x, residual) = (norm(total), total) with total = x +
residual, and add_rms_norm_, which writes the total over the residual; gated_rms_norm(x, gate) =
norm(x) · w · silu(gate). Each also as …_fp8 and …_q8_1, whose first result is quantized as
quantize.py says, from the values that the plain one returns.

The statistics of a sum are those of the rounded total that is stored: that is what transformers
computes, and what the next block adds to, so a fused model has the numbers of an unfused one.

A row is read once and stays in registers; sums are float32. Leading dimensions may have any
strides that merge into two (a slice of a fused projection, per head); others are copied first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, jit, launch, pdl, register, start_next, tl, triton, wait_for_previous
from .quantize import (
    WIDEST,
    check_groups,
    check_rows,
    quantize_fp8_reference,
    quantize_q8_1_reference,
    quantized_like,
    row_starts,
    store_quantized,
    strided_rows,
)

CONVENTIONS = ("llama", "gemma", "late")


def _normed(x: Tensor, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, norm: str) -> Tensor:
    y = _normed(x, eps)
    if weight is None:
        return y.to(x.dtype)
    if norm == "llama":
        return weight * y.to(x.dtype)
    return (y * (weight.to(y.dtype) + (norm == "gemma"))).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: str
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps, norm), total


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _normed(x, eps)
    return (y * weight.to(y.dtype) * F.silu(gate.to(y.dtype))).to(gate.dtype)


@jit
def _norm(
    x, residual, gate, weight, total, out, scale, sums, rows, inner, eps,
    x_outer, x_inner, other_outer, other_inner, total_outer, total_inner,
    WIDTH: tl.constexpr, CONVENTION: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. `residual`, `gate`, `weight`, `scale` and `sums` may be None;
    other_… are the strides of the residual or the gate; GROUP 0 is an unquantized output."""
    start_next(PDL)  # at once: what follows a norm has weights to ask for
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    if weight is not None:
        w = tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32)
        if CONVENTION == "gemma":
            w += 1.0
    wait_for_previous(PDL)
    value = tl.load(x + row_starts(row, inner, x_outer, x_inner) + column, inside, 0.0)
    kind = value.dtype
    value = value.to(tl.float32)
    at = row_starts(row, inner, other_outer, other_inner) + column
    if residual is not None:
        value = (value + tl.load(residual + at, inside, 0.0).to(tl.float32)).to(kind)
        tl.store(total + row_starts(row, inner, total_outer, total_inner) + column, value, inside)
        value = value.to(tl.float32)
    if gate is not None:
        g = tl.load(gate + at, inside, 0.0)
        kind = g.dtype
        g = g.to(tl.float32)
    y = value * tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / WIDTH + eps)
    if weight is not None:
        if CONVENTION == "llama":
            y = y.to(kind).to(tl.float32)
        y *= w
    if gate is not None:
        y *= g * tl.sigmoid(g)
    y = y.to(kind)
    row = row.to(tl.int64)
    if GROUP == 0:
        tl.store(out + row * WIDTH + column, y, inside)
    else:
        y = y.to(tl.float32)
        store_quantized(y, out, scale, sums, row, 0, rows, WIDTH, BLOCK, GROUP)


#: Power of two that holds a row: (rows a program, warps) for a step of decoding, and for many rows.
CONFIGS = {
    32: ((4, 1), (128, 8)),
    64: ((4, 2), (64, 8)),
    128: ((4, 4), (32, 8)),
    256: ((2, 4), (16, 8)),
    512: ((1, 2), (8, 8)),
    1024: ((1, 4), (4, 8)),
    2048: ((1, 4), (1, 4)),
    4096: ((1, 16), (1, 4)),
    8192: ((1, 16), (1, 8)),
    16384: ((1, 16), (1, 16)),
    32768: ((1, 32), (1, 32)),
}
#: Programs from which on throughput counts, not the latency of one.
MANY = 512


def _checked(x: Tensor, weight: Tensor | None, norm: str, other: Tensor | None, name: str) -> None:
    check_rows("x", x, x.device)
    width = x.shape[-1]
    check(0 < width <= WIDEST, f"x: expected rows of 1 to {WIDEST}, found {width}")
    check(norm in CONVENTIONS, f"norm: expected one of {', '.join(CONVENTIONS)}, found {norm}")
    if weight is not None:
        check_rows("weight", weight, x.device)
        if norm == "llama":  # a wider weight would make the result wider than x
            kinds = f"expected {x.dtype} as x, found {weight.dtype}"
            check(weight.dtype == x.dtype, f"weight: {kinds}")
        found = f"expected [{width}] contiguous, found {list(weight.shape)}"
        check(weight.shape == (width,) and weight.is_contiguous(), f"weight: {found}")
    if other is not None:
        check_rows(name, other, x.device)
        shapes = f"expected {list(x.shape)} as x, found {list(other.shape)}"
        check(other.shape == x.shape, f"{name}: {shapes}")
        if name == "residual":
            kinds = f"expected {x.dtype} as x, found {other.dtype}"
            check(other.dtype == x.dtype, f"residual: {kinds}")


def _outputs(x: Tensor, form: str, group: int = 0) -> tuple[Tensor, ...]:
    """Empty outputs shaped like x, which has the dtype of the unquantized one."""
    if form == "plain":
        return (torch.empty_like(x, memory_format=torch.contiguous_format),)
    return quantized_like(x, None if form == "q8_1" else group)


def _walk(x: Tensor, other: Tensor | None, total: Tensor | None) -> tuple[Any, ...]:
    """x and other, copied where their rows cannot be walked as they are; then rows, inner and the
    strides of x, other and total (those of x where there is none)."""
    x, other = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, other))
    walk = strided_rows(x, x if other is None else other, x if total is None else total)
    if walk is None:
        x, other = (None if t is None else t.contiguous() for t in (x, other))
        walk = strided_rows(x, x if other is None else other, x if total is None else total)
    rows, inner, strides = walk
    return x, other, rows, inner, [step for pair in strides for step in pair]


def _run(
    x: Tensor, weight: Tensor | None, eps: float, norm: str, form: str, group: int = 0, *,
    residual: Tensor | None = None, gate: Tensor | None = None, in_place: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(the outputs of `form`…, and the total where there is a residual)."""
    other, name = (residual, "residual") if gate is None else (gate, "gate")
    _checked(x, weight, norm, other, name)
    if in_place:
        writable = residual.stride(-1) == 1 and strided_rows(residual) is not None
        check(writable, f"residual: cannot be written with strides {residual.stride()}")
    width = x.shape[-1]
    block = max(32, triton.next_power_of_2(width))
    size = 0
    if form != "plain":
        check_groups(None if form == "q8_1" else group, width)
        size = 32 if form == "q8_1" else group or block
    outputs = _outputs(x if gate is None else gate, form, group)
    total = None
    if residual is not None:
        total = residual if in_place else torch.empty_like(outputs[0], dtype=x.dtype)
    x, other, rows, inner, strides = _walk(x, other, total)
    few, many = CONFIGS[block]
    tile, warps = many if rows >= MANY * many[0] else few
    launch(
        _norm, (triton.cdiv(rows, tile),), x, other if gate is None else None,
        None if gate is None else other, weight, total, *(*outputs, None, None)[:3],
        rows, inner, eps, *strides, WIDTH=width, CONVENTION=norm, GROUP=size, ROWS=tile,
        BLOCK=max(block, size), pdl=pdl(x), num_warps=warps,
    )  # fmt: skip
    return outputs if residual is None else (*outputs, total)


def _reference(y: Tensor, form: str, group: int = 0) -> tuple[Tensor, ...]:
    y = y.contiguous()
    if form == "plain":
        return (y,)
    return quantize_q8_1_reference(y) if form == "q8_1" else quantize_fp8_reference(y, group)


def _register(form: str, tensors: int) -> None:
    """The three norms with the output `form`, of so many tensors."""
    name = "" if form == "plain" else f"_{form}"
    group = ", int group" if form == "fp8" else ""

    def returns(count: int) -> str:
        return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"

    def one(results: tuple[Tensor, ...]) -> Any:
        return results[0] if len(results) == 1 else results

    def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: str, *group: int) -> Any:
        y, total = add_rms_norm_reference(x, residual, weight, eps, norm)
        return (*_reference(y, form, *group), total.contiguous())

    register(
        f"rms_norm{name}(Tensor x, Tensor? weight, float eps, str norm{group})"
        f" -> {returns(tensors)}",
        cuda=lambda x, weight, eps, norm, *group: one(_run(x, weight, eps, norm, form, *group)),
        cpu=lambda x, weight, eps, norm, *group: one(
            _reference(rms_norm_reference(x, weight, eps, norm), form, *group)
        ),
        fake=lambda x, weight, eps, norm, *group: one(_outputs(x, form, *group)),
    )
    register(
        f"add_rms_norm{name}(Tensor x, Tensor residual, Tensor weight, float eps, str norm{group})"
        f" -> {returns(tensors + 1)}",
        cuda=lambda x, residual, weight, eps, norm, *group: _run(
            x, weight, eps, norm, form, *group, residual=residual
        ),
        cpu=add,
        fake=lambda x, residual, weight, eps, norm, *group: (
            *_outputs(x, form, *group),
            torch.empty_like(x, memory_format=torch.contiguous_format),
        ),
    )
    register(
        f"gated_rms_norm{name}(Tensor x, Tensor gate, Tensor weight, float eps{group})"
        f" -> {returns(tensors)}",
        cuda=lambda x, gate, weight, eps, *group: one(
            _run(x, weight, eps, "late", form, *group, gate=gate)
        ),
        cpu=lambda x, gate, weight, eps, *group: one(
            _reference(gated_rms_norm_reference(x, gate, weight, eps), form, *group)
        ),
        fake=lambda x, gate, weight, eps, *group: one(_outputs(gate, form, *group)),
    )


for _form, _tensors in (("plain", 1), ("fp8", 2), ("q8_1", 3)):
    _register(_form, _tensors)


def _add_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: str) -> Tensor:
    residual.add_(x)
    return rms_norm_reference(residual, weight, eps, norm).contiguous()


register(
    "add_rms_norm_(Tensor x, Tensor(a!) residual, Tensor weight, float eps, str norm) -> Tensor",
    cuda=lambda x, residual, weight, eps, norm: _run(
        x, weight, eps, norm, "plain", residual=residual, in_place=True
    )[0],
    cpu=_add_in_place,
    fake=lambda x, residual, weight, eps, norm: _outputs(x, "plain")[0],
)
