"""GGUF architectures as transformers models: what the metadata is called there, and the tensors.

Sources: llama.cpp's gguf-py/gguf/constants.py and conversion/ (names, and what conversion does to
values), transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Metadata key below the architecture's name → attribute of the configuration.
CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SHARED_MOE = {
    **MOE,
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
GDN = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.state_size": "linear_key_head_dim",
}
SLIDING = {
    "attention.sliding_window": "sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMA4 = {
    **SLIDING,
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "expert_count": "num_experts",
    "expert_used_count": "top_k_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}

#: A linear layer's path below the decoder layer → the GGUF parts that it stacks.
LINEAR = {
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.q_proj": ("attn_q",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
    "mlp.shared_expert.gate_up_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared_expert.down_proj": ("ffn_down_shexp",),
    "mlp.shared_expert_gate": ("ffn_gate_inp_shexp",),
    "linear_attn.in_proj": ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
    "linear_attn.out_proj": ("ssm_out",),
    "per_layer_input_gate": ("inp_gate",),
    "per_layer_projection": ("proj",),
    "router.proj": ("ffn_gate_inp",),
}
#: The same for stacked experts: parts stack inside each expert.
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}

#: A parameter's path below the decoder layer → the GGUF tensor.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
GDN_LAYER = {
    **LAYER,
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
}
GEMMA_LAYER = {
    **LAYER,
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
GEMMA4_LAYER = {
    **GEMMA_LAYER,
    "layer_scalar": "layer_output_scale.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}
#: Below the model, outside of layers; embeddings and head are told by name.
TOP = {"model.norm.weight": "output_norm.weight"}
GEMMA4_TOP = {**TOP, "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight"}
EMBEDDINGS = {
    "model.embed_tokens": "token_embd.weight",
    "model.embed_tokens_per_layer": "per_layer_token_embd.weight",
}
TOP_LINEAR = {"model.per_layer_model_projection": "per_layer_model_proj.weight"}


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture. `model_type` is transformers'; `config`, `layer` and `top` as above.

    `turned`: conversion reordered each head's query and key rows, so that rotary positions turn
    neighbours (row 2i with 2i + 1) in place of halves.
    """

    model_type: str
    config: Mapping[str, str] = field(default_factory=lambda: CONFIG)
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    fixed: Mapping[str, object] = field(default_factory=dict)
    turned: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2", fixed={"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", fixed={"use_sliding_window": False}),
    "qwen3moe": Architecture(
        "qwen3_moe", CONFIG | MOE, fixed={"norm_topk_prob": True, "decoder_sparse_step": 1}
    ),
    "gemma3": Architecture("gemma3_text", CONFIG | SLIDING, GEMMA_LAYER),
    "gemma4": Architecture("gemma4_text", CONFIG | GEMMA4, GEMMA4_LAYER, GEMMA4_TOP),
    "qwen35": Architecture("qwen3_5_text", CONFIG | GDN, GDN_LAYER),
    "qwen35moe": Architecture("qwen3_5_moe_text", CONFIG | GDN | SHARED_MOE, GDN_LAYER),
}
