"""PyTorch modules that compute what the original model computes, from fused weights.

Parameter names are the fused checkpoint's. Importing this imports torch; `import fuseweights`
does not.
"""

from .attention import FusedAttention
from .delta_net import GatedDeltaNet
from .linear import FusedLinear, Section
from .mlp import GatedMLP
from .moe import Experts, SoftmaxRouter, SparseMoE
from .norm import AddRMSNorm, RMSNorm
from .state import StateDictError, load_state, split_state
from .weights import GGUFBlocks, Plain, Scaled

__all__ = [
    "AddRMSNorm",
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
