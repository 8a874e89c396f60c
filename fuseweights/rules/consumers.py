"""Who loads what. An allowlist each: a consumer not known to load a tensor does not get it."""

from __future__ import annotations

from . import llama_cpp
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
    return frozenset(llama_cpp.LOADED) if consumer == "llama.cpp" else None


def loads(consumer: str, architecture: str, group: str) -> Loads | Rejects:
    """Whether `consumer` loads the fused tensors of `group` in a checkpoint of `architecture`."""
    if consumer == "torch":
        return Loads()
    if (group, architecture) in llama_cpp.MISREAD:
        return llama_cpp.MISREAD[group, architecture]
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
