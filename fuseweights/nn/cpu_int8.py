"""A packed INT8 path for decoding on a CPU: one to four tokens at a time, bfloat16 activations.

Weights are quantized a scale a row, activations a scale a token; the product runs in PyTorch's own
prepacked kernels, whichever is fastest here. That changes numbers. Everything else (more tokens,
other types and devices, gradients, compiled graphs) goes through the layer as it was, whose weights
stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKENS = 4
SMALLEST = 1 << 18  # weights: below that a product is too quick to gain from
Kernel = Callable[[Tensor, Any], Tensor]


class Int8Linear(nn.Linear):
    """A linear layer that became this in place. `packed` are its kernel's weights and the identity
    of the tensor they were made from; `plain` is the forward it had of its own, if any."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            return (
                functional.linear(x, self.weight, self.bias)
                if self.plain is None
                else self.plain(x)
            )
        if self.packed is None or self.packed[0] != _identity(self.weight):
            self.pack()
        y = KERNELS[best()][1](x.reshape(-1, self.in_features), self.packed[1])
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _fits(self, x: Tensor) -> bool:
        return (
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and 0 < x.numel() <= TOKENS * self.in_features
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        )

    def pack(self) -> None:
        scale = getattr(self, "weight_scale", None)
        packed = KERNELS[best()][0](*quantize(self.weight.detach(), scale))
        self.packed = _identity(self.weight), packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # kernels' own formats cannot be copied


def _identity(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def quantize(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """INT8 rows and a float32 scale each. With the `scale` of a checkpoint that was INT8 before it
    was loaded, exactly that checkpoint's integers."""
    weight = weight.float()
    if scale is None:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    scale = scale.float().view(-1, 1)
    return (weight / scale).round_().clamp_(-128, 127).to(torch.int8), scale.view(-1)


def _pack_qlinear(rows: Tensor, scale: Tensor) -> Any:
    packed = torch.ops.onednn.qlinear_prepack(rows, None)
    return packed, scale, torch.zeros(len(rows), dtype=torch.int32)


def _qlinear(x: Tensor, packed: Any) -> Tensor:
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127)
    x = x.div(scale).round_().add_(128).to(torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed[0], packed[1], packed[2], None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y.mul_(scale)


def _pack_int8pack(rows: Tensor, scale: Tensor) -> Any:
    return rows.contiguous(), scale.bfloat16()


def _int8pack(x: Tensor, packed: Any) -> Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), *packed)


KERNELS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Kernel]] = {
    "onednn.qlinear": (_pack_qlinear, _qlinear),
    "_weight_int8pack_mm": (_pack_int8pack, _int8pack),
}


@cache
def best() -> str | None:
    """The kernel that is fastest on this machine for one token, None when bfloat16 is."""
    times = measure(2048, 3072)
    return (
        min(times, key=lambda name: times[name] if name else times[name] / 1.1) if times else None
    )


def measure(k: int, n: int, tokens: int = 1, repeats: int = 15) -> dict[str | None, float]:
    """Seconds for one product by each kernel that works here and is right; None is bfloat16."""
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=random) * 0.02).bfloat16()
    x = torch.randn(tokens, k, generator=random).bfloat16()
    want = x.float() @ weight.float().T
    calls: dict[str | None, Callable[[], Tensor]] = {None: lambda: functional.linear(x, weight)}
    for name, (pack, run) in KERNELS.items():
        try:
            packed = pack(*quantize(weight))
            error = (run(x, packed).float() - want).norm() / want.norm()
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # not built into this PyTorch, or not for this machine
        if error < 0.03:
            calls[name] = lambda run=run, packed=packed: run(x, packed)
    with torch.no_grad():
        return {name: _fastest(call, repeats) for name, call in calls.items()}


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def pack_model(model: nn.Module) -> str:
    """Turn every large linear layer of `model` but the output head into an `Int8Linear`, and say
    what that means."""
    if (name := best()) is None:
        return "no INT8 kernel of this PyTorch beats bfloat16 on this machine: nothing was packed"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [m for m in model.modules() if m is not head and _packable(m)]
    for layer in layers:
        layer.plain = layer.__dict__.pop("forward", None)
        layer.packed = None
        layer.__class__ = Int8Linear
        layer.pack()
    count = sum(isinstance(m, Int8Linear) for m in model.modules())
    return (
        f"{count} layers compute up to {TOKENS} bfloat16 tokens on a CPU in INT8 ({name}): numbers "
        "change, weights are rounded to a scale a row and activations to a scale a token"
    )


def unpack_model(model: nn.Module) -> None:
    """Take `pack_model` back."""
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.__class__ = nn.Linear
            del layer.packed
            if (plain := layer.__dict__.pop("plain")) is not None:
                layer.forward = plain


def _packable(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.bfloat16:
        return False
    if layer.weight.device.type != "cpu" or layer.weight.numel() < SMALLEST:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if layer._parameters.keys() == {"weight", "bias"}:
        return "forward" not in layer.__dict__
    scheme = getattr(getattr(layer, "quantization_scheme", None), "weights", None)
    symmetric = getattr(scheme, "symmetric", False) and getattr(scheme, "num_bits", 0) == 8
    scale = getattr(layer, "weight_scale", None)
    whole = symmetric and str(getattr(scheme, "type", "")).endswith("int")
    return bool(whole) and scale is not None and scale.numel() == layer.out_features
