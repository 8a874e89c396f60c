"""Checkpoints whose architecture stores tensors fused by itself → the same with the parts apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..candidates import layer_of
from ..checkpoint import jsontext
from ..checkpoint.directory import CONFIG, INDEX, HFCheckpoint
from ..checkpoint.model import Tensor
from ..checkpoint.pieces import section
from ..checkpoint.safetensors import SafetensorsFile, compose
from ..manifest import Entry, Part
from ..planner import Output, Refusal
from ..rules.families import LLAMA_LIKE, NATIVE, Native
from ..rules.formats import FLOATS
from . import config
from .directory import Row, beside, plain_row

# Per part, the rows of one group of heads that belong to it: ranges, in the order they are taken.
Ranges = tuple[tuple[tuple[int, int], ...], ...]


def _number(settings: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that the configuration gives as a positive integer."""
    found = (settings.get(key) for key in keys)
    return next((value for value in found if type(value) is int and value > 0), None)


def _runs(*sizes: int) -> Ranges:
    """One range a part, one after the other."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(((end - size, end),) for size, end in zip(sizes, ends, strict=True))


def _attention(settings: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(query heads, key heads, width of a head)."""
    heads = _number(settings, "num_attention_heads", "n_head")
    hidden = _number(settings, "hidden_size", "n_embd")
    if not heads or not hidden:
        return None
    kv_heads = _number(settings, "num_key_value_heads") or heads
    if "new_decoder_architecture" in settings:  # falcon
        one = 1 if settings.get("multi_query") else heads
        many = settings["new_decoder_architecture"]
        kv_heads = (_number(settings, "num_kv_heads") or heads) if many else one
    return heads, kv_heads, _number(settings, "head_dim") or hidden // heads


def _stacked(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """[all q | all k | all v]."""
    if (found := _attention(settings)) is None:
        return None
    heads, kv_heads, width = found
    return _runs(heads * width, kv_heads * width, kv_heads * width)


def _grouped(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """Per key head: [its query heads | k | v]."""
    if (found := _attention(settings)) is None or found[0] % found[1]:
        return None
    heads, kv_heads, width = found
    return _runs(heads // kv_heads * width, width, width)


def _per_head(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """Per head: [q | k | v]."""
    found = _attention(settings)
    return found and _runs(*[found[2]] * 3)


def _halves(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    return _runs(rows // 2, rows // 2) if rows % 2 == 0 else None


def _thirds(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """[all q | all k | all v] with as many key heads as query heads."""
    return _runs(*[rows // 3] * 3) if rows % 3 == 0 else None


def _gdn(settings: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(value heads a key head, width of a key head, width of a value head)."""
    keys = _number(settings, "linear_num_key_heads")
    values = _number(settings, "linear_num_value_heads")
    key_width = _number(settings, "linear_key_head_dim")
    value_width = _number(settings, "linear_value_head_dim")
    if not keys or not values or values % keys or not key_width or not value_width:
        return None
    return values // keys, key_width, value_width


def _gdn_qkvz(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """Per key head: [q | k | its v heads | their z]."""
    if (found := _gdn(settings)) is None:
        return None
    ratio, key, value = found
    q, k, v, z = _runs(key, key, ratio * value, ratio * value)
    return (*q, *k, *v), z


def _gdn_ba(settings: Mapping[str, Any], rows: int) -> Ranges | None:
    """Per key head: [b of its value heads | a]."""
    found = _gdn(settings)
    return found and _runs(found[0], found[0])


SIZES: dict[str, Callable[[Mapping[str, Any], int], Ranges | None]] = {
    "stacked": _stacked,
    "grouped": _grouped,
    "per_head": _per_head,
    "halves": _halves,
    "thirds": _thirds,
    "gdn_qkvz": _gdn_qkvz,
    "gdn_ba": _gdn_ba,
}
LAYOUTS = {
    "stacked": "stacked",
    "thirds": "stacked",
    "halves": "stacked",
    "grouped": "interleaved per key head",
    "per_head": "interleaved per head",
    "gdn_qkvz": "interleaved per key head",
    "gdn_ba": "interleaved per key head",
}
# How many groups of heads there must be is what is left when the rows of one are known.
ONE_GROUP = frozenset({"stacked", "halves", "thirds"})


def split(
    checkpoint: HFCheckpoint,
) -> tuple[tuple[Entry, ...], tuple[Refusal, ...], dict[str, list[Row]]]:
    """(what comes apart, what does not and why, the parts by the name of the fused tensor)."""
    entries: list[Entry] = []
    refusals: list[Refusal] = []
    apart: dict[str, list[Row]] = {}
    for native in NATIVE.get(checkpoint.architecture, ()):
        for tensor in checkpoint.tensors.values():
            head, found, suffix = tensor.name.rpartition(f"{native.fused}.")
            if not found or (head and not head.endswith(".")):
                continue
            rows = _parts(checkpoint, native, tensor, head, suffix)
            if isinstance(rows, str):
                layer = layer_of(tensor.name)
                refusals.append(Refusal(native.group, layer, (tensor.name,), "unknown-sizes", rows))
                continue
            apart[tensor.name] = rows
            parts = tuple(
                Part(name, tuple(shape), tensor.file, i, shape[0])
                for i, (name, _, shape, _, _) in enumerate(rows)
            )
            entries.append(Entry(native.group, tensor.name, 0, "stack", parts))
    return tuple(entries), tuple(refusals), apart


def _parts(
    checkpoint: HFCheckpoint, native: Native, tensor: Tensor, head: str, suffix: str
) -> list[Row] | str:
    """The parts of one tensor, or why they cannot be told."""
    if tensor.dtype not in FLOATS or suffix not in ("weight", "bias"):
        return f"{suffix} of type {tensor.dtype} does not come apart by rule"
    axis = native.axis if suffix == "weight" else 0
    total = tensor.shape[axis]
    ranges = SIZES[native.sizes](checkpoint.text_config, total)
    if ranges is None:
        return "config.json does not give the sizes"
    group = max(end for part in ranges for _, end in part)
    groups = total // group if group else 0
    if groups * group != total or (native.sizes in ONE_GROUP and groups != 1):
        return f"{total} rows do not divide into groups of {group}"
    shape = tensor.shape if axis else (groups, group, *tensor.shape[1:])
    rows: list[Row] = []
    for name, part in zip(native.parts, ranges, strict=True):
        pieces = [section(tensor.place, shape, 1, begin, end) for begin, end in part]
        count = groups * sum(end - begin for begin, end in part)
        own = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
        size = tensor.size // total * count
        rows.append((f"{head}{name}.{suffix}", tensor.dtype, own, size, pieces))
    return rows


def becomes_llama(checkpoint: HFCheckpoint, refusals: Sequence[Refusal]) -> str | None:
    """Why the configuration cannot become llama's; None when it can."""
    if refusals:
        return f"{len(refusals)} tensors could not be split"
    row = LLAMA_LIKE.get(checkpoint.architecture)
    if row is None:
        return f"{checkpoint.architecture} is no llama even with its parts apart"
    rope = checkpoint.config.get("rope_parameters") or {}
    for key, allowed in row.only_if.items():
        value = checkpoint.config.get(key, rope.get(key) if isinstance(rope, dict) else None)
        if value not in allowed:
            return f"{key} is {value}, which llama does not compute"
    return None


def _llama_config(text: str) -> str:
    text = jsontext.replaced(text, ["model_type"], "llama")
    text = jsontext.replaced(text, ["architectures"], ["LlamaForCausalLM"])
    return jsontext.removed(text, "auto_map") if "auto_map" in json.loads(text) else text


def outputs(
    checkpoint: HFCheckpoint, apart: Mapping[str, list[Row]], as_llama: bool
) -> tuple[Output, ...]:
    """The files with the parts where the fused tensors stood."""
    weights, files = [], []
    for file in checkpoint.files:
        assert isinstance(file, SafetensorsFile)
        rows = [row for t in file.tensors for row in apart.get(t.name, [plain_row(t)])]
        weights.append(Output(file.path.name, tuple(compose(rows, file.metadata))))
        files.append((file.path.name, [(name, size) for name, _, _, size, _ in rows]))
    texts = {}
    if INDEX in checkpoint.texts:
        texts[INDEX] = config.new_index(checkpoint, files, 0)
    if CONFIG in checkpoint.texts and as_llama:
        texts[CONFIG] = _llama_config(checkpoint.texts[CONFIG])
    return (*weights, *beside(checkpoint, texts))
