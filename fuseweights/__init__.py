"""Fuse the weights of a finished model checkpoint without changing one bit of them."""

__version__ = "0.1.0"

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
from .planner import Group, Plan, Refusal
from .verifier import Difference, Verification

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
    "open_checkpoint",
    "plan",
    "unfuse",
    "verify",
    "verify_source_sha256",
]
