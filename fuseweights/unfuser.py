"""fused checkpoint → plan of the original: by its manifest, or by rule where another tool fused.

By rule, sizes come from the file's own metadata, and a fused tensor whose sizes cannot be told for
certain is left alone with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from .candidates import layer_of
from .checkpoint.directory import HFCheckpoint
from .checkpoint.gguf import read_array
from .checkpoint.model import Checkpoint, Tensor
from .errors import RefusedError, UsageError
from .layout import layout_of, native, read_manifest
from .manifest import Entry, Manifest, Part
from .planner import Plan, Refusal
from .rules import consumers, gguf
from .rules.families import NATIVE
from .rules.groups import Loads, Rule


def plan_unfuse(checkpoint: Checkpoint, as_llama: bool = False) -> Plan:
    """Everything that un-fusing will write. Raises RefusedError when nothing is fused.

    `as_llama` splits what the architecture itself stores fused, under llama's names.
    """
    manifest = read_manifest(checkpoint)
    if as_llama:
        return _plan_native(checkpoint, manifest)
    if manifest is not None:
        entries, refusals = manifest.entries, ()
        inexact = next((file.inexact for file in manifest.files if file.inexact), None)
    else:
        entries, refusals = _by_rule(checkpoint)
        inexact = "it has no manifest, so the order of the original file is not known"
    if not entries:
        raise RefusedError(
            f"{checkpoint.root}: nothing to un-fuse",
            hint="`fuseweights inspect` shows what is fused and why the rest is left alone.",
            refusals=refusals,
        )
    outputs = layout_of(checkpoint).unfuse(checkpoint, entries, manifest)
    copied = len(checkpoint.tensors) - len(entries)
    return Plan(None, checkpoint, (), refusals, copied, None, inexact, outputs, entries)


def _plan_native(checkpoint: Checkpoint, manifest: Manifest | None) -> Plan:
    if not isinstance(checkpoint, HFCheckpoint) or manifest is not None:
        why = "is a GGUF" if manifest is None else "was fused by fuseweights: un-fuse it as it was"
        raise UsageError(
            f"{checkpoint.root}: {why}", hint="--as is for directories that their makers fused."
        )
    entries, refusals, apart = native.split(checkpoint)
    if not entries:
        raise RefusedError(
            f"{checkpoint.root}: {checkpoint.architecture or 'it'} stores nothing fused by itself",
            hint=f"Known are {', '.join(NATIVE)}.",
            refusals=refusals,
        )
    why_not = native.becomes_llama(checkpoint, refusals)
    note = "the names are llama's now" + (
        f", the configuration is not: {why_not}" if why_not else ""
    )
    copied = len(checkpoint.tensors) - len(entries)
    written = native.outputs(checkpoint, apart, as_llama=why_not is None)
    return Plan(None, checkpoint, (), refusals, copied, None, note, written, entries)


def _by_rule(checkpoint: Checkpoint) -> tuple[tuple[Entry, ...], tuple[Refusal, ...]]:
    entries: list[Entry] = []
    refusals: list[Refusal] = []
    places = count()
    for rule, parent, layer, tensors in fused_modules(checkpoint):
        sizes = _sizes(checkpoint, rule, layer, tensors["weight"].shape)
        if isinstance(sizes, str):
            name = f"{parent}.{rule.fused}.weight"
            refusals.append(Refusal(rule.group, layer, (name,), "unknown-sizes", sizes))
            continue
        for suffix, tensor in tensors.items():
            merge = gguf.COMPANIONS[suffix].merge
            parts = tuple(
                Part(
                    f"{parent}.{part}.{suffix}",
                    _part_shape(tensor, rule.axis, rows) if merge == "stack" else tensor.shape,
                    tensor.file,
                    next(places),
                    rows if merge == "stack" else (tensor.shape or (1,))[0],
                )
                for part, rows in zip(rule.parts, sizes, strict=True)
            )
            entries.append(Entry(rule.group, tensor.name, rule.axis, merge, parts))
    return tuple(entries), tuple(refusals)


@dataclass(frozen=True, slots=True)
class FusedModule:
    """Something that is fused already. `layout`: "stacked", or how its maker interleaved it."""

    group: str
    layer: int | None
    name: str
    layout: str = "stacked"


def fused_groups(checkpoint: Checkpoint, manifest: Manifest | None) -> tuple[FusedModule, ...]:
    """Everything that is fused already: by us, by another tool, or by the architecture itself."""
    if manifest is not None:
        found: dict[tuple[str, int | None], FusedModule] = {}
        for entry in manifest.entries:  # the weight comes first, companions follow
            key = entry.group, layer_of(entry.name)
            found.setdefault(key, FusedModule(*key, entry.name))
        return tuple(found.values())
    if isinstance(checkpoint, HFCheckpoint):
        return tuple(
            FusedModule(row.group, layer_of(name), name, native.LAYOUTS[row.sizes])
            for row in NATIVE.get(checkpoint.architecture, ())
            for name in checkpoint.tensors
            if name.endswith(f".{row.fused}.weight")
        )
    return tuple(
        FusedModule(rule.group, layer, tensors["weight"].name)
        for rule, _, layer, tensors in fused_modules(checkpoint)
    )


def _part_shape(tensor: Tensor, axis: int, rows: int) -> tuple[int, ...]:
    return (*tensor.shape[:axis], rows, *tensor.shape[axis + 1 :])


def fused_modules(
    checkpoint: Checkpoint,
) -> Iterator[tuple[Rule, str, int, dict[str, Tensor]]]:
    """(rule, parent, layer, tensors by suffix) of every fused module that a consumer also loads
    apart, so whose parts have names."""
    if checkpoint.container != "gguf":
        return
    for rule in gguf.RULES:
        row = consumers.loads("llama.cpp", "gguf", checkpoint.architecture, rule.group)
        ours = rule.fused in gguf.OURS
        if not (ours or isinstance(row, Loads)):
            continue
        for name, tensor in checkpoint.tensors.items():
            parent, _, suffix = name.rpartition(f".{rule.fused}.")
            if suffix != "weight" or not parent.startswith("blk."):
                continue
            if f"{parent}.{rule.not_beside}.weight" in checkpoint.tensors:
                continue
            tensors = {
                s: checkpoint.tensors[f"{parent}.{rule.fused}.{s}"]
                for s in gguf.COMPANIONS
                if f"{parent}.{rule.fused}.{s}" in checkpoint.tensors
            }
            yield rule, parent, int(parent.removeprefix("blk.")), {"weight": tensor, **tensors}


def _sizes(
    checkpoint: Checkpoint, rule: Rule, layer: int, shape: tuple[int, ...]
) -> tuple[int, ...] | str:
    """Rows of each part of a fused tensor, or why they cannot be told."""
    rows = shape[rule.axis]
    if rule.group in ("gate_up", "experts", "shared_gate_up"):
        return (rows // 2, rows // 2) if rows % 2 == 0 else f"{rows} rows do not halve"
    if rule.group != "qkv":
        return "only a manifest can tell the sizes of this group"
    found = {s for s in _attention_sizes(checkpoint, layer) if sum(s) == rows}
    if len(found) != 1:
        return f"head counts and widths in the metadata do not tell how {rows} rows divide"
    return found.pop()


def _attention_sizes(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[int, int, int]]:
    """Rows of q, k and v by each pair of head widths that the metadata gives."""
    file, arch = checkpoint.files[0], checkpoint.architecture

    def number(key: str) -> int | None:
        value = file.get(f"{arch}.{key}")
        if value is None and (values := read_array(file, f"{arch}.{key}")):
            value = values[layer] if layer < len(values) else None
        return value if isinstance(value, int) else None

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    width = number("embedding_length")
    if not heads or not kv_heads:
        return
    gated = 2 if arch in gguf.GATED_QUERY else 1
    for kind in ("", "_swa"):
        key = number(f"attention.key_length{kind}") or (None if kind else width and width // heads)
        value = number(f"attention.value_length{kind}") or key
        if key and value:
            yield gated * heads * key, kv_heads * key, kv_heads * value
