"""What each tensor of the fused side must consist of: derived from its name by the rules, and from
the source's own tensors. Neither the plan nor the manifest is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..candidates import companions_for, rules_for
from ..checkpoint.model import Checkpoint, Tensor
from ..manifest import fold_experts
from ..rules.formats import PRIMARY, SUFFIXES
from ..rules.groups import Companion, Rejects, Rule
from .results import Difference, Section


def parts_by_rule(
    source: Checkpoint, name: str, experts: int = 0
) -> tuple[Rule, str, list[str]] | None:
    """(rule, suffix, names of the parts in order) of a fused tensor's name; None for any other."""
    for rule in rules_for(source):
        head, found, tail = name.rpartition(rule.fused)
        if not found or (head and not head.endswith(".")):
            continue
        for suffix in _suffixes(rule, tail):
            names = [f"{head}{part}.{suffix}" for part in rule.parts]
            if rule.per_expert:
                names = [n.replace("*", str(e), 1) for e in range(experts) for n in names]
            if names and names[0] in source.tensors:
                return rule, suffix, names
    return None


def _suffixes(rule: Rule, tail: str) -> list[str]:
    """What a fused name's end may stand for: `.bias`; of stacked experts nothing or `_scale`."""
    if not rule.per_expert:
        return [tail[1:]] if tail.startswith(".") else []
    if not tail:
        return ["weight"]
    return [tail[1:], "weight_" + tail[1:]] if tail.startswith("_") else []


def match(
    source: Checkpoint, fused: Checkpoint, differences: list[Difference]
) -> Iterator[Section]:
    """What each tensor of `fused` must be, each tensor of `source` used exactly once."""
    unused = dict(source.tensors)
    for tensor in fused.tensors.values():
        own = source.tensors.get(tensor.name)
        sections = [_itself(own, tensor)] if own else _sections(source, fused, tensor)
        if not sections:
            differences.append(Difference(tensor.name, None, "is not in the source"))
            continue
        if used := [s.part.name for s in sections if unused.pop(s.part.name, None) is None]:
            differences.append(Difference(tensor.name, None, f"repeats {', '.join(used)}"))
        if wrong := _misfit(sections, tensor):
            differences.append(Difference(tensor.name, None, wrong))
            continue
        yield from sections
    differences += [Difference(name, None, "is missing from the fused side") for name in unused]


def _itself(own: Tensor, tensor: Tensor) -> Section:
    return Section(own, tensor, "same", 0, 0, tensor.shape[0] if tensor.shape else 1)


def _sections(source: Checkpoint, fused: Checkpoint, tensor: Tensor) -> list[Section]:
    experts = tensor.shape[0] if tensor.shape else 0
    found = parts_by_rule(source, tensor.name, min(experts, len(source.tensors)))
    if found is None:
        return []
    rule, suffix, names = found
    if any(name not in source.tensors or name in fused.tensors for name in names):
        return []
    layers = [layer(source, name.removesuffix(suffix)) for name in names]
    table = companions_for(source, layers[0])
    if isinstance(table, Rejects) or suffix not in table:
        return []
    companion = table[suffix]
    axis = rule.axis if companion.axis is None else companion.axis
    parts = [source.tensors[name] for name in names]
    merge = _merge(companion, tensor, parts[0])
    axis = axis if merge == "stack" else 0
    sections, begin = [], 0
    for part, own in zip(parts, layers, strict=True):
        rows = part.shape[axis] if len(part.shape) > axis else 1
        if merge == "expand":
            rows = next(own[name].shape[0] for name in PRIMARY if name in own)
        end = begin + rows
        if merge not in ("stack", "expand"):
            begin, end = 0, tensor.shape[0] if tensor.shape else 1
        sections.append(Section(part, tensor, merge, axis, begin, end))
        begin = end
    return sections


def layer(checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
    """The tensors of a linear layer by suffix; `module` ends in its dot."""
    tensors = checkpoint.tensors
    return {s: tensors[module + s] for s in SUFFIXES if module + s in tensors}


def _merge(companion: Companion, tensor: Tensor, part: Tensor) -> str:
    if companion.expands and tensor.shape != part.shape:
        return "expand"
    return companion.merge


def _misfit(sections: list[Section], tensor: Tensor) -> str | None:
    """Why the parts cannot make up `tensor` by type and shape; None when they can."""
    parts = [section.part for section in sections]
    if any(part.dtype != tensor.dtype for part in parts):
        return f"type is {tensor.dtype}, the source has {', '.join(p.dtype for p in parts[:4])}"
    merge, axis, first = sections[0].merge, sections[0].axis, parts[0].shape
    shapes = [part.shape for part in parts]
    if merge == "state":
        return None
    if merge == "expand":
        fits = tensor.shape == (sections[-1].end, 1)
    elif merge == "stack":
        whole = fold_experts(tensor.shape, first)
        fits = _without(whole, axis) == _without(first, axis) and whole[axis] == sections[-1].end
        fits = fits and all(_without(shape, axis) == _without(first, axis) for shape in shapes)
        if len(tensor.shape) > len(first):
            fits = fits and len(set(shapes)) == 1
    else:
        fits = all(shape == tensor.shape for shape in shapes)
    if not fits:
        shown = [list(shape) for shape in shapes[:4]]
        return f"shape is {list(tensor.shape)}, the source has {shown}"
    return None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    return shape[:axis] + shape[axis + 1 :] if axis < len(shape) else None


def by_name(sections: list[Section]) -> Mapping[str, list[Section]]:
    """Sections of the tensors that are made of parts."""
    found: dict[str, list[Section]] = {}
    for section in sections:
        if section.part.name != section.fused.name:
            found.setdefault(section.fused.name, []).append(section)
    return found
