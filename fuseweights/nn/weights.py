"""How a linear layer's weight is stored: which tensors it has, which rows each of them covers, and
how it becomes numbers again.

A format is a small frozen value; the tensors themselves live in the module, under the names that
the checkpoint has. `rows_per` is all that stacking, slicing and un-fusing need: name → how many
rows of the weight one row of that tensor covers, None where it belongs to the whole layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import UsageError

Tensors = Mapping[str, Tensor]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Scales of activations that some formats carry: kept once, unused while the weight dequantizes.
INPUT_SCALES = ("activation_scale", "input_scale")


class Format(Protocol):
    @property
    def rows_per(self) -> Mapping[str, int | None]: ...
    def width(self, weight: Tensor) -> int: ...
    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor: ...
    def by_row(self, tensors: Tensors) -> tuple[Format, dict[str, Tensor]]:
        """The same values with every tensor told by rows, so that any rows can be taken."""
        ...


class _WidthAsStored:
    def width(self, weight: Tensor) -> int:
        return weight.shape[1]


@dataclass(frozen=True)
class Plain(_WidthAsStored):
    """`weight` [N, K] in float64, float32, float16 or bfloat16."""

    rows_per: ClassVar[Mapping[str, int | None]] = {"weight": 1}

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return tensors["weight"]

    def by_row(self, tensors: Tensors) -> tuple[Format, dict[str, Tensor]]:
        return self, dict(tensors)


@dataclass(frozen=True)
class Scaled(_WidthAsStored):
    """`weight` [N, K] in FP8 or INT8 and a scale for every `rows` × `columns` of it, None for all:
    (128, 128) is DeepSeek's block FP8, (1, None) a scale a row, (None, None) one a layer.

    The scale's name: `weight_scale_inv` in transformers' fine-grained FP8 (E4M3, scale F32, BF16 or
    E8M0), `weight_scale` in compressed-tensors and ModelOpt. value = (weight − zero point) · scale.
    """

    rows: int | None = 1
    columns: int | None = None
    scale: str = "weight_scale"
    zero_point: str | None = None
    carried: tuple[str, ...] = ()

    @property
    def rows_per(self) -> Mapping[str, int | None]:
        companions = {self.scale: self.rows, self.zero_point: self.rows}
        companions |= dict.fromkeys(self.carried)
        return {"weight": 1} | {name: rows for name, rows in companions.items() if name}

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        weight = tensors["weight"].float()
        if self.zero_point:
            weight = weight - self._spread(tensors[self.zero_point], weight)
        return (weight * self._spread(tensors[self.scale], weight)).to(dtype)

    def _spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        scale = scale.float()
        if self.rows is None:
            return scale.reshape(())
        if self.rows > 1:
            scale = scale.repeat_interleave(self.rows, 0)[: weight.shape[0]]
        if self.columns is not None:
            scale = scale.repeat_interleave(self.columns, 1)[:, : weight.shape[1]]
        return scale

    def by_row(self, tensors: Tensors) -> tuple[Format, dict[str, Tensor]]:
        rows = tensors["weight"].shape[0]
        out = dict(tensors)
        for name in (self.scale, self.zero_point):
            if name and self.rows is None:
                out[name] = tensors[name].reshape(1, 1).expand(rows, 1)
            elif name:
                out[name] = tensors[name].repeat_interleave(self.rows, 0)[:rows]
        return replace(self, rows=1), out


@dataclass(frozen=True)
class GGUFBlocks:
    """`weight` [N, bytes a row] U8: ggml blocks of 32 or 256 weights along K, as a GGUF file has
    them. `type` is gguf.GGMLQuantizationType's number. With `columns`, K, each row's bytes are in
    planar order, which GPU kernels read faster (kernels/gguf_types.py); `raw` puts them back."""

    type: int
    columns: int | None = None
    rows_per: ClassVar[Mapping[str, int | None]] = {"weight": 1}

    @property
    def is_planar(self) -> bool:
        return self.columns is not None

    def width(self, weight: Tensor) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        return self.columns or weight.shape[-1] // size * weights

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        blocks = tensors["weight"]
        if blocks.is_cuda and dtype != torch.float64:
            from ..kernels.gguf_types import TYPES

            if self.type in TYPES:
                given = blocks, self.type, self.width(blocks), dtype, self.is_planar
                return torch.ops.fuseweights.gguf_dequantize(*given)
        return _dequantize_gguf(self.raw(blocks), self.type).to(dtype)

    def raw(self, weight: Tensor) -> Tensor:
        """The blocks as the file has them, bit for bit."""
        if not self.is_planar:
            return weight
        from ..kernels import gguf_types

        return gguf_types.raw(weight, self.type, self.columns)

    def planar(self, weight: Tensor) -> tuple[GGUFBlocks, Tensor]:
        """The same in planar order, where kernels know the type and read it faster so."""
        from ..kernels import gguf_types

        kind = gguf_types.TYPES.get(self.type)
        if self.is_planar or kind is None or not kind.has_planar:
            return self, weight
        columns = self.width(weight)
        return replace(self, columns=columns), gguf_types.planar(weight, self.type, columns)

    def by_row(self, tensors: Tensors) -> tuple[Format, dict[str, Tensor]]:
        return self, dict(tensors)


@torch.library.custom_op("fuseweights::dequantize_gguf", mutates_args=())
def _dequantize_gguf(blocks: Tensor, type: int) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(blocks.detach().cpu().numpy(), GGMLQuantizationType(type))
    return torch.tensor(values, device=blocks.device)


@_dequantize_gguf.register_fake
def _(blocks: Tensor, type: int) -> Tensor:
    columns = GGUFBlocks(type).width(blocks)
    return blocks.new_empty(blocks.shape[0], columns, dtype=torch.float32)


def detect(tensors: Tensors, block: tuple[int, int] = (128, 128)) -> Format:
    """The format of a layer that has these tensors, by their names, dtypes and shapes."""
    weight, names = tensors["weight"], set(tensors) - {"bias"}
    if weight.is_floating_point() and weight.dtype not in FLOAT8 and names == {"weight"}:
        return Plain()
    scale = next((name for name in ("weight_scale_inv", "weight_scale") if name in names), None)
    zero = "weight_zero_point" if "weight_zero_point" in names else None
    carried = tuple(name for name in INPUT_SCALES if name in names)
    if weight.dtype in (*FLOAT8, torch.int8) and scale:
        shape, (rows, columns) = tuple(tensors[scale].shape), weight.shape
        if names - {zero} == {"weight", scale, *carried}:
            if tensors[scale].numel() == 1:
                return Scaled(None, None, scale, zero, carried)
            for per in ((1, columns), block, (1, block[1])):
                if shape == (-(-rows // per[0]), -(-columns // per[1])):
                    per = (1, None) if per == (1, columns) else per
                    return Scaled(*per, scale, zero, carried)
    shapes = ", ".join(f"{n} {t.dtype} {tuple(t.shape)}" for n, t in sorted(tensors.items()))
    raise UsageError(f"no format of fuseweights.nn has a layer with these tensors: {shapes}")
