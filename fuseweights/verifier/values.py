"""`verify --values`: dequantize both sides and compare the numbers, bit for bit.

Equal bytes already imply equal numbers. This repeats the proof one level up, through gguf's own
dequantizers and each side's own idea of where rows lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ..checkpoint.model import Checkpoint, Tensor
from ..checkpoint.pieces import Sources
from .results import Difference, Section

ROWS = 1 << 22  # weights dequantized at a time


def compare_values(
    source: Checkpoint, fused: Checkpoint, section: Section, notes: list[str]
) -> Iterator[Difference]:
    """At most one difference: the first weight of the section whose value differs."""
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
