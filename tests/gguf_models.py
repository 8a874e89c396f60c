"""Tiny random models of real architectures, as GGUF files that stock llama.cpp loads and runs.

An architecture is data: hyper-parameters, the tensors outside the layers, and one template per
layer. A template maps a tensor's name to its shape in ggml order (row length first), written in
the dimension names of `DIMS`. Weights are quantized by ggml itself, so every block is a real one.
"""

from __future__ import annotations

import ctypes
import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

Template = Mapping[str, str]
Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

# --- ggml's own quantizers -------------------------------------------------------------------


@cache
def _ggml() -> ctypes.CDLL:
    """The ggml shared library inside the installed xllamacpp wheel."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("xllamacpp is needed to quantize: pip install xllamacpp")
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("xllamacpp*.so")) + sorted(folder.glob("xllamacpp*.pyd"))
    lib = ctypes.CDLL(str(found[0]))
    i64, ptr, size = ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ptr, ptr, i64, i64, i64, ptr]
    lib.ggml_quantize_chunk.restype = size
    lib.ggml_row_size.argtypes = [ctypes.c_int, i64]
    lib.ggml_row_size.restype = size
    lib.ggml_blck_size.argtypes = [ctypes.c_int]
    lib.ggml_blck_size.restype = i64
    return lib


# Type numbers by name. gguf-py does not know the last two (yet): they quantize, `build` cannot.
TYPES = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}

BLOCKS = {kind.name: weights for kind, (weights, _) in gguf.GGML_QUANT_SIZES.items()}


def quantize(values_f32: np.ndarray, type_name: str) -> np.ndarray:
    """Quantize float32 [..., rows, n] to uint8 [..., rows, bytes of a row], with ggml.

    Types that ask for an importance matrix get a flat one.
    """
    values = np.ascontiguousarray(values_f32, dtype=np.float32)
    n = values.shape[-1]
    rows = values.size // n
    lib, kind = _ggml(), TYPES[type_name]
    if n % lib.ggml_blck_size(kind):
        raise ValueError(f"rows of {n} values are no whole number of {type_name} blocks")
    out = np.zeros((*values.shape[:-1], lib.ggml_row_size(kind, n)), dtype=np.uint8)
    flat = np.ones(n, dtype=np.float32)
    done = lib.ggml_quantize_chunk(
        kind, values.ctypes.data, out.ctypes.data, 0, rows, n, flat.ctypes.data
    )
    if done != out.size:
        raise ValueError(f"ggml wrote {done} of {out.size} bytes of {type_name}")
    return out


# --- which type a tensor gets ----------------------------------------------------------------

# What llama-quantize falls back to when a row is not a multiple of 256.
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL",
}  # fmt: skip

# Never quantized, as in real files.
KEPT_F32 = (
    "*ffn_gate_inp*", "*ssm_conv1d*", "*_norm.weight", "*.bias", "*ssm_a", "rope_freqs*", "*hc_*",
)  # fmt: skip

# What converters leave in NVFP4: the projections, each with a scale of its own.
SCALED = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|gate|output)|ssm_out|ffn_(gate|up|down)"
                    r"(_exps|_shexp)?)\.weight")  # fmt: skip


def _more_bits(layer: int, layers: int) -> bool:
    """The layers to which llama-quantize gives more bits in its _M mixes."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _type(name: str, row: int, ndim: int, mix: str, layers: int) -> str:
    """The type of one tensor of `row` values a row in a file of this mix."""
    if ndim == 1 or any(fnmatch.fnmatch(name, p) for p in KEPT_F32):
        return "F32"
    kind = mix
    if mix == "Q4_K_M":
        upgraded = name.split(".")[-2] in ("attn_v", "ffn_down", "ffn_down_exps")
        better = name == "output.weight" or (upgraded and _more_bits(_layer(name), layers))
        kind = "Q6_K" if better else "Q4_K"
    elif mix == "NVFP4" and not SCALED.fullmatch(name):
        kind = "BF16"
    while row % (BLOCKS.get(kind) or _ggml().ggml_blck_size(TYPES[kind])):
        kind = FALLBACK.get(kind, "F16")
    return kind


def _layer(name: str) -> int:
    return int(name.split(".")[1])


# --- random values ---------------------------------------------------------------------------

# First match wins: how a tensor's values are drawn, as (mean, standard deviation). A standard
# deviation of None means 1/sqrt(row length), which keeps activations near unit size.
DRAW: tuple[tuple[str, float, float | None], ...] = (
    ("*ssm_a", -1.0, 0.2),
    ("output_norm.weight", 0.0, 1.0),  # no mean: tied embeddings would repeat the last token
    ("*norm*.weight", 1.0, 0.1),
    ("rope_freqs.weight", 1.5, 0.1),
    ("*layer_output_scale.weight", 0.8, 0.05),
    ("*_scale.weight", 1.0, 0.05),
    ("*ffn_gate_inp.scale", 1.0, 0.1),
    ("*.bias", 0.0, 0.3),
    ("*attn_sinks.weight", 0.0, 0.5),
    ("*hc_*", 0.0, 0.3),
    ("token_embd.weight", 0.0, 0.05),
    ("output.weight", 0.0, 0.125),
    ("*ffn_gate_inp*", 0.0, 0.2),
    ("*", 0.0, None),
)


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random float32 values of the shape given in ggml order, returned in numpy order."""
    mean, deviation = next((m, s) for pattern, m, s in DRAW if fnmatch.fnmatch(name, pattern))
    spread = shape[0] ** -0.5 if deviation is None else deviation
    return (mean + spread * rng.standard_normal(shape[::-1])).astype(np.float32)


# --- architectures ---------------------------------------------------------------------------

VOCAB = 304

# One dimension per word. `q` is 8 heads of 32, `kv` is 2 of them.
DIMS: dict[str, int] = {
    "embd": 256, "vocab": VOCAB, "ff": 256, "q": 256, "kv": 64, "head": 32, "heads": 8,
    "gated_q": 512, "experts": 4, "ff_exp": 256, "ff_shexp": 256, "one": 1, "two_embd": 512,
}  # fmt: skip

EMBED: Template = {"token_embd.weight": "embd vocab"}
HEAD: Template = {"output_norm.weight": "embd", "output.weight": "embd vocab"}
TIED: Template = {"output_norm.weight": "embd"}

NORM: Template = {"attn_norm.weight": "embd"}
QKV: Template = {
    "attn_q.weight": "embd q", "attn_k.weight": "embd kv", "attn_v.weight": "embd kv",
}  # fmt: skip
QKV_BIAS: Template = {"attn_q.bias": "q", "attn_k.bias": "kv", "attn_v.bias": "kv"}
QK_NORM: Template = {"attn_q_norm.weight": "head", "attn_k_norm.weight": "head"}
OUT: Template = {"attn_output.weight": "q embd"}
FFN_NORM: Template = {"ffn_norm.weight": "embd"}
FFN: Template = {
    "ffn_gate.weight": "embd ff", "ffn_up.weight": "embd ff", "ffn_down.weight": "ff embd",
}  # fmt: skip
EXPERTS: Template = {
    "ffn_gate_inp.weight": "embd experts",
    "ffn_gate_exps.weight": "embd ff_exp experts",
    "ffn_up_exps.weight": "embd ff_exp experts",
    "ffn_down_exps.weight": "ff_exp embd experts",
}
SHARED: Template = {
    "ffn_gate_shexp.weight": "embd ff_shexp",
    "ffn_up_shexp.weight": "embd ff_shexp",
    "ffn_down_shexp.weight": "ff_shexp embd",
}

ATTENTION: dict[str, Value] = {
    "context_length": 512, "embedding_length": 256, "feed_forward_length": 256,
    "attention.head_count": 8, "attention.head_count_kv": 2,
    "attention.key_length": 32, "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": 32, "rope.freq_base": 10000.0,
}  # fmt: skip
MOE: dict[str, Value] = {
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256,
}  # fmt: skip
SHARED_MOE = MOE | {"expert_shared_count": 1, "expert_shared_feed_forward_length": 256}
POST_NORM: Template = {"post_attention_norm.weight": "embd"}
PROBS_BIAS: Template = {"exp_probs_b.bias": "experts"}
SINKS: Template = {"attn_sinks.weight": "heads"}
NEXTN: Template = {
    "nextn.eh_proj.weight": "two_embd embd",
    "nextn.enorm.weight": "embd", "nextn.hnorm.weight": "embd",
}  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """One architecture: `layers` holds one template a layer, `dims` overrides `DIMS`."""

    layers: tuple[Template, ...]
    hparams: Mapping[str, Value] = field(default_factory=lambda: ATTENTION)
    before: Template = field(default_factory=lambda: EMBED)
    after: Template = field(default_factory=lambda: HEAD)
    dims: Mapping[str, int] = field(default_factory=dict)
    name: str = ""  # general.architecture, where the table's key is not it


DENSE = NORM | QKV | OUT | FFN_NORM | FFN
QWEN3 = NORM | QKV | QK_NORM | OUT | FFN_NORM

GEMMA = NORM | QKV | QK_NORM | OUT | POST_NORM | FFN_NORM | FFN | {
    "post_ffw_norm.weight": "embd",
}  # fmt: skip

# Gated DeltaNet: 2 key heads and 4 value heads of 32.
GDN_DIMS = {"gdn_qkv": 256, "gdn_v": 128, "gdn_heads": 4, "gdn_ba": 8, "conv": 4}
GDN: dict[str, Value] = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 32, "ssm.time_step_rank": 4,
    "ssm.group_count": 2, "full_attention_interval": 2,
}  # fmt: skip
GDN_IN: Template = {
    "attn_qkv.weight": "embd gdn_qkv", "attn_gate.weight": "embd gdn_v",
    "ssm_conv1d.weight": "conv gdn_qkv", "ssm_dt.bias": "gdn_heads", "ssm_a": "gdn_heads",
}  # fmt: skip
GDN_OUT: Template = {"ssm_norm.weight": "head", "ssm_out.weight": "gdn_v embd"}
GDN_35_BARE = GDN_IN | {
    "ssm_beta.weight": "embd gdn_heads", "ssm_alpha.weight": "embd gdn_heads",
} | GDN_OUT  # fmt: skip
GDN_35 = NORM | POST_NORM | GDN_35_BARE
GDN_NEXT = NORM | POST_NORM | GDN_IN | {"ssm_ba.weight": "embd gdn_ba"} | GDN_OUT
GATED_BARE: Template = {
    "attn_q.weight": "embd gated_q", "attn_k.weight": "embd kv", "attn_v.weight": "embd kv",
    "attn_q_norm.weight": "head", "attn_k_norm.weight": "head", "attn_output.weight": "q embd",
}  # fmt: skip
GATED = NORM | POST_NORM | GATED_BARE
GATED_MOE = EXPERTS | {"ffn_gate_inp_shexp.weight": "embd"} | SHARED

# Hyper-connections: 2 residual streams, mixed through a rank of 8.
HYPER: Template = {
    f"hc_{part}_{name}.weight": shape
    for part in ("attn", "ffn")
    for name, shape in (
        ("norm", "embd streams"), ("down", "wide low"), ("up", "low wide"),
        ("inject", "wide streams"),
    )
}  # fmt: skip

# MLA: 64 values a head without rotation and 32 with, a compressed cache of 256.
MLA_DIMS = {
    "q_rank": 256, "mla_q": 768, "kv_a": 288, "kv_rank": 256, "nope": 64, "mla_v": 64,
    "mla_o": 512,
}  # fmt: skip
MLA: Template = {
    "attn_norm.weight": "embd",
    "attn_q_a.weight": "embd q_rank", "attn_q_a_norm.weight": "q_rank",
    "attn_q_b.weight": "q_rank mla_q",
    "attn_kv_a_mqa.weight": "embd kv_a", "attn_kv_a_norm.weight": "kv_rank",
    "attn_k_b.weight": "nope kv_rank heads", "attn_v_b.weight": "kv_rank mla_v heads",
    "attn_output.weight": "mla_o embd",
}  # fmt: skip
MLA_HPARAMS = ATTENTION | SHARED_MOE | {
    "attention.head_count_kv": 1, "attention.key_length": 288, "attention.value_length": 256,
    "attention.key_length_mla": 96, "attention.value_length_mla": 64,
    "attention.q_lora_rank": 256, "attention.kv_lora_rank": 256,
    "leading_dense_block_count": 1, "expert_weights_scale": 1.0, "expert_weights_norm": True,
    "expert_gating_func": 2,
}  # fmt: skip

# Gemma 4: sliding layers with heads of 32, full layers with heads of 64 that may have no v (K = V);
# the last layers share the keys and values of earlier ones and have neither.
GEMMA4_HPARAMS = ATTENTION | {
    "attention.key_length": 64, "attention.value_length": 64,
    "attention.key_length_swa": 32, "attention.value_length_swa": 32,
    "attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False, True, False],
    "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 64, "rope.dimension_count_swa": 32,
    "rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA4_DIMS = {"wide_head": 64, "wide_q": 512, "wide_kv": 128, "half_head": 32, "layer_embd": 32,
               "all_layer_embd": 128}  # fmt: skip
GEMMA4_Q: Template = {"attn_q.weight": "embd q", "attn_q_norm.weight": "head"}
GEMMA4_KV: Template = {
    "attn_k.weight": "embd kv", "attn_v.weight": "embd kv", "attn_k_norm.weight": "head",
}  # fmt: skip
GEMMA4_WIDE_Q: Template = {"attn_q.weight": "embd wide_q", "attn_q_norm.weight": "wide_head"}
GEMMA4_WIDE_KV: Template = {
    "attn_k.weight": "embd wide_kv", "attn_v.weight": "embd wide_kv",
    "attn_k_norm.weight": "wide_head",
}  # fmt: skip
GEMMA4_WIDE_K: Template = {"attn_k.weight": "embd wide_kv", "attn_k_norm.weight": "wide_head"}
GEMMA4_WIDE_OUT: Template = {"attn_output.weight": "wide_q embd"}
GEMMA4_REST = POST_NORM | FFN_NORM | FFN | {
    "post_ffw_norm.weight": "embd", "layer_output_scale.weight": "one",
}  # fmt: skip
GEMMA4_PER_LAYER: Template = {
    "inp_gate.weight": "embd layer_embd", "proj.weight": "layer_embd embd",
    "post_norm.weight": "embd",
}  # fmt: skip
GEMMA4_MOE: Template = EXPERTS | {
    "ffn_gate_inp.scale": "embd", "ffn_down_exps.scale": "experts",
    "pre_ffw_norm_2.weight": "embd", "post_ffw_norm_1.weight": "embd",
    "post_ffw_norm_2.weight": "embd",
}  # fmt: skip
GEMMA4_NARROW = NORM | GEMMA4_Q | GEMMA4_KV | OUT | GEMMA4_REST
GEMMA4_WIDE = NORM | GEMMA4_WIDE_Q | GEMMA4_WIDE_KV | GEMMA4_WIDE_OUT | GEMMA4_REST
GEMMA4_WIDE_NO_V = NORM | GEMMA4_WIDE_Q | GEMMA4_WIDE_K | GEMMA4_WIDE_OUT | GEMMA4_REST
ROPE_FREQS: Template = {"rope_freqs.weight": "half_head"}

ARCHS: dict[str, Arch] = {
    "llama": Arch((DENSE,) * 2),
    "qwen2": Arch((NORM | QKV | QKV_BIAS | OUT | FFN_NORM | FFN,) * 2),
    "qwen3": Arch((QWEN3 | FFN,) * 2),
    "qwen3moe": Arch((QWEN3 | EXPERTS,) * 2, ATTENTION | MOE),
    "gemma3": Arch(
        (GEMMA,) * 2, ATTENTION | {"attention.sliding_window": 16}, after=TIED,
    ),
    # Sliding and full layers, the second full layer without v.
    "gemma4": Arch(
        (GEMMA4_NARROW, GEMMA4_WIDE, GEMMA4_NARROW, GEMMA4_WIDE_NO_V),
        GEMMA4_HPARAMS, EMBED | ROPE_FREQS, TIED, GEMMA4_DIMS,
    ),
    # The two last layers share keys and values; embeddings of each layer.
    "gemma4-shared": Arch(
        tuple(t | GEMMA4_PER_LAYER for t in (
            GEMMA4_NARROW, GEMMA4_WIDE,
            NORM | GEMMA4_Q | OUT | GEMMA4_REST,
            NORM | GEMMA4_WIDE_Q | GEMMA4_WIDE_OUT | GEMMA4_REST,
        )),
        GEMMA4_HPARAMS | {
            "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 32,
        },
        EMBED | ROPE_FREQS | {
            "per_layer_token_embd.weight": "all_layer_embd vocab",
            "per_layer_model_proj.weight": "embd all_layer_embd",
            "per_layer_proj_norm.weight": "layer_embd",
        },
        TIED, GEMMA4_DIMS, name="gemma4",
    ),
    "gemma4-moe": Arch(
        tuple(t | GEMMA4_MOE for t in (
            GEMMA4_NARROW, GEMMA4_WIDE, GEMMA4_NARROW, GEMMA4_WIDE_NO_V,
        )),
        GEMMA4_HPARAMS | MOE, EMBED | ROPE_FREQS, TIED, GEMMA4_DIMS, name="gemma4",
    ),
    "qwen35": Arch(
        (GDN_35 | FFN, GATED | FFN) * 2,
        ATTENTION | GDN | {"rope.dimension_sections": [6, 5, 5, 0]}, dims=GDN_DIMS,
    ),
    "qwen35moe": Arch(
        (GDN_35 | GATED_MOE, GATED | GATED_MOE) * 2,
        ATTENTION | GDN | SHARED_MOE | {"rope.dimension_sections": [6, 5, 5, 0]}, dims=GDN_DIMS,
    ),
    "qwen3next": Arch(
        (GDN_NEXT | GATED_MOE, GATED | GATED_MOE) * 2, ATTENTION | GDN | SHARED_MOE, dims=GDN_DIMS,
    ),
    "deepseek2": Arch(
        (MLA | FFN_NORM | FFN, MLA | FFN_NORM | EXPERTS | PROBS_BIAS | SHARED),
        MLA_HPARAMS, dims=MLA_DIMS,
    ),
    # Drafting blocks (MTP) after the trunk, loaded and unused unless drafting is asked for.
    "qwen35-mtp": Arch(
        (GDN_35 | FFN, GATED | FFN, GATED | FFN | NEXTN),
        ATTENTION | GDN | {"rope.dimension_sections": [6, 5, 5, 0], "nextn_predict_layers": 1},
        dims=GDN_DIMS, name="qwen35",
    ),
    "mistral3": Arch((DENSE,) * 2),
    "mistral4": Arch(
        (MLA | FFN_NORM | FFN, MLA | FFN_NORM | EXPERTS | SHARED),
        MLA_HPARAMS | {"expert_gating_func": 4}, dims=MLA_DIMS,
    ),
    "qwen2moe": Arch(
        (NORM | QKV | QKV_BIAS | OUT | FFN_NORM | GATED_MOE,) * 2, ATTENTION | SHARED_MOE,
    ),
    "glm4moe": Arch(
        (NORM | QKV | QKV_BIAS | OUT | POST_NORM | FFN,
         NORM | QKV | QKV_BIAS | OUT | POST_NORM | EXPERTS | PROBS_BIAS | SHARED),
        ATTENTION | SHARED_MOE | {"leading_dense_block_count": 1, "expert_gating_func": 2},
    ),
    "cohere2moe": Arch(
        (NORM | QKV | OUT | FFN, NORM | QKV | OUT | EXPERTS | SHARED),
        ATTENTION | SHARED_MOE | {
            "leading_dense_block_count": 1, "attention.sliding_window": 16, "logit_scale": 1.0,
            "attention.layer_norm_epsilon": 1e-5,
        },
        after=TIED,
    ),
    "hy_v3": Arch(
        (QWEN3 | FFN, QWEN3 | EXPERTS | {"exp_probs_b": "experts"} | SHARED),
        ATTENTION | SHARED_MOE | {"leading_dense_block_count": 1, "expert_gating_func": 2},
    ),
    # The shared expert's gate and up are one tensor in this architecture.
    "granite_swa": Arch(
        (NORM | QKV | OUT | SINKS | FFN_NORM | EXPERTS | {
            "ffn_up_shexp.weight": "embd two_ff", "ffn_down_shexp.weight": "ff_shexp embd",
        },) * 2,
        ATTENTION | SHARED_MOE | {
            "attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False],
            "logit_scale": 1.0,
        },
        after=TIED, dims={"two_ff": 512},
    ),
    "gpt-oss": Arch(
        (NORM | QKV | QKV_BIAS | OUT | POST_NORM | SINKS | EXPERTS | {
            "attn_output.bias": "embd", "ffn_gate_inp.bias": "experts",
            "ffn_gate_exps.bias": "ff_exp experts", "ffn_up_exps.bias": "ff_exp experts",
            "ffn_down_exps.bias": "embd experts",
        },) * 2,
        ATTENTION | MOE | {"attention.sliding_window": 16},
    ),
    # Fused as converted: attn_qkv, and an ffn_up of double width.
    "phi3": Arch(
        (NORM | {"attn_qkv.weight": "embd qkv"} | OUT | FFN_NORM | {
            "ffn_up.weight": "embd two_ff", "ffn_down.weight": "ff embd",
        },) * 2,
        ATTENTION | {"attention.sliding_window": 0}, dims={"qkv": 384, "two_ff": 512},
    ),
    # llama.cpp loads a fused attn_qkv here and crashes on it.
    "qwen4exp": Arch(
        tuple(HYPER | t for t in (
            GDN_35_BARE | GATED_MOE,
            GATED_BARE | {
                "indexer.q_proj.weight": "embd index_q", "indexer.k_proj.weight": "embd index_k",
                "indexer.q_norm.weight": "index_k", "indexer.k_norm.weight": "index_k",
            } | GATED_MOE,
        )),
        ATTENTION | GDN | SHARED_MOE | {
            "rope.dimension_sections": [6, 5, 5, 0], "hyper_connection.count": 2,
            "hyper_connection.low_rank": 8, "attention.indexer.head_count": 4,
            "attention.indexer.key_length": 64, "attention.indexer.top_k": 8,
        },
        after={
            "output_hc_norm.weight": "embd streams", "output_hc_down.weight": "wide low",
            "output_hc_up.weight": "low wide", "output.weight": "embd vocab",
        },
        dims=GDN_DIMS | {"streams": 2, "wide": 512, "low": 8, "index_q": 256, "index_k": 64},
    ),
}  # fmt: skip

# --- writing ---------------------------------------------------------------------------------


def tensors(arch: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the architecture with its shape in ggml order, in file order."""
    model = ARCHS[arch]
    dims = DIMS | dict(model.dims)
    named = [
        *model.before.items(),
        *((f"blk.{i}.{n}", s) for i, t in enumerate(model.layers) for n, s in t.items()),
        *model.after.items(),
    ]
    for name, shape in named:
        yield name, tuple(dims[word] for word in shape.split())


def add_tokenizer(writer: gguf.GGUFWriter, size: int = VOCAB) -> None:
    """A minimal sentencepiece vocabulary: <unk>, <s>, </s>, the ASCII bytes, and pieces.

    No other bytes: the server withholds tokens that end inside a character.
    """
    unknown, control, byte, normal = 2, 3, 6, 1
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(128))]
    kinds = [unknown, control, control, *[byte] * 128]
    pieces = [f"\u2581{chr(97 + i % 26)}{i // 26 or ''}" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *pieces])
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([*kinds, *[normal] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def add_value(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """One metadata entry, typed as llama.cpp reads it: uint32, float32, bool, string, array."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, values_f32: np.ndarray, kind: str) -> None:
    """One tensor, given in numpy order, quantized to the type."""
    if kind == "F32":
        writer.add_tensor(name, values_f32.astype(np.float32))
    else:
        raw = gguf.GGMLQuantizationType(TYPES[kind])
        writer.add_tensor(name, quantize(values_f32, kind), raw_dtype=raw)


def build(
    arch: str,
    path: Path,
    mix: str = "Q8_0",
    seed: int = 0,
    *,
    hparams: Mapping[str, Value] | None = None,
    metadata: Mapping[str, Value] | None = None,
    types: Mapping[str, str] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny model of the architecture with random weights, and return its path.

    `hparams` overrides entries under the architecture's own prefix, `metadata` adds entries with
    full keys, `types` maps patterns of tensor names to types and goes before the mix. Every NVFP4
    tensor has its `.scale` (one a tensor, or one an expert). `values` holds float32 values, in
    numpy order, of tensors that are not to be random; names not in the architecture come last.
    """
    model = ARCHS[arch]
    name = model.name or arch
    given = dict(values or {})
    writer = gguf.GGUFWriter(path, name)
    writer.add_name("Tiny random model")  # llama.cpp looks for some names in it, such as phi3
    writer.add_block_count(len(model.layers))
    writer.add_vocab_size(VOCAB)
    for key, value in (dict(model.hparams) | dict(hparams or {})).items():
        add_value(writer, f"{name}.{key}", value)
    add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)

    rng = np.random.default_rng(seed)
    listed = dict(tensors(arch))
    for tensor, shape in listed.items():
        drawn = _draw(tensor, shape, rng)
        kind = next((t for p, t in (types or {}).items() if fnmatch.fnmatch(tensor, p)), None)
        kind = kind or _type(tensor, shape[0], len(shape), mix, len(model.layers))
        add_tensor(writer, tensor, given.pop(tensor, drawn), kind)
        scale = tensor.removesuffix("weight") + "scale"
        if kind == "NVFP4" and scale not in listed:
            usual = np.full(shape[2:] or (1,), 0.75, dtype=np.float32)
            add_tensor(writer, scale, given.pop(scale, usual), "F32")
    for tensor, extra in given.items():
        add_tensor(writer, tensor, extra, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
