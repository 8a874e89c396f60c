"""`verify --values`: dequantize both sides and compare the numbers, bit for bit.

Equal bytes already imply equal numbers, where bytes are equal; expanded scales and rewritten
shapes are only proved here. This repeats the proof one level up: GGUF through gguf's own
dequantizers, Hugging Face layers through a reference that knows nothing of rules and plans, each
side with its own configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from ..checkpoint.model import Checkpoint, Tensor
from ..checkpoint.pieces import Sources
from ..rules.formats import PRIMARY
from .matching import by_name, layer
from .results import Difference, Section

ROWS = 1 << 22  # weights dequantized at a time


def compare_values(
    source: Checkpoint, fused: Checkpoint, sections: Sequence[Section], notes: list[str]
) -> Iterator[Difference]:
    """At most one difference a section: its first weight whose value differs."""
    if source.container == "gguf":
        for section in sections:
            yield from _blocks(source, fused, section, notes)
    else:
        for made in by_name(list(sections)).values():
            yield from _layers(source, fused, made, notes)


def _layers(
    source: Checkpoint, fused: Checkpoint, sections: list[Section], notes: list[str]
) -> Iterator[Difference]:
    """The rows of one fused layer against each of its parts' weights."""
    from ..dequantize import bits, weights

    name = sections[0].part.name
    suffix = next((s for s in PRIMARY if name.endswith(f".{s}")), None)
    if suffix is None or sections[0].merge != "stack":
        return
    experts = len(sections[0].fused.shape) == len(sections[0].part.shape) + 1
    per_expert = len(sections) // sections[0].fused.shape[0] if experts else 0
    begin = 0
    for number, section in enumerate(sections):
        part = _read(source, section.part.name.removesuffix(suffix))
        if experts:
            expert, place = divmod(number, per_expert)
            whole = _read_expert(fused, section.fused.name, part, expert)
            begin = 0 if place == 0 else begin
        else:
            whole = _read(fused, section.fused.name.removesuffix(suffix))
        try:
            want = weights(source.quantization, part)
            end = begin + want.shape[0]
            got = weights(fused.quantization, whole, (begin, end))
        except ValueError as error:
            notes.append(f"{section.fused.name}: compared by bytes only: {error}")
            return
        begin = end
        if want.shape != got.shape or want.dtype != got.dtype or (bits(want) != bits(got)).any():
            yield Difference(section.fused.name, None, f"values of {section.part.name} differ")


def _read(checkpoint: Checkpoint, module: str) -> dict[str, tuple]:
    """The tensors of a linear layer by suffix, whole: `module` ends in its dot."""
    with Sources(checkpoint.paths) as sources:
        return {
            suffix: (tensor.dtype, tensor.shape, sources.read(*tensor.place))
            for suffix, tensor in layer(checkpoint, module).items()
        }


def _read_expert(
    checkpoint: Checkpoint, name: str, like: Mapping[str, tuple], expert: int
) -> dict[str, tuple]:
    """One expert's layer out of the stacked tensors, under the suffixes of `like`."""
    stored = {}
    with Sources(checkpoint.paths) as sources:
        for suffix in like:
            tail = "" if suffix == "weight" else "_" + suffix.removeprefix("weight_")
            tensor = checkpoint.tensors[name + tail]
            size = tensor.size // tensor.shape[0]
            raw = sources.read(tensor.file, tensor.offset + expert * size, size)
            stored[suffix] = (tensor.dtype, tensor.shape[1:], raw)
    return stored


def _blocks(
    source: Checkpoint, fused: Checkpoint, section: Section, notes: list[str]
) -> Iterator[Difference]:
    """GGUF rows, a few at a time."""
    import numpy as np

    part, whole, axis = section.part, section.fused, section.axis
    if not part.size:
        return
    width = prod(part.shape[axis + 1 :])
    step = max(1, ROWS // max(1, width))
    with Sources(source.paths) as a, Sources(fused.paths) as b:
        for outer in range(prod(part.shape[:axis])):
            for row in range(0, section.end - section.begin, step):
                count = min(step, section.end - section.begin - row)
                left = _rows(source, part, axis, outer, row, count, a)
                right = _rows(fused, whole, axis, outer, section.begin + row, count, b)
                if left is None or right is None:
                    notes.append(f"gguf cannot dequantize {part.dtype}: compared by bytes only")
                    return
                if not np.array_equal(left.view(np.uint32), right.view(np.uint32)):
                    at = int(np.argmax((left.view(np.uint32) != right.view(np.uint32)).ravel()))
                    yield Difference(whole.name, None, f"value {at} of {part.name} differs")
                    return


def _rows(checkpoint, tensor: Tensor, axis: int, outer: int, row: int, count: int, sources):
    """`count` rows from `row` of slice `outer`, as float32; None where gguf cannot."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    rows = tensor.shape[axis] if tensor.shape else 1
    size = tensor.size // (prod(tensor.shape[:axis]) * rows)
    if getattr(checkpoint.files[0], "order", "<") != "<":
        return None
    at = tensor.offset + (outer * rows + row) * size
    raw = np.frombuffer(sources.read(tensor.file, at, count * size), np.uint8)
    try:
        quantized = raw.reshape(count, size)
        kind = GGMLQuantizationType[tensor.dtype]
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            quantized = quantized.view(np.dtype(f"<f{4 if tensor.dtype == 'F32' else 2}"))
        with np.errstate(all="ignore"):  # infinite scales are compared like any other
            return np.ascontiguousarray(dequantize(quantized, kind), dtype=np.float32)
    except (NotImplementedError, ValueError):
        return None
