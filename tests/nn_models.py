"""Tiny transformers models whose layers are swapped for ours, and the yardsticks of the tests."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import transformers
from hf_models import FAMILIES, _plain
from torch import Tensor, nn

from fuseweights.errors import UsageError
from fuseweights.nn import Experts, FusedAttention, GatedDeltaNet, GatedMLP, RMSNorm, SparseMoE

torch.set_num_threads(1)
SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random model whose every tensor is distinguishable; norms near what they are in life."""
    row = FAMILIES[family]
    torch.manual_seed(seed)
    kwargs = {**_plain(row.kwargs), **changes}
    config = getattr(transformers, row.config)(**kwargs)
    model = getattr(transformers, row.model)(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:  # around their start: 1, 0, or a log decay
                parameter.add_(noise * 0.1)
            # every dtype of a test has the same values
            parameter.copy_(parameter.bfloat16())
    model.set_experts_implementation("eager")  # the only one that knows float64
    return model.to(dtype).eval()


def swap(model: nn.Module, norms: bool = True) -> tuple[nn.Module, Counter]:
    """A copy of `model` with our modules in place of all that they know, and how many of each."""
    model, counts = copy.deepcopy(model), Counter()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            ours = _ours(child)
            if ours is None or (ours is RMSNorm and not norms):
                continue
            try:
                setattr(parent, name, ours.from_parts(child))
                counts[ours.__name__] += 1
            except UsageError:
                counts["left"] += 1
    return model, counts


def _ours(module: nn.Module) -> type[nn.Module] | None:
    kind, names = type(module).__name__, dict(module.named_children()).keys()
    if {"gate", "experts"} <= names:
        return SparseMoE
    if {"gate_proj", "up_proj", "down_proj"} <= names or kind in ("Glm4MLP", "Phi3MLP"):
        return GatedMLP
    if kind.endswith("Experts"):
        return Experts
    if names & {"in_proj_qkvz", "in_proj_qkv"}:
        return GatedDeltaNet
    if names & {"q_proj", "query", "qkv_proj"}:
        return FusedAttention
    if kind.endswith("RMSNorm") and hasattr(module, "weight"):
        return RMSNorm
    return None


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()
