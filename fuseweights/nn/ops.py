"""Every operation the modules compute, in plain PyTorch, and the one place where kernels slip in.

A function marked `@op` is the reference. `function.kernels.append((accepts, run))` puts a kernel
in front of it: the first pair whose `accepts(*args, **kwargs)` is true runs instead. The modules
call nothing else, so they do not change when a kernel arrives.

Sums and transcendental functions are computed in `wide(dtype)`: float32, or float64 where the
input is float64. Results are rounded where transformers rounds them, or later.

T tokens, B sequences, H heads; n or d at the end of a comment's shape is the last dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.norm import (
    add_rms_norm_reference,
    gated_rms_norm_reference,
    rms_norm_reference,
)

Norm = Literal["llama", "gemma", "late"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
Rope = Literal["halves", "compact", "pairs", "glm"]


def op(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Make `reference` an operation that kernels can take over."""
    kernels: list[tuple[Callable[..., bool], Callable[..., Any]]] = []

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        for accepts, run in kernels:
            if accepts(*args, **kwargs):
                return run(*args, **kwargs)
        return reference(*args, **kwargs)

    call.kernels, call.reference = kernels, reference
    return call


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Products


@op
def linear(x: Tensor, tensors: dict[str, Tensor], format: Any, bias: Tensor | None) -> Tensor:
    """x [..., K] → [..., N] with a weight [N, K] stored as `format` (weights.py) says."""
    return F.linear(x, format.dequantize(tensors, x.dtype), bias)


@torch.library.custom_op("fuseweights::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
        start = end
    return out


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    spans = zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)
    grad_weight = torch.stack([grad[a:b].T @ x[a:b] for a, b in spans])
    return _grouped_linear(grad.contiguous(), weight.transpose(1, 2), ends), grad_weight, None


_grouped_linear.register_autograd(_grouped_backward, setup_context=_save_for_backward)


@op
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x [S, K], sorted by expert, times their expert's weight [E, N, K] → [S, N].

    `ends` [E] holds the row after each expert's last.
    """
    return _grouped_linear(x, weight, ends)


@op
def experts(
    x: Tensor, index: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Σ over a token's experts of score · down(act(gate) · up). x [T, H]; index, scores [T, k];
    gate_up [E, 2I, H], gate rows first; down [E, H, I].

    Few tokens gather their experts' weights; many are sorted by expert, so that every weight is
    read once.
    """
    tokens, k = index.shape
    if tokens * k <= gate_up.shape[0]:
        hidden = torch.einsum("th,tknh->tkn", x, gate_up[index])
        out = torch.einsum("tki,tkhi->tkh", gated(hidden, act), down[index])
    else:
        order = index.flatten().argsort(stable=True)
        every = torch.arange(gate_up.shape[0], device=x.device)
        ends = torch.searchsorted(index.flatten()[order], every, right=True)
        hidden = gated(grouped_linear(x[order // k], gate_up, ends), act)
        back = order.argsort()
        out = grouped_linear(hidden, down, ends)[back].view(tokens, k, -1)
    return (out * scores[..., None]).sum(1).to(x.dtype)


@op
def block_experts(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    stacks: dict[str, Tensor],
    formats: dict[str, Any],
    act: Activation,
) -> Tensor:
    """`experts` with stacks `gate_up` [E, 2I, bytes a row] and `down` [E, H, bytes a row] stored as
    `formats` say. Only the experts that are picked become numbers."""
    used = index.unique()
    numbers = {
        name: torch.stack([formats[name].dequantize({"weight": s[e]}, x.dtype) for e in used])
        for name, s in stacks.items()
    }
    compact = torch.searchsorted(used, index)
    return experts(x, compact, scores, numbers["gate_up"], numbers["down"], act)


# Activations and norms

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


@op
def gated(gate_up: Tensor, act: Activation) -> Tensor:
    """act(gate) · up of [..., 2n], gate first → [..., n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


@op
def gated_linear(
    x: Tensor, tensors: dict[str, Tensor], format: Any, bias: Tensor | None, act: Activation
) -> Tensor:
    """act(gate) · up of x [..., K] with one weight [2n, K], gate rows first → [..., n]."""
    return gated(linear(x, tensors, format, bias), act)


@op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, norm: Norm = "llama") -> Tensor:
    """Root mean square norm over the last dimension; what the weight does is the convention:

    llama: rounded, then · w (Llama, Qwen3, Mistral); gemma: · (1 + w), then rounded (Gemma 2 and 3,
    Qwen3-Next, Qwen3.5); late: · w, then rounded (Gemma 4, OLMo 2).
    """
    return rms_norm_reference(x, weight, eps, norm)


@op
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: Norm = "llama"
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum). The sum is rounded once, and the norm reads what was rounded."""
    return add_rms_norm_reference(x, residual, weight, eps, norm)


@op
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) · w · silu(gate), rounded once to the gate's dtype."""
    return gated_rms_norm_reference(x, gate, weight, eps)


# Attention


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    half, kind = cos.shape[-1] // 2, x.dtype
    if rope == "compact":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    elif rope == "glm":
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    elif rope == "pairs":
        x = x.to(wide(kind))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if rope in ("pairs", "glm"):
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    turned = turned * cos + other * sin
    return (torch.cat((turned, rest), -1) if rest.shape[-1] else turned).to(kind)


@op
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rope: Rope = "halves"):
    """Turn the first dimensions of q and k [B, H, T, d] by cos, sin [B, T, n ≤ d].

    halves: x[i] with x[i + n/2] (Llama and most); compact: the same, cos and sin hold every angle
    once (gpt-oss); pairs: x[2i] with x[2i + 1] (Cohere); glm: pairs, with cos as for halves.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin, rope), _rotate(k, cos, sin, rope)


def causal_mask(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Additive mask [T, S] for the last T of S tokens: the past, at most `window` tokens of it."""
    tokens, seen = query.shape[2], key.shape[2]
    at = torch.arange(seen, device=query.device)
    behind = at[seen - tokens :, None] - at
    allowed = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return query.new_zeros(tokens, seen).masked_fill(~allowed, float("-inf"))


def eager_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' "eager" attention for every family: query [B, H, T, d], key and value
    [B, H / groups, S, d], an additive mask; `s_aux` [H] is a column of logits that takes part in
    the softmax alone (gpt-oss). Returns ([B, T, H, d], the weights)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits.dtype)
        logits = torch.cat((logits, sinks), -1)
    weights = logits.to(wide(logits.dtype)).softmax(-1)
    weights = weights[..., : key.shape[2]].to(query.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Gated DeltaNet


@op
def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """silu of a depthwise causal convolution. x [B, T + W - 1, C], past first, any strides;
    weight [C, W] → [B, T, C]. Products and sums are wide."""
    steps = x.shape[1] - weight.shape[1] + 1
    x, kind = x.to(wide(x.dtype)), x.dtype
    taps = weight.to(x.dtype).unbind(1)
    return F.silu(sum(x[:, i : i + steps] * tap for i, tap in enumerate(taps))).to(kind)


def _unit(x: Tensor) -> Tensor:
    x = x.to(wide(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _per_value_head(x: Tensor, heads: int, tiled: bool) -> Tensor:
    """Key heads [B, T, nK, d] repeated for their value heads: h reads h div r, tiled h mod nK."""
    r = heads // x.shape[2]
    if r == 1:
        return x
    return x.repeat(1, 1, r, 1) if tiled else x.repeat_interleave(r, 2)


@op
def delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule: q, k [B, 1, nK, dk], v [B, 1, nV, dv], log decay g and
    beta [B, 1, nV], state [B, nV, dk, dv] → (output [B, 1, nV, dv], new state), both wide.

    S ← S·exp(g); S ← S + k·(beta·(v − Sᵀk))ᵀ; o = Sᵀq / √dk, with q and k of length 1.
    """
    q, k = (_per_value_head(_unit(t), v.shape[2], tiled)[:, 0, :, :, None] for t in (q, k))
    v, g, beta = (t[:, 0].to(q.dtype) for t in (v, g, beta))
    state = state.to(q.dtype) * g.exp()[..., None, None]
    change = beta[..., None] * (v - (state * k).sum(-2))
    state = state + k * change[..., None, :]
    return ((state * q).sum(-2) * q.shape[-2] ** -0.5)[:, None], state


@op
def delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    tiled: bool = False,
    size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same rule over T tokens, `size` at a time: inside a chunk the changes solve one
    triangular system (Yang et al., "Gated Delta Networks", 2024), between chunks the state moves.
    """
    batch, tokens, heads, dv = v.shape
    size = min(size, tokens)
    q, k = (_per_value_head(_unit(t), heads, tiled) for t in (q, k))
    v, g, beta = (t.to(q.dtype) for t in (v, g, beta[..., None]))

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, n] → [B, H, chunks, size, n]
        x = F.pad(x.transpose(1, 2), (0, 0, 0, -tokens % size))
        return x.unflatten(2, (-1, size)).contiguous()

    q, k, v, beta = (chunked(t) for t in (q * q.shape[-1] ** -0.5, k, v, beta))
    decay = chunked(g[..., None]).cumsum(-2)
    between = (decay - decay.mT).tril().exp().tril()  # from token j to a later token i
    system = (k * beta @ k.mT * between).tril(-1)
    sides = torch.cat((v * beta, k * beta * decay.exp()), -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    change, from_state = solved.split((dv, k.shape[-1]), -1)
    scores = q @ k.mT * between
    q, last = q * decay.exp(), decay[..., -1:, :]
    k, last = k * (last - decay).exp(), last.exp()

    if state is None:
        state = v.new_zeros(batch, heads, k.shape[-1], dv)
    state, out = state.to(v.dtype), []
    for i in range(v.shape[2]):
        new = change[:, :, i] - from_state[:, :, i] @ state
        out.append(q[:, :, i] @ state + scores[:, :, i] @ new)
        state = state * last[:, :, i] + k[:, :, i].mT @ new
    return torch.cat(out, 2)[:, :, :tokens].transpose(1, 2), state


from . import gpu  # noqa: E402, F401  (enters the kernels, once all operations are defined)
