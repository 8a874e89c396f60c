"""Random ggml blocks that mean finite numbers: any bits but for the scales, which are small."""

from __future__ import annotations

import torch
from fuseweights.kernels.gguf_types import TYPES, planar
from torch import Tensor

#: Where a block has float16 numbers (bytes); MXFP4 has an exponent in byte 0.
HALVES = {
    **{2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,)},
    **{12: (0, 2), 13: (0, 2), 14: (208,), 20: (0,), 23: (0,), 39: ()},
}


def random_blocks(
    type: int, *shape: int, is_planar: bool = False, device: str = "cpu", seed: int | None = None
) -> Tensor:
    """Blocks of weights [*shape], the last dimension being the columns."""
    kind, generator = TYPES[type], torch.Generator(device)
    generator.manual_seed(int(torch.randint(1 << 31, ())) if seed is None else seed)
    *rows, columns = shape
    size = (*rows, columns // kind.weights, kind.bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)
    for at in HALVES[type]:
        half = torch.randn((*size[:-1], 1), device=device, generator=generator) * 0.01
        blocks[..., at : at + 2] = half.half().view(torch.uint8)
    if TYPES[type].name == "MXFP4":
        blocks[..., 0] = 118 + blocks[..., 0] % 4
    blocks = blocks.flatten(-2)
    return planar(blocks, type, columns) if is_planar else blocks
