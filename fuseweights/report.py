"""Plans, verifications and inspections as JSON objects and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .api import Inspection
from .errors import printable
from .planner import Group, Plan, Refusal
from .rules.groups import GROUPS
from .unfuser import FusedModule
from .verifier import Verification

SCHEMA = 1
SHOWN = 50
FUSED, WILL_FUSE, REFUSED = "●", "○", "×"


def plan_json(plan: Plan) -> dict:
    """The contract's object for `convert` and its dry run."""
    return {
        "schema": SCHEMA,
        "consumer": plan.consumer,
        "source": str(plan.checkpoint.root),
        "groups": [_group_json(group) for group in plan.groups],
        "refusals": [asdict(refusal) for refusal in plan.refusals],
        "copied": plan.copied,
        "bytes": plan.bytes,
        "needs": plan.needs,
        "inexact": plan.inexact,
    }


def _group_json(group: Group) -> dict:
    weight, *companions = group.tensors
    return {
        "group": group.group,
        "layer": group.layer,
        "fused": weight.name,
        "parts": [part.name for part in weight.parts],
        "sections": list(weight.rows),
        "dtype": weight.dtype,
        "companions": [tensor.name for tensor in companions],
    }


def unfuse_json(plan: Plan) -> dict:
    return {
        "schema": SCHEMA,
        "source": str(plan.checkpoint.root),
        "restored": [
            {"fused": entry.name, "parts": [part.name for part in entry.parts]}
            for entry in plan.restored
        ],
        "refusals": [asdict(refusal) for refusal in plan.refusals],
        "copied": plan.copied,
        "bytes": plan.bytes,
        "inexact": plan.inexact,
    }


def verification_json(result: Verification) -> dict:
    return {
        "schema": SCHEMA,
        "ok": result.ok,
        "checked": result.checked,
        "bytes": result.bytes,
        "differences": [asdict(difference) for difference in result.differences],
        "notes": list(result.notes),
    }


def inspection_json(found: Inspection) -> dict:
    groups, refusals = found.decisions[found.consumer]
    return {
        "schema": SCHEMA,
        "source": str(found.checkpoint.root),
        "container": found.checkpoint.container,
        "architecture": found.checkpoint.architecture,
        "files": len(found.checkpoint.files),
        "tensors": len(found.checkpoint.tensors),
        "consumer": found.consumer,
        "fused_for": found.fused_for,
        "fused": [
            {"group": m.group, "layer": m.layer, "fused": m.name, "layout": m.layout}
            for m in found.fused
        ],
        "groups": [_group_json(group) for group in groups],
        "refusals": [asdict(refusal) for refusal in refusals],
        "needs": found.needs(found.consumer),
        "consumers": {
            name: {"fuse": len(fuse), "refused": len(refused), "needs": found.needs(name)}
            for name, (fuse, refused) in found.decisions.items()
        },
    }


def plan_text(plan: Plan, verb: str, seconds: float | None = None) -> RenderableType:
    """What was done, what was left and why."""
    lines = [Text(printable(f"{plan.checkpoint.root.name}: {verb} {_counts(plan)}"))]
    if plan.refusals:
        lines.append(refusal_table(plan.refusals))
    rate = f" in {seconds:.1f} s ({_size(plan.bytes / max(seconds, 1e-9))}/s)" if seconds else ""
    lines.append(Text(f"{plan.copied} tensors unchanged, {_size(plan.bytes)}{rate}"))
    if plan.inexact and plan.restored:
        lines.append(Text(printable(f"Not the original's bytes: {plan.inexact}")))
    elif plan.inexact:
        reason = printable(plan.inexact)
        lines.append(Text(f"Un-fusing will restore tensors, not every byte: {reason}"))
    if plan.consumer == "llama.cpp" and plan.groups:
        lines.append(
            Text(
                f"Needs llama.cpp b{plan.needs} or newer. LoRA adapters for the separate tensors "
                "do not apply to it; -ot and imatrix patterns use the new names."
            )
        )
    return Stack(*lines)


def _counts(plan: Plan) -> str:
    if plan.restored:
        return f"{sum(len(e.parts) for e in plan.restored)} tensors from {len(plan.restored)}"
    counts = {name: sum(g.group == name for g in plan.groups) for name in GROUPS}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def refusal_table(refusals: Iterable[Refusal]) -> Table:
    """One row for each group and reason, the layers it holds for."""
    table = Table("group", "layers", "left because", box=None, padding=(0, 2), title_justify="left")
    rows: dict[tuple[str, str, str], list[int | None]] = {}
    for refusal in refusals:
        key = refusal.group, refusal.reason, refusal.detail
        rows.setdefault(key, []).append(refusal.layer)
    for group, reason, detail in rows:
        layers = ranges(rows[group, reason, detail])
        table.add_row(group, layers, Text(printable(f"{reason}: {detail}")))
    return table


def ranges(layers: Iterable[int | None]) -> str:
    """`0–3, 7` for 0, 1, 2, 3, 7."""
    numbers = sorted({layer for layer in layers if layer is not None})
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        runs.append(str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}")
    return ", ".join(runs) or "–"


def verification_text(result: Verification) -> RenderableType:
    size = _size(result.bytes)
    lines: list[RenderableType] = []
    if result.ok:
        lines.append(Text(f"Equal: {result.checked} tensors, {size}, and all metadata."))
    else:
        table = Table("where", "offset", "difference", box=None, padding=(0, 2))
        for d in result.differences[:SHOWN]:
            offset = "" if d.offset is None else str(d.offset)
            table.add_row(Text(printable(d.tensor)), offset, Text(printable(d.detail)))
        lines += [table, Text(f"Different: {len(result.differences)} differences in {size}.")]
    return Stack(*lines, *(Text(printable(note)) for note in result.notes))


def inspection_text(found: Inspection) -> RenderableType:
    checkpoint = found.checkpoint
    groups, refusals = found.decisions[found.consumer]
    files = f", {len(checkpoint.files)} files" if len(checkpoint.files) > 1 else ""
    head = f"{checkpoint.root.name}: {checkpoint.architecture or 'no architecture'}, "
    head += f"{len(checkpoint.tensors)} tensors{files}"
    if found.fused_for:
        head += f", fused by fuseweights for {found.fused_for}"
    parts: list[RenderableType] = [Text(printable(head))]
    picture = _picture(found.fused, groups, refusals)
    if picture.rows:
        key = f"{FUSED} fused   {WILL_FUSE} will fuse for {found.consumer}   {REFUSED} refused"
        parts += [picture, Text(key)]
    if refusals:
        parts.append(refusal_table(refusals))
    parts.append(_consumer_table(found))
    return Stack(*parts)


def _picture(
    fused: Sequence[FusedModule],
    groups: Sequence[Group],
    refusals: Sequence[Refusal],
) -> Table:
    """Layers × groups; neighbouring layers that look the same share a row."""
    cells: dict[int | None, dict[str, str]] = {}
    for sign, found in (
        (FUSED, [(module.group, module.layer) for module in fused]),
        (WILL_FUSE, [(g.group, g.layer) for g in groups]),
        (REFUSED, [(r.group, r.layer) for r in refusals]),
    ):
        for group, layer in found:
            cells.setdefault(layer, {})[group] = sign
    columns = [name for name in GROUPS if any(name in row for row in cells.values())]
    table = Table("layer", *columns, box=None, padding=(0, 2))
    ordered = sorted(cells, key=lambda layer: -1 if layer is None else layer)
    for row, layers in groupby(ordered, key=lambda layer: tuple(map(cells[layer].get, columns))):
        table.add_row(ranges(layers), *(sign or "" for sign in row))
    return table


def _consumer_table(found: Inspection) -> Table:
    table = Table("consumer", "fuses", "leaves", "needs", box=None, padding=(0, 2))
    for name, (groups, refusals) in found.decisions.items():
        build = found.needs(name)
        needs = f"b{build} or newer" if build else "–"
        table.add_row(name, str(len(groups)), str(len(refusals)), needs)
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
