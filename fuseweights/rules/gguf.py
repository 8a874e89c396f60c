"""GGUF's tensor names: they are the same for every architecture, below `blk.N`.

`attn_qkv` and `ffn_gate_up_exps` are llama.cpp's own; the others are ours in its style, for the
torch modules. In Gated DeltaNet layers `attn_qkv` is the mixer's own projection and `attn_gate`
is z; qwen3next's `ssm_ba` is stored interleaved already, hence another name for our plain stack.
"""

from __future__ import annotations

from .groups import Companion, Rule

_GDN = "ssm_conv1d"

RULES = (
    Rule("qkv", ("attn_q", "attn_k", "attn_v"), "attn_qkv", not_beside=_GDN),
    Rule("qkv_a", ("attn_q_a", "attn_kv_a_mqa"), "attn_qkv_a"),
    Rule(
        "gdn_in_proj",
        ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
        "ssm_in_proj",
        instead=("gdn_qkvz", "gdn_ba"),
        beside="ssm_beta",
    ),
    Rule("gdn_qkvz", ("attn_qkv", "attn_gate"), "ssm_qkvz", beside=_GDN),
    Rule("gdn_ba", ("ssm_beta", "ssm_alpha"), "ssm_beta_alpha"),
    Rule("gate_up", ("ffn_gate", "ffn_up"), "ffn_gate_up"),
    Rule("experts", ("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps", axis=1),
    Rule("shared_gate_up", ("ffn_gate_shexp", "ffn_up_shexp"), "ffn_gate_up_shexp"),
)

COMPANIONS = {
    "weight": Companion("stack", "missing-part"),
    "bias": Companion("stack", "bias-mismatch"),
    "scale": Companion("same", "scale-mismatch"),
    "input_scale": Companion("same", "scale-mismatch"),
}

# Architectures whose query rows are [query | gate] per head, so twice as many.
GATED_QUERY = frozenset({"qwen3next", "qwen35", "qwen35moe", "qwen4exp"})

# Fused names that only we write: whoever sees one knows what it is made of.
OURS = frozenset(rule.fused for rule in RULES) - {"attn_qkv", "ffn_gate_up_exps"}
