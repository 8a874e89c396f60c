"""Fuse the projections of a loaded transformers model in place, and take it back.

No forward is rewritten. Parts that share an input become `Section`s: modules without parameters
that return their columns of one product, computed once by the fused `nn.Linear` beside them. So it
works for every architecture that the rules know, under autograd, torch.compile and torch.export,
and a quantizer or LoRA may replace the fused layer like any other.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import layer_of
from ..planner import Refusal
from ..rules.families import ATTENTION, FAMILIES, MLP
from ..rules.groups import Rule

# Where transformers' modules are not called what the disk calls them: the rules for the modules,
# and fused names, on disk and in the model.
_VIT = tuple(f"attention.{part}_proj" for part in "qkv")
MODULES = {"vit": (Rule("qkv", _VIT, "attention.qkv_proj"),)}
DISK_NAMES = {"vit": ((r"attention\.attention\.qkv_proj", r"attention\.qkv_proj"),)}


# .fused: whether a model is being loaded whose layers were fused as they were constructed. The
# sections take it back when the model is whole: transformers ends loading with `model.eval()`.
CONSTRUCTED = threading.local()


@dataclass(frozen=True, slots=True)
class Patched:
    """A fused group: the fused module's path, its parts' paths and their output sizes."""

    group: str
    layer: int | None
    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What is fused in a model now, what was left alone and why, and whether numbers changed."""

    fused: tuple[Patched, ...]
    left: tuple[Refusal, ...]
    note: str | None = None


class Product:
    """One fused layer's output for one input, from the first section's call to the last one's.

    The owner (the module that holds the fused layer by `name`) is looked up at every call, so that
    whatever replaces the layer is used; it is held weakly, so that a model dies when it is let go.
    """

    def __init__(self, owner: nn.Module, rule: Rule, sizes: Sequence[int], linears: Sequence):
        self._owner = weakref.ref(owner)
        self.rule = rule
        self.name = rule.fused.rpartition(".")[2]
        self.sizes = tuple(sizes)
        self.linears = list(linears)  # the parts themselves, emptied, for un-patching
        self.kept: tuple[Tensor, Tensor, int] | None = None

    def owner(self) -> nn.Module:
        owner = self._owner()
        if owner is None:
            raise RuntimeError(f"the module that held {self.name} is gone: copy or keep it whole")
        return owner

    def fused(self) -> nn.Module:
        return getattr(self.owner(), self.name)

    def take(self, x: Tensor, begin: int, end: int) -> Tensor:
        kept = self.kept  # one read: another thread may put its own there
        if kept is None or kept[0] is not x:
            kept = (x, self.fused()(x), len(self.sizes))
        left = kept[2] - 1
        self.kept = (x, kept[1], left) if left else None
        return kept[1][..., begin:end]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": self._owner(), "kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _owner=weakref.ref(state["_owner"]))


class Section(nn.Module):
    """Rows `begin` to `end` of a fused layer, standing where that part stood."""

    def __init__(self, product: Product, begin: int, end: int):
        super().__init__()
        self.product, self.begin, self.end = product, begin, end

    def forward(self, x: Tensor) -> Tensor:
        return self.product.take(x, self.begin, self.end)

    def train(self, mode: bool = True) -> Section:
        CONSTRUCTED.fused = False
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        return self._of(self.product.fused().weight)

    @property
    def bias(self) -> Tensor | None:
        bias = self.product.fused().bias
        return None if bias is None else self._of(bias)

    def _of(self, whole: Tensor) -> Tensor:
        rows = whole[self.begin : self.end]
        # transformers initializes whatever has not this mark, through attributes like these
        rows._is_hf_initialized = getattr(whole, "_is_hf_initialized", False)
        return rows

    @property
    def in_features(self) -> int:
        return self.product.fused().in_features

    @property
    def out_features(self) -> int:
        return self.end - self.begin

    def extra_repr(self) -> str:
        return f"{self.product.name}[{self.begin}:{self.end}]"


def patch_model(model: nn.Module, *, cpu_int8: bool = False) -> PatchReport:
    """Fuse every group of `model` that the rules of its architecture name and that stacks exactly.

    The parts' storage is freed as it is copied. Gradients that the parts hold are dropped. Calling
    it again changes nothing. `cpu_int8` also gives linear layers a packed INT8 path for decoding
    on a CPU: it changes numbers, and the report's `note` says so.
    """
    family = family_of(model)
    shared = _shared_storages(model)
    left: list[Refusal] = []
    for name, module in list(model.named_modules()):
        left += fuse_layer(module, family, name, shared)
    _convert_back_when_saved(model)
    note = None
    if cpu_int8:
        from .cpu_int8 import pack_model

        note = pack_model(model)
    return PatchReport(tuple(fused_in(model)), tuple(left), note)


def unpatch_model(model: nn.Module) -> PatchReport:
    """Give `model` its own layers and tensors back; a fused layer that something else has replaced
    or wrapped meanwhile is left, with the reason."""
    from .cpu_int8 import unpack_model

    unpack_model(model)
    left = [_unfuse(product, name) for name, product in list(_products(model))]
    _convert_back_when_saved(model)
    return PatchReport(tuple(fused_in(model)), tuple(filter(None, left)))


def fused_in(model: nn.Module) -> Iterator[Patched]:
    """Every fused group of `model`."""
    for name, product in _products(model):
        path = name.rpartition(".")[0]
        parts = tuple(_join(path, part.rpartition(".")[2]) for part in product.rule.parts)
        fused = _join(path, product.name)
        yield Patched(product.rule.group, layer_of(fused), fused, parts, product.sizes)


def family_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def rules_of(family: str) -> tuple[Rule, ...]:
    """The rules for a family's modules; stacked experts are the model's own form already."""
    rules = MODULES.get(family) or FAMILIES.get(family, (ATTENTION, MLP))
    return tuple(rule for rule in rules if not rule.per_expert)


def fuse_layer(
    layer: nn.Module,
    family: str,
    name: str = "",
    shared: frozenset[int] = frozenset(),
    skip: Collection[str] = (),
) -> list[Refusal]:
    """Fuse the groups whose paths start at `layer`, but for the fused paths in `skip`; what could
    not be fused, and why."""
    left = []
    rules, taken = rules_of(family), set()
    for rule in rules:
        parts = [_at(layer, part) for part in rule.parts]
        if not any(isinstance(part, nn.Module) for part in parts) or taken.intersection(rule.parts):
            continue
        if all(isinstance(part, Section) for part in parts):
            taken.update(rule.parts)
            continue
        if rule.fused in skip or (rule.beside and _at(layer, rule.beside) is None):
            continue
        if family not in FAMILIES:
            reason = "unknown-architecture", f"no row says what the layers of {family!r} hold"
        else:
            reason = refusal(layer, rule, parts, shared)
        if reason is None:
            _fuse(_at(layer, rule.fused.rpartition(".")[0]), rule, parts)
            taken.update(rule.parts)
        elif not rule.instead:
            pairs = zip(rule.parts, parts, strict=True)
            names = tuple(_join(name, path) for path, part in pairs if part is not None)
            left.append(Refusal(rule.group, layer_of(name), names, *reason))
    return left


def refusal(
    layer: nn.Module, rule: Rule, parts: Sequence[Any], shared: frozenset[int] = frozenset()
) -> tuple[str, str] | None:
    """Why `parts` do not stack: a code and a sentence, None when they do."""
    for path, part in zip(rule.parts, parts, strict=True):
        if part is None:
            return "missing-part", f"{path} is missing"
        if problem := _not_plain(part):
            return problem[0], f"{path} {problem[1]}"
        if shared.intersection(map(_storage, part.parameters())):
            return "tied-weight", f"{path} shares its weight with another module"
    if _at(layer, rule.fused) is not None:
        return "name-taken", f"{rule.fused} exists beside its parts"
    facts = {
        "shape-mismatch": lambda p: p.in_features,
        "type-mismatch": lambda p: p.weight.dtype,
        "bias-mismatch": lambda p: p.bias is not None,
        "device-mismatch": lambda p: p.weight.device,
        "grad-mismatch": lambda p: [q.requires_grad for q in p.parameters()],
    }
    for code, fact in facts.items():
        if any(fact(part) != fact(parts[0]) for part in parts):
            said = ", ".join(f"{p}: {fact(m)}" for p, m in zip(rule.parts, parts, strict=True))
            return code, f"the parts differ ({said})"
    return None


def _not_plain(part: nn.Module) -> tuple[str, str] | None:
    if hasattr(part, "base_layer"):
        return "adapter", "is wrapped by an adapter: merge it first, or fuse before adding it"
    kind = type(part)
    if kind is not nn.Linear or part._parameters.keys() != {"weight", "bias"} or part._buffers:
        return (
            "format-unsupported",
            f"is a {kind.__module__}.{kind.__name__}, no plain linear layer",
        )
    if any(type(p) is not nn.Parameter or type(p.data) is not Tensor for p in part.parameters()):
        return "format-unsupported", "does not hold plain tensors"
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    if any(hooks) or part._backward_pre_hooks or "forward" in part.__dict__:
        return "hooked", "has hooks or a forward of its own"
    return None


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for segment in path.split("."):
        module = getattr(module, "_modules", {}).get(segment)
    return module


def _join(*path: str) -> str:
    return ".".join(filter(None, path))


def _storage(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _shared_storages(model: nn.Module) -> frozenset[int]:
    """Storages that more than one name in `model` uses; only for use while its tensors live."""
    uses = Counter(
        _storage(p) for _, p in model.named_parameters(remove_duplicate=False) if p.numel()
    )
    return frozenset(storage for storage, count in uses.items() if count > 1)


@torch.no_grad()
def _fuse(owner: nn.Module, rule: Rule, parts: Sequence[nn.Linear]) -> None:
    sizes = [part.out_features for part in parts]
    first = parts[0]
    like = {"device": first.weight.device, "dtype": first.weight.dtype}
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, sum(sizes), bias=first.bias is not None)
    for key in fused._parameters:
        if getattr(first, key) is None:
            continue
        whole = torch.empty(getattr(fused, key).shape, **like)
        begin = 0
        for part in parts:
            own = getattr(part, key)
            whole[begin : begin + len(own)] = own
            begin += len(own)
            own.data, own.grad = own.data.new_empty(0), None
        setattr(fused, key, nn.Parameter(whole, requires_grad=own.requires_grad))
    fused.train(first.training)
    product, begin = Product(owner, rule, sizes, parts), 0
    setattr(owner, product.name, fused)
    for path, size in zip(rule.parts, sizes, strict=True):
        setattr(owner, path.rpartition(".")[2], Section(product, begin, begin + size))
        begin += size
    _release(fused.weight)


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim: what malloc has free goes back to the system, wherever it lies."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def _release(freed: Tensor) -> None:
    """Give freed memory back to the system: its holes are rarely what the next tensor needs."""
    if freed.device.type == "cpu" and (trim := _trim()):
        trim(0)


def _products(model: nn.Module) -> Iterator[tuple[str, Product]]:
    """Every product below `model`, by the path of its first section."""
    for name, module in model.named_modules():
        if isinstance(module, Section) and module.begin == 0:
            yield name, module.product


@torch.no_grad()
def _unfuse(product: Product, name: str) -> Refusal | None:
    owner, fused = product.owner(), product.fused()
    problem = _not_plain(fused)
    path = name.rpartition(".")[0]
    if problem is not None:
        names = (_join(path, product.name),)
        return Refusal(product.rule.group, layer_of(name), names, problem[0], f"it {problem[1]}")
    begin = 0
    for part, linear in zip(product.rule.parts, product.linears, strict=True):
        end = begin + linear.out_features
        for key, whole in fused.named_parameters():
            rows, own = whole.data[begin:end].clone(), getattr(linear, key)
            if own.device == rows.device:
                own.data = rows
            else:
                setattr(linear, key, own := nn.Parameter(rows))
            own.requires_grad_(whole.requires_grad)
        linear.train(fused.training)
        setattr(owner, part.rpartition(".")[2], linear)
        begin = end
    delattr(owner, product.name)
    del fused, whole
    _release(rows)
    return None


def _convert_back_when_saved(model: nn.Module) -> None:
    """Have `save_pretrained` give the parts back, in `model` and in every model inside it."""
    from .door import set_conversions

    set_conversions(model)
