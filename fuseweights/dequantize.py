"""The numbers that a linear layer's stored tensors stand for: a reference of a few lines a format.

`verify --values` and tests ask it for the rows of one section on both sides. It shares nothing with
the rules, the planner or the writer, and needs only numpy. Numbers are float32, float64 where the
weight itself is stored so; every product is rounded in the order of the library that defines the
format, so that results equal its own in float32 bit for bit. (Libraries round once more when asked
for another type.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np

Quantization = Mapping[str, Any]
#: A tensor as stored: its safetensors dtype, its shape, its bytes.
Raw = tuple[str, tuple[int, ...], Any]


def weights(
    quantization: Quantization, layer: Mapping[str, Raw], rows: tuple[int, int] | None = None
) -> np.ndarray:
    """The weights [N, K] of the layer with these tensors by suffix, or its rows [begin, end).

    `quantization` is the checkpoint's configuration of it. Every NaN that arithmetic made has the
    same bits; those of unquantized weights are as stored. Raises ValueError for a layer that no
    row of `FORMATS` tells, or whose tensors contradict each other.
    """
    tensors = Layer({suffix: Stored.of(*raw) for suffix, raw in layer.items()})
    section = slice(*rows) if rows else slice(None)
    if layer.keys() <= PLAIN and tensors["weight"].dtype in FLOATS:
        return tensors["weight"].numbers(section)
    method = str(quantization.get("quant_method", "")).lower()
    tells = (read for suffix, read in FORMATS.get(method, {}).items() if suffix in layer)
    if (read := next(tells, None)) is None:
        what = ", ".join(f"{suffix} {tensor.dtype}" for suffix, tensor in tensors.items())
        raise ValueError(f"quantization method {method!r} is not known with tensors {what}")
    try:
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(read(quantization, tensors, section), np.float32)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"tensors and configuration contradict each other: {error}") from error
    values[np.isnan(values)] = np.nan  # which of two NaNs a product keeps depends on its place
    return values


def bits(values: np.ndarray) -> np.ndarray:
    """The same numbers as unsigned integers: equal only where every bit is, and for NaNs too."""
    return values.view(f"u{values.dtype.itemsize}")


# --- stored numbers ----------------------------------------------------------------------------


def _e4m3() -> np.ndarray:
    """OCP 8-bit floating point: bias 7, no infinities, all ones are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


def _e8m0() -> np.ndarray:
    """OCP microscaling: 2 to the power of code - 127, the last code is NaN."""
    table = np.ldexp(1.0, np.arange(256) - 127)
    table[255] = np.nan
    return table.astype(np.float32)


E4M3, E8M0 = _e4m3(), _e8m0()
#: The upper byte of a float16.
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
#: OCP microscaling: the fourth bit is the sign.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
PLAIN = frozenset({"weight", "bias", "k_scale", "v_scale", "q_scale", "prob_output_scale"})
FLOAT8 = ("F8_E4M3", "F8_E5M2")
#: The numpy type that holds the elements of each safetensors dtype.
STORAGE = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"},
    **{"F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"},
    **{"U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2"},
    **{"U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"},
}
#: How elements become float32; others are cast.
DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": np.copy,
    "BF16": lambda stored: (stored.astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda stored: E4M3[stored],
    "F8_E5M2": lambda stored: E5M2[stored],
    "F8_E8M0": lambda stored: E8M0[stored],
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's elements as they lie on disk."""

    dtype: str
    array: np.ndarray

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], raw: Any) -> Stored:
        if dtype not in STORAGE:
            raise ValueError(f"dtype {dtype} is not known")
        return cls(dtype, np.frombuffer(raw, STORAGE[dtype]).reshape(shape))

    def numbers(self, at: Any = ...) -> np.ndarray:
        """The elements `at` these places as numbers."""
        return DECODE.get(self.dtype, lambda stored: stored.astype(np.float32))(self.array[at])

    def single(self) -> np.ndarray:
        """The one number of this tensor, whether its shape is [] or [1]."""
        return self.numbers().reshape(())


class Layer(dict[str, Stored]):
    def __missing__(self, suffix: str) -> Stored:
        raise ValueError(f"the layer has no {suffix}, only {', '.join(self)}")


Reader = Callable[[Quantization, Layer, slice], np.ndarray]


def unpack(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first `count` unsigned values of `width` <= 8 bits along the last axis, low bits first
    and without gaps: value i starts at bit i·width. compressed-tensors' `unpack_from_int32`;
    GPTQ's words; with a width of 4, a byte's low nibble first."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    stored = np.concatenate([stored, np.zeros_like(stored[..., :1])], -1).astype(np.uint16)
    pairs = stored[..., :-1] | stored[..., 1:] << 8
    start = np.arange(count) * width
    return np.take(pairs, start // 8, -1) >> (start % 8).astype(np.uint16) & ((1 << width) - 1)


# --- what the configuration says ---------------------------------------------------------------


def _schemes(q: Quantization) -> list[Mapping[str, Any]]:
    """Where widths and sizes may be: the configuration itself, compressed-tensors' groups."""
    groups = (q.get("config_groups") or {}).values()
    return [q, *(group.get("weights") or {} for group in groups)]


def _tile(q: Quantization, shape: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
    """How many (rows, columns) of weights of this shape share each of the scales: those of the
    configuration that give so many scales, or one row."""
    stated = [(1, shape[1])]
    for scheme in _schemes(q):
        block = scheme.get("weight_block_size") or scheme.get("block_structure")
        group = scheme.get("group_size")
        stated += [(block[0], block[1])] if isinstance(block, list) else []
        stated += [(1, group)] if isinstance(group, int) and group > 0 else []
    sizes = {(min(a, shape[0]) or 1, min(b, shape[1]) or 1) for a, b in stated}
    fits = [(a, b) for a, b in sizes if (ceil(shape[0] / a), ceil(shape[1] / b)) == scales]
    if len(fits) != 1:
        raise ValueError(f"scales {list(scales)} fit weights {list(shape)} in {len(fits)} ways")
    return fits[0]


def _width(q: Quantization, words: int, count: int, name: str) -> int:
    """Bits of a value where `count` of them take so many 32-bit words; the configuration decides
    between those that would."""
    fits = {width for width in range(1, 9) if ceil(count * width / 32) == words}
    stated = fits & {scheme.get(name) for scheme in _schemes(q)}
    if len(stated or fits) != 1:
        raise ValueError(f"{count} values in {words} words have {sorted(stated or fits)} bits")
    return (stated or fits).pop()


def _spread(q: Quantization, scale: np.ndarray, shape: tuple[int, int], rows: slice) -> np.ndarray:
    """Numbers one a layer, a row, a group of columns or a block, as one a weight of these rows (or
    what broadcasts to it)."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    scale = scale.reshape(len(scale), -1)
    tall, wide = _tile(q, shape, scale.shape)
    own = scale[np.arange(shape[0])[rows] // tall]
    return own if scale.shape[1] == 1 else np.repeat(own, wide, 1)[:, : shape[1]]


# --- formats -----------------------------------------------------------------------------------


def _scaled(q: Quantization, layer: Layer, rows: slice, name: str = "weight_scale") -> np.ndarray:
    """(weight - zero point) · scale: FP8 and INT8 with one a layer, a row, a group or a block.

    Blocks are DeepSeek-V3's `weight_dequant` and transformers' `Fp8Dequantize`, the rest is
    compressed-tensors' `_dequantize`. Bytes as scales are E8M0 (its MXFP8).
    """
    weight, scale, zero = layer["weight"], layer[name], layer.get("weight_zero_point")
    if weight.dtype not in (*FLOAT8, "I8"):
        raise ValueError(f"a weight {weight.dtype} beside {name} is not known")
    shape = weight.array.shape
    values = weight.numbers(rows)
    if zero is not None:
        values = values - _spread(q, zero.numbers(), shape, rows)
    factor = E8M0[scale.array] if scale.dtype == "U8" else scale.numbers()
    return values * _spread(q, factor, shape, rows)


def _packed(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """compressed-tensors' pack-quantized: 1 to 8 bits, stored plus half their range; zero points
    likewise, packed along output rows. `weight_g_idx` tells each column's group (-1: in order)."""
    shape = tuple(layer["weight_shape"].array.tolist())
    words, scale = layer["weight_packed"].array, layer["weight_scale"].numbers()
    width = _width(q, words.shape[1], shape[1], "num_bits")
    if len(words) != shape[0]:
        raise ValueError(f"{len(words)} packed rows, weight_shape says {shape[0]}")
    half = np.float32(1 << width - 1)
    values = unpack(words[rows], width, shape[1]) - half
    zero = np.zeros_like(scale)
    if "weight_zero_point" in layer:
        zero = unpack(layer["weight_zero_point"].array.T, width, shape[0]).T - half
    g_idx = layer.get("weight_g_idx")
    if g_idx is not None and (g_idx.array >= 0).all():
        return (values - zero[rows][:, g_idx.array]) * scale[rows][:, g_idx.array]
    return (values - _spread(q, zero, shape, rows)) * _spread(q, scale, shape, rows)


def _fp4(packed: Stored, scale: np.ndarray, group: int, rows: slice) -> np.ndarray:
    """value · scale, the scale of these rows one a `group` of columns."""
    columns = 2 * packed.array.shape[1]
    if packed.dtype != "U8" or columns != group * scale.shape[1]:
        raise ValueError(
            f"{packed.dtype} {list(packed.array.shape)} is not FP4 in groups of {group}"
        )
    return E2M1[unpack(packed.array[rows], 4, columns)] * np.repeat(scale, group, 1)


def _nvfp4_modelopt(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """ModelOpt's `NVFP4QTensor.dequantize`: value · (scale · scale_2)."""
    scale = layer["weight_scale"].numbers(rows) * layer["weight_scale_2"].single()
    return _fp4(layer["weight"], scale, 16, rows)


def _nvfp4_compressed(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """compressed-tensors' `_dequantize`: value · (scale / global scale)."""
    scale = layer["weight_scale"].numbers(rows) / layer["weight_global_scale"].single()
    return _fp4(layer["weight_packed"], scale, 16, rows)


def _mxfp4(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """OCP microscaling: value · 2 to the power of (scale - 127)."""
    return _fp4(layer["weight_packed"], E8M0[layer["weight_scale"].array[rows]], 32, rows)


def _gptq(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """(value - zero point) · scale of the column's group; columns of the stored tensors are output
    rows. The format gptq stores zero points less one, gptq_v2 as they are (GPTQModel)."""
    layout = str(q.get("checkpoint_format") or "gptq").lower()
    if layout not in (offsets := {"gptq": 1, "gptq_v2": 0}):
        raise ValueError(f"GPTQ repacked as {layout} is not known")
    scale, g_idx = layer["scales"].numbers(), layer["g_idx"].array
    width = _width(q, layer["qweight"].array.shape[0], len(g_idx), "bits")
    zero = unpack(layer["qzeros"].array, width, scale.shape[1])[:, rows] + offsets[layout]
    values = unpack(layer["qweight"].array[:, rows].T, width, len(g_idx)).astype(np.float32)
    return (values - zero[g_idx].T) * scale[:, rows][g_idx].T


#: The nibble that holds each column of eight: AutoAWQ's gemm packs them 0, 2, 4, 6, 1, 3, 5, 7.
AWQ_NIBBLE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7]).astype(np.uint32)


def _awq(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """AutoAWQ's `dequantize_gemm`: (value - zero point) · scale; columns are output rows."""
    version, width = str(q.get("version") or "gemm").lower(), q.get("bits") or q.get("w_bit") or 4
    if (version, width) != ("gemm", 4):
        raise ValueError(f"AWQ's {version} layout with {width} bits is not known")
    groups, count = layer["scales"].array.shape
    columns = len(layer["qweight"].array)
    group = _tile(q, (count, columns), (count, groups))[1]
    column = np.arange(count)[rows]

    def nibbles(words: Stored) -> np.ndarray:
        picked = np.take(words.array.view(np.uint32), column // 8, 1)
        return (picked >> 4 * AWQ_NIBBLE[column % 8] & 15).astype(np.float32)

    of = np.arange(columns) // group
    steps = nibbles(layer["qweight"]) - nibbles(layer["qzeros"])[of]
    return (steps * layer["scales"].numbers()[:, rows][of]).T


def _bitsandbytes4(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """bitsandbytes' `dequantize_4bit`: map[code] · absmax of the block, over the flattened rows
    and the high nibble first. Nested scales are map[code] · absmax + offset themselves."""
    states = [layer[suffix] for suffix in layer if suffix.startswith("weight.quant_state.")]
    if len(states) != 1:
        raise ValueError(f"{len(states)} bitsandbytes states for one weight")
    state = json.loads(states[0].array.tobytes())
    block, (count, columns) = state["blocksize"], state["shape"]
    pairs = layer["weight"].array.reshape(-1).view(np.uint8)
    if count * columns > 2 * len(pairs):
        raise ValueError(f"{len(pairs)} bytes of weights, the state says {count} x {columns}")
    begin, end, _ = rows.indices(count)
    at = np.arange(begin * columns, end * columns)
    codes = pairs[at // 2] >> np.where(at % 2, 0, 4).astype(np.uint8) & 15
    scale = layer["weight.absmax"].array
    if "nested_blocksize" in state:
        outer = np.arange(len(scale)) // state["nested_blocksize"]
        inner = layer["weight.nested_quant_map"].numbers()[scale]
        scale = inner * layer["weight.nested_absmax"].numbers()[outer]
        scale = scale + np.float32(state["nested_offset"])
    values = layer["weight.quant_map"].numbers()[codes] * scale[at // block]
    return values.reshape(-1, columns)


def _bitsandbytes8(q: Quantization, layer: Layer, rows: slice) -> np.ndarray:
    """bitsandbytes' `int8_vectorwise_dequant`: weight · SCB · (1/127), in this order."""
    if layer["weight"].dtype != "I8" or layer["weight_format"].single() != 0:
        raise ValueError("bitsandbytes INT8 is known in rows only (weight_format 0)")
    scaled = layer["weight"].numbers(rows) * layer["SCB"].numbers(rows)[:, None]
    return scaled * np.float32(7.874015718698502e-3)


_MODELOPT: dict[str, Reader] = {"weight_scale_2": _nvfp4_modelopt, "weight_scale": _scaled}
#: By quantization method, what reads a layer with this tensor; the first that is there decides.
FORMATS: dict[str, dict[str, Reader]] = {
    "fp8": {
        "weight_scale_inv": partial(_scaled, name="weight_scale_inv"),
        "weight_scale": _scaled,
    },
    "modelopt": _MODELOPT,
    "modelopt_fp4": _MODELOPT,
    "compressed-tensors": {
        "weight_shape": _packed,
        "weight_global_scale": _nvfp4_compressed,
        "weight_packed": _mxfp4,
        "weight_scale": _scaled,
    },
    "gptq": {"qweight": _gptq},
    "awq": {"qweight": _awq},
    "bitsandbytes": {"SCB": _bitsandbytes8, "weight.absmax": _bitsandbytes4},
}
