"""Random arguments for Gated DeltaNet's decoding kernels, and how far they are from float64."""

from __future__ import annotations

from typing import Any

import torch
from fuseweights.kernels import gated_delta_decode as decode
from fuseweights.kernels import gdn_projection as projection
from torch import Tensor

RATIOS = 1, 2, 3, 4, 8


def error(out: Tensor, exact: Tensor) -> float:
    out, exact = out.double(), exact.double()
    return float((out - exact).norm() / exact.norm())


def token(
    batch: int,
    heads: projection.Heads,
    layout: str = "contiguous",
    kind: torch.dtype = torch.float16,
    device: str = "cpu",
    foreign: int = 3,
) -> dict[str, Tensor]:
    """q, k, v, z, b, a of a token, as views of one fused output, `foreign` columns around it."""
    group, values = heads.keys * heads.group, heads.values
    x = torch.randn(batch, group + 2 * values + 2 * foreign, device=device).to(kind)
    qkvz, ba = x[:, foreign:].split((group, 2 * values + foreign), -1)
    return projection.views(qkvz, ba[:, : 2 * values], heads, layout)._asdict()


def case(
    batch: int,
    heads: projection.Heads,
    layout: str = "contiguous",
    kind: torch.dtype = torch.float16,
    device: str = "cpu",
    kept: int = 4,
    width: int = 4,
    convolved: bool = False,
) -> dict[str, Any]:
    """Arguments of `gated_delta_decode`."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    values = heads.values
    channels = 2 * heads.keys * heads.key_dim + values * heads.value_dim
    given = token(batch, heads, layout, kind, device) | {
        "A_log": random(values).to(kind),
        "dt_bias": random(values).to(kind),
        "norm_weight": (1 + random(heads.value_dim) / 8).to(kind),
        "state": random(batch, values, heads.key_dim, heads.value_dim),
        "tiled": layout == "tiled",
    }
    if not convolved:
        given["conv_state"] = random(batch, channels, kept).to(kind)
        given["conv_weight"] = (random(channels, width) / 2).to(kind)
        counts = batch, heads.keys, heads.key_dim
        given["arrivals"] = torch.zeros(counts, device=device, dtype=torch.int32)
    return given


def copied(given: dict[str, Any], kind: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments with states of their own, floating ones as `kind`."""

    def copy(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.clone() if name in ("state", "conv_state", "arrivals") else x
        return x.to(kind) if kind and x.is_floating_point() else x

    return {name: copy(name, x) for name, x in given.items()}


def problems(name: str, given: dict[str, Any], tokens: list[dict[str, Tensor]]) -> list[str]:
    """What is wrong with our outputs and states over some `tokens`. An error may be 1.1 times plain
    PyTorch's; where that rounds nothing (states without a convolution, fp32), it may be a few
    fp32 roundings: the two sum in different orders."""
    ours, plain, exact = copied(given), copied(given), copied(given, torch.float64)
    found = []
    for t, now in enumerate(tokens):
        out, usual = (f(**x | now) for f, x in
                      ((decode.gated_delta_decode, ours), (decode.reference, plain)))  # fmt: skip
        truth = decode.reference(**exact | {part: x.double() for part, x in now.items()})
        for what, mine, theirs, right in (
            ("output", out, usual, truth),
            ("state", ours["state"], plain["state"], exact["state"]),
        ):
            off, bound = error(mine, right), max(1.1 * error(theirs, right), 5e-7)
            if not off <= bound:
                found.append(f"{name}, token {t}: {what} is off by {off:.2e}, may be {bound:.2e}")
        if "conv_state" in given:
            if not torch.equal(ours["conv_state"], plain["conv_state"]):
                found.append(f"{name}, token {t}: the convolution's state")
            if ours["arrivals"].any():
                found.append(f"{name}, token {t}: arrivals")
    return found
