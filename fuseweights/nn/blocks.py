"""Modules around GGUF blocks that are not one plain stack: parts of several types, experts, and
embedding tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .linear import FusedLinear, Section


class MixedLinear(nn.Module):
    """One layer's parts in several stacks, because their types differ (Q4_K_M keeps v in Q6_K):
    what `FusedLinear` is to its caller, with a product a stack."""

    def __init__(self, stacks: Sequence[FusedLinear]):
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    @property
    def sections(self) -> dict[str, tuple[Section, ...]]:
        return {name: s for stack in self.stacks for name, s in stack.sections.items()}

    @property
    def rows(self) -> list[int]:
        return [rows for stack in self.stacks for rows in stack.rows]

    @property
    def in_features(self) -> int:
        return self.stacks[0].in_features

    @property
    def out_features(self) -> int:
        return sum(self.rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([stack(x) for stack in self.stacks], -1)

    def gated(self, x: Tensor, act: ops.Activation) -> Tensor:
        """act(gate) · up, where gate and up are the parts: [..., K] → [..., ΣN / 2]."""
        return ops.gated(self(x), act)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Each part's output, views of y [..., ΣN]."""
        return y.split(self.rows, dim=-1)


class BlockExperts(nn.Module):
    """Stacked experts in the types of a GGUF file: `gate_up_proj` [E, 2I, bytes a row], gate rows
    first, `down_proj` [E, H, bytes a row]."""

    def __init__(self, tensors: Mapping[str, Tensor], formats: Mapping[str, Any], act: str):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.formats, self.act = dict(formats), act

    def forward(self, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        """x [T, H], index and scores [T, k] → [T, H]."""
        stacks = {"gate_up": self.gate_up_proj, "down": self.down_proj}
        formats = {"gate_up": self.formats["gate_up_proj"], "down": self.formats["down_proj"]}
        return ops.block_experts(x, index, scores, stacks, formats, self.act)


class BlockEmbedding(nn.Module):
    """Rows of a quantized table [N, bytes a row], dequantized as they are looked up; times
    `scale` where the architecture scales its embeddings (Gemma)."""

    def __init__(self, weight: Tensor, format: Any, dtype: torch.dtype, scale: float | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.format, self.dtype = format, dtype
        if scale is not None:  # rounded to the dtype, as transformers' is when it multiplies
            scale = torch.tensor(scale, dtype=dtype, device=weight.device)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        rows = {"weight": self.weight[ids.flatten()]}
        out = self.format.dequantize(rows, self.dtype).to(self.dtype).unflatten(0, ids.shape)
        return out if self.scale is None else out * self.scale
