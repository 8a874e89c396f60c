"""Attention with q, k and v from one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.qkv_rope import gate_view
from . import gpu, ops
from .linear import FusedLinear, Section, product
from .mlp import around
from .norm import RMSNorm
from .state import check_nothing_lost


@dataclass(frozen=True)
class Family:
    """What a loaded attention module does not say of itself."""

    rope: ops.Rope | None = "halves"
    rope_only_sliding: bool = False


#: model_type → its attention, each compared with transformers' own in tests/test_nn_models.py.
FAMILIES: dict[str, Family] = {
    name: family
    for names, family in {
        """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text
        qwen3_5_moe_text gemma gemma2 gemma3_text gemma4_text granite olmo2 olmo3 smollm3 phi3
        glm4_moe minimax_m2 starcoder2""": Family(),
        "glm4": Family(rope="glm"),
        "cohere2": Family(rope="pairs", rope_only_sliding=True),
        "gpt_oss": Family(rope="compact"),
        "bert roberta": Family(rope=None),
    }.items()
    for name in names.split()
}
Q, K, V = "q_proj", "k_proj", "v_proj"


class FusedAttention(nn.Module):
    """Self-attention with a fused `qkv_proj`; heads of q rows may be [query | gate] (Qwen3-Next,
    Qwen3.5), `q_norm` and `k_norm` act on heads, or on all rows before they are cut into heads
    (OLMo 2), `v_norm` has no weight (Gemma 4). Without v rows, v is k (Gemma 4's k_eq_v).

    The cache is transformers' (`update(k, v, layer_idx)`), attention runs through its registry by
    `config._attn_implementation`, with the mask that the model makes; without a config eagerly, and
    causal where no mask is given.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer_idx: int = 0,
        bias: bool = False,
        out_bias: bool = False,
        gate: bool = False,
        qk_norm: ops.Norm | None = None,
        eps: float = 1e-6,
        rope: ops.Rope | None = "halves",
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        config: Any = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        like = {"dtype": dtype, "device": device}
        sections = attention_sections((Q, K, V), heads, kv_heads, head_dim, gate)
        self.qkv_proj = FusedLinear(hidden, sections, bias=bias, **like)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=out_bias, **like)
        self.q_norm = RMSNorm(head_dim, eps, qk_norm, **like) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, qk_norm, **like) if qk_norm else None
        self.v_norm = None
        self.config, self.layer_idx, self.head_dim, self.gate = config, layer_idx, head_dim, gate
        self.rope, self.sliding_window, self.softcap = rope, sliding_window, softcap
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.out_name, self.attention_dropout, self.is_causal = "o_proj", 0.0, True
        self.sinks = self.shares_kv_as = None

    @classmethod
    def from_parts(cls, attention: nn.Module) -> FusedAttention:
        """From a loaded transformers attention module. Its output projection, norms' weights and
        sinks are used as they are; a family that is not in FAMILIES is refused."""
        config, old = attention.config, attention
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise UsageError(f"attention of {config.model_type} is not known to fuseweights.nn")
        head_dim = getattr(old, "head_dim", None) or old.attention_head_size
        names = ("query", "key", "value") if hasattr(old, "query") else (Q, K, V)
        parts = {n: p for n in names if (p := getattr(old, n, None)) is not None}
        if not hasattr(old, "qkv_proj") and len(parts) < 2:
            raise UsageError(f"layer {old.layer_idx} reads another's keys: nothing to fuse")
        self = cls(1, 1, 1, head_dim, layer_idx=old.layer_idx, config=config, device="meta")
        self.out_name = next((n for n in ("o_proj", "out_proj") if hasattr(old, n)), None)
        if self.out_name != "o_proj":
            del self.o_proj
        if self.out_name:
            setattr(self, self.out_name, getattr(old, self.out_name))

        heads = config.num_attention_heads
        if parts:
            widths = {name: part.weight.shape[0] for name, part in parts.items()}
            kv_heads = widths[names[1]] // head_dim
            self.gate = widths[names[0]] == 2 * heads * head_dim
            sections = attention_sections(names, heads, kv_heads, head_dim, self.gate)
            sections = {name: sections[name] for name in parts}
            self.qkv_proj = FusedLinear.from_parts(parts, sections)
        else:
            sections = attention_sections(names, heads, config.num_key_value_heads, head_dim)
            self.qkv_proj = around(old.qkv_proj, lambda rows: sections)

        for name, size in (("q_norm", None), ("k_norm", None), ("v_norm", head_dim)):
            norm = getattr(old, name, None)
            setattr(self, name, None if norm is None else RMSNorm.from_parts(norm, size))
        self.rope = family.rope
        self.sliding_window = getattr(old, "sliding_window", None)
        if config.model_type in ("mistral", "mixtral", "phi3", "starcoder2"):
            self.sliding_window = config.sliding_window
        unturned = family.rope_only_sliding and self.sliding_window is None
        if unturned or not getattr(old, "use_rope", True):
            self.rope = None
        self.softcap = getattr(old, "attn_logit_softcapping", None)
        self.scaling, self.is_causal = old.scaling, old.is_causal
        dropout = getattr(old, "dropout", None)
        self.attention_dropout = dropout.p if dropout else getattr(old, "attention_dropout", 0.0)
        self.sinks = getattr(old, "sinks", None)
        if getattr(old, "store_full_length_kv", False):
            self.shares_kv_as = old.layer_type
        check_nothing_lost(old, self)
        return self.train(attention.training)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads a key head, on this process: transformers' attention functions ask."""
        q, k = self.qkv_proj.rows[:2]
        return q // k // (2 if self.gate else 1)

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, T, H·d] → [B, T, H, d], normed by head or as a whole."""
        if norm is not None and norm.size != self.head_dim:
            x, norm = norm(x), None
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)

    def _inputs(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
        """The product's rows as q, k, v [B, H, T, d], and the output's gate [B, T, H·d]."""
        norms = [n for n in (self.q_norm, self.k_norm, self.v_norm) if n is not None]
        alike = {(norm.size, norm.eps, norm.norm) for norm in norms}
        weights = tuple(norm and norm.weight for norm in (self.q_norm, self.k_norm))
        cos, sin = (None, None) if self.rope is None else angles
        by_head = len(alike) <= 1 and all(n.size == self.head_dim for n in norms)
        if by_head and gpu.takes(qkv, cos, sin, *weights):
            q, k = (rows // self.head_dim for rows in self.qkv_proj.rows[:2])
            heads = q // 2 if self.gate else q
            _, eps, norm = next(iter(alike), (None, 0.0, "llama"))
            inputs = gpu.OPS.qkv_rope(
                *(qkv, heads, k, self.head_dim, cos, sin, *weights, eps, norm),
                *(self.rope or "halves", self.gate, self.v_norm is not None),
            )
            gate = gate_view(qkv, heads, self.head_dim).flatten(-2) if self.gate else None
            return *inputs, gate

        q, k, *v = self.qkv_proj.split(qkv)
        v, gate = self._heads(v[0] if v else k, self.v_norm).transpose(1, 2), None
        if self.gate:
            q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
            q, gate = q.flatten(-2), gate.flatten(-2)
        q = self._heads(q, self.q_norm).transpose(1, 2)
        k = self._heads(k, self.k_norm).transpose(1, 2)
        if self.rope is not None:
            q, k = ops.rotary(q, k, *angles, self.rope)
        return q, k, v, gate

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        shared_kv_states: dict | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, gate = self._inputs(self.qkv_proj(hidden_states), position_embeddings)
        if past_key_values is not None:
            past_key_values = getattr(past_key_values, "self_attention_cache", past_key_values)
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.shares_kv_as is not None:
            shared_kv_states[self.shares_kv_as] = k, v

        if self.config is None and attention_mask is None and self.is_causal:
            attention_mask = ops.causal_mask(q, k, self.sliding_window)
        extra = {"softcap": self.softcap} if self.softcap is not None else {}
        if self.sinks is not None:
            extra["s_aux"] = self.sinks
        out, weights = attention_function(self.config)(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
            **extra,
            **kwargs,
        )
        out = out.flatten(-2)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        if self.out_name:
            out = product(getattr(self, self.out_name), out)
        return out, weights


def attention_sections(
    names: tuple[str, ...], heads: int, kv_heads: int, head_dim: int, gate: bool = False
) -> dict[str, Section]:
    kv = Section(kv_heads * head_dim, kv_heads, replicate=True)
    q = Section(heads * head_dim * (2 if gate else 1), heads)
    return dict(zip(names, (q, kv, kv), strict=True))


def attention_function(config: Any) -> Any:
    """transformers' registry, where SDPA, flash and flex attention are; eager is ours."""
    if config is None:
        return ops.eager_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ops.eager_attention)
