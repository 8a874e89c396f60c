"""Tiny transformers models whose layers are swapped for ours, and the yardsticks of the tests."""

from __future__ import annotations

import copy
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
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:  # around their start: 1, 0, or a log decay
                parameter.add_(noise * 0.1)
            # every dtype of a test has the same values
            parameter.copy_(parameter.bfloat16())
    model.set_experts_implementation("eager")  # the only one that knows float64
    return model.to(dtype).eval()


def swap(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """A copy of `model` with our modules in place of all that they know, and how many of each."""
    model, counts = copy.deepcopy(model), {}

    def replace(parent: nn.Module, name: str, module: nn.Module) -> None:
        setattr(parent, name, module)
        counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if hasattr(child, "gate") and hasattr(child, "experts"):
                try:
                    replace(parent, name, SparseMoE.from_parts(child))
                except UsageError:
                    counts["left"] = counts.get("left", 0) + 1
            elif (hasattr(child, "down_proj") and hasattr(child, "act_fn") and "MLP" in kind) or kind in ("Glm4MLP", "Phi3MLP"):
                replace(parent, name, GatedMLP.from_parts(child))
            elif kind == "Gemma4TextExperts":
                replace(parent, name, Experts.from_parts(child))
            elif hasattr(child, "in_proj_qkvz") or hasattr(child, "in_proj_qkv"):
                replace(parent, name, GatedDeltaNet.from_parts(child))
            elif "RMSNorm" in kind and "Gated" not in kind and hasattr(child, "weight"):
                replace(parent, name, RMSNorm.from_parts(child))
            elif any(hasattr(child, n) for n in ("q_proj", "query", "qkv_proj")):
                try:
                    replace(parent, name, FusedAttention.from_parts(child))
                except UsageError:
                    counts["left"] = counts.get("left", 0) + 1
    return model, counts


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()
