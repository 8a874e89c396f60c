"""Quantization formats of Hugging Face checkpoints: which tensors belong to a linear layer, and
how each one merges when layers stack along their output rows.

A row is a table of companions, the weight first. `axis` is the dimension that holds output rows,
`per` how many rows of the weight one of the companion's rows covers. Formats that are not here
are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol

from .groups import Companion, Rejects

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
# Scales of the KV cache: they stay where they are, under their own names.
CARRIED = frozenset({"k_scale", "v_scale", "q_scale", "prob_output_scale"})
PRIMARY = ("weight", "weight_packed", "qweight")
# Every suffix that some table below has.
SUFFIXES = (
    *PRIMARY,
    *("bias", "weight_scale_inv", "activation_scale"),
    *("weight_scale", "weight_scale_2", "weight_zero_point", "input_scale", "input_zero_point"),
    *("weight_shape", "weight_g_idx", "weight_global_scale", "input_global_scale"),
    *("qzeros", "scales", "g_idx"),
    *("SCB", "weight_format", "weight.absmax", "weight.quant_map"),
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")),
)
# Methods whose files list their tensors where fusing does not follow.
NAMED_ELSEWHERE = frozenset({"torchao"})
BNB_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


class TensorLike(Protocol):
    dtype: str
    shape: tuple[int, ...]


Part = Mapping[str, TensorLike]
Table = dict[str, Companion]

_BIAS = Companion("stack", "bias-mismatch")
_ROWS = Companion("stack", "missing-part")
_SCALE = Companion("stack", "scale-mismatch")
_SAME = Companion("same", "scale-mismatch")
PLAIN: Table = {"weight": _ROWS, "bias": _BIAS}


def companions(quantization: Mapping[str, Any], part: Part) -> Table | Rejects:
    """The table for a linear layer with these tensors in a checkpoint quantized like this."""
    method = str(quantization.get("quant_method", "")).lower()
    if method in NAMED_ELSEWHERE:
        detail = f"quantization method {method!r} lists its tensors elsewhere: none stacks exactly"
        return Rejects("format-unsupported", detail)
    weight = part.get("weight")
    if weight is not None and weight.dtype in FLOATS and part.keys() <= PLAIN.keys():
        return PLAIN
    build = FORMATS.get(method)
    if build is None:
        named = f"quantization method {method!r}" if method else "a layer with these tensors"
        return Rejects("format-unsupported", f"nothing says how {named} stacks exactly")
    try:
        return build(quantization, part)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        return Rejects("format-unsupported", f"the {method} configuration is malformed: {error}")


def _single(tensor: TensorLike | None) -> bool:
    """One number: no row of one, which a layer of one block has."""
    return tensor is not None and tensor.shape in ((), (1,))


def _scale(part: Part, name: str, block: int = 1, expands: bool = False) -> Companion:
    """One number for the whole layer is kept, rows of them stack."""
    if _single(part.get(name)):
        return Companion("same", "scale-mismatch", expands=expands)
    return Companion("stack", "scale-mismatch", per=Fraction(block))


def _positive(value: Any) -> int:
    """`value` if it is a positive integer; raises ValueError."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no size")
    return value


def _fine_grained(q: Mapping[str, Any], part: Part) -> Table | Rejects:
    """transformers' `fp8`: E4M3 with a scale a block of 128 × 128, or one a layer."""
    if "weight" in part and part["weight"].dtype not in FLOAT8:
        return Rejects("format-unsupported", f"fp8 with {part['weight'].dtype} weights")
    block = _positive((q.get("weight_block_size") or [1])[0])
    return {
        "weight": _ROWS,
        "weight_scale_inv": _scale(part, "weight_scale_inv", block),
        "activation_scale": _SAME,
        "bias": _BIAS,
    }


def _modelopt(q: Mapping[str, Any], part: Part) -> Table:
    """FP8 with a scale a layer or a row, NVFP4 with a scale 16 weights and one a layer."""
    return {
        "weight": _ROWS,
        "weight_scale": _scale(part, "weight_scale"),
        "weight_scale_2": _SAME,
        "input_scale": _SAME,
        "bias": _BIAS,
    }


def _compressed_tensors(q: Mapping[str, Any], part: Part) -> Table | Rejects:
    """FP8 and INT8 by layer, row or block; packed INT4 and INT8; NVFP4 and MXFP4."""
    weights = [g.get("weights") or {} for g in (q.get("config_groups") or {}).values()]
    if "weight_packed" not in part:
        blocks = {tuple(w["block_structure"]) for w in weights if w.get("block_structure")}
        block = _positive(blocks.pop()[0]) if len(blocks) == 1 else 1
        return {
            "weight": _ROWS,
            "weight_scale": _scale(part, "weight_scale", block, expands=True),
            "weight_zero_point": _scale(part, "weight_zero_point", block),
            "input_scale": _SAME,
            "input_zero_point": _SAME,
            "bias": _BIAS,
        }
    table = {"weight_packed": _ROWS, "weight_scale": _scale(part, "weight_scale"), "bias": _BIAS}
    if part["weight_packed"].dtype == "U8":
        return {**table, "weight_global_scale": _SAME, "input_global_scale": _SAME}
    bits = {w.get("num_bits") for w in weights}
    if len(bits) != 1 or not isinstance(number := bits.pop(), int):
        return Rejects("format-unsupported", "the config does not tell how many bits are packed")
    return {
        **table,
        "weight_zero_point": Companion("stack", "scale-mismatch", per=Fraction(32, number)),
        "weight_shape": Companion("shape", "missing-part"),
        "weight_g_idx": Companion("same", "g-idx-mismatch"),
        "input_scale": _SAME,
    }


def _gptq(q: Mapping[str, Any], part: Part) -> Table | Rejects:
    """Columns are output rows; eight 4-bit zero points share a word along them."""
    layout = str(q.get("checkpoint_format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        return Rejects("format-unsupported", f"GPTQ repacked as {layout} does not stack exactly")
    columns = Companion("stack", "scale-mismatch", axis=1)
    return {
        "qweight": Companion("stack", "missing-part", axis=1),
        "qzeros": Companion("stack", "scale-mismatch", axis=1, per=Fraction(32, q["bits"])),
        "scales": columns,
        "g_idx": Companion("same", "g-idx-mismatch"),
        "bias": _BIAS,
    }


def _awq(q: Mapping[str, Any], part: Part) -> Table | Rejects:
    """Words of eight 4-bit columns, in weights and zero points alike."""
    version = str(q.get("version") or "gemm").lower()
    if version != "gemm":
        return Rejects("format-unsupported", f"AWQ's {version} layout does not stack exactly")
    words = Companion("stack", "missing-part", axis=1)
    bits = q.get("bits") or q.get("w_bit") or 4
    return {
        "qweight": words,
        "qzeros": words,
        "scales": Companion("stack", "scale-mismatch", axis=1, per=Fraction(bits, 32)),
        "bias": Companion("stack", "bias-mismatch", per=Fraction(bits, 32)),
    }


def _bitsandbytes(q: Mapping[str, Any], part: Part) -> Table | Rejects:
    """Rows flattened to pairs of nibbles with a scale a block; INT8 with a scale a row."""
    if "SCB" in part:
        return {"weight": _ROWS, "SCB": _SCALE, "weight_format": _SAME, "bias": _BIAS}
    if any("nested" in suffix for suffix in part):
        return Rejects(
            "format-unsupported", "nested (double quantized) scales do not stack exactly"
        )
    states = [suffix for suffix in part if suffix.startswith("weight.quant_state.")]
    absmax = part.get("weight.absmax")
    if len(states) != 1 or absmax is None or part["weight"].dtype != "U8":
        return Rejects("format-unsupported", "not a layout that bitsandbytes writes")
    pairs = part["weight"].shape[0]
    blocks = [b for b in BNB_BLOCKS if -(-2 * pairs // b) == absmax.shape[0]]
    if not blocks:
        return Rejects("format-unsupported", "the scales fit no block size of bitsandbytes")
    return {
        "weight": _ROWS,
        "weight.absmax": Companion("stack", "scale-mismatch", per=Fraction(blocks[0], 2)),
        "weight.quant_map": _SAME,
        states[0]: Companion("state", "type-mismatch"),
        "bias": Companion("stack", "bias-mismatch", per=None),
    }


FORMATS: dict[str, Callable[[Mapping[str, Any], Part], Table | Rejects]] = {
    "fp8": _fine_grained,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
