"""Sparse mixture of experts with gate and up stacked for every expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from . import ops
from .mlp import GATE_UP, GatedMLP, activation_of
from .state import check_nothing_lost


class Experts(nn.Module):
    """`gate_up_proj` [E, 2I, H], gate rows first, and `down_proj` [E, H, I]: parameters without
    `.weight`, as transformers 5 and the fused checkpoint have them."""

    def __init__(
        self,
        count: int,
        hidden: int,
        intermediate: int,
        act: ops.Activation = "silu",
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        like = {"dtype": dtype, "device": device}
        up = torch.empty(count, 2 * intermediate, hidden, **like)
        down = torch.empty(count, hidden, intermediate, **like)
        self.gate_up_proj = nn.Parameter(nn.init.normal_(up, std=0.02))
        self.down_proj = nn.Parameter(nn.init.normal_(down, std=0.02))
        self.act = act

    @classmethod
    def from_parts(cls, experts: nn.Module) -> Experts:
        """From transformers' stacked experts, sharing their tensors, or from a list of MLPs with
        gate_proj, up_proj and down_proj (or w1, w3 and w2), stacking them."""
        self = cls(1, 1, 1, device="meta")
        if isinstance(experts, nn.ModuleList):
            names = (
                (*GATE_UP, "down_proj") if hasattr(experts[0], "gate_proj") else ("w1", "w3", "w2")
            )
            linears = [[getattr(expert, name) for name in names] for expert in experts]
            if any(
                type(part) is not nn.Linear or part.bias is not None for e in linears for part in e
            ):
                raise UsageError("experts stack from plain linear layers without biases")
            gate, up, down = ([e[i].weight.detach() for e in linears] for i in range(3))
            stacked = torch.stack(gate).new_empty(len(gate), 2 * gate[0].shape[0], gate[0].shape[1])
            for expert, rows in enumerate(zip(gate, up, strict=True)):
                torch.cat(rows, out=stacked[expert])
            self.gate_up_proj, self.down_proj = (
                nn.Parameter(stacked),
                nn.Parameter(torch.stack(down)),
            )
            self.act = activation_of(experts[0].act_fn)
        else:
            transposed = getattr(experts, "is_transposed", False)
            biased = getattr(experts, "has_bias", False)
            if transposed or biased or not getattr(experts, "is_concatenated", True):
                raise UsageError(
                    f"{type(experts).__name__} is not laid out as [E, 2I, H], gate first"
                )
            self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
            self.act = activation_of(experts.act_fn)
        return self.train(experts.training)

    def part_tensors(self) -> dict[str, tuple[str, Tensor]]:
        """`0.gate_proj.weight` → ("gate_up_proj", its view): an expert at a time."""
        out = {}
        for expert, (gate_up, down) in enumerate(
            zip(self.gate_up_proj, self.down_proj, strict=True)
        ):
            views = (*gate_up.chunk(2), down)
            homes = ("gate_up_proj", "gate_up_proj", "down_proj")
            for name, home, view in zip((*GATE_UP, "down_proj"), homes, views, strict=True):
                out[f"{expert}.{name}.weight"] = (home, view)
        return out

    def forward(self, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        """x [T, H], index and scores [T, k] → [T, H]."""
        return ops.experts(x, index, scores, self.gate_up_proj, self.down_proj, self.act)


class SoftmaxRouter(nn.Module):
    """softmax(x Wᵀ) in float32, its k largest, rescaled to sum to 1 if `normalize`."""

    def __init__(self, hidden: int, count: int, top_k: int, *, normalize: bool = True, **like: Any):
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(count, hidden, **like), std=0.02))
        self.top_k, self.normalize = top_k, normalize

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], scores [T, k], index [T, k]), as transformers' routers return them."""
        logits = F.linear(x, self.weight)
        scores, index = logits.to(ops.wide(x.dtype)).softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores.to(x.dtype), index


class SparseMoE(nn.Module):
    """Routed experts plus a shared one: `gate` (the router), `experts.gate_up_proj`,
    `experts.down_proj`; `shared_expert`, times sigmoid(`shared_expert_gate`(x)) if there is one
    (Qwen), or `shared_experts`, simply added (DeepSeek, GLM-4.5)."""

    def __init__(
        self,
        hidden: int,
        count: int,
        top_k: int,
        intermediate: int,
        shared: int = 0,
        act: ops.Activation = "silu",
        *,
        normalize: bool = True,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        like = {"dtype": dtype, "device": device}
        self.gate = SoftmaxRouter(hidden, count, top_k, normalize=normalize, **like)
        self.experts = Experts(count, hidden, intermediate, act, **like)
        if shared:
            self.shared_expert = GatedMLP(hidden, shared, act, **like)
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False, **like)

    @classmethod
    def from_parts(cls, moe: nn.Module) -> SparseMoE:
        """From a loaded transformers block. Its router is used as it is: whatever returns (…,
        scores, index)."""
        if not hasattr(moe, "gate") or not hasattr(moe, "experts"):
            raise UsageError(f"{type(moe).__name__} has no gate and experts")
        self = cls(1, 1, 1, 1, device="meta")
        self.gate, self.experts = moe.gate, Experts.from_parts(moe.experts)
        for name in ("shared_expert", "shared_experts"):
            if getattr(moe, name, None) is not None:
                setattr(self, name, GatedMLP.from_parts(getattr(moe, name)))
        if hasattr(moe, "shared_expert_gate"):
            self.shared_expert_gate = moe.shared_expert_gate
        check_nothing_lost(moe, self)
        return self.train(moe.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        _, scores, index = self.gate(x)
        out = self.experts(x, index, scores)
        if hasattr(self, "shared_expert"):
            out = out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        elif hasattr(self, "shared_experts"):
            out = out + self.shared_experts(x)
        return out.view_as(hidden_states)
