"""Norms, alone and with the residual add before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from . import ops


class RMSNorm(nn.Module):
    """`weight` [n], or none; `norm` is the convention of ops.rms_norm."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        norm: ops.Norm = "llama",
        *,
        scale: bool = True,
        dtype: torch.dtype | None = None,
        device=None,
    ):
        super().__init__()
        self.size, self.eps, self.norm = size, eps, norm
        start = torch.zeros if norm == "gemma" else torch.ones
        weight = nn.Parameter(start(size, dtype=dtype, device=device)) if scale else None
        self.register_parameter("weight", weight)

    @classmethod
    def from_parts(cls, norm: nn.Module, size: int | None = None):
        """Around the weight of a loaded transformers norm. `size` where it has no weight."""
        weight = getattr(norm, "weight", None)
        size = size or weight.shape[0]
        self = cls(size, eps_of(norm), convention_of(norm), scale=False)
        self.weight = weight
        return self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.norm)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, {self.norm}"


class AddRMSNorm(RMSNorm):
    """Residual add and norm in one: (x, residual) → (norm(x + residual), x + residual).
    Without a residual, x is the sum. x, residual [..., n], one dtype."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, self.norm), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps, self.norm)


def eps_of(norm: nn.Module) -> float:
    names = ("variance_epsilon", "eps", "epsilon")
    return next(getattr(norm, name) for name in names if hasattr(norm, name))


def convention_of(norm: nn.Module) -> ops.Norm:
    """What a norm does with its weight, told by what it computes, not by what it is called: a copy
    of it with a known weight, in bfloat16, where the conventions round differently."""
    weight = getattr(norm, "weight", None)
    if isinstance(norm, RMSNorm):
        return norm.norm
    size = 512 if weight is None else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, size, generator=generator).bfloat16() for n in (16, 1))
    with torch.no_grad():
        given = {} if weight is None else {"weight": w[0]}
        try:
            y = torch.func.functional_call(norm, given, (x,))
            wrong = {
                name: (ops.rms_norm(x, given.get("weight"), eps_of(norm), name) != y).float().mean()
                for name in ("llama", "gemma", "late")
            }
        except (RuntimeError, StopIteration, TypeError, AttributeError) as error:
            raise UsageError(f"{type(norm).__name__} is no RMS norm: {error}") from error
    best = min(wrong, key=wrong.get)
    if wrong[best] > 0.01:  # another order of the same float32 sums flips a last bit now and then
        raise UsageError(f"{type(norm).__name__} computes none of the known RMS norms")
    return best
