"""Fuse the weights of a finished model checkpoint without changing one bit of them."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .api import (
    Inspection,
    convert,
    inspect,
    open_checkpoint,
    plan,
    unfuse,
    verify,
    verify_source_sha256,
)
from .errors import (
    CorruptError,
    FuseweightsError,
    RefusedError,
    SourceChangedError,
    UsageError,
    WriteError,
)
from .nn.door import install as _open_door
from .planner import Group, Plan, Refusal
from .verifier import Difference, Verification

if TYPE_CHECKING:
    from .nn.gguf_model import load_model
    from .nn.load import load_state_dict
    from .nn.patch import patch_model, unpatch_model

__all__ = [
    "CorruptError",
    "Difference",
    "FuseweightsError",
    "Group",
    "Inspection",
    "Plan",
    "Refusal",
    "RefusedError",
    "SourceChangedError",
    "UsageError",
    "Verification",
    "WriteError",
    "convert",
    "inspect",
    "load_model",
    "load_state_dict",
    "open_checkpoint",
    "patch_model",
    "plan",
    "unfuse",
    "unpatch_model",
    "verify",
    "verify_source_sha256",
]

# Needs torch: imported when first asked for.
_WITH_TORCH = {
    "load_model": "gguf_model",
    "load_state_dict": "load",
    "patch_model": "patch",
    "unpatch_model": "patch",
}


def __getattr__(name: str):
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".nn.{_WITH_TORCH[name]}", __name__), name)


# transformers loads a fused directory once its registry of fusions knows our name.
_open_door()
