"""The words every rule table is written in."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

GROUPS = (
    "qkv",
    "qkv_a",
    "gdn_in_proj",
    "gdn_qkvz",
    "gdn_ba",
    "gate_up",
    "experts",
    "shared_gate_up",
)

# How a companion merges: stacked like the weight; one kept because all are equal; `weight_shape`
# or a bitsandbytes state, rewritten for the whole.
Merge = Literal["stack", "same", "shape", "state"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules of one layer that stack, in this order, into one fused module.

    Names are dotted paths below the layer and match whole segments only; `*` stands for every
    expert's number, and the fused tensor then has experts as its first dimension. `axis` counts
    from the outermost dimension. `instead` names the groups that take over where this one is
    refused. `beside` is a module that must stand in the layer for the rule to hold, `not_beside`
    one that must not.
    """

    group: str
    parts: tuple[str, ...]
    fused: str
    axis: int = 0
    instead: tuple[str, ...] = ()
    beside: str | None = None
    not_beside: str | None = None

    @property
    def per_expert(self) -> bool:
        return any("*" in part for part in self.parts)

    def fused_name(self, suffix: str) -> str:
        """The fused tensor of the parts' tensors that end in `suffix`, below the layer. Stacked
        experts are parameters, not modules: they have no `.weight`."""
        if not self.per_expert:
            return f"{self.fused}.{suffix}"
        return self.fused + ("" if suffix == "weight" else "_" + suffix.removeprefix("weight_"))


@dataclass(frozen=True, slots=True)
class Companion:
    """How the tensors that end in one suffix merge when their layers stack.

    `reason` is the refusal's code when some parts lack it or they disagree. `axis` holds output
    rows (None: the rule's). `per` says how many rows of the weight one of its rows covers (None:
    not told by rows). `expands`: unequal single numbers may become one a row.
    """

    merge: Merge
    reason: str
    axis: int | None = None
    per: Fraction | None = Fraction(1)
    expands: bool = False


@dataclass(frozen=True, slots=True)
class Loads:
    """A consumer loads the fused module: since which build, with which companions (None: any)."""

    since: int | None = None
    companions: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Rejects:
    """A consumer does not: the refusal's code and sentence."""

    reason: str
    detail: str
