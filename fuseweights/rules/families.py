"""Hugging Face architectures: a row each, model_type → the rules its modules follow.

Names are those on disk (transformers 5 reverts its own expert stacking when it saves). Rows of q
that hold [query | gate] per head make no difference to stacking. Families whose checkpoints are
fused by themselves have `NATIVE` rows too: their parts and how rows are laid out, for un-fusing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .groups import Rule


def _qkv(path: str, parts: str = "q_proj k_proj v_proj", fused: str = "qkv_proj") -> Rule:
    return Rule("qkv", tuple(f"{path}.{part}" for part in parts.split()), f"{path}.{fused}")


def _gate_up(path: str, parts: str = "gate_proj up_proj", group: str = "gate_up") -> Rule:
    return Rule(group, tuple(f"{path}.{part}" for part in parts.split()), f"{path}.gate_up_proj")


ATTENTION = _qkv("self_attn")
MLP = _gate_up("mlp")
EXPERTS = Rule(
    "experts",
    ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    "mlp.experts.gate_up_proj",
)
SHARED = _gate_up("mlp.shared_expert", group="shared_gate_up")
SHARED_EXPERTS = _gate_up("mlp.shared_experts", group="shared_gate_up")
# transformers' own module is called mlp.experts, whatever the disk says
BLOCK_SPARSE = Rule(
    "experts",
    ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
    "mlp.experts.gate_up_proj",
)
MLA = Rule(
    "qkv_a",
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "self_attn.fused_qkv_a_proj",
    beside="self_attn.q_a_proj",
)
GDN = (
    Rule(
        "gdn_in_proj",
        tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
        "linear_attn.in_proj",
        instead=("gdn_qkvz", "gdn_ba"),
    ),
    Rule(
        "gdn_qkvz",
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        "linear_attn.in_proj_qkvz",
    ),
    Rule(
        "gdn_ba",
        ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        "linear_attn.in_proj_ba",
    ),
)
WHISPER = (ATTENTION, _qkv("encoder_attn", "k_proj v_proj", "kv_proj"))
LLAMA4 = (
    ATTENTION,
    _gate_up("feed_forward"),
    _gate_up("feed_forward.shared_expert", group="shared_gate_up"),
)

_ROWS: dict[str, tuple[Rule, ...]] = {
    """llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4
    gemma4_text granite olmo2 olmo3 smollm3 cohere2 internlm3 qwen2_5_vl qwen2_5_vl_text qwen3_vl
    qwen3_vl_text""": (ATTENTION, MLP),
    "qwen3_moe qwen2_moe": (ATTENTION, MLP, EXPERTS, SHARED),
    "glm4_moe": (ATTENTION, MLP, EXPERTS, SHARED_EXPERTS),
    "glm4 phi3 gpt_oss starcoder2 siglip siglip_text_model siglip_vision_model": (ATTENTION,),
    "mixtral minimax_m2": (ATTENTION, BLOCK_SPARSE),
    "llama4 llama4_text": LLAMA4,
    "qwen3_next": (ATTENTION, MLP, EXPERTS, SHARED),
    "qwen3_5 qwen3_5_text": (ATTENTION, *GDN, MLP),
    "qwen3_5_moe qwen3_5_moe_text": (ATTENTION, *GDN, MLP, EXPERTS, SHARED),
    "deepseek_v2 deepseek_v3 kimi_k2": (MLA, MLP, EXPERTS, SHARED_EXPERTS),
    "internlm2": (_gate_up("feed_forward", "w1 w3"),),
    "baichuan": (MLP,),
    "bert roberta": (_qkv("attention.self", "query key value"),),
    "vit": (_qkv("attention.attention", "query key value"),),
    "whisper": WHISPER,
    "gpt2 falcon gpt_neox bloom": (),
}
FAMILIES = {name: rules for names, rules in _ROWS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Native:
    """A module that the architecture itself stores fused.

    Its rows come in groups of heads, each holding some rows of every part; one group is plain
    stacking. `sizes` names the formula for them in layout/native.py. `axis` is the dimension of
    the weight that holds output rows: 1 in GPT-2's transposed layers.
    """

    group: str
    fused: str
    parts: tuple[str, ...]
    sizes: str
    axis: int = 0


def _native_qkv(path: str, fused: str, sizes: str, axis: int = 0) -> Native:
    parts = tuple(f"{path}.{part}_proj" for part in "qkv")
    return Native("qkv", f"{path}.{fused}", parts, sizes, axis)


_HALVES = Native("gate_up", "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "halves")
NATIVE: dict[str, tuple[Native, ...]] = {
    "phi3": (_native_qkv("self_attn", "qkv_proj", "stacked"), _HALVES),
    "glm4": (_HALVES,),
    "baichuan": (_native_qkv("self_attn", "W_pack", "thirds"),),
    "gpt2": (_native_qkv("attn", "c_attn", "thirds", axis=1),),
    "falcon": (_native_qkv("self_attention", "query_key_value", "grouped"),),
    "bloom": (_native_qkv("self_attention", "query_key_value", "per_head"),),
    "gpt_neox": (_native_qkv("attention", "query_key_value", "per_head"),),
    # interleaved per key head; apart under Qwen3.5's names and in its order
    "qwen3_next": (
        Native(
            "gdn_qkvz",
            "linear_attn.in_proj_qkvz",
            ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
            "gdn_qkvz",
        ),
        Native(
            "gdn_ba",
            "linear_attn.in_proj_ba",
            ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
            "gdn_ba",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class LlamaLike:
    """An architecture that computes what llama computes once its parts are apart, as long as
    these configuration entries have one of these values."""

    only_if: dict[str, tuple]


LLAMA_LIKE = {
    "phi3": LlamaLike({"partial_rotary_factor": (None, 1, 1.0), "sliding_window": (None,)}),
}
