"""A transformers configuration from a GGUF file's metadata.

transformers reads most of these itself, some since 5.23 only, and for the others it parses the
whole file with its vocabulary (seconds, and half a gigabyte for a large one). Tests compare what
both read.
"""

from __future__ import annotations

from typing import Any

from ..checkpoint.gguf import GGUFFile, read_array
from ..checkpoint.model import Checkpoint
from ..errors import UsageError
from ..rules.gguf_models import ARCHITECTURES, Architecture

SLIDING, FULL = "sliding_attention", "full_attention"


class Metadata:
    """The entries below an architecture's prefix."""

    def __init__(self, checkpoint: Checkpoint):
        self.file: GGUFFile = checkpoint.files[0]
        self.prefix = checkpoint.architecture + "."

    def get(self, key: str, default: Any = None) -> Any:
        """A scalar, or an array as a list."""
        value = self.file.get(self.prefix + key)
        if value is None:
            value = read_array(self.file, self.prefix + key)
        return default if value is None else value


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The row of a GGUF checkpoint. Raises UsageError without one."""
    row = ARCHITECTURES.get(checkpoint.architecture)
    if checkpoint.container != "gguf" or row is None:
        raise UsageError(
            f"{checkpoint.root}: {checkpoint.container} of {checkpoint.architecture!r} is not read "
            f"into a model; GGUF of these is: {', '.join(ARCHITECTURES)}",
            hint="A Hugging Face directory loads with AutoModelForCausalLM.from_pretrained.",
        )
    return row


def read_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration of the model in a GGUF checkpoint. Raises UsageError for an
    architecture without a row, and for rotary scaling that is not known here."""
    from transformers import AutoConfig

    row, metadata = architecture_of(checkpoint), Metadata(checkpoint)
    values = dict(row.fixed)
    for key, name in row.config.items():
        if (value := metadata.get(key)) is not None:
            values[name] = value
    values["num_hidden_layers"] = metadata.get("block_count") - metadata.get(
        "nextn_predict_layers", 0
    )
    values["vocab_size"] = checkpoint.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in checkpoint.tensors
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    for key in ("bos", "eos"):
        token = metadata.file.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            values[f"{key}_token_id"] = token
    special = {"gemma3": _gemma3, "gemma4": _gemma4, "qwen35": _qwen35, "qwen35moe": _qwen35}
    special.get(checkpoint.architecture, _usual)(values, metadata, checkpoint)
    return AutoConfig.for_model(row.model_type, **values)


def _rope(metadata: Metadata, base: str = "rope.freq_base", default: float = 10000.0) -> dict:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get(base, default)}
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": metadata.get("rope.scaling.factor")}
    if kind == "yarn":
        original = metadata.get("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    elif kind != "linear":
        raise UsageError(f"{metadata.file.path}: rotary scaling {kind!r} is not known here")
    return rope


def _usual(values: dict, metadata: Metadata, checkpoint: Checkpoint) -> None:
    values["rope_parameters"] = _rope(metadata)


def _gemma3(values: dict, metadata: Metadata, checkpoint: Checkpoint) -> None:
    """Five sliding layers, then a full one; the 27B scales queries by the heads' share of the
    hidden size, the others by the head (llama.cpp's src/models/gemma3.cpp)."""
    layers = values["num_hidden_layers"]
    values["layer_types"] = [FULL if i % 6 == 5 else SLIDING for i in range(layers)]
    values["rope_parameters"] = {
        FULL: _rope(metadata, default=1e6),
        SLIDING: {
            "rope_type": "default",
            "rope_theta": metadata.get("rope.freq_base_swa", 10000.0),
        },
    }
    by_head = layers != 62
    values["query_pre_attn_scalar"] = (
        values["head_dim"] if by_head else values["hidden_size"] // values["num_attention_heads"]
    )


def _gemma4(values: dict, metadata: Metadata, checkpoint: Checkpoint) -> None:
    """Sliding layers are told by an array; full ones have wider heads, and may have no v."""
    layers = values["num_hidden_layers"]
    sliding = metadata.get("attention.sliding_window_pattern")
    values["layer_types"] = [SLIDING if s else FULL for s in sliding]
    full = values["layer_types"].index(FULL)
    values["global_head_dim"] = values.pop("head_dim")
    values["head_dim"] = metadata.get("attention.key_length_swa", values["global_head_dim"])
    values["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 1e6)},
        SLIDING: {
            "rope_type": "default",
            "rope_theta": metadata.get("rope.freq_base_swa", 10000.0),
        },
    }
    values["vocab_size_per_layer_input"] = values["vocab_size"]
    values.setdefault("hidden_size_per_layer_input", 0)
    values["enable_moe_block"] = "blk.0.ffn_gate_inp.weight" in checkpoint.tensors

    heads = values["num_key_value_heads"]
    if isinstance(heads, list):
        values["num_global_key_value_heads"] = heads[full]
        values["num_key_value_heads"] = heads[values["layer_types"].index(SLIDING)]
    values["attention_k_eq_v"] = isinstance(heads, list) or any(
        f"blk.{i}.attn_k.weight" in checkpoint.tensors
        and f"blk.{i}.attn_v.weight" not in checkpoint.tensors
        for i in range(layers)
    )
    widths = values.get("intermediate_size")
    if isinstance(widths, list):
        values["intermediate_size"] = widths[0]
        values["use_double_wide_mlp"] = max(widths) == 2 * min(widths)


def _qwen35(values: dict, metadata: Metadata, checkpoint: Checkpoint) -> None:
    """Every n-th layer is full attention; rotary positions turn a part of each head."""
    every = metadata.get("full_attention_interval", 4)
    layers = values["num_hidden_layers"]
    values["layer_types"] = [
        FULL if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
    ]
    inner = metadata.get("ssm.inner_size")
    values["linear_value_head_dim"] = inner // values["linear_num_value_heads"]
    turned = metadata.get("rope.dimension_count", values["head_dim"])
    values["rope_parameters"] = {
        **_rope(metadata),
        "partial_rotary_factor": turned / values["head_dim"],
    }
    if sections := metadata.get("rope.dimension_sections"):
        values["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}
