"""Hugging Face directories: headers, index, configuration and every other file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoint.directory import CONFIG, INDEX, HFCheckpoint
from ..checkpoint.model import Checkpoint, SourceFile
from ..checkpoint.pieces import Sources
from ..checkpoint.safetensors import SafetensorsFile
from ..manifest import KEY, Manifest, Origin
from .results import Difference, Section

BLOCK = 1 << 18
FUSION = "fusion_config"
# Where fusing adds entries to an object, and to lists of module names.
GROWING_OBJECTS = re.compile(r"(^|/)(config_groups|dynamic|quantized_layers)$")
GROWING_LISTS = re.compile(
    r"(^|/)(modules_to_not_convert|ignored_layers|ignore|llm_int8_skip_modules|skip_modules|exclude_modules"
    r"|config_groups/[^/]+/targets)$"
)


def metadata(
    source: Checkpoint,
    fused: Checkpoint,
    manifest: Manifest | None,
    made: Mapping[str, list[Section]],
) -> Iterator[Difference]:
    """Everything that is not a tensor's bytes must be the source's, but for what fusing adds."""
    assert isinstance(source, HFCheckpoint) and isinstance(fused, HFCheckpoint)
    files = {file.path.name: file for file in fused.files}
    for a in source.files:
        b = fused.files[0] if fused.bare else files.pop(a.path.name, None)
        if b is None and all(
            any(part.part.name == t.name for parts in made.values() for part in parts)
            for t in _tensors(a)
        ):
            continue  # all its tensors moved into others
        if not isinstance(a, SafetensorsFile) or not isinstance(b, SafetensorsFile):
            yield Difference(a.path.name, None, "the file is missing")
            continue
        ours = {KEY} if manifest is not None and b is fused.files[0] else set()
        rest = {k: v for k, v in (b.metadata or {}).items() if k not in ours}
        if rest != dict(a.metadata or {}):
            yield Difference(a.path.name, None, "__metadata__ differs")
    if not fused.bare:
        for name, tensor in fused.tensors.items():
            first = made[name][0].part if name in made else source.tensors.get(name, tensor)
            home = source.files[first.file].path.name
            if fused.files[tensor.file].path.name != home:
                yield Difference(name, None, f"is not in {home}, where it or its first part was")
        for name in files:
            yield Difference(name, None, "the source has no such file")
        yield from _texts(source, fused, manifest, made)
        yield from _extras(source, fused)


def _tensors(file: SourceFile) -> tuple:
    return file.tensors if isinstance(file, SafetensorsFile) else ()


def _texts(
    source: HFCheckpoint,
    fused: HFCheckpoint,
    manifest: Manifest | None,
    made: Mapping[str, list[Section]],
) -> Iterator[Difference]:
    modules = {name.rpartition(".")[0] for name in made} | set(made)
    for name in sorted(source.texts.keys() | fused.texts.keys()):
        a, b = source.texts.get(name), fused.texts.get(name)
        if a is None or b is None:
            yield Difference(name, None, "only one side has it")
        elif name == INDEX:
            yield from _index(source.index or {}, fused.index or {}, fused)
        else:
            old, new = json.loads(a), json.loads(b)
            if name == CONFIG:
                _mark(old)
            for where in _changed(old, new, "", modules):
                yield Difference(name, None, f"{where or 'it'} differs beyond what fusing adds")
        if manifest is not None and a is not None and manifest.texts.get(name, a) != a:
            yield Difference(name, None, "the manifest records another original")
    if manifest is not None:
        for name in manifest.texts.keys() - source.texts.keys():
            yield Difference(name, None, "the manifest records a file that the source lacks")


def _mark(config: dict[str, Any]) -> None:
    """Give a model's configuration, and those it nests, the mark that fusing gives them."""
    for key, inner in config.items():
        if key.endswith("_config") and isinstance(inner, dict) and "model_type" in inner:
            _mark(inner)
    config[FUSION] = {**(config.get(FUSION) or {}), "fuseweights": True}


def _index(a: Mapping[str, Any], b: Mapping[str, Any], fused: HFCheckpoint) -> Iterator[Difference]:
    """The reader has checked weight_map against the files: what is left is the metadata."""
    total = sum(tensor.size for tensor in fused.tensors.values())
    old, new = (
        dict(side["metadata"]) if isinstance(side.get("metadata"), dict) else {} for side in (a, b)
    )
    if new.pop("total_size", None) != total:
        yield Difference(INDEX, None, f"total_size is not {total}, the size of all tensors")
    old.pop("total_size", None)
    for key in ("total_parameters",):  # fewer by the companions that are kept once
        if type(old.get(key)) is int and type(new.get(key)) is int and new[key] <= old[key]:
            del old[key], new[key]
    others = [{k: v for k, v in side.items() if k != "metadata"} for side in (a, b)]
    if old != new or others[0] != others[1]:
        yield Difference(INDEX, None, "its metadata differs")


def _changed(a: Any, b: Any, path: str, modules: Collection[str]) -> Iterator[str]:
    """Paths at which `b` is not `a` with only fused names added where names are listed."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a:
            inner = f"{path}/{key}" if path else key
            if key not in b:
                yield inner
            else:
                yield from _changed(a[key], b[key], inner, modules)
        added = b.keys() - a.keys()
        if added and not GROWING_OBJECTS.search(path):
            yield path
    elif isinstance(a, list) and isinstance(b, list) and GROWING_LISTS.search(path):
        if b[: len(a)] != a or not set(b[len(a) :]) <= set(modules):
            yield path
    elif json.dumps(a) != json.dumps(b):  # also for NaN, which is not equal to itself
        yield path


def _extras(source: HFCheckpoint, fused: HFCheckpoint) -> Iterator[Difference]:
    a, b = dict(source.extras), dict(fused.extras)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield Difference(name, None, "only one side has it")
        elif a[name].size != b[name].size or not _equal(a[name], b[name]):
            yield Difference(name, None, "the file differs")


def _equal(a: SourceFile, b: SourceFile) -> bool:
    with Sources([a.path, b.path]) as sources:
        for at in range(0, a.size, BLOCK):
            size = min(BLOCK, a.size - at)
            if sources.read(0, at, size) != sources.read(1, at, size):
                return False
    return True


def origin(file: SafetensorsFile, recorded: Origin) -> Iterator[Difference]:
    """What the manifest says of a source file's name and header."""
    whole = file.header + " " * (file.data_start - 8 - len(file.header.encode()))
    if recorded.header not in (None, whole) or (recorded.header is None and not file.usual):
        yield Difference(file.path.name, None, "the manifest records another header")
    if recorded.name != file.path.name:
        yield Difference(file.path.name, None, f"the manifest calls it {recorded.name}")
