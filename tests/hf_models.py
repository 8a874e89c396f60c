"""Tiny random checkpoints, one row a family.

`save("llama", directory)` instantiates the real transformers class with a small random
configuration and writes it with `save_pretrained`, so that names, order, shapes and files are
the library's own. Families that live in remote code have no class here: their state dict is
built to the names that their modelling files use, and written the way the library writes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Config = Mapping[str, Any]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

LAYERS = 2
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
MLP = 96
VOCAB = 128

#: What nearly every decoder calls its sizes.
TEXT: Config = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITH_HEAD_DIM: Config = {**TEXT, "head_dim": HEAD_DIM}
EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: Gated DeltaNet: two key heads, four value heads.
GDN: Config = {
    **WITH_HEAD_DIM,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
GDN_MOE: Config = {**GDN, **EXPERTS, "shared_expert_intermediate_size": 48}

QWEN_VISION: Config = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
}
ENCODER: Config = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
VISION: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MLA: Config = {
    **TEXT,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Family:
    """A class of transformers, its configuration class, and small sizes.

    `extra` yields tensors that official checkpoints have and the class does not: MTP layers.
    """

    model: str
    config: str
    kwargs: Config
    extra: Callable[[Config], Shapes] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Remote:
    """A model that only exists as remote code: config.json and tensors by hand."""

    architectures: tuple[str, ...]
    model_type: str
    config: Config
    shapes: Callable[[Config], Shapes] = field(repr=False)


def _decoder(prefix: str, norm: str, layers: Config, config: Config) -> Shapes:
    """Embedding, `layers` (suffix → shape) for every layer, final norm, head."""
    embed = "tok_embeddings" if norm == "ffn_norm" else "embed_tokens"
    head = "output" if norm == "ffn_norm" else "lm_head"
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield f"{prefix}.{embed}.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for suffix, shape in layers.items():
            yield f"{prefix}.layers.{layer}.{suffix}", shape
    yield f"{prefix}.norm.weight", (hidden,)
    yield f"{head}.weight", (vocab, hidden)


def _internlm2(config: Config) -> Shapes:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    wqkv = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head_dim
    layers = {
        "attention.wqkv.weight": (wqkv, hidden),  # per key-value group: [its q heads | k | v]
        "attention.wo.weight": (hidden, hidden),
        "feed_forward.w1.weight": (mlp, hidden),
        "feed_forward.w3.weight": (mlp, hidden),
        "feed_forward.w2.weight": (hidden, mlp),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    return _decoder("model", "ffn_norm", layers, config)


def _baichuan(config: Config) -> Shapes:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    layers = {
        "self_attn.W_pack.weight": (3 * hidden, hidden),  # [q; k; v]
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "mlp.up_proj.weight": (mlp, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return _decoder("model", "input_layernorm", layers, config)


def _kimi_k2(config: Config) -> Shapes:
    """DeepSeek-V3's names, as Kimi-K2's remote code has them: every expert for itself."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    attention = {
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (kv_rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + v), kv_rank),
        "self_attn.o_proj.weight": (hidden, heads * v),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, hidden),
            f"{prefix}.up_proj.weight": (width, hidden),
            f"{prefix}.down_proj.weight": (hidden, width),
        }

    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    sparse = {"mlp.gate.weight": (experts, hidden), "mlp.gate.e_score_correction_bias": (experts,)}
    for expert in range(experts):
        sparse |= mlp(f"mlp.experts.{expert}", width)
    sparse |= mlp("mlp.shared_experts", width * config["n_shared_experts"])

    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        dense = layer < config["first_k_dense_replace"]
        block = attention | (mlp("mlp", config["intermediate_size"]) if dense else sparse)
        for suffix, shape in block.items():
            yield f"model.layers.{layer}.{suffix}", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _attention_and_mlp(prefix: str, config: Config, q_rows: int) -> Shapes:
    """One more decoder layer with the usual names."""
    hidden, mlp, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    kv_rows = config["num_key_value_heads"] * head_dim
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.self_attn.q_proj.weight", (q_rows, hidden)
    yield f"{prefix}.self_attn.k_proj.weight", (kv_rows, hidden)
    yield f"{prefix}.self_attn.v_proj.weight", (kv_rows, hidden)
    yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
    yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, config["num_attention_heads"] * head_dim)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield f"{prefix}.mlp.gate_proj.weight", (mlp, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (mlp, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, mlp)


def _qwen_mtp(config: Config) -> Shapes:
    """Multi-token prediction as Qwen3-Next and Qwen3.5 ship it: outside `model.`."""
    config = config.get("text_config", config)
    hidden = config["hidden_size"]
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    q_rows = 2 * config["num_attention_heads"] * config["head_dim"]  # per head [q | gate]
    yield from _attention_and_mlp("mtp.layers.0", config, q_rows)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{norm}.weight", (hidden,)


def _deepseek_mtp(config: Config) -> Shapes:
    """Multi-token prediction as DeepSeek-V3 ships it: one more layer after the last."""
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    prefix = f"model.layers.{last}."
    for name, shape in _kimi_k2({**config, "num_hidden_layers": last + 1}):
        if name.startswith(prefix):
            yield name, shape
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{norm}.weight", (hidden,)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    for table in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}{table}.weight", (config["vocab_size"], hidden)


FAMILIES: dict[str, Family | Remote] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", TEXT),
    "llama_bias": Family("LlamaForCausalLM", "LlamaConfig", {**TEXT, "attention_bias": True}),
    "llama_tied": Family("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", WITH_HEAD_DIM),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", WITH_HEAD_DIM),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", WITH_HEAD_DIM),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", WITH_HEAD_DIM),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**WITH_HEAD_DIM}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", TEXT),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "olmo3": Family("Olmo3ForCausalLM", "Olmo3Config", TEXT),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", TEXT),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", WITH_HEAD_DIM),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **WITH_HEAD_DIM,
            "attention_bias": True,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **WITH_HEAD_DIM,
            "intermediate_size_mlp": 96,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": {
                **WITH_HEAD_DIM,
                "intermediate_size_mlp": 96,
                "intermediate_size": 32,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                **VISION,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**WITH_HEAD_DIM, **EXPERTS}),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 48},
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**WITH_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_next": Family("Qwen3NextForCausalLM", "Qwen3NextConfig", GDN_MOE),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", GDN),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": GDN, "vision_config": QWEN_VISION},
    ),
    "qwen3_5_mtp": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": GDN, "vision_config": QWEN_VISION},
        _qwen_mtp,
    ),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", GDN_MOE),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": GDN_MOE, "vision_config": QWEN_VISION},
    ),
    "gemma3n_text": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **WITH_HEAD_DIM,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **WITH_HEAD_DIM,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4_k_eq_v": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **WITH_HEAD_DIM,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": {
                **WITH_HEAD_DIM,
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 32,
                "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 8,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "position_embedding_size": 16,
                "use_clipped_linears": True,
            },
            "audio_config": None,
        },
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", TEXT),
    "glm4": Family("Glm4ForCausalLM", "Glm4Config", {**WITH_HEAD_DIM, "attention_bias": True}),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA),
    "deepseek_v2_lite": Family(
        "DeepseekV2ForCausalLM", "DeepseekV2Config", {**MLA, "q_lora_rank": None}
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "deepseek_v3_mtp": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**MLA, "num_nextn_predict_layers": 1},
        _deepseek_mtp,
    ),
    "kimi_k2": Remote(
        ("DeepseekV3ForCausalLM",),
        "kimi_k2",
        {
            **MLA,
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        },
        _kimi_k2,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**WITH_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", TEXT),
    "internlm2": Remote(
        ("InternLM2ForCausalLM",),
        "internlm2",
        {
            **TEXT,
            "bias": False,
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        },
        _internlm2,
    ),
    # Registered in transformers as a configuration alone, run by the Llama classes.
    "internlm3": Family(
        "LlamaForCausalLM", "InternLM3Config", {**WITH_HEAD_DIM, "qkv_bias": True, "bias": True}
    ),
    "baichuan": Remote(
        ("BaichuanForCausalLM",),
        "baichuan",
        {
            **TEXT,
            "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        },
        _baichuan,
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "vit": Family("ViTForImageClassification", "ViTConfig", VISION),
    "siglip": Family(
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": {**ENCODER, "hidden_size": 32, "projection_size": 32},
            "vision_config": VISION,
        },
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": MLP,
            "decoder_ffn_dim": MLP,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 3,
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "new_decoder_architecture": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {**ENCODER, "bos_token_id": 1}),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": WITH_HEAD_DIM,
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
    ),
}


def save(
    family: str,
    directory: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int | str | None = None,
    original_format: bool = True,
    seed: int = 0,
) -> Path:
    """Write a tiny random checkpoint of `family` into `directory` and return it.

    `max_shard_size` is in bytes, or text such as "40KB"; None keeps one file. With
    `original_format` transformers gives back the names that it renamed and splits the experts that
    it stacked when it loaded them; without it, the file has the model's own.
    """
    row = FAMILIES[family]
    torch.manual_seed(seed)
    shard = "1GB" if max_shard_size is None else max_shard_size
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(row, Family):
        model = _build(row, getattr(torch, dtype))
        state = model.state_dict()
        if row.extra is not None:
            state |= _random(row.extra(row.kwargs), dtype)
        model.save_pretrained(
            directory,
            max_shard_size=shard,
            state_dict=state,
            save_original_format=original_format,
        )
    else:
        _write_remote(row, directory, dtype, shard)
    return directory


def _build(row: Family, dtype: torch.dtype) -> Any:
    import transformers

    config = getattr(transformers, row.config)(**_plain(row.kwargs), dtype=dtype)
    model = getattr(transformers, row.model)(config).to(dtype)
    with torch.no_grad():  # biases and norms start at 0 and 1: make every tensor distinguishable
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    return model


def _random(shapes: Shapes, dtype: str) -> dict[str, torch.Tensor]:
    kind = getattr(torch, dtype)
    return {name: (torch.randn(shape) * 0.05).to(kind) for name, shape in shapes}


def _plain(value: Any) -> Any:
    """A private copy: configuration classes keep and edit what they are given."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _write_remote(row: Remote, directory: Path, dtype: str, shard: int | str) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = _random(row.shapes(row.config), dtype)
    save_torch_state_dict(tensors, directory, max_shard_size=shard)
    config = {
        "architectures": list(row.architectures),
        **row.config,
        "model_type": row.model_type,
        "torch_dtype": dtype,
    }
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
