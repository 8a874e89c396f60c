"""PyTorch modules that compute what the original model computes, from fused weights.

Parameter names are the fused checkpoint's. Modules are imported when they are first asked for, so
that `fuseweights.nn.door`, which `import fuseweights` opens, costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import FusedAttention
    from .decode import Decoder
    from .delta_net import GatedDeltaNet
    from .linear import FusedLinear, Section
    from .mlp import GatedMLP
    from .moe import Experts, SoftmaxRouter, SparseMoE
    from .norm import AddRMSNorm, RMSNorm
    from .state import StateDictError, load_state, split_state
    from .weights import GGUFBlocks, Plain, Scaled

_HOMES = {
    "AddRMSNorm": "norm",
    "Decoder": "decode",
    "Experts": "moe",
    "FusedAttention": "attention",
    "FusedLinear": "linear",
    "GGUFBlocks": "weights",
    "GatedDeltaNet": "delta_net",
    "GatedMLP": "mlp",
    "Plain": "weights",
    "RMSNorm": "norm",
    "Scaled": "weights",
    "Section": "linear",
    "SoftmaxRouter": "moe",
    "SparseMoE": "moe",
    "StateDictError": "state",
    "load_state": "state",
    "split_state": "state",
}

__all__ = [
    "AddRMSNorm",
    "Decoder",
    "Experts",
    "FusedAttention",
    "FusedLinear",
    "GGUFBlocks",
    "GatedDeltaNet",
    "GatedMLP",
    "Plain",
    "RMSNorm",
    "Scaled",
    "Section",
    "SoftmaxRouter",
    "SparseMoE",
    "StateDictError",
    "load_state",
    "split_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
