"""Checkpoints with true headers and holes for data: as large as wanted, at no cost in disk."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Row = tuple[str, str, list[int]]


def write_file(path: Path, rows: list[Row]) -> int:
    """One safetensors file of holes; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in rows:
        size = prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def linear(name: str, rows: int, columns: int) -> list[Row]:
    """An FP8 block-scaled layer."""
    blocks = [-(-rows // 128), -(-columns // 128)]
    return [
        (f"{name}.weight", "F8_E4M3", [rows, columns]),
        (f"{name}.weight_scale_inv", "F32", blocks),
    ]


def deepseek_v3(directory: Path, layers: int = 61, experts: int = 256, files: int = 163) -> Path:
    """DeepSeek-V3's layers: MLA, three dense layers, then experts, FP8 in blocks of 128."""
    hidden, expert, dense = 7168, 2048, 18432
    rows: list[Row] = [("model.embed_tokens.weight", "BF16", [129280, hidden])]
    for n in range(layers):
        at = f"model.layers.{n}."
        rows += [
            (f"{at}input_layernorm.weight", "BF16", [hidden]),
            (f"{at}post_attention_layernorm.weight", "BF16", [hidden]),
            (f"{at}self_attn.q_a_layernorm.weight", "BF16", [1536]),
            (f"{at}self_attn.kv_a_layernorm.weight", "BF16", [512]),
            *linear(f"{at}self_attn.q_a_proj", 1536, hidden),
            *linear(f"{at}self_attn.q_b_proj", 24576, 1536),
            *linear(f"{at}self_attn.kv_a_proj_with_mqa", 576, hidden),
            *linear(f"{at}self_attn.kv_b_proj", 32768, 512),
            *linear(f"{at}self_attn.o_proj", hidden, 16384),
        ]
        if n < 3:
            parts = [("mlp", dense)]
        else:
            rows += [
                (f"{at}mlp.gate.weight", "BF16", [experts, hidden]),
                (f"{at}mlp.gate.e_score_correction_bias", "F32", [experts]),
            ]
            parts = [(f"mlp.experts.{e}", expert) for e in range(experts)]
            parts.append(("mlp.shared_experts", expert))
        for name, width in parts:
            rows += linear(f"{at}{name}.gate_proj", width, hidden)
            rows += linear(f"{at}{name}.up_proj", width, hidden)
            rows += linear(f"{at}{name}.down_proj", hidden, width)
    rows += [("model.norm.weight", "BF16", [hidden]), ("lm_head.weight", "BF16", [129280, hidden])]
    directory.mkdir(parents=True, exist_ok=True)
    weight_map, total, step = {}, 0, -(-len(rows) // files)
    for number in range(files):
        part = rows[number * step : (number + 1) * step]
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        total += write_file(directory / name, part)
        weight_map |= dict.fromkeys((row[0] for row in part), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory
