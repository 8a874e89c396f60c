"""The JSON files beside the tensors, after fusing: edited in place, nothing else touched.

Lists that name modules keep their entries and gain the fused names, because some engines look at
a fused layer's own name and others at its parts'. What is unquantized is told from the tensors
themselves, so no pattern has to be understood to keep it so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from ..checkpoint import jsontext
from ..checkpoint.directory import CONFIG, CONFIGS, HFCheckpoint
from ..errors import CorruptError
from ..planner import Group
from ..rules.formats import FLOATS

FUSION = "fusion_config"
OURS = "fuseweights"
# Lists of modules that stay unquantized, wherever a quantization's configuration may keep them.
IGNORED = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "llm_int8_skip_modules",
    "skip_modules",
    "exclude_modules",
)


def module_of(group: Group) -> str:
    """The fused module's path: the weight's name without what names the tensor."""
    name = group.tensors[0].name
    head, _, last = name.rpartition(".")
    return head if last in ("weight", "weight_packed", "qweight") else name


def part_modules(group: Group) -> list[str]:
    return [part.name.rpartition(".")[0] for part in group.tensors[0].parts]


def edited(checkpoint: HFCheckpoint, groups: Sequence[Group]) -> dict[str, str]:
    """New contents of every JSON file that must change; the index apart."""
    texts = {name: text for name, text in checkpoint.texts.items() if name in CONFIGS}
    for name, text in texts.items():
        try:
            for path in _quantizations(json.loads(text), name):
                text = _with_names(text, path, groups)
                text = _with_expanded(text, path, groups)
            texts[name] = _with_fusion(text) if name == CONFIG else text
        except (TypeError, ValueError, LookupError, AttributeError, re.error) as error:
            where = checkpoint.root / name
            raise CorruptError(f"{where}: its configuration is malformed: {error}") from error
    return {name: text for name, text in texts.items() if text != checkpoint.texts[name]}


def _with_fusion(text: str) -> str:
    """What tells transformers that this is for `import fuseweights`, not for its own loading: in
    every model's configuration, because a part of a vision-language model can be loaded alone."""
    for path in model_configs(json.loads(text)):
        whole = _at(text, path)
        present = whole.get(FUSION)
        if isinstance(present, dict):
            new = [] if OURS in present else [True]
            text = jsontext.added(text, [*path, FUSION], new, [OURS] * len(new))
        elif present is not None:
            raise ValueError(f"{FUSION} is {present!r}, expected an object")
        elif FUSION in whole:
            text = jsontext.replaced(text, [*path, FUSION], {OURS: True})
        else:
            text = jsontext.added(text, path, [{OURS: True}], [FUSION])
    return text


def model_configs(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """Paths of a model's configuration and of those that it nests."""
    yield []
    for key, inner in config.items():
        if key.endswith("_config") and isinstance(inner, dict) and "model_type" in inner:
            for path in model_configs(inner):
                yield [key, *path]


def _quantizations(content: Mapping[str, Any], name: str) -> list[list[str]]:
    """Paths of the quantization configurations in one file."""
    if name != CONFIG:
        return [["quantization"]] if isinstance(content.get("quantization"), dict) else [[]]
    keys = ("quantization_config", "compression_config")
    found = [[key] for key in keys if isinstance(content.get(key), dict)]
    inner = content.get("text_config")
    if isinstance(inner, dict):
        found += [["text_config", key] for key in keys if isinstance(inner.get(key), dict)]
    return found


def _at(text: str, path: Sequence[str]) -> Any:
    try:
        begin, end = jsontext.locate(text, path)
    except KeyError:
        return None
    return json.loads(text[begin:end])


def _with_names(text: str, path: list[str], groups: Sequence[Group]) -> str:
    plain = [module_of(g) for g in groups if g.tensors[0].dtype in FLOATS]
    for key in IGNORED:
        listed = _at(text, [*path, key])
        if isinstance(listed, list) and listed:
            text = jsontext.added(text, [*path, key], [m for m in plain if m not in listed])
    quantized = [g for g in groups if g.tensors[0].dtype not in FLOATS]
    config_groups = _at(text, [*path, "config_groups"])
    for name, scheme in config_groups.items() if isinstance(config_groups, dict) else ():
        names = list(_targeted(scheme.get("targets") or [], quantized))
        text = jsontext.added(text, [*path, "config_groups", name, "targets"], names)
    for key in ("dynamic", "quantized_layers"):
        rules = _at(text, [*path, key])
        if isinstance(rules, dict) and rules:
            new = dict((_renamed if key == "dynamic" else _moved)(rules, groups))
            text = jsontext.added(text, [*path, key], list(new.values()), list(new))
    return text


def _targeted(targets: list[str], groups: Sequence[Group]) -> Iterator[str]:
    """Fused modules whose parts these targets name, but which they would no longer match."""
    for group in groups:
        parts = part_modules(group)
        if all(_names(targets, m) for m in parts) and not _names(targets, module_of(group)):
            yield module_of(group)


def _renamed(rules: Mapping[str, Any], groups: Sequence[Group]) -> Iterator[tuple[str, Any]]:
    """The first pattern that matches a group's parts, again for the fused name."""
    for group in groups:
        fused, first = module_of(group), part_modules(group)[0]
        for rule, value in rules.items():
            sign = rule[:2] if rule[:2] in ("-:", "+:") else ""
            pattern = rule.removeprefix(sign)
            if not _match(pattern, first):
                continue
            new = f"{sign}{re.escape(fused)}$"
            if new not in rules and not _match(pattern, fused):
                yield new, value
            break


def _moved(layers: Mapping[str, Any], groups: Sequence[Group]) -> Iterator[tuple[str, Any]]:
    """What is said of a group's parts by name, for the fused name."""
    for group in groups:
        first, fused = part_modules(group)[0], module_of(group)
        if first in layers and fused not in layers:
            yield fused, layers[first]


def _match(pattern: str, module: str) -> bool:
    """`re.match`, but for patterns that may take forever: those that repeat a group."""
    if re.search(r"\)[*+{]", pattern):
        raise ValueError(f"pattern {pattern!r} repeats a group, which could take forever")
    return re.match(pattern, module) is not None


def _with_expanded(text: str, path: list[str], groups: Sequence[Group]) -> str:
    """Config groups of their own for layers whose scale is now one a row."""
    expanded = [g for g in groups if any(t.merge == "expand" for t in g.tensors)]
    schemes = _at(text, [*path, "config_groups"])
    if not expanded or not isinstance(schemes, dict):
        return text
    modules: dict[str, list[str]] = {}
    for group in expanded:
        modules.setdefault(_scheme_of(part_modules(group)[0], schemes), []).append(module_of(group))
    taken = set(schemes)
    for name, targets in modules.items():
        weights = {**schemes[name]["weights"], "strategy": "channel"}
        new = {**schemes[name], "targets": targets, "weights": weights}
        key = next(k for i in range(len(taken) + 1) if (k := f"group_{i}") not in taken)
        taken.add(key)
        text = jsontext.added(text, [*path, "config_groups"], [new], [key])
    return text


def _scheme_of(module: str, schemes: Mapping[str, Any]) -> str:
    """The config group of a module: one that names it, else one that names its class."""
    named = (name for name, s in schemes.items() if _names(s.get("targets") or [], module))
    by_class = (n for n, s in schemes.items() if "Linear" in (s.get("targets") or []))
    found = next(named, None) or next(by_class, None)
    if found is None:
        raise ValueError(f"no config group is for {module}")
    return found


def _names(targets: Sequence[str], module: str) -> bool:
    """Whether a config group's targets name `module`, by itself or by pattern."""
    return any(_match(t[3:], module) if t.startswith("re:") else t == module for t in targets)


def index_text(weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    """An index as transformers writes it."""
    # json's indenting encoder is Python; for 100,000 names that would take most of a plan's time
    about = json.dumps(dict(metadata), indent=2, sort_keys=True).replace("\n", "\n  ")
    rows = ",\n".join(
        f"    {quoted(name)}: {quoted(file)}" for name, file in sorted(weight_map.items())
    )
    rows = f"{{\n{rows}\n  }}" if rows else "{}"
    return f'{{\n  "metadata": {about},\n  "weight_map": {rows}\n}}\n'


def new_index(
    checkpoint: HFCheckpoint, files: Iterable[tuple[str, Sequence[tuple[str, int]]]], lost: int
) -> str:
    """The index of `files`, each a name and its (tensor, bytes), `lost` elements less than now."""
    weight_map, total = {}, 0
    for name, tensors in files:
        for tensor, size in tensors:
            weight_map[tensor] = name
            total += size
    index = {k: v for k, v in (checkpoint.index or {}).items() if k != "weight_map"}
    metadata = index.pop("metadata", None)
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = total
    if type(metadata.get("total_parameters")) is int:
        metadata["total_parameters"] -= lost
    if index:  # entries of whoever wrote it
        whole = {**index, "metadata": metadata, "weight_map": weight_map}
        return json.dumps(whole, indent=2, sort_keys=True) + "\n"
    return index_text(weight_map, metadata)
