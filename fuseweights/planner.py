"""checkpoint + rules → plan. Reads no tensor data except the few bytes that a guard compares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from . import guards
from .candidates import find, rules_for
from .checkpoint.model import Checkpoint
from .checkpoint.pieces import Piece, piece_size
from .errors import RefusedError, UsageError
from .manifest import Entry
from .merging import Fused, fuse
from .rules import consumers
from .rules.groups import GROUPS, Loads


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that stack: the fused weight first, then its companions."""

    group: str
    layer: int | None
    tensors: tuple[Fused, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A group left as it was: a stable code and a sentence."""

    group: str
    layer: int | None
    parts: tuple[str, ...]
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Output:
    """A file to write: its name below the target, and its bytes."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(map(piece_size, self.pieces))


@dataclass(frozen=True)
class Plan:
    """Everything that will be written, and every refusal.

    Fusing fills `groups`, un-fusing `restored`. `copied` counts the tensors that move unchanged,
    `needs` is the consumer's first build that loads the result, `inexact` says why the original
    bytes could not come back exactly (None: they do).
    """

    consumer: str | None
    checkpoint: Checkpoint
    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    copied: int
    needs: int | None
    inexact: str | None
    outputs: tuple[Output, ...]
    restored: tuple[Entry, ...] = ()

    @cached_property
    def bytes(self) -> int:
        return sum(output.size for output in self.outputs)


def decide(
    checkpoint: Checkpoint, consumer: str, only: Iterable[str] | None
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """Every group that fuses and every one that is refused."""
    wanted = _wanted(checkpoint, consumer, only)
    rules = tuple(rule for rule in rules_for(checkpoint) if rule.group in wanted)
    groups: list[Group] = []
    refusals: list[Refusal] = []
    taken: set[str] = set()
    for candidate in find(checkpoint, consumer, rules):
        if taken.intersection(candidate.names):
            continue
        refusal = next(filter(None, (guard(candidate) for guard in guards.GUARDS)), None)
        if refusal is None:
            groups.append(Group(candidate.rule.group, candidate.layer, fuse(candidate)))
            taken.update(candidate.names)
        elif not wanted.intersection(candidate.rule.instead):
            refusals.append(
                Refusal(candidate.rule.group, candidate.layer, candidate.names, *refusal)
            )
    return tuple(groups), tuple(refusals)


def _wanted(checkpoint: Checkpoint, consumer: str, only: Iterable[str] | None) -> frozenset[str]:
    if consumer not in consumers.CONTAINERS:
        known = ", ".join(consumers.CONTAINERS)
        raise UsageError(f"unknown consumer {consumer!r}", hint=f"Known are {known}.")
    if checkpoint.container not in consumers.CONTAINERS[consumer]:
        able = [c for c, kinds in consumers.CONTAINERS.items() if checkpoint.container in kinds]
        raise UsageError(
            f"{consumer} does not read {checkpoint.container}: {checkpoint.root}",
            hint=f"Convert it for {' or '.join(able)}.",
        )
    if only is None:
        return consumers.offered(consumer) or frozenset(GROUPS)
    unknown = sorted(set(only) - set(GROUPS))
    if unknown:
        raise UsageError(
            f"unknown group {', '.join(unknown)}", hint=f"Known are {', '.join(GROUPS)}."
        )
    return frozenset(only)


def needed_build(checkpoint: Checkpoint, consumer: str, groups: Iterable[str]) -> int | None:
    """The consumer's first build that loads all of `groups` fused."""
    rows = [
        consumers.loads(consumer, checkpoint.container, checkpoint.architecture, group)
        for group in groups
    ]
    return max((row.since for row in rows if isinstance(row, Loads) and row.since), default=None)


def default_consumer(checkpoint: Checkpoint) -> str:
    return consumers.DEFAULT_CONSUMER[checkpoint.container]


def refuse_if(plan: Plan, strict: bool) -> None:
    """Raises RefusedError when there is nothing to fuse, or when `strict` and anything was left."""
    if strict and plan.refusals:
        raise RefusedError(
            f"{plan.checkpoint.root}: {len(plan.refusals)} groups cannot be fused",
            hint="Leave out --strict to fuse the others, or choose groups with --fuse.",
            refusals=plan.refusals,
        )
    if not plan.groups:
        raise RefusedError(
            f"{plan.checkpoint.root}: nothing to fuse for {plan.consumer}",
            hint="`fuseweights inspect` shows each group and the reason.",
            refusals=plan.refusals,
        )
