"""checkpoint + rules → plan. Reads no tensor data except the few bytes that a guard compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .checkpoint.model import Checkpoint, Tensor
from .checkpoint.pieces import Piece, Sources, piece_size, stacked
from .errors import RefusedError, UsageError
from .manifest import Entry
from .rules import consumers, gguf
from .rules.groups import GROUPS, Companion, Loads, Rejects, Rule

SMALL = 1 << 16


@dataclass(frozen=True, slots=True)
class Fused:
    """One output tensor made of source tensors: stacked along `axis`, or one of equals."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    merge: str
    parts: tuple[Tensor, ...]

    @property
    def sections(self) -> tuple[int, ...]:
        """Rows of each part along `axis`; all of them for a tensor kept once."""
        return tuple(part.shape[self.axis] if part.shape else 1 for part in self.parts)

    @property
    def piece(self) -> Piece:
        if self.merge == "same":
            return self.parts[0].bytes
        return stacked([part.place for part in self.parts], self.parts[0].shape, self.axis)

    @property
    def size(self) -> int:
        return piece_size(self.piece)


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


@dataclass(frozen=True)
class Candidate:
    """The parts of one group in one layer, found or not, as the guards see them."""

    checkpoint: Checkpoint
    consumer: str
    rule: Rule
    companions: Mapping[str, Companion]
    parent: str
    parts: tuple[Mapping[str, Tensor], ...]
    modules: Mapping[str, Mapping[str, Tensor]] = field(repr=False)

    @property
    def layer(self) -> int | None:
        """The last number in the parent's path."""
        numbers = [s for s in self.parent.split(".") if s.isdecimal()]
        return int(numbers[-1]) if numbers else None

    def path(self, module: str) -> str:
        return f"{self.parent}.{module}" if self.parent else module

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names of the parts that are there."""
        return tuple(
            self.path(f"{module}.weight")
            for module, tensors in zip(self.rule.parts, self.parts, strict=True)
            if tensors
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix that any part has, the weight first."""
        found = {suffix for tensors in self.parts for suffix in tensors}
        return tuple(sorted(found, key=lambda s: (s != "weight", s)))

    @cached_property
    def row(self) -> Loads | Rejects:
        return consumers.loads(self.consumer, self.checkpoint.architecture, self.rule.group)

    def column(self, suffix: str) -> list[Tensor]:
        return [tensors[suffix] for tensors in self.parts if suffix in tensors]


Guard = Callable[[Candidate], tuple[str, str] | None]


def consumer_loads_it(c: Candidate) -> tuple[str, str] | None:
    return (c.row.reason, c.row.detail) if isinstance(c.row, Rejects) else None


def fused_name_is_free(c: Candidate) -> tuple[str, str] | None:
    if c.path(c.rule.fused) in c.modules:
        return "name-taken", f"{c.path(c.rule.fused)} exists beside its parts"
    return None


def companions_are_known(c: Candidate) -> tuple[str, str] | None:
    unknown = [suffix for suffix in c.suffixes if suffix not in c.companions]
    if unknown:
        return "unknown-companion", f"nothing says how to merge {', '.join(unknown)}"
    allowed = c.row.companions if isinstance(c.row, Loads) else None
    ignored = [suffix for suffix in c.suffixes if allowed is not None and suffix not in allowed]
    if ignored:
        return (
            "consumer-unsupported",
            f"{c.consumer} never loads {c.rule.fused}.{ignored[0]}",
        )
    return None


def every_part_is_complete(c: Candidate) -> tuple[str, str] | None:
    pairs = list(zip(c.rule.parts, c.parts, strict=True))
    if absent := [part for part, tensors in pairs if not tensors]:
        return "missing-part", f"the layer has no {', '.join(absent)}"
    for suffix in c.suffixes:
        if lacking := [part for part, tensors in pairs if suffix not in tensors]:
            return c.companions[suffix].reason, f"{', '.join(lacking)} has no {suffix}"
    return None


def types_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        types = [tensor.dtype for tensor in c.column(suffix)]
        if len(set(types)) > 1:
            pairs = zip(c.rule.parts, types, strict=True)
            return "type-mismatch", f"{suffix}: " + ", ".join(f"{p} is {t}" for p, t in pairs)
    return None


def shapes_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        shapes = [tensor.shape for tensor in c.column(suffix)]
        axis = c.rule.axis if c.companions[suffix].merge == "stack" else None
        if len({_without(shape, axis) for shape in shapes}) > 1 or (
            axis is not None and len(shapes[0]) <= axis
        ):
            pairs = zip(c.rule.parts, shapes, strict=True)
            return "shape-mismatch", f"{suffix}: " + ", ".join(
                f"{p} is {list(shape)}" for p, shape in pairs
            )
    return None


def kept_values_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        if c.companions[suffix].merge == "same" and not _equal(c.checkpoint, c.column(suffix)):
            return c.companions[suffix].reason, f"{suffix} differs between the parts"
    return None


def metadata_agrees(c: Candidate) -> tuple[str, str] | None:
    notes = getattr(c.checkpoint.files[0], "tensor_notes", {})
    said = {notes.get(tensor.name) for tensor in c.column("weight")}
    if len(said) > 1:
        return "metadata-mismatch", "general.tensor_extra says different things of the parts"
    return None


GUARDS: tuple[Guard, ...] = (
    consumer_loads_it,
    fused_name_is_free,
    companions_are_known,
    every_part_is_complete,
    types_agree,
    shapes_agree,
    kept_values_agree,
    metadata_agrees,
)


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _equal(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> bool:
    first, *rest = tensors
    if any(tensor.size != first.size for tensor in rest):
        return False
    with Sources(checkpoint.paths) as sources:
        for begin in range(0, first.size, SMALL):
            size = min(SMALL, first.size - begin)
            chunk = sources.read(first.file, first.offset + begin, size)
            if any(sources.read(t.file, t.offset + begin, size) != chunk for t in rest):
                return False
    return True


def find(checkpoint: Checkpoint, consumer: str, rules: Sequence[Rule]) -> Iterator[Candidate]:
    """Every group of which at least one part is there, by rule and then by layer."""
    named = [
        (rule, name.split("."), name in rule.parts)
        for rule in rules
        for name in {*rule.parts, rule.fused, rule.beside, rule.not_beside} - {None}
    ]
    by_leaf: dict[str, list] = {}
    for rule, path, is_part in named:
        by_leaf.setdefault(path[-1], []).append((rule, path, is_part))
    modules: dict[str, dict[str, Tensor]] = {}
    parents: dict[Rule, dict[str, None]] = {rule: {} for rule in rules}
    for tensor in checkpoint.tensors.values():
        segments = tensor.name.split(".")
        for end in range(1, len(segments)):
            for rule, path, is_part in by_leaf.get(segments[end - 1], ()):
                if segments[max(0, end - len(path)) : end] != path:
                    continue
                modules.setdefault(".".join(segments[:end]), {})[".".join(segments[end:])] = tensor
                if is_part:
                    parents[rule][".".join(segments[: end - len(path)])] = None
    for rule in rules:
        for parent in parents[rule]:
            prefix = parent + "." if parent else ""
            if rule.beside and prefix + rule.beside not in modules:
                continue
            if rule.not_beside and prefix + rule.not_beside in modules:
                continue
            parts = tuple(modules.get(prefix + part, {}) for part in rule.parts)
            yield Candidate(checkpoint, consumer, rule, gguf.COMPANIONS, parent, parts, modules)


def decide(
    checkpoint: Checkpoint, consumer: str, only: Iterable[str] | None
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """Every group that fuses and every one that is refused."""
    wanted = _wanted(checkpoint, consumer, only)
    rules = tuple(rule for rule in gguf.RULES if rule.group in wanted)
    groups: list[Group] = []
    refusals: list[Refusal] = []
    taken: set[str] = set()
    for candidate in find(checkpoint, consumer, rules):
        if taken.intersection(candidate.names):
            continue
        refusal = next(filter(None, (guard(candidate) for guard in GUARDS)), None)
        if refusal is None:
            groups.append(_fuse(candidate))
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


def _fuse(c: Candidate) -> Group:
    tensors = []
    for suffix in c.suffixes:
        parts = tuple(tensors[suffix] for tensors in c.parts)
        merge, shape, axis = c.companions[suffix].merge, parts[0].shape, c.rule.axis
        if merge == "stack":
            rows = sum(part.shape[axis] for part in parts)
            shape = (*shape[:axis], rows, *shape[axis + 1 :])
        name = f"{c.path(c.rule.fused)}.{suffix}"
        tensors.append(Fused(name, shape, parts[0].dtype, axis, merge, parts))
    return Group(c.rule.group, c.layer, tuple(tensors))


def needed_build(checkpoint: Checkpoint, consumer: str, groups: Iterable[str]) -> int | None:
    """The consumer's first build that loads all of `groups` fused."""
    rows = [consumers.loads(consumer, checkpoint.architecture, group) for group in groups]
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
