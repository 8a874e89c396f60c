"""Who loads what. An allowlist each: a consumer not known to load a tensor does not get it.

llama.cpp, numbers are first builds: read from its source and release history, or, where only
`TESTED` stands, run on that build (tests/test_llama_cpp.py runs the table's main rows). A loaded
file must also compute the same: architectures whose graph ignores a fused tensor that their
loader accepts are listed with what happens.
"""

from __future__ import annotations

from .groups import Loads, Rejects

CONTAINERS = {
    "llama.cpp": frozenset({"gguf"}),
    "torch": frozenset({"gguf", "safetensors"}),
    "vllm": frozenset({"safetensors"}),
    "sglang": frozenset({"safetensors"}),
}
DEFAULT_CONSUMER = {"gguf": "llama.cpp", "safetensors": "torch"}

TESTED = 11549

_CRASHES = Rejects(
    "consumer-unsupported", "llama.cpp's loader accepts it, then its graph crashes on the absent q"
)
_INTERLEAVED = Rejects(
    "order-mismatch",
    "llama.cpp reads z inside ssm_in interleaved per key head; stacked rows load and compute wrong",
)

_QKV = {
    "llama": 8929,
    "qwen2": 8929,
    "qwen3": 8929,
    "qwen3moe": 8929,
    "gemma3": 10068,
    "gemma4": 11063,
    "qwen35": 11063,
    "qwen35moe": 11063,
    "qwen3next": 11063,
    "bailingmoe3": _CRASHES,
    "glm5-next": _CRASHES,
    "kimi-k3": _CRASHES,
    "qwen4exp": _CRASHES,
}
_EXPERTS = {
    "qwen35moe": 8672,
    "qwen3next": 8672,
    "gemma4": 9093,
    "deepseek2": TESTED,
    "mistral4": TESTED,
    "cohere2moe": TESTED,
    "hy_v3": TESTED,
    "qwen4exp": TESTED,
}
_LLAMA_CPP = {
    "qkv": (_QKV, frozenset({"weight", "bias", "scale", "input_scale"})),
    "experts": (_EXPERTS, frozenset({"weight", "bias"})),
}
_LLAMA_CPP_ARCHITECTURES = frozenset(_QKV) | frozenset(_EXPERTS)


def offered(consumer: str, container: str) -> frozenset[str] | None:
    """The groups a consumer has any use for; None when it takes every group."""
    return frozenset(_LLAMA_CPP) if consumer == "llama.cpp" else None


def loads(consumer: str, container: str, architecture: str, group: str) -> Loads | Rejects:
    """Whether `consumer` loads the fused tensors of `group` in a checkpoint of `architecture`."""
    if consumer == "torch":
        return Loads()
    if group not in _LLAMA_CPP:
        if group == "gdn_qkvz" and architecture == "qwen3next":
            return _INTERLEAVED
        return Rejects("consumer-unsupported", f"llama.cpp has no fused form of {group}")
    if architecture not in _LLAMA_CPP_ARCHITECTURES:
        return Rejects(
            "unknown-architecture",
            f"no row says how llama.cpp loads {architecture or 'a file without an architecture'}",
        )
    builds, companions = _LLAMA_CPP[group]
    row = builds.get(architecture)
    if isinstance(row, int):
        return Loads(row, companions)
    return row or Rejects(
        "consumer-unsupported", f"llama.cpp does not load a fused {group} for {architecture}"
    )
