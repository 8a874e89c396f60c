"""Fused or restored tensors → the files of one container. One module a container."""

from __future__ import annotations

from types import ModuleType

from ..checkpoint.model import Checkpoint
from ..manifest import Manifest
from . import directory, gguf

LAYOUTS: dict[str, ModuleType] = {"gguf": gguf, "safetensors": directory}


def layout_of(checkpoint: Checkpoint) -> ModuleType:
    """The module with this container's `read_manifest`, `fuse` and `unfuse`."""
    return LAYOUTS[checkpoint.container]


def read_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest of a checkpoint that fuseweights fused; None for any other."""
    return layout_of(checkpoint).read_manifest(checkpoint)
