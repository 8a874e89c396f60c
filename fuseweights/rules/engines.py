"""Which fused keys of a Hugging Face directory vLLM and SGLang load, by architecture and group.

Read in the loaders of vLLM 0.33 and SGLang 0.5.23; tests/engine_mapping.py follows their name
mapping. An engine that would drop a fused key without a word is as bad as one that fails, so what
is not listed is refused.
"""

from __future__ import annotations

import re

from .groups import Rejects

# The text model's own layers, with or without a vision-language prefix.
TEXT_LAYER = re.compile(
    r"^(?:(?:model|language_model|bert|roberta|text_model|vision_model|encoder|decoder)\.)*layers?\.\d+$"
)

_QKV_AND_GATE_UP_VLLM = """
    llama mistral qwen2 qwen3 gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    granite cohere2 internlm3 qwen2_5_vl qwen3_vl qwen3_5 qwen3_5_text
"""
_LOADED: dict[str, dict[str, str]] = {
    "vllm": {
        "qkv": _QKV_AND_GATE_UP_VLLM
        + """
            qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text glm4 glm4_moe mixtral
            minimax_m2 gpt_oss bert roberta siglip
        """,
        "gate_up": _QKV_AND_GATE_UP_VLLM
        + "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text glm4_moe internlm2"
        + " llama4 llama4_text",
        "shared_gate_up": "qwen2_moe qwen3_next qwen3_5_moe qwen3_5_moe_text glm4_moe"
        + " llama4 llama4_text",
        "experts": "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text glm4_moe",
        "qkv_a": "deepseek_v2 deepseek_v3 kimi_k2",
    },
    "sglang": {
        "qkv": """
            llama mistral granite glm4 internlm3 qwen3_next gemma4 gemma4_text gemma3n
            gemma3n_text bert roberta qwen2_5_vl qwen3_vl
        """,
        "gate_up": """
            llama mistral granite internlm2 internlm3 gemma4 gemma4_text gemma3n gemma3n_text
            llama4 llama4_text
        """,
        "shared_gate_up": "qwen3_next llama4 llama4_text",
        "gdn_qkvz": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
        "gdn_ba": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    },
}
LOADED = {
    engine: {group: frozenset(names.split()) for group, names in groups.items()}
    for engine, groups in _LOADED.items()
}


def _rejects(detail: str) -> Rejects:
    return Rejects("consumer-unsupported", detail)


# Fused keys that load, or are dropped without a word, and then compute something else.
MISREAD: dict[tuple[str, str, str], Rejects] = {
    **{
        (engine, "qkv", name): _rejects(
            f"{engine} permutes llama4's q and k while loading, by their names: a fused qkv "
            "loads and computes wrong"
        )
        for engine in LOADED
        for name in ("llama4", "llama4_text")
    },
    **{
        ("sglang", "qkv_a", name): _rejects(
            "sglang waits for a partner of the fused tensor that never comes: uninitialised"
        )
        for name in ("deepseek_v2", "deepseek_v3", "kimi_k2")
    },
    **{
        ("vllm", group, name): _rejects(f"vllm's loader makes {key} of the fused name and fails")
        for group, key in (("gdn_qkvz", "in_proj_qkvzz"), ("gdn_ba", "in_proj_baa"))
        for name in ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    },
}

# Quantization methods that an engine cannot load at all, and groups it loads only unquantized.
NO_METHOD = {("vllm", "bitsandbytes"): _rejects("vllm 0.33 has no bitsandbytes of its own")}
PLAIN_ONLY = frozenset({"experts"})
# Engines that cut fused scales with floor division, so that the last part must fit too.
EVERY_PART_ALIGNED = frozenset({"sglang"})
