"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.model import Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two checkpoints differ: a tensor, metadata key or file, an offset in it, and how."""

    tensor: str
    offset: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """`checked` tensors of the fused side in `bytes` were compared; `notes` say what was not."""

    checked: int
    bytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences


@dataclass(frozen=True, slots=True)
class Section:
    """Source tensor `part` must be rows `begin` to `end` of `fused` along `axis`.

    `merge` says in which way: "stack"; "same", the whole of it; "expand", its one number in each
    of the rows; "shape" and "state", the whole describes all parts together.
    """

    part: Tensor
    fused: Tensor
    merge: str
    axis: int
    begin: int
    end: int
