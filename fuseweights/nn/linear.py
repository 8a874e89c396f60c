"""One weight for several projections that read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from . import ops
from .weights import Format, Plain, detect


class Section(NamedTuple):
    """Rows that tensor parallel divides by themselves. `units` are what must stay whole (heads;
    None: single rows). `replicate`: with more ranks than units several ranks keep the same unit,
    as engines do with key and value heads."""

    rows: int
    units: int | None = None
    replicate: bool = False

    def share(self, rank: int, world: int) -> tuple[tuple[int, int], Section]:
        """This rank's rows (first, last + 1), and the section that they make."""
        units = self.units or self.rows
        if units % world == 0:
            mine, first = units // world, rank * (units // world)
        elif self.replicate and world % units == 0:
            mine, first = 1, rank // (world // units)
        else:
            what = f"{units} heads" if self.units else f"{units} rows"
            raise UsageError(f"{what} do not divide among {world} processes")
        size = self.rows // units
        local = Section(mine * size, self.units and mine, self.replicate)
        return (first * size, (first + mine) * size), local


#: What a part may be given as: its rows, a section, or the sections that it consists of.
Parts = Mapping[str, "int | Section | Sequence[Section]"]


def _sections(part: int | Section | Sequence[Section]) -> tuple[Section, ...]:
    if isinstance(part, Section):
        return (part,)
    return (Section(part),) if isinstance(part, int) else tuple(part)


class FusedLinear(nn.Module):
    """y = x Wᵀ + b with W [ΣN, K] the parts' weights one below the other, in the order of
    `sections`: part name → its sections. `split(y)` gives each part's columns, as views.

    Parameters: `weight`, `bias` if any, and what the format adds (`weight_scale_inv`, …), under the
    names of the fused checkpoint. The parts are siblings of this module when it is un-fused.
    """

    def __init__(
        self,
        in_features: int,
        sections: Parts,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        self.sections = {name: _sections(part) for name, part in sections.items()}
        rows = sum(self.rows)
        like = {"dtype": dtype, "device": device}
        tensors = {"weight": torch.empty(rows, in_features, **like)}
        nn.init.kaiming_uniform_(tensors["weight"], a=5**0.5)
        if bias:
            tensors["bias"] = torch.zeros(rows, **like)
        self._hold(tensors, Plain())

    def _hold(self, tensors: Mapping[str, Tensor], format: Format) -> None:
        self.in_features, self.format = format.width(tensors["weight"]), format
        self.names = tuple(name for name in tensors if name != "bias")
        for name, tensor in tensors.items():
            grad = tensor.is_floating_point() and isinstance(format, Plain)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=grad))
        if "bias" not in tensors:
            self.register_parameter("bias", None)

    @classmethod
    def from_tensors(
        cls, sections: Parts, tensors: Mapping[str, Tensor], format: Format | None = None
    ) -> FusedLinear:
        """Around tensors that are fused already, without copying."""
        self = cls(1, dict.fromkeys(sections, 1), device="meta")
        self.sections = {name: _sections(part) for name, part in sections.items()}
        format = format or detect(tensors)
        self._hold(tensors, format)
        if (stored := self.weight.shape[0]) != sum(self.rows):
            raise UsageError(f"sections have {sum(self.rows)} rows, the weight has {stored}")
        return self

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, nn.Module | Mapping[str, Tensor]],
        sections: Parts | None = None,
        format: Format | None = None,
    ) -> FusedLinear:
        """Stack loaded layers (or their tensors). Values are kept exactly; scales of FP8 and INT8
        layers that cannot share blocks, or a single number, become one a row. Parts that
        patch_model has stacked already share its tensors."""
        stacked = {getattr(part, "product", None) for part in parts.values()}
        if len(stacked) == 1 and (product := stacked.pop()) is not None:
            rows = dict(zip(parts, product.sizes, strict=True))
            return cls.from_tensors(sections or rows, dict(product.fused().named_parameters()))
        tensors = {name: _tensors(part) for name, part in parts.items()}
        blocks = {n: getattr(part, "block_size", None) or (128, 128) for n, part in parts.items()}
        formats = {n: format or detect(t, tuple(blocks[n])) for n, t in tensors.items()}
        _check_alike(tensors, formats)
        if not _stackable(tensors, formats):
            for name in parts:
                formats[name], tensors[name] = formats[name].by_row(tensors[name])
        first, kind = next(iter(tensors.values())), next(iter(formats.values()))
        fused = {
            name: tensor
            if name != "bias" and kind.rows_per[name] is None
            else torch.cat([part[name].detach() for part in tensors.values()])
            for name, tensor in first.items()
        }
        rows = {name: part["weight"].shape[0] for name, part in tensors.items()}
        self = cls.from_tensors(sections or rows, fused, kind)
        self.train(any(getattr(part, "training", False) for part in parts.values()))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(first[name].requires_grad)
        return self

    @property
    def rows(self) -> list[int]:
        return [sum(section.rows for section in part) for part in self.sections.values()]

    @property
    def out_features(self) -> int:
        return sum(self.rows)

    @property
    def slices(self) -> dict[str, slice]:
        """Part → its rows of the weight and columns of the output: where a LoRA target of that
        name lives."""
        ends, out = 0, {}
        for name, rows in zip(self.sections, self.rows, strict=True):
            out[name], ends = slice(ends, ends + rows), ends + rows
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.tensors(), self.format, self.bias)

    def gated(self, x: Tensor, act: ops.Activation) -> Tensor:
        """act(gate) · up, of a layer whose two halves are gate and up: [..., K] → [..., ΣN / 2]."""
        return ops.gated_linear(x, self.tensors(), self.format, self.bias, act)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Each part's output, views of y [..., ΣN]."""
        return y.split(self.rows, dim=-1)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The parts' own tensors, part → name → view: un-fused."""
        per = {**self.format.rows_per, **({} if self.bias is None else {"bias": 1})}
        return {
            part: {
                name: getattr(self, name)
                if n is None
                else getattr(self, name)[rows.start // n : -(-rows.stop // n)]
                for name, n in per.items()
            }
            for part, rows in self.slices.items()
        }

    def part_tensors(self) -> dict[str, tuple[str, Tensor]]:
        """`q_proj.weight` → ("weight", its view): the names of the split checkpoint."""
        return {
            f"{part}.{name}": (name, view)
            for part, tensors in self.parts().items()
            for name, view in tensors.items()
        }

    def fuse_lora(self, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Adapters of some parts, (A [r, K], B [N, r]) each, as one (A [Σr, K], B [ΣN, Σr]) for the
        whole layer: block-diagonal, the same function."""
        unknown = adapters.keys() - self.sections.keys()
        if unknown:
            raise UsageError(f"no part is called {', '.join(sorted(unknown))}")
        a = torch.cat([pair[0] for pair in adapters.values()])
        b, rank = a.new_zeros(self.out_features, a.shape[0]), 0
        for name, (_, up) in adapters.items():
            b[self.slices[name], rank : rank + up.shape[1]] = up
            rank += up.shape[1]
        return a, b

    def shard(self, rank: int, world: int) -> FusedLinear:
        """What process `rank` of `world` holds: its share of every section, stacked again."""
        format, tensors = self.format, self.tensors()
        ranges, local, start = [], {}, 0
        for name, sections in self.sections.items():
            shares = [section.share(rank, world) for section in sections]
            local[name] = tuple(section for _, section in shares)
            for section, ((first, last), _) in zip(sections, shares, strict=True):
                ranges.append((start + first, start + last))
                start += section.rows
        blocks = [n for n in format.rows_per.values() if n]
        if any(edge % n for n in blocks for span in ranges for edge in span):
            format, tensors = format.by_row(tensors)
        per = format.rows_per
        if self.bias is not None:
            tensors, per = {**tensors, "bias": self.bias}, {**per, "bias": 1}
        taken = {
            name: tensor.detach()
            if per[name] is None
            else torch.cat([tensor.detach()[a // per[name] : b // per[name]] for a, b in ranges])
            for name, tensor in tensors.items()
        }
        return FusedLinear.from_tensors(local, taken, format)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{n}={r}" for n, r in zip(self.sections, self.rows, strict=True))
        return f"{self.in_features} → {parts}, {self.format}, bias={self.bias is not None}"


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of a plain linear layer that nothing hooks into, by ops.linear."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is not nn.Linear or hooks or layer._backward_hooks:
        return layer(x)
    return ops.linear(x, {"weight": layer.weight}, Plain(), layer.bias)


def _tensors(part: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors by name, the weight first."""
    if isinstance(part, nn.Module):
        part = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    if "weight" not in part or any("." in name for name in part):
        names = ", ".join(sorted(part)) or "no tensors"
        raise UsageError(f"not a linear layer with a weight of its own: {names}")
    return {"weight": part["weight"], **part}


def _check_alike(tensors: Mapping[str, Mapping[str, Tensor]], formats: Mapping[str, Format]):
    """One error that lists everything in which the parts disagree."""
    problems = []

    def differ(what: str, of: Mapping[str, Any]) -> None:
        if len(set(of.values())) > 1:
            problems.append(f"{what}: " + ", ".join(f"{part} has {v}" for part, v in of.items()))

    differ("tensors", {part: " + ".join(sorted(t)) for part, t in tensors.items()})
    differ("format", {part: str(format) for part, format in formats.items()})
    differ("input size", {part: t["weight"].shape[1] for part, t in tensors.items()})
    differ("device", {part: str(t["weight"].device) for part, t in tensors.items()})
    kind = next(iter(formats.values()))
    for name, per in {**kind.rows_per, "bias": 1}.items():
        held = {part: t[name] for part, t in tensors.items() if name in t}
        dtypes = {part: str(t.dtype).removeprefix("torch.") for part, t in held.items()}
        differ(f"dtype of {name}", dtypes)
        if per is None and name in getattr(kind, "carried", ()):
            differ(name, {part: t.item() for part, t in held.items()})
    if problems:
        raise UsageError("these layers do not stack exactly: " + "; ".join(problems))


def _stackable(tensors: Mapping[str, Mapping[str, Tensor]], formats: Mapping[str, Format]) -> bool:
    """Whether scales stay as they are: whole blocks in every part but the last, single numbers
    bit-equal."""
    held = list(tensors.values())
    for name, per in next(iter(formats.values())).rows_per.items():
        if per is None:
            if any(not torch.equal(part[name], held[0][name]) for part in held[1:]):
                return False
        elif any(part["weight"].shape[0] % per for part in held[:-1]):
            return False
    return True
