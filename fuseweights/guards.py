"""What must hold before a group is stacked. A guard returns (reason code, sentence), or None.

They run in this order and the first that speaks refuses the group, so each may rely on those
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import prod

from .candidates import Candidate, companions_for
from .checkpoint.model import Tensor
from .merging import bnb_state, weight_shape
from .rules import engines
from .rules.formats import PRIMARY
from .rules.groups import Loads, Rejects

Guard = Callable[[Candidate], tuple[str, str] | None]
SHOWN = 4


def _said(items: Iterable[str]) -> str:
    """At most a few of them: there may be hundreds of experts."""
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def consumer_loads_it(c: Candidate) -> tuple[str, str] | None:
    return (c.row.reason, c.row.detail) if isinstance(c.row, Rejects) else None


def consumer_knows_the_module(c: Candidate) -> tuple[str, str] | None:
    """Engines' tables are known for the text model's layers, not for towers and draft heads."""
    if c.consumer in engines.LOADED and not engines.TEXT_LAYER.search(c.parent):
        return "consumer-unsupported", f"{c.consumer} is not known to load it fused in {c.parent}"
    layers = c.checkpoint.layers
    if c.consumer in engines.LOADED and layers and (c.layer or 0) >= layers:
        return "consumer-unsupported", f"{c.consumer} loads draft layers with code of their own"
    return None


def fused_name_is_free(c: Candidate) -> tuple[str, str] | None:
    if c.path(c.rule.fused) in c.taken:
        return "name-taken", f"{c.path(c.rule.fused)} exists beside its parts"
    return None


def format_is_known(c: Candidate) -> tuple[str, str] | None:
    if isinstance(c.table, Rejects):
        return c.table.reason, c.table.detail
    method = str(getattr(c.checkpoint, "quantization", {}).get("quant_method", ""))
    if rejects := engines.NO_METHOD.get((c.consumer, method)):
        return rejects.reason, rejects.detail
    return None


def companions_are_known(c: Candidate) -> tuple[str, str] | None:
    assert not isinstance(c.table, Rejects)
    if c.suffixes[0] not in PRIMARY:
        return "missing-part", f"there is no weight beside {_said(c.suffixes)}"
    if unknown := [suffix for suffix in c.suffixes if suffix not in c.table]:
        tables = [companions_for(c.checkpoint, part) for part in c.parts if part]
        if len({frozenset(table) for table in tables if not isinstance(table, Rejects)}) > 1:
            return "type-mismatch", "the parts are not quantized alike"
        return "unknown-companion", f"nothing says how to merge {_said(unknown)}"
    allowed = c.row.companions if isinstance(c.row, Loads) else None
    if c.consumer in engines.LOADED and c.rule.group in engines.PLAIN_ONLY:
        allowed = frozenset({"weight"})
    if ignored := [s for s in c.suffixes if allowed is not None and s not in allowed]:
        return "consumer-unsupported", f"{c.consumer} never loads {c.rule.fused_name(ignored[0])}"
    return None


def experts_stack_whole(c: Candidate) -> tuple[str, str] | None:
    """Experts lie one after the other: what merges in another way has no place in the stack."""
    if c.rule.per_expert:
        for suffix in c.suffixes:
            if c.companion(suffix).merge != "stack" or c.axis(suffix) != 0:
                return "format-unsupported", f"{suffix} of many experts cannot be stacked"
    return None


def types_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        column = c.column(suffix)
        if len({tensor.dtype for tensor in column.values()}) > 1:
            pairs = (f"{module} is {tensor.dtype}" for module, tensor in column.items())
            return "type-mismatch", f"{suffix}: {_said(pairs)}"
    return None


def parts_are_complete(c: Candidate) -> tuple[str, str] | None:
    parts = list(zip(c.modules, c.parts, strict=True))
    if absent := [module for module, tensors in parts if not tensors]:
        return "missing-part", f"the layer has no {_said(absent)}"
    for suffix in c.suffixes:
        if lacking := [module for module, tensors in parts if suffix not in tensors]:
            return c.companion(suffix).reason, f"{_said(lacking)} has no {suffix}"
    return None


def shapes_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        merge, axis = c.companion(suffix).merge, c.axis(suffix)
        if merge == "state":
            continue
        column = c.column(suffix)
        rests = {_rest(tensor, axis if merge == "stack" else None) for tensor in column.values()}
        rows = {tensor.shape[axis : axis + 1] for tensor in column.values()}
        if len(rests) > 1 or None in rests or (c.rule.per_expert and len(rows) > 1):
            pairs = (f"{module} is {list(tensor.shape)}" for module, tensor in column.items())
            return "shape-mismatch", f"{suffix}: {_said(pairs)}"
    return None


def _rest(tensor: Tensor, axis: int | None) -> tuple[int, ...] | None:
    """The shape without the stacking axis; None when it has no such axis."""
    if axis is None:
        return tensor.shape
    if axis >= len(tensor.shape):
        return None
    return tensor.shape[:axis] + tensor.shape[axis + 1 :]


def scales_stay_aligned(c: Candidate) -> tuple[str, str] | None:
    """A block of scales must not straddle two parts; the last part may end within one."""
    first = c.suffixes[0]
    for suffix in c.suffixes[1:]:
        companion, axis = c.companion(suffix), c.axis(suffix)
        if companion.merge != "stack" or companion.per is None:
            continue
        parts = list(c.parts)
        for module, part in zip(c.modules, parts, strict=True):
            rows = part[first].shape[c.axis(first)]
            blocks = Fraction(rows) / companion.per
            if part[suffix].shape[axis] != -(-blocks.numerator // blocks.denominator):
                return (
                    "shape-mismatch",
                    f"{module}: {suffix} has {part[suffix].shape[axis]} rows for {rows} of {first}",
                )
            last = part is parts[-1] and c.consumer not in engines.EVERY_PART_ALIGNED
            if blocks.denominator != 1 and not (last and not c.rule.per_expert):
                return (
                    "misaligned-scale-block",
                    f"{module} has {rows} rows, no multiple of the {companion.per} that share "
                    f"a {suffix}",
                )
    return None


# What describes a layer of so many rows: how to read it, whether it fits the weight (nibbles in
# pairs), and what must be alike whatever the rows.
PARSED: dict[str, tuple[Callable, Callable, Callable]] = {
    "shape": (
        weight_shape,
        lambda shape, weight: shape[0] == weight.shape[0],
        lambda shape: shape[1],
    ),
    "state": (
        bnb_state,
        lambda state, weight: -(-prod(state["shape"]) // 2) == weight.shape[0],
        lambda state: {**state, "shape": state["shape"][1:]},
    ),
}


def kept_values_agree(c: Candidate) -> tuple[str, str] | None:
    for suffix in c.suffixes:
        companion = c.companion(suffix)
        if companion.merge == "stack":
            continue
        values: list = [c.checkpoint.read(tensor) for tensor in c.column(suffix).values()]
        if companion.merge in PARSED:
            parse, fits, columns = PARSED[companion.merge]
            values = [parse(value) for value in values]
            weights = c.column(c.suffixes[0]).values()
            if None in values or not all(map(fits, values, weights)):
                return "format-unsupported", f"{suffix} does not describe its weight"
            values = [columns(value) for value in values]
        elif companion.expands and len(c.column(c.suffixes[0])) == len(values):
            continue
        if any(value != values[0] for value in values):
            return companion.reason, f"{suffix} differs between the parts"
    return None


def metadata_agrees(c: Candidate) -> tuple[str, str] | None:
    notes = getattr(c.checkpoint.files[0], "tensor_notes", {})
    if len({notes.get(name) for name in c.names}) > 1:
        return "metadata-mismatch", "general.tensor_extra says different things of the parts"
    return None


GUARDS: tuple[Guard, ...] = (
    consumer_loads_it,
    consumer_knows_the_module,
    fused_name_is_free,
    format_is_known,
    companions_are_known,
    experts_stack_whole,
    types_agree,
    parts_are_complete,
    shapes_agree,
    scales_stay_aligned,
    kept_values_agree,
    metadata_agrees,
)
