"""Small quantized checkpoints, one row a format.

`save("gptq", directory)` writes a small model whose linear layers are laid out as the format's
own tool writes them. compressed-tensors and bitsandbytes produce their tensors themselves; the
others are built to their documented layout. `dequantize` is a float reference of a few lines a
format: it knows nothing of the package under test and reads fused tensors as well.

Knobs make one group differ in one respect, so that a guard can be seen to fire.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Json = dict[str, Any]

BLOCK = 128  # rows and columns that share a scale in block FP8
GROUP = 64  # columns that share a scale in the integer formats
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])  # by code: bit 3 is the sign
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each nibble holds

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")
OTHER_DTYPE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.bfloat16,
}


@dataclass(frozen=True)
class Sizes:
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 384
    vocab: int = 64


#: k and v have 10 rows, no multiple of any block or word (and 720 weights, none of 64).
RAGGED = {"heads": 64, "kv_heads": 1, "head_dim": 10}
RAGGED_BNB = {"heads": 8, "kv_heads": 1, "head_dim": 10, "hidden": 72}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A decoder layer: what is quantized, what never is, and what fuses with what."""

    architecture: str
    config: str
    linears: Callable[[Sizes], dict[str, Shape]]
    others: Callable[[Sizes], dict[str, Shape]]
    kwargs: Callable[[Sizes], Json]
    groups: Mapping[str, tuple[str, ...]]  # by the name of the fused module
    unquantized: tuple[str, ...] = ()  # linear layers that official checkpoints leave alone


def _attention(s: Sizes) -> dict[str, Shape]:
    q_rows, kv_rows = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return {
        "self_attn.q_proj": (q_rows, s.hidden),
        "self_attn.k_proj": (kv_rows, s.hidden),
        "self_attn.v_proj": (kv_rows, s.hidden),
        "self_attn.o_proj": (s.hidden, q_rows),
    }


def _mlp(s: Sizes, name: str = "mlp", width: int | None = None) -> dict[str, Shape]:
    rows = width or s.mlp
    return {
        f"{name}.gate_proj": (rows, s.hidden),
        f"{name}.up_proj": (rows, s.hidden),
        f"{name}.down_proj": (s.hidden, rows),
    }


def _norms(s: Sizes) -> dict[str, Shape]:
    return {
        "input_layernorm.weight": (s.hidden,),
        "post_attention_layernorm.weight": (s.hidden,),
    }


def _text(s: Sizes) -> Json:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }


# Gated DeltaNet: one key head and two value heads of 64 (in_proj_qkv is q, k, v).
_GDN_ROWS = {"qkv": 64 + 64 + 128, "z": 128, "b": 2, "a": 2}
# Multi-head latent attention: kv_a's 128 + 64 rows are no multiple of 128.
_Q_RANK, _KV_RANK, _NOPE, _ROPE, _V = 256, 128, 64, 64, 64
_EXPERTS, _EXPERT_ROWS = 2, 128

MODELS: dict[str, Model] = {
    "llama": Model(
        "LlamaForCausalLM",
        "LlamaConfig",
        linears=lambda s: _attention(s) | _mlp(s),
        others=_norms,
        kwargs=lambda s: _text(s) | {"head_dim": s.head_dim},
        groups={"self_attn.qkv_proj": ATTENTION, "mlp.gate_up_proj": MLP},
    ),
    "qwen3_5": Model(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        linears=lambda s: {
            **{f"linear_attn.in_proj_{k}": (n, s.hidden) for k, n in _GDN_ROWS.items()},
            "linear_attn.out_proj": (s.hidden, _GDN_ROWS["z"]),
            **_mlp(s),
        },
        others=lambda s: {
            **_norms(s),
            "linear_attn.A_log": (2,),
            "linear_attn.dt_bias": (2,),
            "linear_attn.conv1d.weight": (_GDN_ROWS["qkv"], 1, 4),
            "linear_attn.norm.weight": (64,),
        },
        kwargs=lambda s: {
            **_text(s),
            "head_dim": s.head_dim,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        groups={
            "linear_attn.in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
            "linear_attn.in_proj_ba": ("in_proj_b", "in_proj_a"),
            "mlp.gate_up_proj": MLP,
        },
        unquantized=("in_proj_b", "in_proj_a"),
    ),
    "deepseek_v3": Model(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        linears=lambda s: {
            "self_attn.q_a_proj": (_Q_RANK, s.hidden),
            "self_attn.kv_a_proj_with_mqa": (_KV_RANK + _ROPE, s.hidden),
            "self_attn.q_b_proj": (s.heads * (_NOPE + _ROPE), _Q_RANK),
            "self_attn.kv_b_proj": (s.heads * (_NOPE + _V), _KV_RANK),
            "self_attn.o_proj": (s.hidden, s.heads * _V),
            **{
                name: shape
                for expert in range(_EXPERTS)
                for name, shape in _mlp(s, f"mlp.experts.{expert}", _EXPERT_ROWS).items()
            },
            **_mlp(s, "mlp.shared_experts", _EXPERT_ROWS),
        },
        others=lambda s: {
            **_norms(s),
            "self_attn.q_a_layernorm.weight": (_Q_RANK,),
            "self_attn.kv_a_layernorm.weight": (_KV_RANK,),
            "mlp.gate.weight": (_EXPERTS, s.hidden),
            "mlp.gate.e_score_correction_bias": (_EXPERTS,),
        },
        kwargs=lambda s: {
            **_text(s),
            "num_key_value_heads": s.heads,
            "q_lora_rank": _Q_RANK,
            "kv_lora_rank": _KV_RANK,
            "qk_nope_head_dim": _NOPE,
            "qk_rope_head_dim": _ROPE,
            "v_head_dim": _V,
            "n_routed_experts": _EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": _EXPERT_ROWS,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        },
        groups={
            "self_attn.fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
            "mlp.shared_experts.gate_up_proj": MLP,
            **{f"mlp.experts.{expert}.gate_up_proj": MLP for expert in range(_EXPERTS)},
        },
    ),
}


@dataclass(frozen=True)
class Linear:
    """One layer to quantize; what its group shares is computed over the group beforehand."""

    weight: Tensor  # float32 [N, K]
    dtype: torch.dtype  # of scales that follow the model's
    amax: float  # of the group's weights, unless this part was made unequal
    input_amax: float
    g_idx: Tensor  # the group of each column, in activation order
    unequal: bool = False


@dataclass(frozen=True)
class Style:
    """How a tool writes its JSON."""

    indent: int = 2
    sort: bool = True
    newline: bool = True


@dataclass(frozen=True)
class Format:
    """How a layer is stored (`pack`), read back (`unpack`) and described in config.json."""

    pack: Callable[[Linear], Tensors]
    unpack: Callable[[Tensors], Tensor]
    config: Callable[[list[str]], Json] | None  # from the names that stay unquantized
    files: Mapping[str, Callable[[list[str]], Json]] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    ragged: Mapping[str, int] = field(default_factory=lambda: RAGGED)
    bias_on: tuple[str, ...] = ()
    metadata: Callable[[Sequence[str]], dict[str, str]] | None = None
    style: Style = Style()
    library: str | None = None  # whose code made the tensors; None: built to the layout
    refused: bool = False


# --- bits --------------------------------------------------------------------------------------


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Unsigned `values` [..., n] to int32 words [..., ceil(n·bits/32)], low bits first."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % per_word))
    words = padded.unflatten(-1, (-1, per_word)) << (torch.arange(per_word) * bits)
    total = words.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).int().contiguous()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` unsigned values along the last axis of int32 `words`."""
    fields = words.long()[..., None] >> (torch.arange(32 // bits) * bits)
    return (fields & (2**bits - 1)).flatten(-2)[..., :count]


def pack_nibbles(codes: Tensor) -> Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()


def spread(scale: Tensor, columns: int) -> Tensor:
    """One scale a group of columns to one a column."""
    size = -(-columns // scale.shape[-1])
    return scale.repeat_interleave(size, -1)[..., :columns]


# --- FP8 ---------------------------------------------------------------------------------------


def _to_e4m3(weight: Tensor) -> Tensor:
    return weight.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _tiles(scale: Tensor, shape: torch.Size) -> Tensor:
    rows = scale.repeat_interleave(BLOCK, 0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def pack_fp8_block(
    linear: Linear, *, name: str, dtype: torch.dtype = torch.float32, static: bool = False
) -> Tensors:
    """transformers' and DeepSeek's: a scale for each tile of 128 by 128, ragged at the edges."""
    rows, columns = linear.weight.shape
    padded = torch.nn.functional.pad(linear.weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    if dtype is torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(dtype)
    weight = _to_e4m3(linear.weight / _tiles(scale.float(), linear.weight.shape))
    tensors = {"weight": weight, name: scale}
    if static:
        tensors["activation_scale"] = torch.tensor(linear.input_amax / E4M3_MAX)
    return tensors


def unpack_fp8_block(tensors: Tensors, *, name: str) -> Tensor:
    weight = tensors["weight"].float()
    return weight * _tiles(tensors[name].float(), weight.shape)


def pack_fp8_tensor(linear: Linear, *, scale: str, input_scale: str | None) -> Tensors:
    """Scalars of shape []: ModelOpt, and transformers without a block size."""
    weight_scale = torch.tensor(linear.amax / E4M3_MAX)
    tensors = {"weight": _to_e4m3(linear.weight / weight_scale), scale: weight_scale}
    if input_scale:
        tensors[input_scale] = torch.tensor(linear.input_amax / E4M3_MAX)
    return tensors


def unpack_scaled(tensors: Tensors, *, name: str = "weight_scale") -> Tensor:
    """One scale a tensor ([] or [1]) or a row ([N, 1]), FP8 or INT8."""
    weight = tensors["weight"].float()
    if (zero := tensors.get("weight_zero_point")) is not None:
        weight = weight - zero.float()
    return weight * tensors[name].float()


# --- compressed-tensors ------------------------------------------------------------------------


def _ct_scheme(weights: Json, activations: Json | None) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    inputs = QuantizationArgs(**activations) if activations else None
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs
    )


def _ct_range(linear: Linear, strategy: str, group: int | None) -> tuple[Tensor, Tensor]:
    """What an observer would have seen: the least and the greatest of each scale's weights."""
    weight = linear.weight
    if strategy == "tensor":
        return torch.tensor([-linear.amax]), torch.tensor([linear.amax])
    if strategy == "block":
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    return groups.amin(2), groups.amax(2)


def pack_ct(
    linear: Linear,
    *,
    layout: str,
    weights: Json,
    activations: Json | None = None,
    actorder: bool = False,
) -> Tensors:
    """By compressed-tensors' own compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _ct_scheme(weights, activations)
    args = scheme.weights
    static = activations is not None and not activations.get("dynamic", False)
    local = activations is not None and activations.get("dynamic") == "local"
    state: Tensors = {}
    if actorder:  # columns that are close in activation order share a scale
        order = torch.argsort(linear.g_idx, stable=True)
        linear = replace(linear, weight=linear.weight[:, order])
    low, high = _ct_range(linear, str(args.strategy), args.group_size)
    global_scale = None
    if str(args.strategy) == "tensor_group":
        global_scale = torch.tensor([E4M3_MAX * 6 / linear.amax])
        state["weight_global_scale"] = global_scale
    scale, zero = calculate_qparams(low, high, args, global_scale=global_scale)
    state |= {"weight": linear.weight, "weight_scale": scale, "weight_zero_point": zero}
    if args.scale_dtype is None:
        state["weight_scale"] = scale.to(linear.dtype)
    if static:
        top = 127 if activations["type"] == "int" else E4M3_MAX
        state["input_scale"] = torch.tensor([linear.input_amax / top], dtype=linear.dtype)
    if local:
        state["input_global_scale"] = torch.tensor([E4M3_MAX * 6 / linear.input_amax])
    packed = BaseCompressor.get_value_from_registry(layout).compress(state, scheme)
    if actorder:
        restored = unpack_bits(packed["weight_packed"], args.num_bits, len(linear.g_idx))
        packed["weight_packed"] = pack_bits(restored[:, torch.argsort(order)], args.num_bits)
        packed["weight_g_idx"] = linear.g_idx.int()
    return {key: value.detach().clone().contiguous() for key, value in packed.items()}


def unpack_ct_packed(tensors: Tensors) -> Tensor:
    rows, columns = tensors["weight_shape"].tolist()
    bits = 32 * tensors["weight_packed"].shape[1] // columns
    half = 2 ** (bits - 1)
    values = unpack_bits(tensors["weight_packed"], bits, columns).float() - half
    scale = tensors["weight_scale"].float()
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in tensors:
        words = tensors["weight_zero_point"].T.contiguous()
        zero = unpack_bits(words, bits, rows).T.float() - half
    if (g_idx := tensors.get("weight_g_idx")) is not None:
        return (values - zero[:, g_idx.long()]) * scale[:, g_idx.long()]
    return (values - spread(zero, columns)) * spread(scale, columns)


def config_ct(
    ignore: list[str],
    *,
    layout: str,
    weights: Json,
    activations: Json | None = None,
    actorder: bool = False,
) -> Json:
    """As `ModelCompressor.update_config` writes it."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    scheme = _ct_scheme(weights, activations)
    scheme.format = layout
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=ignore,
        format=layout,
        quantization_status="compressed",
    ).model_dump(mode="json", exclude=["quant_method"])
    if actorder:  # as earlier releases wrote it, which had it
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return {
        "version": compressed_tensors.__version__,
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
        "transform_config": {},
        **config,
    }


# --- 4-bit floats ------------------------------------------------------------------------------


def _e2m1_codes(values: Tensor) -> Tensor:
    codes = (values.abs()[..., None] - E2M1[:8]).abs().argmin(-1)
    return codes | (values < 0).long() << 3


def pack_nvfp4_modelopt(linear: Linear) -> Tensors:
    scale_2 = torch.tensor(linear.amax / (6 * E4M3_MAX))
    groups = linear.weight.unflatten(1, (-1, 16))
    scale = _to_e4m3(groups.abs().amax(2) / 6 / scale_2)
    step = (scale.float() * scale_2)[..., None].clamp(min=1e-12)
    return {
        "weight": pack_nibbles(_e2m1_codes(groups / step).flatten(1)),
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(linear.input_amax / (6 * E4M3_MAX)),
    }


def unpack_nvfp4_modelopt(tensors: Tensors) -> Tensor:
    values = E2M1[unpack_nibbles(tensors["weight"])]
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return values * spread(scale, values.shape[1])


def unpack_fp4_ct(tensors: Tensors) -> Tensor:
    values = E2M1[unpack_nibbles(tensors["weight_packed"])]
    scale = tensors["weight_scale"]
    if scale.dtype is torch.uint8:  # E8M0
        factor = torch.exp2(scale.float() - 127)
    else:
        factor = scale.float() / tensors["weight_global_scale"]
    return values * spread(factor, values.shape[1])


# --- GPTQ, AWQ ---------------------------------------------------------------------------------


def _affine(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """float16 scale and integer zero point over the last axis."""
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / top).clamp(min=1e-6).half()
        return scale, torch.full(scale.shape, 2 ** (bits - 1))
    scale = ((high - low) / top).clamp(min=1e-6).half()
    return scale, (-low / scale.float()).round().clamp(1, top).long()


def _quantized(linear: Linear, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values [K, N], scales and zero points [G, N] with the layer's own column groups."""
    by_group = linear.weight[:, torch.argsort(linear.g_idx, stable=True)]
    scale, zero = (t.T for t in _affine(by_group.unflatten(1, (-1, GROUP)), bits, symmetric))
    steps = linear.weight.T / scale.float()[linear.g_idx] + zero[linear.g_idx]
    return steps.round().clamp(0, 2**bits - 1).long(), scale.contiguous(), zero


def pack_gptq(linear: Linear, *, bits: int = 4, desc_act: bool = False, offset: int = 1) -> Tensors:
    """`offset` 1: the gptq convention (zero points stored less one); 0: gptq_v2."""
    if not desc_act:
        linear = replace(linear, g_idx=torch.arange(linear.weight.shape[1]) // GROUP)
    values, scale, zero = _quantized(linear, bits, symmetric=True)
    return {
        "qweight": pack_bits(values.T, bits).T.contiguous(),
        "qzeros": pack_bits(zero - offset, bits),
        "scales": scale,
        "g_idx": linear.g_idx.int(),
    }


def unpack_gptq(tensors: Tensors, *, bits: int = 4, offset: int = 1) -> Tensor:
    g_idx = tensors["g_idx"].long()
    values = unpack_bits(tensors["qweight"].T, bits, len(g_idx)).T
    scale = tensors["scales"].float()
    zero = unpack_bits(tensors["qzeros"], bits, scale.shape[1]) + offset
    return ((values - zero[g_idx]) * scale[g_idx]).T.contiguous()


def _awq_words(values: Tensor) -> Tensor:
    columns = torch.nn.functional.pad(values, (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    return pack_bits(columns[..., AWQ_ORDER].flatten(1), 4)


def _awq_values(words: Tensor, columns: int) -> Tensor:
    fields = unpack_bits(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
    return fields[..., torch.argsort(torch.tensor(AWQ_ORDER))].flatten(1)[:, :columns]


def pack_awq(linear: Linear) -> Tensors:
    linear = replace(linear, g_idx=torch.arange(linear.weight.shape[1]) // GROUP)
    values, scale, zero = _quantized(linear, 4, symmetric=False)
    return {"qweight": _awq_words(values), "qzeros": _awq_words(zero), "scales": scale}


def unpack_awq(tensors: Tensors) -> Tensor:
    scale = tensors["scales"].float()
    rows = scale.shape[1]
    values = _awq_values(tensors["qweight"], rows)
    zero = _awq_values(tensors["qzeros"], rows)
    size = values.shape[0] // scale.shape[0]
    steps = values - zero.repeat_interleave(size, 0)
    return (steps * scale.repeat_interleave(size, 0)).T.contiguous()


def pack_awq_gemv(linear: Linear) -> Tensors:
    """Rows of packed columns, scales padded to whole words: the layout of AWQ's other kernel."""
    linear = replace(linear, g_idx=torch.arange(linear.weight.shape[1]) // GROUP)
    values, scale, zero = _quantized(linear, 4, symmetric=False)
    groups = -(-scale.shape[0] // 8) * 8
    padded = torch.nn.functional.pad(scale.T, (0, groups - scale.shape[0])).contiguous()
    return {"qweight": pack_bits(values.T, 4), "qzeros": pack_bits(zero.T, 4), "scales": padded}


def unpack_awq_gemv(tensors: Tensors) -> Tensor:
    columns = tensors["qweight"].shape[1] * 8
    scale = tensors["scales"].float()[:, : columns // GROUP]
    zero = unpack_bits(tensors["qzeros"], 4, scale.shape[1])
    values = unpack_bits(tensors["qweight"], 4, columns)
    return (values - spread(zero, columns)) * spread(scale, columns)


# --- bitsandbytes ------------------------------------------------------------------------------


def pack_bnb4(linear: Linear, *, kind: str = "nf4", nested: bool = False) -> Tensors:
    from bitsandbytes.functional import quantize_4bit

    if linear.unequal:
        kind = {"nf4": "fp4", "fp4": "nf4"}[kind]
    weight = linear.weight.to(linear.dtype)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    extra = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **extra}


def unpack_bnb4(tensors: Tensors) -> Tensor:
    (blob,) = (v for k, v in tensors.items() if ".quant_state.bitsandbytes__" in k)
    state = json.loads(bytes(blob.tolist()))
    absmax = tensors["weight.absmax"]
    if "nested_blocksize" in state:
        outer = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        inner = tensors["weight.nested_quant_map"][absmax.long()]
        absmax = inner * outer[: len(inner)] + state["nested_offset"]
    packed = tensors["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()  # high nibble first
    values = tensors["weight.quant_map"][codes]
    scale = absmax.float().repeat_interleave(state["blocksize"])[: len(values)]
    count = state["shape"][0] * state["shape"][1]
    return (values * scale)[:count].reshape(state["shape"])


def pack_bnb8(linear: Linear) -> Tensors:
    from bitsandbytes.functional import int8_vectorwise_quant

    values, scale, _ = int8_vectorwise_quant(linear.weight.half())
    layout = torch.tensor(1 if linear.unequal else 0, dtype=torch.uint8)
    return {"weight": values, "SCB": scale, "weight_format": layout}


def unpack_bnb8(tensors: Tensors) -> Tensor:
    return tensors["weight"].float() * (tensors["SCB"] / 127)[:, None]


# --- refused -----------------------------------------------------------------------------------


def pack_hqq(linear: Linear) -> Tensors:
    """hqq's `HQQLinear.state_dict` with its metadata encoded as tensors."""
    groups = linear.weight.reshape(-1, GROUP)
    scale, zero = _affine(groups, 4, symmetric=False)
    steps = (groups / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15).to(torch.uint8)
    half = len(steps) // 2

    def text(value: Any) -> Tensor:
        return torch.tensor(list(str(value).encode()), dtype=torch.uint8)

    return {
        "W_q": steps[:half] << 4 | steps[half:],
        "scale": scale[:, None],
        "zero": zero.half()[:, None],
        "shape": torch.tensor(linear.weight.shape),
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(GROUP),
        "axis": torch.tensor(1),
        "packing": text("4bit_u8"),
        "unpack_view_dtype": text("uint8"),
        "compute_dtype": text(linear.dtype),
        "view_as_float": torch.tensor(0),
        "channel_wise": torch.tensor(1),
        "optimize": torch.tensor(1),
        "round_zero": torch.tensor(1),
        "offload_meta": torch.tensor(0),
        "encoded_state_dict": torch.tensor(1),
        "stores_quant_config": torch.tensor(1),
    }


def unpack_hqq(tensors: Tensors) -> Tensor:
    packed = tensors["W_q"]
    steps = torch.cat([packed >> 4, packed & 15]).float()
    return ((steps - tensors["zero"]) * tensors["scale"]).reshape(tensors["shape"].tolist())


def pack_torchao(linear: Linear) -> Tensors:
    """torchao's flattened Int4TilePackedTo4dTensor: rows of 8 and columns of 128 in tiles."""
    rows, columns = linear.weight.shape
    linear = replace(linear, g_idx=torch.arange(columns) // GROUP)
    values, scale, zero = _quantized(linear, 4, symmetric=False)
    padded = torch.nn.functional.pad(values.T, (0, -columns % 128, 0, -rows % 8))
    tiles = padded.unflatten(0, (-1, 8)).unflatten(2, (-1, 128)).permute(0, 2, 1, 3)
    words = pack_bits(tiles.reshape(*tiles.shape[:2], 32, 32), 4)
    offset = (8 - zero.float()) * scale.float()
    both = torch.stack([scale.float(), offset], -1).to(linear.dtype)
    return {"_weight_qdata": words, "_weight_scale_and_zero": both}


def torchao_metadata(names: Sequence[str]) -> dict[str, str]:
    """Each tensor's class and attributes, as torchao's safetensors support records them."""
    suffix = "._weight_qdata"
    weights = [f"{n.removesuffix(suffix)}.weight" for n in names if n.endswith(suffix)]
    plain = [n for n in names if "._weight_" not in n]
    described = {
        "_type": "Int4TilePackedTo4dTensor",
        "_data": {"block_size": [1, GROUP]},
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }
    return {
        **{name: json.dumps(described) for name in weights},
        **{name: json.dumps({"_type": "Tensor"}) for name in plain},
        "tensor_names": json.dumps(weights + plain),
    }


def pack_marlin(linear: Linear) -> Tensors:
    """AutoGPTQ's marlin checkpoints: `B` [K/16, 2N] in 16 by 16 tiles, `s` [G, N]."""
    linear = replace(linear, g_idx=torch.arange(linear.weight.shape[1]) // GROUP)
    values, scale, _ = _quantized(linear, 4, symmetric=True)
    columns, rows = values.shape
    padded = torch.nn.functional.pad(values, (0, -rows % 16))
    tiles = padded.reshape(columns // 16, 16, -1, 16).transpose(1, 2).flatten(1)
    return {"B": pack_bits(tiles, 4), "s": scale}


def _no_reference(tensors: Tensors) -> Tensor:
    raise NotImplementedError("tiled for one kernel: there is no need to read it here")


# --- configurations ----------------------------------------------------------------------------


def _static(config: Json, key: str) -> Callable[[list[str]], Json]:
    """A fixed configuration that names the unquantized modules under `key`."""
    return lambda ignore: {**config, key: ignore}


def _modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    """config.json and hf_quant_config.json, which name the unquantized modules differently."""
    bits = 4 if algorithm == "NVFP4" else 8
    args = {"dynamic": False, "num_bits": bits, "type": "float", **more}
    producer = {"name": "modelopt", "version": "0.47.0"}
    group = {"input_activations": args, "weights": args, "targets": ["Linear"]}

    def in_config(ignore: list[str]) -> Json:
        return {
            "config_groups": {"group_0": group},
            "ignore": ignore,
            "quant_algo": algorithm,
            "producer": producer,
            "quant_method": "modelopt",
        }

    def beside(ignore: list[str]) -> Json:
        details = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **more}
        return {"producer": producer, "quantization": {**details, "exclude_modules": ignore}}

    style = Style(indent=4, sort=False, newline=False)
    return {"config": in_config, "files": {"hf_quant_config.json": beside}, "style": style}


def _gptq(bits: int = 4, *, desc_act: bool = False, layout: str = "gptq") -> dict[str, Any]:
    offset = 0 if layout == "gptq_v2" else 1

    def config(ignore: list[str]) -> Json:
        body: Json = {
            "bits": bits,
            "group_size": GROUP,
            "desc_act": desc_act,
            "sym": True,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05},
        }
        skipped = [name for name in ignore if name != "lm_head"]
        if skipped:  # a leading "-:" leaves the modules that match unquantized
            body["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in skipped}
        return body

    return {
        "pack": partial(pack_gptq, bits=bits, desc_act=desc_act, offset=offset),
        "unpack": partial(unpack_gptq, bits=bits, offset=offset),
        "config": config,
        "files": {"quantize_config.json": config},
        "dtype": torch.float16,
        "style": Style(sort=False),
    }


def _awq(version: str) -> Callable[[list[str]], Json]:
    config = {
        "bits": 4,
        "group_size": GROUP,
        "quant_method": "awq",
        "version": version,
        "zero_point": True,
    }
    return _static(config, "modules_to_not_convert")


def _bnb(bits: int, *, kind: str = "fp4", nested: bool = False) -> Callable[[list[str]], Json]:
    config = {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }
    return _static(config, "llm_int8_skip_modules")


def _fp8(block: list[int] | None, scheme: str, **more: Any) -> Callable[[list[str]], Json]:
    config = {"activation_scheme": scheme, "fmt": "e4m3", "quant_method": "fp8", **more}
    return _static({**config, "weight_block_size": block}, "modules_to_not_convert")


def _ct(unpack: Callable[[Tensors], Tensor], layout: str, **scheme: Any) -> Format:
    return Format(
        pack=partial(pack_ct, layout=layout, **scheme),
        unpack=unpack,
        config=partial(config_ct, layout=layout, **scheme),
        style=Style(newline=False),
        library="compressed-tensors",
    )


def _int(bits: int, strategy: str, symmetric: bool = True) -> Json:
    group = {"group_size": GROUP} if strategy == "group" else {}
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, **group}


def _float8(strategy: str, dynamic: bool = False, **more: Any) -> Json:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": dynamic, **more}


_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": E4M3,
    "zp_dtype": E4M3,
}
_MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
_TOKEN_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def _plain(linear: Linear) -> Tensors:
    return {"weight": linear.weight.to(linear.dtype)}


def _read_plain(tensors: Tensors) -> Tensor:
    return tensors["weight"].float()


_inverse = {"name": "weight_scale_inv"}

FORMATS: dict[str, Format] = {
    "plain": Format(_plain, _read_plain, None),
    "plain_f16": Format(_plain, _read_plain, None, dtype=torch.float16),
    "plain_f32": Format(_plain, _read_plain, None, dtype=torch.float32),
    "plain_bias": Format(_plain, _read_plain, None, bias_on=(*ATTENTION, "o_proj")),
    # transformers' fine-grained FP8
    "fp8_block": Format(
        partial(pack_fp8_block, **_inverse),
        partial(unpack_fp8_block, **_inverse),
        _fp8([BLOCK, BLOCK], "dynamic"),
    ),
    "fp8_block_bf16_scale": Format(
        partial(pack_fp8_block, dtype=torch.bfloat16, **_inverse),
        partial(unpack_fp8_block, **_inverse),
        _fp8([BLOCK, BLOCK], "dynamic"),
    ),
    "fp8_block_e8m0": Format(
        partial(pack_fp8_block, dtype=torch.float8_e8m0fnu, **_inverse),
        partial(unpack_fp8_block, **_inverse),
        _fp8([BLOCK, BLOCK], "dynamic", scale_fmt="ue8m0"),
    ),
    "fp8_block_static": Format(
        partial(pack_fp8_block, static=True, **_inverse),
        partial(unpack_fp8_block, **_inverse),
        _fp8([BLOCK, BLOCK], "static"),
    ),
    "fp8_tensor": Format(
        partial(pack_fp8_tensor, scale="weight_scale_inv", input_scale="activation_scale"),
        partial(unpack_scaled, **_inverse),
        _fp8(None, "static"),
    ),
    # compressed-tensors
    "ct_fp8_block": _ct(
        partial(unpack_fp8_block, name="weight_scale"),
        "float-quantized",
        weights=_float8("block", block_structure=[BLOCK, BLOCK]),
        activations=_float8("group", True, group_size=BLOCK),
    ),
    "ct_fp8_tensor_static": _ct(
        unpack_scaled,
        "float-quantized",
        weights=_float8("tensor"),
        activations=_float8("tensor"),
    ),
    "ct_fp8_tensor_dynamic": _ct(
        unpack_scaled,
        "float-quantized",
        weights=_float8("tensor"),
        activations=_float8("token", True),
    ),
    "ct_fp8_channel": _ct(
        unpack_scaled,
        "float-quantized",
        weights=_float8("channel"),
        activations=_float8("token", True),
    ),
    "ct_int8_channel": _ct(
        unpack_scaled, "int-quantized", weights=_int(8, "channel"), activations=_TOKEN_INT8
    ),
    "ct_int8_channel_asym": _ct(
        unpack_scaled, "int-quantized", weights=_int(8, "channel", False), activations=_TOKEN_INT8
    ),
    "ct_int8_channel_static": _ct(
        unpack_scaled, "int-quantized", weights=_int(8, "channel"), activations=_int(8, "tensor")
    ),
    "ct_int4": _ct(unpack_ct_packed, "pack-quantized", weights=_int(4, "group")),
    "ct_int4_asym": _ct(unpack_ct_packed, "pack-quantized", weights=_int(4, "group", False)),
    "ct_int4_channel": _ct(unpack_ct_packed, "pack-quantized", weights=_int(4, "channel")),
    "ct_int4_g_idx": _ct(
        unpack_ct_packed, "pack-quantized", weights=_int(4, "group"), actorder=True
    ),
    "ct_int8": _ct(unpack_ct_packed, "pack-quantized", weights=_int(8, "channel")),
    "ct_int8_group": _ct(unpack_ct_packed, "pack-quantized", weights=_int(8, "group")),
    "ct_int8_asym": _ct(unpack_ct_packed, "pack-quantized", weights=_int(8, "group", False)),
    "ct_nvfp4": _ct(
        unpack_fp4_ct,
        "nvfp4-pack-quantized",
        weights=_NVFP4,
        activations={**_NVFP4, "dynamic": "local"},
    ),
    "ct_nvfp4a16": _ct(unpack_fp4_ct, "nvfp4-pack-quantized", weights=_NVFP4),
    "ct_mxfp4": _ct(unpack_fp4_ct, "mxfp4-pack-quantized", weights=_MXFP4),
    # ModelOpt
    "modelopt_fp8": Format(
        partial(pack_fp8_tensor, scale="weight_scale", input_scale="input_scale"),
        unpack_scaled,
        **_modelopt("FP8"),
    ),
    "modelopt_nvfp4": Format(
        pack_nvfp4_modelopt, unpack_nvfp4_modelopt, **_modelopt("NVFP4", group_size=16)
    ),
    # GPTQ, AWQ
    "gptq": Format(**_gptq()),
    "gptq_int8": Format(**_gptq(8)),
    "gptq_desc_act": Format(**_gptq(desc_act=True)),
    "gptq_v2": Format(**_gptq(layout="gptq_v2")),
    "gptq_v2_desc_act": Format(**_gptq(desc_act=True, layout="gptq_v2")),
    "awq": Format(pack_awq, unpack_awq, _awq("gemm"), dtype=torch.float16),
    # bitsandbytes
    "bnb_nf4": Format(
        pack_bnb4, unpack_bnb4, _bnb(4, kind="nf4"), library="bitsandbytes", ragged=RAGGED_BNB
    ),
    "bnb_fp4": Format(
        partial(pack_bnb4, kind="fp4"),
        unpack_bnb4,
        _bnb(4),
        library="bitsandbytes",
        ragged=RAGGED_BNB,
    ),
    "bnb_nf4_nested": Format(
        partial(pack_bnb4, nested=True),
        unpack_bnb4,
        _bnb(4, kind="nf4", nested=True),
        library="bitsandbytes",
        ragged=RAGGED_BNB,
    ),
    "bnb_int8": Format(
        pack_bnb8,
        unpack_bnb8,
        _bnb(8),
        dtype=torch.float16,
        library="bitsandbytes",
        ragged=RAGGED_BNB,
    ),
    # to be refused
    "awq_gemv": Format(
        pack_awq_gemv, unpack_awq_gemv, _awq("gemv"), dtype=torch.float16, refused=True
    ),
    "marlin": Format(
        pack_marlin,
        _no_reference,
        **{k: v for k, v in _gptq(layout="marlin").items() if k not in ("pack", "unpack")},
        refused=True,
    ),
    "hqq": Format(
        pack_hqq,
        unpack_hqq,
        _static(
            {
                "quant_config": {
                    "offload_meta": False,
                    "scale_quant_params": None,
                    "weight_quant_params": {
                        "axis": 1,
                        "channel_wise": True,
                        "group_size": GROUP,
                        "nbits": 4,
                        "optimize": True,
                        "round_zero": True,
                        "view_as_float": False,
                    },
                    "zero_quant_params": None,
                },
                "quant_method": "hqq",
            },
            "skip_modules",
        ),
        refused=True,
    ),
    "torchao": Format(
        pack_torchao,
        _no_reference,
        _static(
            {
                "include_input_output_embeddings": False,
                "quant_method": "torchao",
                "quant_type": {
                    "default": {
                        "_data": {
                            "group_size": GROUP,
                            "int4_packing_format": {
                                "_data": "TILE_PACKED_TO_4D",
                                "_type": "Int4PackingFormat",
                            },
                        },
                        "_type": "Int4WeightOnlyConfig",
                        "_version": 2,
                    }
                },
            },
            "modules_to_not_convert",
        ),
        metadata=torchao_metadata,
        refused=True,
    ),
}


# --- checkpoints -------------------------------------------------------------------------------


def save(
    fmt: str,
    directory: Path,
    *,
    model: str = "llama",
    unequal: str | None = None,
    unequal_input: str | None = None,
    ragged: bool = False,
    g_idx_differs: bool | str = False,
    bias_on: Sequence[str] | None = None,
    missing: str | None = None,
    dtype_differs: str | None = None,
    unquantized: str | None = None,
    unknown: str | None = None,
    kv_scales: bool = False,
    layer: int = 0,
    layers: int = 2,
    max_shard_size: int | str | None = None,
    seed: int = 0,
) -> Path:
    """Write a small `model` in the format `fmt` into `directory` and return it.

    The knobs name a part ("v_proj"). They touch `layer` alone, and leave the others to fuse;
    `ragged`, `bias_on` and `kv_scales` are the model's.

    unequal         the part's per-tensor scale, 4-bit type or weight_format is another
    unequal_input   its input scale is another
    ragged          k and v have 10 rows
    g_idx_differs   its columns were quantized in another order (True: v_proj's)
    bias_on         the parts that have a bias (default: the format's)
    missing         it is not there at all
    dtype_differs   its floating-point tensors (not FP8) have another type
    unquantized     it stayed in the model's type, and the configuration says so
    unknown         it has a companion that nobody knows, `mystery`
    kv_scales       attention has k_scale and v_scale for its cache
    """
    row, shape = FORMATS[fmt], MODELS[model]
    sizes = Sizes(**row.ragged) if ragged else Sizes()
    odd_order = "v_proj" if g_idx_differs is True else g_idx_differs
    bias_on = row.bias_on if bias_on is None else tuple(bias_on)
    random = torch.Generator().manual_seed(seed)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=random) * 0.05

    def order(columns: int) -> Tensor:
        groups = torch.arange(columns) // min(GROUP, columns)
        return groups[torch.randperm(columns, generator=random)]

    ignore = ["lm_head"]
    tensors: Tensors = {"model.embed_tokens.weight": normal(sizes.vocab, sizes.hidden)}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        weights = {name: normal(*dims) for name, dims in shape.linears(sizes).items()}
        orders: dict[str, Tensor] = {}
        tops: dict[str, float] = {}
        for name, weight in weights.items():
            whole = _fused_name(shape, name)
            orders.setdefault(whole, order(weight.shape[1]))
            tops[whole] = max(tops.get(whole, 0.0), float(weight.abs().max()))
        for name, weight in weights.items():
            part, whole = name.rpartition(".")[2], _fused_name(shape, name)
            changed = part if index == layer else None  # the knobs speak of it
            if changed and changed == missing:
                continue
            same = Linear(weight, row.dtype, tops[whole], 3.0, orders[whole])
            linear = same
            if changed and changed == unequal:
                linear = replace(linear, amax=1.5 * linear.amax, unequal=True)
            if changed and changed == unequal_input:
                linear = replace(linear, input_amax=1.5 * linear.input_amax)
            if changed and changed == odd_order:
                linear = replace(linear, g_idx=order(weight.shape[1]))
            quantized = not (part in shape.unquantized or (changed and changed == unquantized))
            packed = row.pack(linear) if quantized else _plain(linear)
            if not quantized:
                ignore.append(f"{prefix}.{name}")
            elif linear is not same:
                _must_differ(fmt, packed, row.pack(same))
            if part in bias_on:
                packed["bias"] = normal(weight.shape[0]).to(row.dtype)
            if changed and changed == unknown:
                packed["mystery"] = normal(3)
            if changed and changed == dtype_differs:
                recast = {k: v.to(OTHER_DTYPE.get(v.dtype, v.dtype)) for k, v in packed.items()}
                _must_differ(fmt, packed, recast)
                packed = recast
            tensors |= {f"{prefix}.{name}.{key}": value for key, value in packed.items()}
        if kv_scales:
            tensors[f"{prefix}.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
            tensors[f"{prefix}.self_attn.v_proj.v_scale"] = torch.tensor(0.25)
        for name, dims in shape.others(sizes).items():
            tensors[f"{prefix}.{name}"] = normal(*dims).to(row.dtype)
    tensors["model.norm.weight"] = normal(sizes.hidden)
    tensors["lm_head.weight"] = normal(sizes.vocab, sizes.hidden)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        tensors[name] = tensors[name].to(row.dtype)

    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(row, tensors, directory, max_shard_size)
    config = _config(row, shape, sizes, layers)
    if bias_on and model == "llama":
        config["attention_bias"] = True
    if row.config is not None:
        config["quantization_config"] = row.config(ignore)
    _write_json(directory / "config.json", config, row.style)
    for name, content in row.files.items():
        _write_json(directory / name, content(ignore), row.style)
    return directory


def _must_differ(fmt: str, one: Tensors, other: Tensors) -> None:
    """A knob that changes nothing would make a test say nothing."""
    if all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one):
        raise ValueError(f"{fmt} has nothing that this knob changes")


def _fused_name(model: Model, name: str) -> str:
    """The module that the part `name` would fuse into, or itself."""
    parent, _, part = name.rpartition(".")
    for whole, parts in model.groups.items():
        if part in parts and whole.rpartition(".")[0] == parent:
            return whole
    return name


def _config(row: Format, model: Model, sizes: Sizes, layers: int) -> Json:
    import transformers

    kwargs = model.kwargs(sizes) | {"num_hidden_layers": layers}
    if "linear_num_key_heads" in kwargs:
        kwargs["layer_types"] = ["linear_attention"] * layers
    config = getattr(transformers, model.config)(
        architectures=[model.architecture], dtype=row.dtype, **kwargs
    )
    return json.loads(config.to_json_string())


def _write_json(path: Path, content: Json, style: Style) -> None:
    text = json.dumps(content, indent=style.indent, sort_keys=style.sort)
    path.write_text(text + "\n" * style.newline, encoding="utf-8")


def _write_tensors(
    row: Format, tensors: Tensors, directory: Path, max_shard_size: int | str | None
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size="1GB" if max_shard_size is None else max_shard_size
    )
    metadata = {"format": "pt"}
    if row.metadata is not None:
        metadata |= row.metadata(sorted(tensors))
    for filename, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, directory / filename, metadata=metadata)
    if split.is_sharded:
        weight_map = split.tensor_to_filename
        _write_json(
            directory / "model.safetensors.index.json",
            {"metadata": split.metadata, "weight_map": weight_map},
            Style(),
        )


# --- reading -----------------------------------------------------------------------------------


def load(directory: Path) -> Tensors:
    """Every tensor of a checkpoint, by name."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def dequantize(fmt: str, tensors: Mapping[str, Any], prefix: str) -> Tensor:
    """The float32 weight [N, K] of the module `prefix`, whether it is one part or fused.

    `tensors` maps names to torch tensors or numpy arrays. A module that was left unquantized
    reads as plain.
    """
    local = {
        name.removeprefix(f"{prefix}."): torch.as_tensor(value)
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.")
    }
    plain = (torch.float32, torch.float16, torch.bfloat16)
    if (weight := local.get("weight")) is not None and weight.dtype in plain:
        return weight.float()
    return FORMATS[fmt].unpack(local)


def groups(layer: int = 0, model: str = "llama") -> dict[str, list[str]]:
    """The modules of `layer` that could fuse, by the name of the fused module."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.{whole}": [f"{prefix}.{whole.rpartition('.')[0]}.{part}" for part in parts]
        for whole, parts in MODELS[model].groups.items()
    }


#: What transformers hands to its own FP8 quantizer, for the cross-check.
def fine_grained(scale_fmt: str = "float") -> SimpleNamespace:
    settings = SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt=scale_fmt)
    return SimpleNamespace(quantization_config=settings)
