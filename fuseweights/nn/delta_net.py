"""Gated DeltaNet (Qwen3-Next, Qwen3.5) with its input projections fused."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .linear import FusedLinear, Section, product
from .norm import eps_of
from .state import check_nothing_lost

Layout = Literal["contiguous", "interleaved", "tiled"]
PARTS = tuple(f"in_proj_{part}" for part in ("qkv", "z", "b", "a"))


class GatedDeltaNet(nn.Module):
    """Linear attention with a state [B, nV, dk, dv] in place of a KV cache.

    One `in_proj` (q, k, v, z, b, a rows), or `in_proj_qkvz` and `in_proj_ba`; `conv1d.weight`
    [2·nK·dk + nV·dv, 1, W], `A_log` and `dt_bias` [nV], `norm.weight` [dv], `out_proj` [H, nV·dv].

    Layouts: "contiguous", Qwen3.5's [Q | K | V | Z | b | a]; "interleaved", Qwen3-Next's: per key
    head [q | k | v·r | z·r] and [b·r | a·r], r = nV / nK; "tiled", GGUF's qwen35: contiguous, with
    value head h reading key head h mod nK (in all others h div r) in v, z, b, a, A, dt, the
    convolution and out_proj's columns.
    """

    def __init__(
        self,
        hidden: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        layout: Layout = "contiguous",
        one: bool = True,
        conv_width: int = 4,
        eps: float = 1e-6,
        layer_idx: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        like = {"dtype": dtype, "device": device}
        self.key_heads, self.value_heads = key_heads, value_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.layout, self.layer_idx, self.eps = layout, layer_idx, eps
        for name, sections in self._sections(one).items():
            setattr(self, name, FusedLinear(hidden, sections, **like))
        rows = 2 * key_heads * key_dim + value_heads * value_dim
        self.conv1d = nn.Conv1d(rows, rows, conv_width, groups=rows, bias=False, **like)
        self.A_log = nn.Parameter(torch.zeros(value_heads, **like))
        self.dt_bias = nn.Parameter(torch.ones(value_heads, **like))
        self.norm = _Weight(torch.ones(value_dim, **like))
        self.out_proj = nn.Linear(value_heads * value_dim, hidden, bias=False, **like)

    def _sections(self, one: bool) -> dict[str, dict[str, Any]]:
        """The input projections' names → their parts' sections."""
        k = Section(self.key_heads * self.key_dim, self.key_heads)
        v = Section(self.value_heads * self.value_dim, self.value_heads)
        head = Section(self.value_heads, self.value_heads)
        if self.layout == "interleaved":
            qkvz, ba = (
                Section(rows, self.key_heads) for rows in (2 * (k.rows + v.rows), 2 * head.rows)
            )
            return {"in_proj_qkvz": {"qkvz": qkvz}, "in_proj_ba": {"ba": ba}}
        parts = dict(zip(PARTS, ((k, k, v), v, head, head), strict=True))
        if one:
            return {"in_proj": parts}
        pairs = ("in_proj_qkvz", PARTS[:2]), ("in_proj_ba", PARTS[2:])
        return {name: {part: parts[part] for part in pair} for name, pair in pairs}

    @classmethod
    def from_parts(cls, mixer: nn.Module, *, one: bool = True) -> GatedDeltaNet:
        """From a loaded transformers GatedDeltaNet, split as Qwen3.5 has it or fused as Qwen3-Next.
        `one` False keeps qkvz and ba apart, for checkpoints with b and a in another dtype."""
        native = not hasattr(mixer, "in_proj_qkv")
        self = cls(
            1, mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim,
            layout="interleaved" if native else "contiguous", one=one,
            eps=eps_of(mixer.norm), layer_idx=mixer.layer_idx, device="meta",
        )  # fmt: skip
        for name, sections in self._sections(one).items():
            if native:
                weight = {"weight": getattr(mixer, name).weight}
                setattr(self, name, FusedLinear.from_tensors(sections, weight))
            else:
                parts = {part: getattr(mixer, part) for part in sections}
                setattr(self, name, FusedLinear.from_parts(parts, sections))
        self.conv1d, self.out_proj, self.norm = mixer.conv1d, mixer.out_proj, mixer.norm
        self.A_log, self.dt_bias = mixer.A_log, mixer.dt_bias
        check_nothing_lost(mixer, self)
        return self.train(mixer.training)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, H] → q|k|v [B, T, C], z [B, T, nV, dv], b, a [B, T, nV]: views where the layout
        allows."""
        if self.layout == "interleaved":
            r, heads = self.value_heads // self.key_heads, (self.key_heads, -1)
            widths = (self.key_dim, self.key_dim, r * self.value_dim, r * self.value_dim)
            q, k, v, z = self.in_proj_qkvz(x).unflatten(-1, heads).split(widths, -1)
            b, a = (t.flatten(-2) for t in self.in_proj_ba(x).unflatten(-1, heads).chunk(2, -1))
            return torch.cat([t.flatten(-2) for t in (q, k, v)], -1), self._values(z), b, a
        if hasattr(self, "in_proj"):
            qkv, z, b, a = self.in_proj.split(self.in_proj(x))
        else:
            qkv, z = self.in_proj_qkvz.split(self.in_proj_qkvz(x))
            b, a = self.in_proj_ba.split(self.in_proj_ba(x))
        return qkv, self._values(z), b, a

    def _values(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.value_heads, self.value_dim)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """`attention_mask` [B, T] has zeros where a token is padding. `cache_params` is
        transformers' cache: it keeps the last W inputs of the convolution, and the state."""
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[..., None]).to(hidden_states.dtype)
        tokens = hidden_states.shape[1]
        qkv, z, b, a = self.project(hidden_states)

        state, width = None, self.conv1d.weight.shape[-1]
        if cache_params is not None:
            state = cache_params.get_recurrent_state(self.layer_idx)
            qkv = cache_params.update_conv_state(
                qkv.transpose(1, 2), self.layer_idx, conv_kernel_size=width
            ).transpose(1, 2)
        past = tokens + width - 1
        qkv = F.pad(qkv, (0, 0, max(past - qkv.shape[1], 0), 0))[:, -past:]
        qkv = ops.causal_conv(qkv, self.conv1d.weight.squeeze(1))

        keys = self.key_heads * self.key_dim
        q, k, v = qkv.split((keys, keys, self.value_heads * self.value_dim), -1)
        q, k = (t.unflatten(-1, (self.key_heads, self.key_dim)) for t in (q, k))
        kind = ops.wide(a.dtype)
        g = -self.A_log.to(kind).exp() * F.softplus(a.to(kind) + self.dt_bias)
        inputs = (q, k, self._values(v), g, b.sigmoid(), state, self.layout == "tiled")
        one_step = state is not None and tokens == 1
        out, state = (ops.delta_step if one_step else ops.delta_chunks)(*inputs)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        out = ops.gated_rms_norm(out, z, self.norm.weight, self.eps)
        return product(self.out_proj, out.flatten(-2))


class _Weight(nn.Module):
    """A parameter that a checkpoint calls `something.weight`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
