"""What tests/test_kernel_gdn.py compiles for Hopper, in the shapes of Qwen3.5-35B-A3B."""

import torch
from fuseweights.kernels.causal_conv1d_update import causal_conv1d_update
from fuseweights.kernels.gated_delta_decode import gated_delta_decode
from fuseweights.kernels.gdn_projection import Heads, gdn_split, views

HEADS = Heads(16, 32, 128, 128)


def empty(*shape, kind=torch.bfloat16):
    return torch.empty(*shape, dtype=kind)


def _decode(batch, layout="contiguous", conv=True):
    qkvz, ba = empty(batch, 12288 + 64).split((12288, 64), -1)
    parts = views(qkvz, ba, HEADS, layout)
    weights = empty(32), empty(32), empty(128)
    state = empty(batch, 32, 128, 128, kind=torch.float32)
    rest = {
        "conv_state": empty(batch, 8192, 4),
        "conv_weight": empty(8192, 4),
        "arrivals": empty(batch, 16, 128, kind=torch.int32),
    }
    tiled = layout == "tiled"
    gated_delta_decode(*parts, *weights, state, 1e-6, tiled, **rest if conv else {})


SASS = {
    "decode 1": lambda: _decode(1),
    "decode 64": lambda: _decode(64),
    "decode 1, interleaved": lambda: _decode(1, "interleaved"),
    "decode 1, convolved": lambda: _decode(1, conv=False),
    "split 1": lambda: gdn_split(empty(1, 12288), empty(1, 64), *HEADS),
    "split 2048": lambda: gdn_split(empty(2048, 12288), empty(2048, 64), *HEADS),
    "convolution": lambda: causal_conv1d_update(
        empty(1, 1, 8192), empty(1, 8192, 4), empty(8192, 4)
    ),
}
