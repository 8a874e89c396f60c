"""What vLLM and SGLang do with the name of a tensor, by family.

A simulation of the name substitution in their `load_weights`, not their code. Read in vLLM 0.33.0
(`vllm/model_executor/models`) and SGLang 0.5.23 (`python/sglang/srt/models`). Each row names its
source. Both engines build their models with fused modules (`qkv_proj`, `gate_up_proj`, ...) and
rename a checkpoint's parts to them, by substring. What differs is what becomes of a name that is
fused already: `v_proj` is a substring of `qkv_proj`, and `up_proj` of `gate_up_proj`.

Four loops are found:

    mapper  vLLM's `WeightsMapper.orig_to_new_stacked` (models/utils.py): every substring is
            replaced in turn, then `AutoWeightsLoader` looks the result up, or raises ValueError
    raise   the first substring found is replaced and the result looked up: KeyError
    mutate  as before, but a result that is no parameter goes on to the next substring, changed
            as it is, and is dropped in the end, with at best a warning
    copy    as before, but the next substring starts from the original name
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Shard = str | int | tuple[int, ...]
Stacked = tuple[tuple[str, str, Shard], ...]  # found in the name, replaced by, part


@dataclass(frozen=True)
class Outcome:
    """`loads` into `name`, whole if `shard` is None; or why it does not.

    raises    the engine stops with an error
    dropped   the tensor is skipped and its parameter stays uninitialised
    wrong     it is loaded, but not as the engine expects it
    unknown   it depends on what the engine finds out about the model as it starts
    """

    verdict: Literal["loads", "raises", "dropped", "wrong", "unknown"]
    name: str
    shard: Shard | None = None


@dataclass(frozen=True)
class Loader:
    source: str
    stacked: Stacked
    modules: tuple[str, ...]  # of a layer, as the engine names them: those that matter here
    loop: Literal["mapper", "raise", "mutate", "copy"]
    missing: Literal["raises", "dropped"] = "raises"  # a name without substitution, no parameter
    rename: tuple[tuple[str, str], ...] = ()  # before everything else
    # parts that are held back until both are there, then concatenated; found by substring
    joined: tuple[str, str, str] | None = None
    # parts whose rows are reordered while loading, found by path segment
    reordered: tuple[str, ...] = ()
    # what becomes of `experts.gate_up_proj` [E, 2I, H], without `.weight`
    stacked_experts: Literal["loads", "raises", "dropped", "native"] | None = None
    runtime: bool = False  # modules are fused only where the engine's matcher succeeds


QKV = (("q_proj", "qkv_proj", "q"), ("k_proj", "qkv_proj", "k"), ("v_proj", "qkv_proj", "v"))
GATE_UP = (("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 1))
GDN_PARTS = (
    ("in_proj_qkv", "in_proj_qkvz", (0, 1, 2)),
    ("in_proj_z", "in_proj_qkvz", 3),
    ("in_proj_b", "in_proj_ba", 0),
    ("in_proj_a", "in_proj_ba", 1),
)
MLA_PARTS = (
    ("q_a_proj", "fused_qkv_a_proj", 0),
    ("kv_a_proj_with_mqa", "fused_qkv_a_proj", 1),
)
CROSS = ((".k_proj", ".kv_proj", "k"), (".v_proj", ".kv_proj", "v"))  # vLLM numbers them
BERT_QKV = (("query", "qkv_proj", "q"), ("key", "qkv_proj", "k"), ("value", "qkv_proj", "v"))


def around(stacked: Stacked, before: str = "", after: str = "") -> Stacked:
    """The same substitutions with more of the path: `.q_proj`, or `in_proj_qkv.`."""
    return tuple((f"{before}{a}{after}", f"{before}{b}{after}", s) for a, b, s in stacked)


DOTTED = around(QKV + GATE_UP, ".")
BARE = QKV + GATE_UP
DENSE = ("self_attn.qkv_proj", "mlp.gate_up_proj")
SHARED = ("mlp.shared_expert.gate_up_proj", "mlp.shared_experts.gate_up_proj")
GDN = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
MOE_STACKED = around(QKV, ".") + tuple(
    row
    for parent in (".mlp.", ".shared_expert.", ".shared_experts.")
    for row in around(GATE_UP, parent)
)


def vllm(
    source: str, stacked: Stacked = DOTTED, modules: tuple[str, ...] = DENSE, **more
) -> Loader:
    return Loader(f"vllm/model_executor/models/{source}", stacked, modules, "mapper", **more)


def legacy_vllm(source: str, stacked: Stacked, modules: tuple[str, ...], **more) -> Loader:
    return Loader(f"vllm/model_executor/models/{source}", stacked, modules, "raise", **more)


_V_QWEN3_NEXT = vllm(
    "qwen3_next.py: Qwen3NextModel.hf_to_vllm_mapper",
    MOE_STACKED,
    DENSE + SHARED + GDN,
    stacked_experts="loads",
)
_V_QWEN3_5 = vllm(
    "qwen3_5.py: Qwen3_5Model.hf_to_vllm_mapper",
    MOE_STACKED + around(GDN_PARTS, "."),
    DENSE + SHARED + GDN,
    stacked_experts="loads",
)
_V_DEEPSEEK = legacy_vllm(
    "deepseek_v2.py: DeepseekV2Model.load_weights",
    GATE_UP + MLA_PARTS,
    ("self_attn.fused_qkv_a_proj", "mlp.gate_up_proj", "mlp.shared_experts.gate_up_proj"),
    stacked_experts="raises",
)
_V_GEMMA4 = vllm(
    "gemma4.py: _gemma4_layer_weights_mapper",
    around(QKV, ".self_attn.", ".") + around(GATE_UP, ".mlp.", "."),
    stacked_experts="native",
)
_V_LLAMA4 = legacy_vllm(
    "llama4.py: Llama4Model.load_weights, Llama4ForCausalLM.permute_qk_weight_for_rotary",
    DOTTED,
    ("self_attn.qkv_proj", "feed_forward.gate_up_proj", "feed_forward.shared_expert.gate_up_proj"),
    reordered=("q_proj", "k_proj"),
    stacked_experts="native",
)
_V_BERT = vllm(
    "bert.py: BertModel.hf_to_vllm_mapper", around(BERT_QKV, ".self."), ("attention.self.qkv_proj",)
)
_V_SIGLIP = vllm("siglip.py: Siglip*Transformer", around(QKV, "."), ("self_attn.qkv_proj",))
_V_RUNTIME = vllm(
    "transformers/base.py, transformers/fusers/: registry.py sends it to TransformersForCausalLM",
    runtime=True,
)

#: By the names of the fixtures' families, for their text models: what becomes of a vision tower is
#: not said. A family that is not here has no model in the engine.
VLLM: Mapping[str, Loader] = {
    **{
        family: vllm(source)
        for source, families in {
            "llama.py: LlamaModel.hf_to_vllm_mapper": (
                "llama",
                "llama_bias",
                "llama_tied",
                "mistral",
                "internlm3",
            ),
            "qwen2.py: Qwen2Model.hf_to_vllm_mapper": ("qwen2", "qwen3", "qwen3_vl"),
            "gemma2.py: Gemma2ForCausalLM.hf_to_vllm_mapper": ("gemma2",),
            "gemma3.py: Gemma3Model.hf_to_vllm_mapper": ("gemma3", "gemma3_text"),
            "granite.py: GraniteModel.hf_to_vllm_mapper": ("granite",),
            "commandr.py: CohereForCausalLM.hf_to_vllm_mapper": ("cohere2",),
        }.items()
        for family in families
    },
    "qwen2_5_vl": vllm(
        "qwen2_5_vl.py: Qwen2_5_VisionTransformer.hf_to_vllm_mapper; qwen2.py for the text",
        DOTTED,
        (*DENSE, "attn.qkv"),
    ),
    "glm4_moe": vllm(
        "glm4_moe.py: Glm4MoeModel.hf_to_vllm_mapper",
        MOE_STACKED,
        DENSE + SHARED,
        stacked_experts="loads",
    ),
    "glm4": vllm("glm4.py: Glm4Model"),
    "phi3": vllm("phi3.py: Phi3ForCausalLM"),
    "llama4": _V_LLAMA4,
    "llama4_text": _V_LLAMA4,
    "qwen3_moe": vllm(
        "qwen3_moe.py: Qwen3MoeModel.hf_to_vllm_mapper",
        MOE_STACKED,
        DENSE + SHARED,
        stacked_experts="loads",
    ),
    "qwen2_moe": vllm(
        "qwen2_moe.py: Qwen2MoeForCausalLM.hf_to_vllm_mapper",
        MOE_STACKED,
        DENSE + SHARED,
        stacked_experts="loads",
    ),
    "mixtral": vllm(
        "mixtral.py: MixtralModel.hf_to_vllm_mapper",
        around(QKV, "."),
        ("self_attn.qkv_proj",),
        stacked_experts="dropped",
    ),
    "minimax_m2": vllm(
        "minimax_m2.py: MiniMaxM2Model.hf_to_vllm_mapper",
        around(QKV, "."),
        ("self_attn.qkv_proj",),
        stacked_experts="dropped",
    ),
    "qwen3_next": _V_QWEN3_NEXT,
    "qwen3_5": _V_QWEN3_5,
    "qwen3_5_text": _V_QWEN3_5,
    "qwen3_5_moe": _V_QWEN3_5,
    "qwen3_5_moe_text": _V_QWEN3_5,
    "gemma3n_text": vllm(
        "gemma3n.py: Gemma3nTextModel.hf_to_vllm_mapper, _kv_sharing_weights_mapper",
        around(QKV, ".self_attn.", ".") + around(GATE_UP, "."),
    ),
    "gemma4": _V_GEMMA4,
    "gemma4_text": _V_GEMMA4,
    "gemma4_k_eq_v": _V_GEMMA4,
    "deepseek_v2": _V_DEEPSEEK,
    "deepseek_v3": _V_DEEPSEEK,
    "kimi_k2": _V_DEEPSEEK,
    "gpt_oss": legacy_vllm(
        "gpt_oss.py: GptOssModel._load_weights_other, GptOssForCausalLM.hf_to_vllm_mapper",
        around(QKV, "."),
        ("attn.qkv_proj",),
        rename=((".self_attn.", ".attn."),),
        stacked_experts="native",
    ),
    "internlm2": vllm(
        "internlm2.py: InternLM2Model.hf_to_vllm_mapper",
        ((".w1", ".gate_up_proj", 0), (".w3", ".gate_up_proj", 1)),
        ("feed_forward.gate_up_proj", "attention.wqkv"),
    ),
    "bert": _V_BERT,
    "roberta": _V_BERT,
    "siglip": _V_SIGLIP,
    "whisper": vllm(
        "whisper.py: WhisperForConditionalGeneration.hf_to_vllm_mapper",
        around(QKV, ".self_attn.") + around(CROSS, ".encoder_attn"),
        ("self_attn.qkv_proj", "encoder_attn.kv_proj"),
    ),
    "olmo2": _V_RUNTIME,
    "olmo3": _V_RUNTIME,
    "smollm3": _V_RUNTIME,
    "starcoder2": _V_RUNTIME,
}


def sglang(
    source: str,
    loop: Literal["raise", "mutate", "copy"],
    missing: Literal["raises", "dropped"],
    stacked: Stacked = BARE,
    modules: tuple[str, ...] = DENSE,
    **more,
) -> Loader:
    return Loader(f"sglang/srt/models/{source}", stacked, modules, loop, missing, **more)


_GDN_WHOLE = around(GDN_PARTS, "", ".")  # SGLang has the dot that vLLM lacks
_STRIPPED = ("qkv_proj", "mlp.gate_up_proj", *SHARED, *GDN)  # `.self_attn` is taken out
_S_LLAMA = sglang("llama.py: LlamaForCausalLM._legacy_load_weights", "mutate", "dropped", DOTTED)
_S_GEMMA3 = sglang("gemma3_causal.py: Gemma3ForCausalLM.load_weights", "raise", "raises")
_S_QWEN3_5 = sglang(
    "qwen3_5.py: Qwen3_5*.load_weights",
    "mutate",
    "dropped",
    BARE + _GDN_WHOLE,
    _STRIPPED,
    rename=((".self_attn", ""),),
    stacked_experts="loads",  # but from then on it looks for a stacked down_proj too
)
_S_DEEPSEEK = sglang(
    "deepseek_common/deepseek_weight_loader.py: DeepseekV2WeightLoaderMixin.do_load_weights",
    "raise",
    "dropped",
    GATE_UP,
    (
        "self_attn.fused_qkv_a_proj_with_mqa",
        "mlp.gate_up_proj",
        "mlp.shared_experts.gate_up_proj",
    ),
    joined=("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa"),
    stacked_experts="loads",
)
_S_GEMMA4 = sglang(
    "gemma4_causal.py: Gemma4ForCausalLM.load_weights", "copy", "dropped", stacked_experts="native"
)
_S_LLAMA4 = sglang(
    "mllama4.py: Llama4ForConditionalGeneration.load_weights, permute_qk_weight_for_rotary",
    "raise",
    "raises",
    around(QKV, ".self_attn.")
    + around(GATE_UP, ".shared_expert.")
    + around(GATE_UP, ".feed_forward."),
    ("self_attn.qkv_proj", "feed_forward.gate_up_proj", "feed_forward.shared_expert.gate_up_proj"),
    reordered=("q_proj", "k_proj"),
    stacked_experts="native",
)
_S_BERT = sglang(
    "bert.py, roberta.py: load_weights",
    "raise",
    "raises",
    BERT_QKV,
    ("attention.self_attn.qkv_proj",),
    rename=(("self", "self_attn"),),
)


def _sglang_moe(source: str) -> Loader:
    return sglang(source, "mutate", "dropped", BARE, DENSE + SHARED, stacked_experts="dropped")


SGLANG: Mapping[str, Loader] = {
    "llama": _S_LLAMA,
    "llama_bias": _S_LLAMA,
    "llama_tied": _S_LLAMA,
    "mistral": _S_LLAMA,
    "internlm3": _S_LLAMA,
    "phi3": _S_LLAMA,
    "qwen2": sglang("qwen2.py: Qwen2ForCausalLM._legacy_load_weights", "mutate", "dropped"),
    "qwen3": sglang("qwen3.py: Qwen3ForCausalLM.load_weights", "raise", "dropped"),
    "gemma2": sglang("gemma2.py: Gemma2ForCausalLM.load_weights", "raise", "raises"),
    "gemma3": _S_GEMMA3,
    "gemma3_text": _S_GEMMA3,
    "granite": sglang("granite.py: GraniteForCausalLM.load_weights", "raise", "raises", DOTTED),
    "olmo2": sglang("olmo2.py: Olmo2ForCausalLM.load_weights", "raise", "raises"),
    "cohere2": sglang("commandr.py: CohereForCausalLM.load_weights", "raise", "raises"),
    "glm4": sglang("glm4.py: Glm4ForCausalLM.load_weights", "mutate", "dropped", DOTTED),
    "glm4_moe": _sglang_moe("glm4_moe.py: Glm4MoeForCausalLM.load_weights"),
    "qwen3_moe": _sglang_moe("qwen3_moe.py: Qwen3MoeForCausalLM.load_weights"),
    "qwen2_moe": _sglang_moe("qwen2_moe.py: Qwen2MoeForCausalLM.load_weights"),
    "mixtral": sglang(
        "mixtral.py: MixtralForCausalLM.load_weights",
        "raise",
        "dropped",
        QKV,
        ("self_attn.qkv_proj",),
        stacked_experts="dropped",
    ),
    "minimax_m2": sglang(
        "minimax_m2.py: MiniMaxM2ForCausalLM.load_weights",
        "mutate",
        "dropped",
        modules=("self_attn.qkv_proj",),
        stacked_experts="dropped",
    ),
    "qwen3_next": sglang(
        "qwen3_next.py: Qwen3NextForCausalLM.load_weights",
        "copy",
        "raises",
        BARE + _GDN_WHOLE,
        _STRIPPED,
        rename=((".self_attn", ""),),
        stacked_experts="raises",
    ),
    "qwen3_5": _S_QWEN3_5,
    "qwen3_5_text": _S_QWEN3_5,
    "qwen3_5_moe": _S_QWEN3_5,
    "qwen3_5_moe_text": _S_QWEN3_5,
    "llama4": _S_LLAMA4,
    "llama4_text": _S_LLAMA4,
    "gemma3n_text": sglang(
        "gemma3n_causal.py: Gemma3nForCausalLM.load_weights", "mutate", "dropped", DOTTED
    ),
    "gemma4": _S_GEMMA4,
    "gemma4_text": _S_GEMMA4,
    "gemma4_k_eq_v": _S_GEMMA4,
    "deepseek_v2": _S_DEEPSEEK,
    "deepseek_v3": _S_DEEPSEEK,
    "kimi_k2": _S_DEEPSEEK,
    "gpt_oss": sglang(
        "gpt_oss.py: GptOssForCausalLM._load_normal_weights",
        "mutate",
        "dropped",
        QKV,
        ("self_attn.qkv_proj",),
        stacked_experts="native",
    ),
    "starcoder2": sglang(
        "starcoder2.py: Starcoder2ForCausalLM.load_weights",
        "raise",
        "dropped",
        QKV,
        ("self_attn.qkv_proj",),
    ),
    "internlm2": sglang(
        "internlm2.py: InternLM2ForCausalLM.load_weights",
        "raise",
        "raises",
        (("w1", "gate_up_proj", 0), ("w3", "gate_up_proj", 1)),
        ("feed_forward.gate_up_proj", "attention.wqkv"),
    ),
    "baichuan": sglang(
        "baichuan.py: BaiChuanBaseForCausalLM.load_weights",
        "raise",
        "raises",
        GATE_UP,
        ("self_attn.W_pack", "mlp.gate_up_proj"),
    ),
    "bert": _S_BERT,
    "roberta": _S_BERT,
    "whisper": sglang(
        "whisper.py: WhisperForConditionalGeneration.load_weights",
        "mutate",
        "dropped",
        around(QKV, ".self_attn.") + around(CROSS, ".encoder_attn"),
        ("self_attn.qkv_proj", "encoder_attn.kv_proj"),
    ),
    "qwen2_5_vl": sglang(
        "qwen2_5_vl.py: Qwen2_5_VLForConditionalGeneration.load_weights",
        "raise",
        "dropped",
        around(QKV, ".") + GATE_UP[::-1],
    ),
    "qwen3_vl": sglang(
        "qwen3_vl.py: Qwen3VLForConditionalGeneration.load_weights",
        "mutate",
        "dropped",
        around(QKV, ".") + GATE_UP[::-1],
    ),
}

ENGINES: Mapping[str, Mapping[str, Loader]] = {"vllm": VLLM, "sglang": SGLANG}

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks|h)\.\d+\.(.+)")


def outcome(engine: str, family: str, name: str) -> Outcome:
    """What `engine` does with the tensor `name` of a checkpoint of `family`."""
    loader = ENGINES[engine].get(family)
    if loader is None:
        return Outcome("raises", name)
    for old, new in loader.rename:
        name = name.replace(old, new)
    if name.endswith("experts.gate_up_proj"):
        verdict = loader.stacked_experts or "raises"
        return Outcome("loads" if verdict == "native" else verdict, name)
    if loader.runtime and _in(loader, name):
        return Outcome("unknown", name)
    if loader.reordered and _in(loader, name) and name.split(".")[-2] == "qkv_proj":
        return Outcome("wrong", name)
    return {"mapper": _mapper, "raise": _raise, "mutate": _mutate, "copy": _copy}[loader.loop](
        loader, name
    )


def _in(loader: Loader, name: str) -> bool:
    """Whether the engine's model has a parameter of that name (or may have: a companion)."""
    found = _IN_LAYER.search(name)
    rest = found.group(1) if found else name
    return any(rest.startswith(f"{module}.") for module in loader.modules)


def _absent(loader: Loader, name: str, verdict: Literal["raises", "dropped"]) -> Outcome:
    # a bias that the model lacks is skipped everywhere: GPTQ writes biases of zeros
    return Outcome("dropped" if name.endswith(".bias") else verdict, name)


def _mapper(loader: Loader, name: str) -> Outcome:
    shard: Shard | None = None
    for old, new, part in loader.stacked:
        if old in name:
            name, shard = name.replace(old, new, 1), part
    if _in(loader, name):
        return Outcome("loads", name, shard)
    return _absent(loader, name, "raises")


def _raise(loader: Loader, name: str) -> Outcome:
    for old, new, part in loader.stacked:
        if old in name:
            replaced = name.replace(old, new)
            if _in(loader, replaced):
                return Outcome("loads", replaced, part)
            return _absent(loader, replaced, "raises")
    return _otherwise(loader, name)


def _mutate(loader: Loader, name: str) -> Outcome:
    for old, new, part in loader.stacked:
        if old in name:
            name = name.replace(old, new)
            if _in(loader, name):
                return Outcome("loads", name, part)
    return _otherwise(loader, name)


def _copy(loader: Loader, name: str) -> Outcome:
    for old, new, part in loader.stacked:
        if old in name and _in(loader, name.replace(old, new)):
            return Outcome("loads", name.replace(old, new), part)
    return _otherwise(loader, name)


def _otherwise(loader: Loader, name: str) -> Outcome:
    """No part of anything: the name itself must be a parameter's."""
    if loader.joined is not None:
        first, second, fused = loader.joined
        for index, part in enumerate((first, second)):
            if f".{part}." in name:
                return Outcome("loads", name.replace(part, fused), index)
            if part in name:  # held back for a partner that never comes
                return Outcome("dropped", name)
    if _in(loader, name):
        return Outcome("loads", name)
    return _absent(loader, name, loader.missing)
