"""Who loads what. An allowlist each: a consumer not known to load a tensor does not get it."""

from __future__ import annotations

from . import engines, llama_cpp
from .families import FAMILIES
from .groups import Loads, Rejects

CONTAINERS = {
    "llama.cpp": frozenset({"gguf"}),
    "torch": frozenset({"gguf", "safetensors"}),
    "vllm": frozenset({"safetensors"}),
    "sglang": frozenset({"safetensors"}),
}
DEFAULT_CONSUMER = {"gguf": "llama.cpp", "safetensors": "torch"}


def offered(consumer: str) -> frozenset[str] | None:
    """The groups a consumer has any use for; None when it takes every group."""
    if consumer == "torch":
        return None
    return frozenset(llama_cpp.LOADED if consumer == "llama.cpp" else engines.LOADED[consumer])


def loads(consumer: str, container: str, architecture: str, group: str) -> Loads | Rejects:
    """Whether `consumer` loads the fused tensors of `group` in a checkpoint of `architecture`."""
    if consumer == "llama.cpp":
        return _llama_cpp(architecture, group)
    if container == "safetensors" and architecture not in FAMILIES:
        named = f"model type {architecture!r}" if architecture else "a checkpoint without a config"
        return Rejects("unknown-architecture", f"no row says what the layers of {named} hold")
    if consumer == "torch":
        return Loads()
    if rejects := engines.MISREAD.get((consumer, group, architecture)):
        return rejects
    if architecture in engines.LOADED[consumer].get(group, ()):
        return Loads()
    return Rejects(
        "consumer-unsupported", f"{consumer} is not known to load a fused {group} of {architecture}"
    )


def _llama_cpp(architecture: str, group: str) -> Loads | Rejects:
    if rejects := llama_cpp.MISREAD.get((group, architecture)):
        return rejects
    if group not in llama_cpp.LOADED:
        return Rejects("consumer-unsupported", f"llama.cpp has no fused form of {group}")
    builds, companions = llama_cpp.LOADED[group]
    row = builds.get(architecture)
    if isinstance(row, int):
        if architecture in llama_cpp.SCALE_IGNORED:
            companions = companions - {"scale", "input_scale"}
        return Loads(row, companions)
    return row or Rejects(
        "unknown-architecture",
        f"no row says how llama.cpp loads {group} in "
        + (architecture or "a file without an architecture"),
    )
