"""The doors into transformers: `from_pretrained` of a fused directory, and saving back.

A fused directory's config.json says `"fusion_config": {"fuseweights": true}`. transformers (5.23;
5.17 lacks a part of it) looks that name up in a registry, which is private and said to be
experimental: only `_SPEC` and `register` know it. Importing fuseweights must not import
transformers, so `install` waits for the module that holds the registry. This file therefore
imports torch and transformers nowhere but inside functions.
"""

from __future__ import annotations

import importlib.abc
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from ..rules.groups import Rule

OURS = "fuseweights"
FUSION = "fusion_config"
REGISTRY = "transformers.fusion_mapping"
# What stacks by rows when parts that are quantized are taken apart; the rest needs `unfuse`.
BY_ROWS = ("weight", "bias", "weight_scale", "weight_scale_inv")
BLOCKS = (128, 64, 32, 256)


def install() -> None:
    """Register with transformers: now if its registry is loaded, else when it will be."""
    if (module := sys.modules.get(REGISTRY)) is not None:
        register(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def register(module: ModuleType) -> None:
    """Enter our specification into the registry of `transformers.fusion_mapping`."""
    registry = getattr(module, "_FUSION_REGISTRY", None)
    if isinstance(registry, dict):
        registry.setdefault(OURS, _SPEC)
    else:
        warnings.warn(
            "this transformers keeps its fusions elsewhere: from_pretrained cannot load fused "
            "directories (`fuseweights unfuse` gives back the original)",
            stacklevel=2,
        )


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets `register` see the registry as soon as it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != REGISTRY:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


class Stack:
    """Tensors of the parts → the fused tensor, and back (`reverse_op`). Sizes come from the
    tensors, or from the model's own sections: parts need not be equal."""

    supports_many_to_many = False

    def convert(
        self,
        input_dict: dict[str, list],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        import torch

        if missing := [p for p in source_patterns if not input_dict.get(p)]:
            raise ValueError(f"{full_layer_name}: the checkpoint lacks {', '.join(missing)}")
        parts = [input_dict.pop(p)[0] for p in source_patterns]
        suffix = full_layer_name.rpartition(".")[2]
        if suffix not in ("weight", "bias") or not parts[0].dtype.is_floating_point:
            raise ValueError(
                f"{full_layer_name}: `fuseweights convert` fuses quantized layers, loading does not"
            )
        first = parts[0]
        whole = first.new_empty(sum(map(len, parts)), *first.shape[1:])
        with torch.no_grad():
            for part, rows in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                rows.copy_(part)
        return {target_patterns[0]: whole}

    @property
    def reverse_op(self) -> Unstack:
        return Unstack()


class Unstack:
    """A fused tensor → contiguous tensors of the parts. One that is none of ours keeps its name."""

    supports_many_to_many = False

    def convert(
        self,
        input_dict: dict[str, list],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        from .patch import Section

        (whole,) = next(iter(input_dict.values()))
        path, _, suffix = full_layer_name.rpartition(".")
        try:
            section = model.get_submodule(path)
        except AttributeError:
            section = None
        if not isinstance(section, Section):
            fused = (
                next(iter(input_dict)).replace("\\", "").removeprefix(BOUNDARY.replace("\\", ""))
            )
            return {full_layer_name.replace(target_patterns[0], fused): whole}
        rows = _rows(section.product.sizes, whole, suffix)
        if rows is None:
            raise ValueError(
                f"{full_layer_name}: cannot be taken apart here; save with "
                "save_original_format=False"
            )
        parts = [whole] * len(rows) if rows == () else whole.split(rows)
        pairs = zip(target_patterns, parts, strict=True)
        return {name: part.clone().contiguous() for name, part in pairs}

    @property
    def reverse_op(self) -> Stack:
        return Stack()


def _rows(sizes: tuple[int, ...], whole: Any, suffix: str) -> list[int] | None:
    """How many rows of a tensor belong to each part; None when that cannot be told."""
    if suffix not in BY_ROWS or (not whole.dtype.is_floating_point and suffix != "weight"):
        return None
    total, rows = sum(sizes), len(whole) if whole.ndim else 0
    if rows == total:
        return list(sizes)
    for block in BLOCKS if suffix.startswith("weight_scale") else ():
        blocks = [-(-size // block) for size in sizes]
        if sum(blocks) == rows and not any(size % block for size in sizes[:-1]):
            return blocks
    return None


BOUNDARY = r"(?<!\w)"


class Conversions(list):
    """What transformers registers for a model type, the last `ours` of them for fused models only.
    It keeps them for every model of that type and copies them once it has constructed one: a copy
    for a model that is not fused goes without them."""

    def __init__(self, others: Iterable, ours: Sequence):
        super().__init__([*others, *ours])
        self.ours = len(ours)

    def __radd__(self, others: list) -> Conversions:
        begin = len(self) - self.ours
        return Conversions([*others, *self[:begin]], self[begin:])

    def __deepcopy__(self, memo: dict) -> list:
        from .patch import CONSTRUCTED

        fused = getattr(CONSTRUCTED, "fused", False)
        kept = self if fused else self[: len(self) - self.ours]
        return [deepcopy(conversion, memo) for conversion in kept]


def converters(rules: Sequence[Rule]) -> list:
    """transformers' weight conversions: parts → fused when a split directory is loaded, back when
    a model is saved. They count as used so that saving gives the original format by default."""
    from transformers.core_model_loading import WeightConverter

    found = []
    for rule in rules:
        parts = [BOUNDARY + re.escape(part) for part in rule.parts]
        converter = WeightConverter(parts, BOUNDARY + re.escape(rule.fused), [Stack()])
        converter._was_used = True
        found.append(converter)
    return found


def set_conversions(model: Any, *, original: bool = False) -> None:
    """Make `save_pretrained` of `model`, and of the models inside it, write the parts. `original`
    also gives back what transformers itself stacks, even where the checkpoint had it stacked."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    from .patch import _products

    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel):
            continue
        rules = list(dict.fromkeys(product.rule for _, product in _products(inner)))
        used = getattr(inner, "_weight_conversions", None)
        if used is None and not rules:
            continue
        if used is None or original:
            usual = get_model_conversion_mapping(inner, add_legacy=False)
            if used is None:  # as transformers does
                used = [c for c in usual if not isinstance(c, PrefixChange)]
            have = {tuple(c._original_source_patterns) for c in used}
            parts = " ".join(part for rule in rules for part in rule.parts)
            used = [
                *used,
                *(
                    c
                    for c in usual
                    if tuple(c._original_source_patterns) not in have
                    and (isinstance(c, WeightConverter) or c._original_target_patterns[0] in parts)
                ),
            ]
        inner._weight_conversions = [*(c for c in used if not _is_ours(c)), *converters(rules)]


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, Stack) for op in getattr(conversion, "operations", ()))


class _Specification:
    """What transformers asks of a fusion. It fuses layers as they are constructed, so that
    quantizers and loaders meet the fused module; a layer is fused only where its configuration
    says so, because transformers keeps using the classes for every model that comes later."""

    target_modules_patterns: tuple[str, ...] = ()

    def get_empty_log(self, model_name: str) -> str:
        return f"fuseweights knows nothing to fuse in {model_name}"

    def is_fusable(self, module: Any) -> bool:
        """Whether `module` is a layer: what the paths of the rules start from."""
        from torch import nn

        from ..rules.families import FAMILIES
        from .patch import MODULES, _at

        rules = {rule for rules in (*FAMILIES.values(), *MODULES.values()) for rule in rules}
        return any(
            all(isinstance(_at(module, part), nn.Linear) for part in rule.parts) for rule in rules
        )

    def make_fused_class(self, original: type) -> type:
        """Constructs a layer, fuses it, and leaves an instance of `original`: its name and class
        are what device maps, gradient checkpointing and pickling know."""

        def __init__(layer, *args, **kwargs):
            original.__init__(layer, *args, **kwargs)
            layer.__class__ = original
            _fuse_constructed(layer, args, kwargs)

        kind = type(original)
        is_instance = {"__instancecheck__": lambda cls, thing: isinstance(thing, original)}
        fusing = type("Fusing", (kind,), is_instance)
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        return fusing(original.__name__, (original,), {"__init__": __init__, **names})

    def make_transforms(self, config: Any) -> list:
        from transformers.core_model_loading import WeightRenaming

        from .patch import DISK_NAMES, rules_of

        _anchor_names()
        skip = _mark(config)
        renamings = DISK_NAMES.get(config.model_type, ())
        ours = [WeightRenaming(*names) for names in renamings]
        if getattr(config, "quantization_config", None) is None:
            skipped = {path for path, _, _ in (entry.rpartition(":") for entry in skip)}
            ours += converters(_one_each(rules_of(config.model_type), skipped))
        _register_elsewhere(config, ours)
        return Conversions([], ours)


def _one_each(rules: Iterable[Rule], skipped: Collection[str]) -> list[Rule]:
    """A tensor may belong to one conversion only: of rules that stand in for each other the first,
    or where that is skipped what stands in for it."""
    first = [rule for rule in rules if not (rule.instead and rule.fused in skipped)]
    seconds = {group for rule in first for group in rule.instead}
    return [rule for rule in first if rule.group not in seconds]


_SPEC = _Specification()


def _anchor_names() -> None:
    """transformers searches the names of patched classes as patterns: RobertaLayer would also
    replace XLMRobertaLayer. Anchored they match themselves only."""
    from transformers.monkey_patching import (
        get_patch_mapping,
        register_patch_mapping,
        unregister_patch_mapping,
    )

    for name, replacement in get_patch_mapping().items():
        if type(replacement).__name__ == "Fusing" and name == replacement.__name__:
            unregister_patch_mapping([name])
            register_patch_mapping({f"^{name}$": replacement}, overwrite=True)


def _register_elsewhere(config: Any, ours: Sequence) -> None:
    """transformers registers conversions for the model type of the class. It does not look there
    when the configuration has another type, or when conversions are known for the class itself."""
    import transformers
    from transformers import conversion_mapping, fusion_mapping

    known = conversion_mapping.get_checkpoint_conversion_mapping
    registered = fusion_mapping._REGISTERED_FUSION_SOURCE_PATTERNS
    family = type(config).__name__.removesuffix("Config")
    known("legacy")  # builds the cache
    named = [n for n in conversion_mapping._checkpoint_conversion_mapping_cache if family in n]
    classes = {name: getattr(transformers, name, None) for name in named}
    own = {n for n, c in classes.items() if getattr(c, "config_class", None) is type(config)}
    for name in {config.model_type, *own}:
        before = registered.get((name, OURS), ())
        others = [t for t in known(name) or () if tuple(t.source_patterns) not in before]
        conversion_mapping.register_checkpoint_conversion_mapping(
            name, Conversions(others, ours), overwrite=True
        )
        # so that transformers replaces them when this is where it registers them itself
        registered[(name, OURS)] = {tuple(t.source_patterns) for t in ours}


def _mark(config: Any) -> list[str]:
    """Tell the configurations inside `config`, which layers are built from, what is to be fused,
    and what is not because the checkpoint has it otherwise: returned."""
    options: dict[str, Any] = {"family": config.model_type}
    if skip := sorted(set(_not_as_usual(config))):
        options["skip"] = skip
        getattr(config, FUSION)[OURS] = options
    for inner in _inner_configs(config):
        setattr(inner, FUSION, {OURS: options})
    return skip


def _inner_configs(config: Any) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _inner_configs(value)


def _not_as_usual(config: Any) -> Iterator[str]:
    """`path of the fused module:layer` of groups that this checkpoint has fused in other groups,
    and, when it is quantized, of those that it has not fused: they did not stack exactly."""
    from ..api import open_checkpoint
    from ..candidates import find, layer_of
    from .patch import rules_of

    directory = _directory(config)
    if directory is None:
        return
    checkpoint, rules = open_checkpoint(directory), rules_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        for candidate in find(checkpoint, "torch", rules):
            yield f"{candidate.rule.fused}:{candidate.layer}"
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    for rule in rules:
        for other in rules:
            ends = "." + other.fused
            for path in modules if other.group in rule.instead else ():
                if path.endswith(ends):
                    yield f"{rule.fused}:{layer_of(path)}"


def _directory(config: Any) -> Path | None:
    """Where the checkpoint that is being loaded lies: its directory, or the hub's cache."""
    from transformers.utils import cached_file

    from ..checkpoint.directory import INDEX, SINGLE

    name = config.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    for file in (SINGLE, INDEX):
        found = cached_file(
            name,
            file,
            revision=getattr(config, "_commit_hash", None),
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            return Path(found).parent
    return None


def _fuse_constructed(layer: Any, args: Sequence, kwargs: Mapping[str, Any]) -> None:
    from .patch import CONSTRUCTED, fuse_layer

    given = (*args, *kwargs.values())
    options = next((o for o in map(_options, given) if o), None)
    CONSTRUCTED.fused = options is not None
    if options is None:
        return
    number = next((n for n in given if type(n) is int), None)
    entries = (entry.rpartition(":") for entry in options.get("skip", ()))
    skip = {path for path, _, at in entries if number is None or at == str(number)}
    fuse_layer(layer, options["family"], skip=skip)


def _options(config: Any) -> dict[str, Any] | None:
    fusion = getattr(config, FUSION, None)
    ours = fusion.get(OURS) if isinstance(fusion, Mapping) else None
    if not ours:
        return None
    return {"family": config.model_type, **(ours if isinstance(ours, Mapping) else {})}


def save_pretrained(model: Any, directory: Any, *, fused: bool = False, **options: Any) -> None:
    """Write a transformers model, fused or not, split (what the unfused model would write, to the
    byte) or as a fused directory that `unfuse` takes back to exactly that."""
    with _as_original(model):
        if not fused:
            model.save_pretrained(directory, **options)
            return
        from ..api import convert

        target = Path(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as split:
            model.save_pretrained(split, **options)
            convert(split, target)


@contextmanager
def _as_original(model: Any) -> Iterator[None]:
    """With conversions that give back the original format, and without our entry in fusion_config,
    here and in the configurations inside."""
    key = "_weight_conversions"
    changed = [(m, key, m.__dict__[key]) for m in model.modules() if key in m.__dict__]
    set_conversions(model, original=True)
    for config in (model.config, *_inner_configs(model.config)):
        fusion = getattr(config, FUSION, None)
        if isinstance(fusion, Mapping) and OURS in fusion:
            changed.append((config, FUSION, fusion))
            if others := {name: value for name, value in fusion.items() if name != OURS}:
                setattr(config, FUSION, others)
            else:
                delattr(config, FUSION)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
