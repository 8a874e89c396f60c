"""Every group that a checkpoint may fuse: its parts by rule, layer by layer, found or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .checkpoint.model import Checkpoint, Tensor
from .rules import consumers, formats, gguf
from .rules.families import ATTENTION, FAMILIES, MLP
from .rules.groups import Companion, Loads, Rejects, Rule

# A segment that is a number as Python would write it.
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d{0,8})(?![^.])", re.ASCII)
Modules = Mapping[str, Mapping[str, Tensor]]


def rules_for(checkpoint: Checkpoint) -> tuple[Rule, ...]:
    """The rules of this architecture; the usual ones for a family without a row, so that what it
    has can at least be named when it is refused."""
    if checkpoint.container == "gguf":
        return gguf.RULES
    return FAMILIES.get(checkpoint.architecture, (ATTENTION, MLP))


def companions_for(checkpoint: Checkpoint, part: Mapping[str, Tensor]) -> formats.Table | Rejects:
    """How each tensor of a linear layer like `part` merges."""
    if checkpoint.container == "gguf":
        return gguf.COMPANIONS
    return formats.companions(checkpoint.quantization, part)


def layer_of(path: str) -> int | None:
    """The last number in a dotted path."""
    numbers = [segment for segment in path.split(".") if _NUMBER.fullmatch(segment)]
    return int(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Candidate:
    """The parts of one group in one layer, as the guards see them.

    `parts` has the tensors of each part by suffix (empty where the layer lacks it), `modules` its
    name below `parent`.
    """

    checkpoint: Checkpoint
    consumer: str
    rule: Rule
    parent: str
    modules: tuple[str, ...]
    parts: tuple[Mapping[str, Tensor], ...]
    taken: Modules = field(repr=False)

    @property
    def layer(self) -> int | None:
        return layer_of(self.parent)

    def path(self, below: str) -> str:
        return f"{self.parent}.{below}" if self.parent else below

    @cached_property
    def table(self) -> formats.Table | Rejects:
        return companions_for(self.checkpoint, next(filter(None, self.parts)))

    @cached_property
    def row(self) -> Loads | Rejects:
        """What the consumer's table says of this group."""
        return consumers.loads(
            self.consumer,
            self.checkpoint.container,
            self.checkpoint.architecture,
            self.rule.group,
        )

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix that any part has, the weight first."""
        found = {suffix for tensors in self.parts for suffix in tensors}
        return tuple(sorted(found, key=lambda s: (s not in formats.PRIMARY, s)))

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names of the parts that are there."""
        first = self.suffixes[0]
        return tuple(tensors[first].name for tensors in self.parts if first in tensors)

    def companion(self, suffix: str) -> Companion:
        assert not isinstance(self.table, Rejects)
        return self.table[suffix]

    def axis(self, suffix: str) -> int:
        own = self.companion(suffix).axis
        return self.rule.axis if own is None else own

    def column(self, suffix: str) -> dict[str, Tensor]:
        """The parts' tensors that end in `suffix`, by module."""
        pairs = zip(self.modules, self.parts, strict=True)
        return {module: tensors[suffix] for module, tensors in pairs if suffix in tensors}


def find(checkpoint: Checkpoint, consumer: str, rules: Sequence[Rule]) -> Iterator[Candidate]:
    """Every group of which at least one part is there, by rule and then by layer."""
    modules, parents = _modules(checkpoint, rules)
    for rule in rules:
        for parent, experts in parents[rule].items():
            prefix = parent + "." if parent else ""
            if rule.beside and prefix + rule.beside not in modules:
                continue
            if rule.not_beside and prefix + rule.not_beside in modules:
                continue
            names = _part_names(rule, experts)
            parts = tuple(modules.get(prefix + name, {}) for name in names)
            yield Candidate(checkpoint, consumer, rule, parent, names, parts, modules)


def _modules(
    checkpoint: Checkpoint, rules: Sequence[Rule]
) -> tuple[dict[str, dict[str, Tensor]], dict[Rule, dict[str, set[int]]]]:
    """Tensors of every module that a rule names, and where below each rule applies (with the
    numbers of the experts found there)."""
    modules: dict[str, dict[str, Tensor]] = {}
    parents: dict[Rule, dict[str, set[int]]] = {rule: {} for rule in rules}
    places: dict[str, list[_Place]] = {}  # names that differ only in numbers have the same
    for tensor in checkpoint.tensors.values():
        pattern = _NUMBER.sub("*", tensor.name)
        if (found := places.get(pattern)) is None:
            found = places[pattern] = list(_places(pattern.split("."), rules))
        if not found:
            continue
        segments = tensor.name.split(".")
        for rule, start, end, expert, is_part in found:
            suffix = ".".join(segments[end:])
            if suffix not in formats.CARRIED:
                modules.setdefault(".".join(segments[:end]), {})[suffix] = tensor
            if is_part:
                experts = parents[rule].setdefault(".".join(segments[:start]), set())
                if expert is not None:
                    experts.add(int(segments[expert]))
    return modules, parents


# (rule, where its path starts and ends in the segments, the expert's segment, is it a part)
_Place = tuple[Rule, int, int, int | None, bool]


def _places(segments: list[str], rules: Sequence[Rule]) -> Iterator[_Place]:
    """Where a rule's names occur, whole segments only; numbers are `*` here."""
    for rule in rules:
        for name in sorted(
            {*rule.parts, rule.fused, rule.beside, rule.not_beside} - {None}, key=str
        ):
            path = str(name).split(".")
            for start in range(len(segments) - len(path) + 1):
                end = start + len(path)
                if segments[start:end] == path:
                    expert = start + path.index("*") if "*" in path else None
                    yield rule, start, end, expert, name in rule.parts


def _part_names(rule: Rule, experts: set[int]) -> tuple[str, ...]:
    if not rule.per_expert:
        return rule.parts
    last = min(max(experts), 2 * len(experts))  # a number that lies is a missing expert, no list
    return tuple(
        part.replace("*", str(number)) for number in range(last + 1) for part in rule.parts
    )
