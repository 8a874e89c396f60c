"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from . import ops
from .linear import FusedLinear, Section, product
from .state import check_nothing_lost

GATE_UP = ("gate_proj", "up_proj")


class GatedMLP(nn.Module):
    """down_proj(act(gate) · up), with gate and up from one product: `gate_up_proj` [2I, H], gate
    rows first, `down_proj` [H, I]; biases if any."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        act: ops.Activation = "silu",
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        like = {"bias": bias, "dtype": dtype, "device": device}
        self.gate_up_proj = FusedLinear(hidden, dict.fromkeys(GATE_UP, intermediate), **like)
        self.down_proj = nn.Linear(intermediate, hidden, **like)
        self.act = act

    @classmethod
    def from_parts(cls, mlp: nn.Module) -> GatedMLP:
        """From a loaded transformers MLP: gate_proj and up_proj, or a gate_up_proj that the
        architecture itself has (Phi-3, GLM-4); its down_proj is used as it is."""
        self = cls(1, 1, device="meta")
        self.act = activation_of(
            next(getattr(mlp, name) for name in ("act_fn", "activation_fn") if hasattr(mlp, name))
        )
        if hasattr(mlp, "gate_up_proj"):
            self.gate_up_proj = around(mlp.gate_up_proj, lambda n: dict.fromkeys(GATE_UP, n // 2))
        else:
            parts = {name: getattr(mlp, name) for name in GATE_UP}
            self.gate_up_proj = FusedLinear.from_parts(parts)
        self.down_proj = mlp.down_proj
        check_nothing_lost(mlp, self)
        return self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.down_proj, self.gate_up_proj.gated(x, self.act))


def around(linear: nn.Module, sections: Callable[[int], dict[str, int | Section]]) -> FusedLinear:
    """A FusedLinear that shares a natively fused layer's tensors."""
    tensors = dict(linear.named_parameters())
    return FusedLinear.from_tensors(sections(linear.weight.shape[0]), tensors)


def activation_of(function: Callable[[Tensor], Tensor]) -> ops.Activation:
    """The name of an activation, told by what it computes: transformers has many for the same."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    for name, ours in ops.ACTIVATIONS.items():
        if torch.allclose(function(x), ours(x), rtol=0, atol=1e-9):
            return name
    raise UsageError(f"{function} is none of {', '.join(ops.ACTIVATIONS)}")
