"""The words every rule table is written in."""

from __future__ import annotations

from dataclasses import dataclass
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

Merge = Literal["stack", "same"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules of one layer that stack, in this order, into one fused module.

    Names are dotted paths below the layer and match whole segments only. `axis` counts from the
    outermost dimension. `instead` names the groups that take over where this one is refused.
    `beside` is a module that must stand in the layer for the rule to hold, `not_beside` one that
    must not.
    """

    group: str
    parts: tuple[str, ...]
    fused: str
    axis: int = 0
    instead: tuple[str, ...] = ()
    beside: str | None = None
    not_beside: str | None = None


@dataclass(frozen=True, slots=True)
class Companion:
    """How the tensors that end in one suffix merge: stacked like the weight, or one kept because
    all are bit-equal. `reason` is the refusal's code when some parts lack it or they differ."""

    merge: Merge
    reason: str


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
